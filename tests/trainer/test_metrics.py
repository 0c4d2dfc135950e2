"""Metrics are scikit-learn's and scipy's, on random labels and on those that tell nothing apart."""

import warnings

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from trainer.metrics import accuracy, f1, macro_f1, matthews, measure, pearson, spearman


@pytest.mark.parametrize("labels", [2, 3, 7])
@pytest.mark.parametrize("seed", range(5))
def test_of_random_labels_they_are_scikit_learn_s(labels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randint(labels, (200,), generator=generator)
    noise = torch.randint(labels, (200,), generator=generator)
    predicted = torch.where(torch.rand(200, generator=generator) < 0.6, wanted, noise)
    assert accuracy(predicted, wanted) == pytest.approx(accuracy_score(wanted, predicted), abs=1e-12)
    assert matthews(predicted, wanted) == pytest.approx(matthews_corrcoef(wanted, predicted), abs=1e-12)
    assert macro_f1(predicted, wanted) == pytest.approx(f1_score(wanted, predicted, average="macro"), abs=1e-12)
    average = "binary" if labels == 2 else "macro"
    found = measure(["f1", "accuracy"], predicted, wanted, labels)
    assert found["f1"] == pytest.approx(f1_score(wanted, predicted, average=average), abs=1e-12)


@pytest.mark.parametrize(("predicted", "wanted"), [([0] * 8, [0, 1] * 4), ([1] * 8, [0, 1] * 4), ([1] * 8, [1] * 8)])
def test_of_one_class_alone_they_are_scikit_learn_s(predicted: list[int], wanted: list[int]) -> None:
    p, w = torch.tensor(predicted), torch.tensor(wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert matthews(p, w) == pytest.approx(matthews_corrcoef(wanted, predicted))
        assert f1(p, w) == pytest.approx(f1_score(wanted, predicted, zero_division=0.0))
        assert accuracy(p, w) == pytest.approx(accuracy_score(wanted, predicted))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_scipy_s_with_ties_and_without(ties: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(100, generator=generator, dtype=torch.float64) * 1e-3 + 4
    y = x * 100 + torch.randn(100, generator=generator, dtype=torch.float64) * 0.1
    if ties:
        x, y = (x * 1000).round(), (y * 10).round()
    assert pearson(x, y) == pytest.approx(pearsonr(x, y).statistic, abs=1e-10)
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-10)


def test_a_constant_has_no_correlation_and_a_line_all_of_it() -> None:
    x = torch.arange(5, dtype=torch.float64)
    for correlation in (pearson, spearman):
        assert correlation(torch.full((5,), 0.1, dtype=torch.float64), x) == 0.0
        assert correlation(x[:1], x[:1]) == 0.0
        assert correlation(3 * x + 1, x) == pytest.approx(1.0)
        assert correlation(-x, x) == pytest.approx(-1.0)
