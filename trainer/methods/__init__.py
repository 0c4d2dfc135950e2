"""Every method by its name. A test keeps these names equal to trainer.methodconfig.METHOD_CONFIGS."""

from trainer.config import TrainingSpec
from trainer.methods.base import Method
from trainer.methods.factors import Dora, Lora, LowRank, SLTrain
from trainer.methods.full import Full
from trainer.methods.galore import GaLore
from trainer.methods.galore_plus import GaLorePlus
from trainer.methods.garare import Flora, GaRare
from trainer.methods.golore import GoLore
from trainer.methods.loro import Loro
from trainer.methods.relora import Relora
from trainer.methods.sparse import GaSare, GoSare

METHODS: dict[str, type[Method]] = {
    "full": Full,
    "galore": GaLore,
    "golore": GoLore,
    "galore_plus": GaLorePlus,
    "gasare": GaSare,
    "gosare": GoSare,
    "flora": Flora,
    "garare": GaRare,
    "loro": Loro,
    "lowrank": LowRank,
    "lora": Lora,
    "dora": Dora,
    "relora": Relora,
    "sltrain": SLTrain,
}


def make_method(spec: TrainingSpec) -> Method:
    return METHODS[spec.method.name](spec)
