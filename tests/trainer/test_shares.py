"""`benchmarks.shares`: products are found, counted as torch's own counter does, and put into rows."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.shares import markdown, rows_of, shares_of


def _some_products() -> None:
    x = torch.randn(64, 48, requires_grad=True)
    y = torch.nn.functional.linear(x, torch.randn(32, 48), torch.randn(32))
    torch.bmm(y.view(4, 16, 32), torch.randn(4, 32, 8)).sum().backward()


def test_flops_are_those_of_torchs_own_counter() -> None:
    with FlopCounterMode(display=False) as counter:
        _some_products()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        _some_products()
    shares = shares_of(profiler.events())
    assert shares["flops"] == counter.get_total_flops() > 0
    assert shares["products"] > 0


def test_a_product_added_in_place_is_one() -> None:
    total = torch.zeros(32, 16)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        total.addmm_(torch.randn(32, 8), torch.randn(8, 16))
    assert shares_of(profiler.events())["flops"] == 2 * 32 * 8 * 16


def test_the_bound_has_the_first_ones_rate() -> None:
    """Half the FLOPs in three quarters of the time: as quick as the first one's, they would take half of it."""
    of_one = {"attention": 0.0, "AdamW": 0.0, "copies": 0.1}
    full = of_one | {"products": 0.8, "flops": 100.0, "step": 1.0}
    half = of_one | {"products": 0.6, "flops": 50.0, "step": 0.8}
    rows = rows_of({"full": [full], "half": [half]})
    assert [row["rest"] for row in rows] == pytest.approx([0.1, 0.1])
    assert [row["bound"] for row in rows] == pytest.approx([1.0, 0.6])
    assert "| half | 0 | 600 | 0 | 0 | 100 | 100 | 800 | 0.800 | 0.600 |" in markdown({"rows": rows})
