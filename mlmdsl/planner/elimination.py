"""Min-sum variable elimination: the assignment of least cost, exactly (Dechter 1999, Bucket elimination).

A factor is a table over a few variables; absent entries are impossible. Cost grows with the largest table made on the way, which for
the graphs of transformer blocks stays small (their treewidth is 3 or 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

Table = Mapping[tuple[int, ...], float]


@dataclass(frozen=True)
class Factor:
    """Costs by the values of `variables`, in their order."""

    variables: tuple[int, ...]
    table: Table


def eliminate(domains: Sequence[int], factors: Sequence[Factor]) -> tuple[float, tuple[int, ...]] | None:
    """The least sum of all factors and the values that reach it; None where there is no possible assignment. Variable v takes the
    values 0 .. domains[v] - 1; of equally good assignments the one with smaller values late in the elimination is taken, always the
    same."""
    pool = list(factors)
    remaining = set(range(len(domains)))
    steps: list[tuple[int, tuple[int, ...], Mapping[tuple[int, ...], int]]] = []
    constant = 0.0
    while remaining:
        variable = min(remaining, key=lambda v: (_width(v, pool, domains), v))
        bucket = [f for f in pool if variable in f.variables]
        pool = [f for f in pool if variable not in f.variables]
        joined, best = _eliminated(variable, bucket, domains)
        if not joined.table:
            return None
        steps.append((variable, joined.variables, best))
        remaining.discard(variable)
        if joined.variables:
            pool.append(joined)
        else:
            constant += joined.table[()]
    values = [0] * len(domains)
    for variable, others, best in reversed(steps):
        values[variable] = best[tuple(values[v] for v in others)]
    return constant, tuple(values)


def _width(variable: int, pool: Sequence[Factor], domains: Sequence[int]) -> int:
    """Size of the table that eliminating the variable makes."""
    size = 1
    for other in {v for f in pool if variable in f.variables for v in f.variables}:
        size *= domains[other]
    return size


def _eliminated(variable: int, bucket: Sequence[Factor], domains: Sequence[int]) -> tuple[Factor, dict[tuple[int, ...], int]]:
    """The bucket's sum, minimised over the variable, and the value that reaches each minimum."""
    others = tuple(sorted({v for f in bucket for v in f.variables} - {variable}))
    lookups = [(f.table, tuple(-1 if v == variable else others.index(v) for v in f.variables)) for f in bucket]
    table: dict[tuple[int, ...], float] = {}
    best: dict[tuple[int, ...], int] = {}
    for key in product(*(range(domains[v]) for v in others)):
        for value in range(domains[variable]):
            total = 0.0
            for costs, places in lookups:
                cost = costs.get(tuple(value if p < 0 else key[p] for p in places))
                if cost is None:
                    break
                total += cost
            else:
                if key not in table or total < table[key]:
                    table[key], best[key] = total, value
    return Factor(others, table), best
