"""Settings of a method that would not do what their names say, found when a job is submitted. Imports no torch."""

from trainer import methodconfig as methods
from trainer.presets import ALL_LINEAR, Shape

# (field, what is wrong and what to do)
Problem = tuple[str, str]


def problem_of(method: methods.MethodConfig, steps: int, pretrained: bool, decay: float) -> Problem | None:
    """The first thing wrong with a resolved method in a run of `steps`; `pretrained` where weights were loaded."""
    match method:
        case methods.LowRankConfig() | methods.SLTrainConfig() if pretrained:
            return (
                "model.weights",
                f"{method.name} has no place for pretrained weights and would drop them; set weights to 'random', "
                "or choose lora, loro or galore",
            )
        case methods.LoroConfig():
            return _loro(method, steps, pretrained, decay)
        case methods.ReloraConfig():
            return _restarts("relora", method.period, method.restart_warmup, steps - 1)
        case methods.GoLoreConfig():
            return _golore(method, steps)
        case methods.GaLorePlusConfig():
            return _galore_plus(method, steps)
        case _:
            return None


def _loro(method: methods.LoroConfig, steps: int, pretrained: bool, decay: float) -> Problem | None:
    assert method.period is not None
    if method.period == 1 and method.refresh:
        return (
            "method.refresh",
            "refresh with period 1 would leave Adam nothing but the sign of each gradient; set refresh to false",
        )
    if method.scale != 1 and not pretrained:
        return (
            "method.scale",
            f"scale {method.scale:g} is λ of W + λBA, and random weights have no W beside BA; leave it out",
        )
    if pretrained and decay > 0:
        return (
            "optimisation.weight_decay",
            f"weight_decay {decay:g} would pull W + λBA towards W without its initial λBA; set it to 0",
        )
    if method.exact_step == "none":
        return None
    return _restarts("loro", method.period, method.restart_warmup, steps)


def _restarts(name: str, period: int, warmup: int, longest: int) -> Problem | None:
    """`longest`: the period at which the run has just one exact step, or restart."""
    if period > longest:
        return (
            "method.period",
            f"period {period} is too long for this run: {name} would never reach its first; choose at most {longest}",
        )
    if warmup > period:
        return (
            "method.restart_warmup",
            f"restart_warmup {warmup} is above period {period}: the learning rate would never recover; "
            f"choose at most {period}",
        )
    return None


def _golore(method: methods.GoLoreConfig, steps: int) -> Problem | None:
    first = method.first_random_step(steps)
    if method.random_fraction == 0 or -(-first // method.period) * method.period < steps:
        return None
    return (
        "method.random_fraction",
        f"the last {method.random_fraction:.0%} of {steps} steps have no switch with period {method.period}, so no "
        "subspace would be random; raise it, lower period, or choose galore",
    )


def _galore_plus(method: methods.GaLorePlusConfig, steps: int) -> Problem | None:
    if method.targets != (ALL_LINEAR,) and (strange := sorted(set(method.head_targets) - set(method.targets))):
        return (
            "method.head_targets",
            f"{strange[0]!r} is not among method.targets ({', '.join(method.targets)}); add it there, or leave it out",
        )
    if method.residual_density == 0 or not method.head_targets:
        return None
    if method.optimizer == "msgd":
        return (
            "method.optimizer",
            "msgd has no second moment, which the residual divides by; choose adamw, or set residual_density to 0",
        )
    if method.residual_warmup >= steps:
        return (
            "method.residual_warmup",
            f"residual_warmup {method.residual_warmup} is not below the run's {steps} steps: no residual would be; "
            "give a smaller one, or set residual_density to 0",
        )
    return None


def rank_problem(method: methods.MethodConfig, shape: Shape, model: str) -> str | None:
    """What is wrong with the method's rank for a model of this shape, if anything is."""
    if not isinstance(method, methods.RankedSettings) or method.rank is None:
        return None
    pinv = isinstance(method, methods.GaRareConfig) and method.back_projection == "pinv"
    for name, (rows, columns) in shape.target_sides().items():
        if not method.has_target(name):
            continue
        if method.rank > min(rows, columns):
            return (
                f"rank {method.rank} is above the smallest side of {name} in {model} ({rows}×{columns}); "
                f"choose at most {min(rows, columns)}, or leave {name} out of method.targets"
            )
        if pinv and method.rank > rows // 2:
            return pinv_problem(method.rank, f"{name} in {model}", rows)
    return None


def pinv_problem(rank: int, name: str, rows: int) -> str:
    return (
        f"rank {rank} is above half the {rows} rows of {name}: with back_projection pinv the inverse of a nearly "
        f"square Gaussian explodes; choose at most {rows // 2}, or transpose"
    )
