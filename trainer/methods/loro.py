"""LORO: the low-rank Riemannian optimizer (Mo, Huang and Pan 2025, ICLR, algorithm 1).

Both factors of W_eff = B A are trained, and no full-size weight exists; with a pretrained W, W_eff = W + λ·B A, the
initial λ·B A taken out of W, so that the function starts as it was.

    every K-th step (exact)    B, A ← factors of SVD_r(BA − η·T), T the tangent vector of the directions
                               then moments and count of the factors ← 0, and η is warmed up over a few steps
    other steps (`scaled`)     B ← B − η(r/d)·dB     A ← A − η(r/d)·dA      d the model's hidden size, for every layer

dB and dA are Adam's directions M̂/(√V̂ + ε) in both. Decay, where there is any, acts on both factors before the step, as
AdamW has it. Ablations of the paper: `between` unscaled or preconditioned, `exact_step` svd or none, `refresh` off.
A factor that is nearly singular is solved with damping, and counted in the switched event; so is one that is left as it
was, because its direction is no number.

Where the step is not Adam's own, the optimizer updates the moments alone (rule `moments`), and it is made here.
"""

import time

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config import TrainingSpec
from trainer.errors import SpecError
from trainer.lowrank.factored import FactoredLinear, xavier
from trainer.lowrank.linalg import wide
from trainer.lowrank.riemannian import balanced, preconditioned, retracted
from trainer.lowrank.switch import SwitchReport, initial_generator
from trainer.methodconfig import LoroConfig
from trainer.methods.base import StepContext
from trainer.methods.factors import LowRank
from trainer.modelconfig import starts_from_weights
from trainer.optimizer import direction
from trainer.zero import Shards


class Loro(LowRank):
    def __init__(self, spec: TrainingSpec) -> None:
        super().__init__(spec)
        self.hidden = 0

    @property
    def config(self) -> LoroConfig:
        assert isinstance(self.spec.method, LoroConfig)
        return self.spec.method

    @property
    def period(self) -> int:
        assert self.config.period is not None
        return self.config.period

    def look_at(self, model: nn.Module) -> None:
        hidden = getattr(getattr(model, "config", None), "hidden_size", None)
        if hidden is None:
            raise SpecError("method: loro scales its steps by r / hidden_size, and this model's configuration has none")
        self.hidden = hidden

    def make(self, linear: nn.Linear, name: str, index: int) -> FactoredLinear:
        rows, columns = linear.weight.shape
        generator = initial_generator(self.spec.optimisation.seed, index)
        b, a = xavier(rows, self.rank, generator), xavier(self.rank, columns, generator)
        # What is taken out of W is the product of the factors as they are stored, in W's own type.
        b, a = b.to(linear.weight), a.to(linear.weight)
        scale = self.config.scale
        keep = starts_from_weights(self.spec.model)
        if keep:
            with torch.no_grad():
                linear.weight.copy_(wide(linear.weight) - scale * (wide(b) @ wide(a)))
        return FactoredLinear(linear, name, b, a, scale, keep_weight=keep)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, object]]:
        factors, *others = super().parameter_groups(model)
        rate = self.rank / self.hidden if self.config.between == "scaled" else 1.0
        # Decay is rate × weight_decay, and is to be η·λ.
        return [factors | {"rate": rate, "weight_decay": self.decay / rate}, *others]

    def rate_factor(self, step: int) -> float:
        warmup = self.config.restart_warmup
        if step < self.period or not warmup or self._is_last_of_period(step):
            return 1.0
        return min(1.0, (step % self.period + 1) / warmup)

    def before_step(self, context: StepContext) -> SwitchReport | None:
        group = context.shards.group("factors")
        group["rule"] = "moments" if self._steps_itself(context.step) else "adamw"
        return None

    def after_step(self, context: StepContext) -> SwitchReport | None:
        began = time.perf_counter()
        last = self._is_last_of_period(context.step)
        damped = 0
        if self._steps_itself(context.step) or (last and self.config.exact_step == "svd"):
            damped = self._rewrite(context)
        if last and self.config.refresh:
            context.shards.forget("factors", [p for layer in self.layers for p in layer.trained()])
        return SwitchReport(time.perf_counter() - began, None, damped) if last or damped else None

    def _is_last_of_period(self, step: int) -> bool:
        return (step + 1) % self.period == 0

    def _is_exact(self, step: int) -> bool:
        return self._is_last_of_period(step) and self.config.exact_step == "riemannian"

    def _steps_itself(self, step: int) -> bool:
        """Whether the step is not Adam's own: the optimizer then updates the moments alone."""
        return self._is_exact(step) or self.config.between == "preconditioned"

    def _rewrite(self, context: StepContext) -> int:
        """Set every layer's factors to what the step makes of them; returns how many solves were damped. Collective.

        Each layer is computed by one rank, in turn, and sent to the others.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        shards, damped = context.shards, 0
        for index, layer in enumerate(self.layers):
            b, a = wide(shards.read(layer.B)), wide(shards.read(layer.A))
            directions = self._directions(layer, shards) if self._steps_itself(context.step) else None
            result = torch.cat([b.flatten(), a.flatten(), b.new_zeros(1)])
            if index % world == rank:
                new_b, new_a, was_damped = self._new_factors(context, b, a, directions)
                result = torch.cat([new_b.flatten(), new_a.flatten(), b.new_tensor([float(was_damped)])])
            dist.broadcast(result, src=index % world)
            shards.write(layer.B, result[: b.numel()].view_as(b))
            shards.write(layer.A, result[b.numel() : -1].view_as(a))
            damped += int(result[-1])
        return damped

    def _directions(self, layer: FactoredLinear, shards: Shards) -> tuple[Tensor, Tensor]:
        """dB (m, r) and dA (r, n). Collective."""
        optimisation, count = self.spec.optimisation, shards.count("factors")

        def of(factor: nn.Parameter) -> Tensor:
            first, second = (shards.read_moment(factor, key) for key in ("exp_avg", "exp_avg_sq"))
            return direction(first, second, count, optimisation.betas, optimisation.epsilon)

        return of(layer.B), of(layer.A)

    def _new_factors(
        self, context: StepContext, b: Tensor, a: Tensor, directions: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, bool]:
        """The factors after the step along `directions`, or after Adam's own where there are none.

        Where those are no numbers, or a decomposition fails, b and a stay: what the loss says decides what follows.
        """
        if not all(bool(torch.isfinite(value).all()) for value in (b, a, *(directions or ()))):
            return b, a, True
        new_b, new_a, damped = b, a, False
        try:
            if directions is not None:
                keep, rate = 1.0 - context.learning_rate * self.decay, context.learning_rate
                step = retracted if self._is_exact(context.step) else preconditioned
                new_b, new_a, damped = step(keep * b, keep * a, *directions, rate)
            if self._is_last_of_period(context.step) and self.config.exact_step == "svd":
                new_b, new_a = balanced(new_b, new_a)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # documented, not declared
            return b, a, True
        return new_b, new_a, damped
