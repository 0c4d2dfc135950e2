"""The reference rules by name, and the factor that two methods put on η."""

from typing import Any

from tests.reference.adam import Full
from tests.reference.crosshead import GaLorePlus
from tests.reference.factors import Dora, Lora, LowRank, Relora, SLTrain
from tests.reference.loro import Loro
from tests.reference.projected import Flora, GaLore, GaRare, GoLore
from tests.reference.rule import Draws, Problem, Rule
from tests.reference.sparse import GaSare, GoSare

__all__ = ["RULES", "Draws", "Problem", "Rule", "rate_factor"]

RULES: dict[str, type[Rule]] = {
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


def rate_factor(settings: Any, step: int) -> float:
    """The factor on η of all parameters at 0-based `step`: 1/w, 2/w, … 1 after a restart; 1 at LORO's exact steps."""
    if settings.name not in ("loro", "relora") or settings.restart_warmup == 0 or step < settings.period:
        return 1.0
    if settings.name == "loro" and (step + 1) % settings.period == 0:
        return 1.0
    # LORO restarts after step K−1, ReLoRA before step τ: the first step of a new period is the same for both.
    return min(1.0, (step % settings.period + 1) / settings.restart_warmup)
