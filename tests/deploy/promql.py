"""What an expression of PromQL names: series, labels and values, each looked up among those that exist."""

import re
from collections.abc import Iterator

import promql_parser as promql
from promql_parser import AggModifierType, LabelModifierType, MatchOp

from tests.deploy.series import Series

Labels = dict[str, set[str]]
# Functions that look at buckets, and leave a series without them.
_OF_BUCKETS = ("histogram_quantile",)


class Problem(Exception):
    """The expression names what is not there."""


def labels_of(expression: str, series: Series) -> Labels:
    """The labels of what the expression returns, with the values that are known. Raises Problem, or ValueError."""
    return _labels(promql.parse(expression), series)


def selectors(expression: promql.Expr) -> Iterator[promql.VectorSelector]:
    """Every selector of a series in the expression."""
    for part in _parts(expression):
        if isinstance(part, promql.VectorSelector):
            yield part
        yield from selectors(part)


def _parts(node: promql.Expr) -> list[promql.Expr]:
    match node:
        case promql.MatrixSelector():
            return [node.vector_selector]
        case promql.Call():
            return list(node.args)
        case promql.BinaryExpr():
            return [node.lhs, node.rhs]
        case promql.AggregateExpr() | promql.ParenExpr() | promql.SubqueryExpr() | promql.UnaryExpr():
            return [node.expr]
    return []


def _labels(node: promql.Expr, series: Series) -> Labels:
    of_parts = [_labels(part, series) for part in _parts(node)]
    match node:
        case promql.VectorSelector():
            return _selected(node, series)
        case promql.AggregateExpr():
            return _aggregated(node, of_parts[0])
        case promql.BinaryExpr():
            return _joined(node, *of_parts)
        case promql.Call() if node.func.name == "absent":
            return {m.name: {m.value} for s in selectors(node) for m in s.matchers.matchers if m.op == MatchOp.Equal}
        case promql.Call():
            labels = {label: values for part in of_parts for label, values in part.items()}
            if node.func.name in _OF_BUCKETS:
                _must_have(["le"], labels, node)
                del labels["le"]
            return labels
    return of_parts[0] if of_parts else {}


def _selected(node: promql.VectorSelector, series: Series) -> Labels:
    if node.name not in series.labels:
        raise Problem(f"{node.name} does not exist")
    labels = series.labels[node.name]
    for matcher in node.matchers.matchers:
        _must_have([matcher.name], labels, node)
        seen = labels[matcher.name]
        # A pattern or word that no value meets is a misspelt one. What is left out need not be there.
        wanted = matcher.op in (MatchOp.Equal, MatchOp.Re)
        if wanted and seen and not any(_meets(matcher, value) for value in seen):
            raise Problem(f"{node.name}: no {matcher.name} is like {matcher.value}; there are {sorted(seen)}")
    return labels


def _meets(matcher: promql.Matcher, value: str) -> bool:
    return value == matcher.value if matcher.op == MatchOp.Equal else bool(re.fullmatch(matcher.value, value))


def _aggregated(node: promql.AggregateExpr, labels: Labels) -> Labels:
    if node.modifier is None:
        return {}
    _must_have(node.modifier.labels, labels, node)
    by = node.modifier.type == AggModifierType.By
    return {label: values for label, values in labels.items() if (label in node.modifier.labels) == by}


def _joined(node: promql.BinaryExpr, left: Labels, right: Labels) -> Labels:
    modifier, operator = node.modifier, str(node.op)
    matching = modifier.matching if modifier is not None else None
    if matching is not None:
        for side in (left, right):
            _must_have(matching.labels, side, node)
    if matching is not None and matching.type == LabelModifierType.Include and operator not in ("and", "or", "unless"):
        kept = {label: values for label, values in left.items() if label in matching.labels}
        left = kept if modifier.group_labels is None else left
    if matching is None and operator != "or" and left and right and left.keys() != right.keys():
        raise Problem(f"{node} never matches: {sorted(left)} on one side, {sorted(right)} on the other")
    brought = {label: right[label] for label in (modifier.group_labels or [])} if modifier is not None else {}
    return left | brought if left else right


def _must_have(wanted: list[str], labels: Labels, node: promql.Expr) -> None:
    missing = sorted(set(wanted) - labels.keys())
    if missing:
        raise Problem(f"there is no label {', '.join(missing)} in {node}; there are {', '.join(sorted(labels))}")
