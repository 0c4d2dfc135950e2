"""LLaMA shapes by name, and the sides of the matrices that a low-rank method works on. Imports no torch.

The five large presets are those of the papers (docs/methods.md); the small ones are ours, for a CPU.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import SpecError

# The matrices of a LLaMA block, by the last part of their module name.
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# In the place of names: every linear module of the model's repeated blocks.
ALL_LINEAR = "all-linear"
# What the families of transformers call the maps to queries and keys, whose rows belong to heads.
HEAD_TARGETS = ("q_proj", "k_proj", "query", "key", "query_proj", "key_proj", "q_lin", "k_lin")


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA-like decoder. `kv_heads` below `heads` is grouped-query attention."""

    hidden: int
    ffn: int
    heads: int
    layers: int
    kv_heads: int
    head_size: int

    def target_sides(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every target matrix of one block."""
        d, q, kv = self.hidden, self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "q_proj": (q, d),
            "k_proj": (kv, d),
            "v_proj": (kv, d),
            "o_proj": (d, q),
            "gate_proj": (self.ffn, d),
            "up_proj": (self.ffn, d),
            "down_proj": (d, self.ffn),
        }


def _plain(hidden: int, ffn: int, heads: int, layers: int) -> Shape:
    return Shape(hidden, ffn, heads, layers, kv_heads=heads, head_size=hidden // heads)


PRESETS: dict[str, Shape] = {
    "llama-tiny": _plain(64, 176, 4, 2),
    "llama-1m": _plain(128, 344, 4, 5),
    "llama-9m": _plain(288, 768, 6, 9),
    "llama-60m": _plain(512, 1376, 8, 8),
    "llama-130m": _plain(768, 2048, 12, 12),
    "llama-350m": _plain(1024, 2736, 16, 24),
    "llama-1b": _plain(2048, 5461, 32, 24),
    "llama-7b": _plain(4096, 11008, 32, 32),
}


def usual_rank(preset: str | None) -> int:
    """The papers' rank for a preset, a quarter of the hidden size but for one; 128 for a model of another kind."""
    if preset is None:
        return 128
    return 256 if preset == "llama-130m" else PRESETS[preset].hidden // 4


def shape_of_directory(path: Path) -> Shape | None:
    """The shape that a Hugging Face `config.json` states, or None where it does not use LLaMA's names.

    Raises SpecError where it is not JSON.
    """
    try:
        stated = json.loads((path / "config.json").read_text())
        hidden, heads = int(stated["hidden_size"]), int(stated["num_attention_heads"])
        return Shape(
            hidden=hidden,
            ffn=int(stated["intermediate_size"]),
            heads=heads,
            layers=int(stated["num_hidden_layers"]),
            kv_heads=int(stated.get("num_key_value_heads") or heads),
            head_size=int(stated.get("head_dim") or hidden // heads),
        )
    except ValueError as error:
        raise SpecError(f"model.path: {path / 'config.json'} is not JSON: {error}") from error
    except (KeyError, TypeError):
        return None


def longest_of_directory(path: Path) -> int | None:
    """The positions that a Hugging Face `config.json` states; None where it states none. The model itself may have a
    few fewer to give (RoBERTa). Call after `shape_of_directory`, which knows whether it is JSON."""
    stated = json.loads((path / "config.json").read_text()).get("max_position_embeddings")
    return stated if isinstance(stated, int) and stated > 0 else None


def head_size_of(config: Any) -> int | None:
    """Rows of q_proj that belong to one attention head, by a Hugging Face configuration; None where it does not say."""
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if heads is None or hidden is None:
        return None
    return int(getattr(config, "head_dim", None) or hidden // heads)
