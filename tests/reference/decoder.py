"""A small decoder in whatever type it is given, float64 too: Hugging Face's computes norms and the loss in float32.

Modules are named as in a LLaMA block; grouped-query attention; called as the product calls a model.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, HIDDEN, FFN, HEADS, KV_HEADS = 61, 32, 44, 4, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        kv = HIDDEN // HEADS * KV_HEADS
        sides = {"q": (HIDDEN, HIDDEN), "k": (HIDDEN, kv), "v": (HIDDEN, kv), "o": (HIDDEN, HIDDEN)}
        sides |= {"gate": (HIDDEN, FFN), "up": (HIDDEN, FFN), "down": (FFN, HIDDEN)}
        for name, (inputs, outputs) in sides.items():
            setattr(self, f"{name}_proj", nn.Linear(inputs, outputs, bias=name == "q"))
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norms[0](x)
        q, k, v = (self._split(projection(normed)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        normed = self.norms[1](x)
        return x + self.down_proj(functional.silu(self.gate_proj(normed)) * self.up_proj(normed))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, HIDDEN // HEADS)).transpose(1, 2)


class Decoder(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HIDDEN // HEADS
        )
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> SimpleNamespace:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)[:, :-1].flatten(0, 1)
        return SimpleNamespace(loss=functional.cross_entropy(logits, labels[:, 1:].flatten()))


def decoder(dtype: torch.dtype = torch.float64) -> Decoder:
    torch.manual_seed(0)
    return Decoder().to(dtype)
