"""Min-sum variable elimination: the assignment of least cost, exactly (Dechter 1999, Bucket Elimination).

A factor is a table of costs over a few variables, `inf` where a combination is impossible. Eliminating a variable adds up the
factors that speak of it, takes the minimum over its values, and leaves a factor over its neighbours; the variables then get
their values in the reverse order. Time grows with the largest table made on the way: graphs of transformer blocks are
series-parallel but for tied weights, so that tables over two variables do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from math import inf, prod
from operator import add

from mlmdsl.frozen import frozen

Row = list[float]


@frozen
class Factor:
    """Costs by the values of `variables`: `costs` is flat, the last variable's values next to each other."""

    variables: tuple[int, ...]
    costs: Row


def eliminate(domains: Sequence[int], factors: Iterable[Factor]) -> tuple[float, tuple[int, ...]] | None:
    """The least sum of all factors and the values that reach it; None where every assignment is impossible.

    Variable v takes the values 0 .. domains[v] - 1. The variable whose elimination makes the smallest table goes first, the
    lower number where two are alike; of equally good values the lowest is taken: the result is a function of the arguments
    alone."""
    pool = _Pool(domains, factors)
    steps: list[tuple[int, list[Factor]]] = []
    constant = 0.0
    for variable, bucket in pool.buckets():
        others = tuple(sorted(_members(bucket) - {variable}))
        rows = _joined(variable, others, bucket, domains)
        costs = list(map(min, rows))
        if min(costs) == inf:
            return None
        steps.append((variable, bucket))
        if others:
            pool.put(Factor(others, costs))
        else:
            constant += costs[0]
    values = [0] * len(domains)
    for variable, bucket in reversed(steps):
        row = _row(variable, bucket, domains, values)
        values[variable] = row.index(min(row))
    return constant, tuple(values)


class _Pool:
    """The factors that are left, by variable, with the size of the table that eliminating each variable would make."""

    def __init__(self, domains: Sequence[int], factors: Iterable[Factor]):
        self.domains = domains
        self.by_variable: dict[int, list[Factor]] = {v: [] for v in range(len(domains))}
        self.width: dict[int, int] = dict.fromkeys(self.by_variable, 1)
        for factor in factors:
            for v in factor.variables:
                self.by_variable[v].append(factor)
        for v in self.by_variable:
            self._measure(v)

    def _measure(self, variable: int) -> None:
        self.width[variable] = prod(self.domains[v] for v in _members(self.by_variable[variable]))

    def buckets(self) -> Iterable[tuple[int, list[Factor]]]:
        while self.by_variable:
            variable = min(self.by_variable, key=lambda v: (self.width[v], v))
            bucket = self.by_variable.pop(variable) or [Factor((variable,), [0.0] * self.domains[variable])]
            for other in _members(bucket) - {variable}:
                self.by_variable[other] = [f for f in self.by_variable[other] if variable not in f.variables]
            yield variable, bucket

    def put(self, factor: Factor) -> None:
        for v in factor.variables:
            self.by_variable[v].append(factor)
        for v in factor.variables:
            self._measure(v)


def _members(factors: Iterable[Factor]) -> set[int]:
    return {v for factor in factors for v in factor.variables}


def _joined(variable: int, others: tuple[int, ...], bucket: Sequence[Factor], domains: Sequence[int]) -> list[Row]:
    """For each assignment of `others` (the last one's values next to each other) the bucket's sum by the variable's values."""
    total: list[Row] | None = None
    for factor in sorted(bucket, key=lambda f: len(f.variables)):
        rows = _rows(factor, variable, others, domains)
        total = rows if total is None else [list(map(add, a, b)) for a, b in zip(total, rows, strict=True)]
    assert total is not None
    return total


def _rows(factor: Factor, variable: int, others: tuple[int, ...], domains: Sequence[int]) -> list[Row]:
    """The factor's costs by the variable's values, for each assignment of `others`."""
    strides = _strides(factor, domains)
    offsets = [0]
    for other in others:
        steps = [strides.get(other, 0) * value for value in range(domains[other])]
        offsets = [offset + step for offset in offsets for step in steps]
    stride, size, costs = strides[variable], domains[variable], factor.costs
    if len(factor.variables) == 1:
        return list(repeat(costs, len(offsets)))
    return [costs[o : o + stride * size : stride] for o in offsets]


def _row(variable: int, bucket: Sequence[Factor], domains: Sequence[int], values: Sequence[int]) -> Row:
    """The bucket's sum by the variable's values, where all other variables have theirs."""
    total = [0.0] * domains[variable]
    for factor in sorted(bucket, key=lambda f: len(f.variables)):
        strides = _strides(factor, domains)
        offset = sum(strides[v] * values[v] for v in factor.variables if v != variable)
        stride = strides[variable]
        total = list(map(add, total, factor.costs[offset : offset + stride * domains[variable] : stride]))
    return total


def _strides(factor: Factor, domains: Sequence[int]) -> Mapping[int, int]:
    strides: dict[int, int] = {}
    stride = 1
    for variable in reversed(factor.variables):
        strides[variable] = stride
        stride *= domains[variable]
    return strides
