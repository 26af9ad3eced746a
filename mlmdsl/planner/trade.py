"""What it costs to keep less: seconds against bytes, where each layer may be recomputed in one of several ways.

Over all layers the fewest seconds are convex in the bytes: the lower hull of each kind's points, its edges put one behind
another, the cheapest first (a fractional knapsack, Dantzig 1957). Plans are points above it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf
from typing import NamedTuple

Point = tuple[float, float]  # bytes that a layer keeps, seconds that its passes take


class Trade(NamedTuple):
    """Of one micro-batch through all layers: bytes kept under the mildest way of recomputing, and at least; `edges`: (seconds
    for each byte less, for so many bytes), the cheapest first."""

    kept: float
    least: float
    edges: tuple[tuple[float, float], ...]

    def seconds(self, less: float) -> float:
        """What it takes at least to keep so many bytes less than under the mildest way; infinite where nothing does."""
        longer = 0.0
        for price, most in self.edges:
            if less <= most:
                return longer + price * max(less, 0.0)
            longer += price * most
            less -= most
        return longer if less <= 1e-9 * self.kept else inf


def trade_of(kinds: Iterable[tuple[int, Sequence[Point]]]) -> Trade:
    """Of layers by kind: how many, and their points, the mildest way of recomputing first."""
    kept = least = 0.0
    edges: list[tuple[float, float]] = []
    for count, points in kinds:
        kept += count * points[0][0]
        least += count * min(size for size, _ in points)
        edges += [(price, count * less) for price, less in _hull(points)]
    return Trade(kept, least, tuple(sorted(edges)))


def _hull(points: Sequence[Point]) -> Iterable[Point]:
    """(seconds for each byte, bytes) from the first point on, along the lower hull, to the one with the fewest bytes. What
    keeps less in no more time costs nothing."""
    at = 0
    while True:
        size, seconds = points[at]
        steps = [((s - seconds) / (size - b), i) for i, (b, s) in enumerate(points) if b < size]
        if not steps:
            return
        price, following = min(steps, key=lambda step: (step[0], points[step[1]][0]))
        yield max(price, 0.0), size - points[following][0]
        at = following


def cheapest(trades: Sequence[Trade]) -> Trade:
    """What no mixture of several falls below: all bytes at the least price."""
    first, price = trades[0], min((edge[0] for trade in trades for edge in trade.edges), default=inf)
    edges = ((price, first.kept - first.least),) if price < inf else ()
    return Trade(first.kept, first.least, edges)
