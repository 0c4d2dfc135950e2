"""The learning rate: linear up, cosine down."""

import pytest

from trainer.config import Optimisation
from trainer.schedule import learning_rate


def rates(**settings: float) -> list[float]:
    optimisation = Optimisation.model_validate({"steps": 10, "learning_rate": 2.0, "warmup_steps": 4} | settings)
    return [learning_rate(step, optimisation) for step in range(1, 11)]


def test_warm_up_then_cosine_to_the_floor() -> None:
    found = rates(final_rate_ratio=0.1)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert found[6] == pytest.approx(2.0 * (0.1 + 0.9 / 2))  # half way down
    assert found[-1] == pytest.approx(0.2)
    assert found[3:] == sorted(found[3:], reverse=True)


def test_without_warm_up_the_first_step_has_nearly_the_peak() -> None:
    assert rates(warmup_steps=0)[0] < 2.0
    assert rates(warmup_steps=0)[0] > 1.9


def test_all_warm_up() -> None:
    assert rates(warmup_steps=10)[-1] == pytest.approx(2.0)
