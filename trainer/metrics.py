"""How good predictions are: the metrics of classifications and regressions, by name.

All are what scikit-learn and scipy compute. Where a metric is undefined (one class alone is predicted, a constant has
no correlation) it is 0: nothing was told apart.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def accuracy(predicted: Tensor, wanted: Tensor) -> float:
    """Share of equal labels. (N,) int64 both, here and below."""
    return float((predicted == wanted).double().mean())


def f1(predicted: Tensor, wanted: Tensor, label: int = 1) -> float:
    """Harmonic mean of precision and recall of one label, the second."""
    hit = int(((predicted == label) & (wanted == label)).sum())
    return _ratio(2 * hit, int((predicted == label).sum()) + int((wanted == label).sum()))


def macro_f1(predicted: Tensor, wanted: Tensor) -> float:
    """Mean of F1 over all labels that occur."""
    labels = sorted({*predicted.tolist(), *wanted.tolist()})
    return sum(f1(predicted, wanted, label) for label in labels) / len(labels)


def matthews(predicted: Tensor, wanted: Tensor) -> float:
    """Correlation of two labellings, of any number of labels (Gorodkin 2004)."""
    count = int(max(predicted.max(), wanted.max())) + 1
    table = torch.zeros(count, count, dtype=torch.float64)
    table.index_put_((wanted, predicted), torch.ones(len(wanted), dtype=torch.float64), accumulate=True)
    total, right = table.sum(), table.trace()
    of_wanted, of_predicted = table.sum(1), table.sum(0)
    covariance = right * total - of_wanted @ of_predicted
    spread = (total**2 - of_predicted @ of_predicted) * (total**2 - of_wanted @ of_wanted)
    return _ratio(float(covariance), float(spread.sqrt()))


def pearson(predicted: Tensor, wanted: Tensor) -> float:
    """(N,) float64 both, here and below."""
    x, y = _centred(predicted), _centred(wanted)
    return max(-1.0, min(1.0, _ratio(float(x @ y), float(x.norm() * y.norm()))))


def spearman(predicted: Tensor, wanted: Tensor) -> float:
    """Pearson's, of the ranks."""
    return pearson(_ranks(predicted), _ranks(wanted))


def measure(names: Sequence[str], predicted: Tensor, wanted: Tensor, labels: int) -> dict[str, float]:
    """Each by its name in a spec. `labels`: how many there are; f1 is that of the second of two, else the mean."""
    functions: dict[str, Callable[[Tensor, Tensor], float]] = {
        "accuracy": accuracy,
        "f1": f1 if labels == 2 else macro_f1,
        "matthews": matthews,
        "pearson": pearson,
        "spearman": spearman,
    }
    return {name: functions[name](predicted, wanted) for name in names}


def _centred(values: Tensor) -> Tensor:
    # What a constant leaves, its rounding, is no spread.
    centred = values - values.mean()
    return torch.zeros_like(values) if bool((values == values[0]).all()) else centred / centred.abs().max()


def _ranks(values: Tensor) -> Tensor:
    """From 1; equal values share the mean of their ranks."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = (last - (counts.double() - 1) / 2)[place]
    return ranks


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else 0.0
