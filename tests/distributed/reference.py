"""GaLore and AdamW as the papers write them: on whole gradients, one process, no DeepSpeed, nothing of trainer.lowrank.

Zhao et al. 2024 (arXiv:2403.03507), algorithm 2, with AdamW's decoupled decay on the whole weight. The gradient is of
the mean loss over the global batch. Only the model, the data order and the learning-rate schedule are shared with the
product; the model's linear modules stay plain.
"""

import math

import torch
from torch import Tensor, nn

from trainer.config import TrainingSpec
from trainer.methodconfig import GaLoreConfig
from trainer.schedule import learning_rate


class Adam:
    """M ← β₁M + (1−β₁)G, V ← β₂V + (1−β₂)G²; returns M̂/(√V̂ + ε)."""

    def __init__(self, betas: tuple[float, float], epsilon: float) -> None:
        self.betas, self.epsilon = betas, epsilon
        self.m: Tensor | float = 0.0
        self.v: Tensor | float = 0.0
        self.t = 0

    def direction(self, gradient: Tensor) -> Tensor:
        b1, b2 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * gradient
        self.v = b2 * self.v + (1 - b2) * gradient**2
        return (self.m / (1 - b1**self.t)) / ((self.v / (1 - b2**self.t)).sqrt() + self.epsilon)


def projector(gradient: Tensor, rank: int) -> Tensor:
    """Top left singular vectors, from the eigenvectors of G Gᵀ: another route than the product's SVD."""
    values, vectors = torch.linalg.eigh(gradient.double() @ gradient.double().T)
    top = vectors[:, values.argsort(descending=True)[:rank]]
    for column in range(rank):
        if top[top[:, column].abs().argmax(), column] < 0:
            top[:, column] *= -1
    return top.float()


def train(spec: TrainingSpec, model: nn.Module, batches: list[Tensor]) -> list[float]:
    """Train `model` in place, one update a global batch; returns the losses before each update."""
    optimisation, method = spec.optimisation, spec.method
    galore = method if isinstance(method, GaLoreConfig) else None
    adams = {name: Adam(optimisation.betas, optimisation.epsilon) for name, _ in model.named_parameters()}
    projectors: dict[str, Tensor] = {}
    losses = []
    for step, tokens in enumerate(batches):
        eta = learning_rate(step + 1, optimisation)
        model.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())
        projected: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, p in model.named_parameters():
                g = p.grad
                if galore and name.split(".")[-2] in galore.targets:
                    left = p.shape[0] <= p.shape[1]
                    g = g if left else g.T
                    if step % galore.period == 0:
                        projectors[name] = projector(g, galore.rank)
                    g = projectors[name].T @ g
                projected[name] = g
            norm = math.sqrt(sum(float(g.square().sum()) for g in projected.values()))
            clip = min(1.0, optimisation.clip_norm / (norm + 1e-6)) if optimisation.clip_norm else 1.0
            for name, p in model.named_parameters():
                update = adams[name].direction(projected[name] * clip)
                if name in projectors:
                    update = galore.alpha * projectors[name] @ update
                    update = update if p.shape[0] <= p.shape[1] else update.T
                decay = optimisation.weight_decay if p.ndim >= 2 else 0.0
                p.mul_(1 - eta * decay).sub_(eta * update)
    return losses
