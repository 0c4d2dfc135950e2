"""Every method by its name. A test keeps these names equal to trainer.methodconfig.METHOD_CONFIGS."""

from trainer.config import TrainingSpec
from trainer.methods.base import Method
from trainer.methods.full import Full
from trainer.methods.galore import GaLore

METHODS: dict[str, type[Method]] = {"full": Full, "galore": GaLore}


def make_method(spec: TrainingSpec) -> Method:
    return METHODS[spec.method.name](spec)
