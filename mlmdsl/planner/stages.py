"""Cutting the model into virtual stages: contiguous runs of layers, the slowest stage as fast as possible, exactly.

A layer is one pass of a repeat (with the straight code that follows the repeat, on its last pass); what stands before the first
repeat (the embedding) belongs to the first stage, what stands after the last one (head and loss) to the last. Every stage has a
layer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import accumulate, groupby, pairwise
from math import floor

from mlmdsl.frozen import frozen
from mlmdsl.graph.graph import Graph, Node

_EPS = 1e-9  # relative: sums of equal numbers in another order


@frozen
class Chain:
    """The model as stages see it: regions by index. `kinds` are the sorts of layers (the regions that one runs), `layers` how
    many of each follow one another, as (kind, count)."""

    first: tuple[int, ...]
    last: tuple[int, ...]
    kinds: tuple[tuple[int, ...], ...]
    layers: tuple[tuple[int, int], ...]
    _parts: dict[tuple[tuple[int, ...], bool, bool], Part] = field(default_factory=lambda: {}, compare=False)

    def part(self, layers: tuple[int, ...], first: bool, last: bool) -> Part:
        """Equal parts are one object."""
        key = (layers, first, last)
        return self._parts.get(key) or self._parts.setdefault(key, Part(*key))

    @cached_property
    def count(self) -> int:
        return sum(count for _, count in self.layers)

    @property
    def whole(self) -> tuple[Part]:
        """All of the model."""
        return (self.part(tuple(count for _, count in self.layers), True, True),)

    def regions(self, part: Part) -> list[tuple[int, int]]:
        """The regions that a part runs, and how many passes of each."""
        layers = [(i, count) for kind, count in enumerate(part.layers) if count for i in self.kinds[kind]]
        return layers + [(i, 1) for i in self.first * part.first + self.last * part.last]


def chain_of(graph: Graph) -> Chain:
    repeats = [i for i, region in enumerate(graph.regions) if region.repeated]
    if not repeats:
        return Chain(tuple(range(len(graph.regions))), (), (), ())
    kinds: list[tuple[int, ...]] = []
    layers: list[tuple[int, int]] = []
    for index, following in zip(repeats, [*repeats[1:], repeats[-1] + 1], strict=True):
        between, count = tuple(range(index + 1, following)), graph.regions[index].count
        plain = count - bool(between)
        for kind, number in (((index,), plain), ((index, *between), count - plain)):
            if number:
                layers.append((len(kinds), number))
                kinds.append(kind)
    after = tuple(range(repeats[-1] + 1, len(graph.regions)))
    return Chain(tuple(range(repeats[0])), after, tuple(kinds), tuple(layers))


def begins_anew(graph: Graph) -> Node | None:
    """Behind the first repeat a value that is made of weights alone, and not of what the stage before hands on: where a decoder
    begins. A stage with it cannot take its backward pass apart: torch parts gradients of inputs from those of weights where
    the ways of the two meet (torch.distributed.pipelining._backward), and from such a value they meet in several places."""
    of_carried: set[str] = {c.entry for region in graph.regions for c in region.carried}
    of_carried |= {c.next for region in graph.regions for c in region.carried}
    behind = False
    for region in graph.regions:
        for node in region.nodes:
            if of_carried & set(node.inputs):
                of_carried.add(node.path)
            elif behind and not region.repeated and node.weights and node.path not in of_carried:
                return node
        behind |= region.repeated
    return None


@dataclass(frozen=True, eq=False)
class Part:
    """What one virtual stage runs: layers by kind, and whether it has the model's beginning or end. Made by `Chain.part`."""

    layers: tuple[int, ...]
    first: bool
    last: bool


def parts_of(chain: Chain, stages: Sequence[int]) -> tuple[Part, ...]:
    """The parts of a given distribution of layers."""
    assert sum(stages) == chain.count, (stages, chain)
    kinds = [kind for kind, count in chain.layers for _ in range(count)]
    parts: list[Part] = []
    start = 0
    for index, size in enumerate(stages):
        mine = kinds[start : start + size]
        counts = tuple(mine.count(kind) for kind in range(len(chain.kinds)))
        parts.append(chain.part(counts, index == 0, index == len(stages) - 1))
        start += size
    return tuple(parts)


def balance(chain: Chain, seconds: Sequence[float], first: float, last: float, stages: int) -> tuple[int, ...]:
    """Layers per stage. `seconds`: of a layer by kind; `first` and `last`: of the model's beginning and end.

    The slowest stage is as fast as any contiguous distribution allows; of those the most even one, later stages taking what
    does not divide (they hold fewer micro-batches)."""
    if not chain.layers:
        assert stages == 1
        return (0,)
    assert 1 <= stages <= chain.count
    if len(chain.kinds) == 1:
        return _uniform(chain.count, first / seconds[0], last / seconds[0], stages)
    costs = [seconds[kind] for kind, count in chain.layers for _ in range(count)]
    costs[0] += first
    costs[-1] += last
    return _general(costs, stages)


# ---- layers that cost alike: closed form ----------------------------------------------------------------------------


def _uniform(layers: int, first: float, last: float, stages: int) -> tuple[int, ...]:
    """Costs in units of one layer. The least bound whose capacities hold all layers, then an even spread below it."""
    if stages == 1:
        return (layers,)
    low = max(floor(layers / stages) - 1, 1)
    steps = sorted({0.0, first - floor(first), last - floor(last)})
    for whole in range(low, layers + 2 + floor(first) + floor(last)):
        for step in steps:
            bound = whole + step
            ends = floor(bound - first + _EPS), floor(bound - last + _EPS)
            middle = floor(bound + _EPS)
            if min(ends) >= 1 and ends[0] + ends[1] + middle * (stages - 2) >= layers:
                return _spread(layers, stages, ends[0], middle, ends[1])
    raise AssertionError("one stage holds all layers")


@cache
def _spread(layers: int, stages: int, first: int, middle: int, last: int) -> tuple[int, ...]:
    """As even as the capacities allow: filled up to one level, of which the first stages that reach it give back what is too
    much."""
    capacities = (first, *[middle] * (stages - 2), last)
    level = next(n for n in range(1, layers + 1) if sum(min(n, most) for most in capacities) >= layers)
    found = [min(level, most) for most in capacities]
    full = [stage for stage, size in enumerate(found) if size == level]
    for stage in full[: sum(found) - layers]:
        found[stage] -= 1
    return tuple(found)


# ---- layers of several kinds ----------------------------------------------------------------------------------------


def _general(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    before = [0.0, *accumulate(costs)]  # what the layers in front of each position cost
    bound = _least_bound(before, stages)
    needed = _needed(before, bound)
    found: list[int] = []
    start = 0
    for stage in range(stages - 1):
        after = stages - stage - 1
        most = min(_end(before, start, bound) - start, len(costs) - start - after)
        least = next(n for n in range(1, most + 1) if needed[start + n] <= after)
        size = min(max((len(costs) - start) // (after + 1), least), most)
        found.append(size)
        start += size
    return (*found, len(costs) - start)


def _least_bound(before: Sequence[float], stages: int) -> float:
    """Raised from below to the next value that lets some stage take one layer more, until the stages suffice."""
    layers = len(before) - 1
    bound = max(max(b - a for a, b in pairwise(before)), before[-1] / stages)
    while True:
        used, start, following = 0, 0, float("inf")
        while start < layers:
            end = _end(before, start, bound)
            if end < layers:
                following = min(following, before[end + 1] - before[start])
            start = end
            used += 1
        if used <= stages:
            return bound
        bound = following


def _end(before: Sequence[float], start: int, bound: float) -> int:
    """Where the layers from `start` on that fit under the bound end; one at least does."""
    return max(start + 1, bisect_right(before, before[start] + bound * (1 + _EPS)) - 1)


def _needed(before: Sequence[float], bound: float) -> list[int]:
    """Stages that the layers from each position to the end need."""
    needed = [0] * len(before)
    for start in range(len(before) - 2, -1, -1):
        needed[start] = 1 + needed[_end(before, start, bound)]
    return needed


# ---- what the search needs of a distribution ------------------------------------------------------------------------


@frozen
class Cut:
    """A distribution of layers over pipeline * interleave virtual stages, and its distinct parts.

    runs: (part, how many virtual stages in a row are alike); ranks: (rank, its parts) of the ranks whose memory can be the
    largest: of ranks that run alike parts on alike devices, the first, which holds the most micro-batches (but in a V); placed:
    a rank's virtual stages, by rank."""

    stages: tuple[int, ...]
    parts: tuple[Part, ...]
    runs: tuple[tuple[Part, int], ...]
    ranks: tuple[tuple[int, tuple[Part, ...]], ...]
    placed: tuple[tuple[int, ...], ...]

    def held(self, rank: int) -> tuple[Part, ...]:
        """The parts of a rank, in model order."""
        return tuple(self.parts[stage] for stage in self.placed[rank])


def cut_of(
    chain: Chain, stages: tuple[int, ...], placed: tuple[tuple[int, ...], ...], sites: Sequence[object] | None = None
) -> Cut:
    """`sites`: what each rank lies on, where they are not alike."""
    parts, on = parts_of(chain, stages), sites or (None,) * len(placed)
    lying: list[object] = [None] * len(parts)
    for site, mine in zip(on, placed, strict=True):
        for stage in mine:
            lying[stage] = site
    runs = tuple((part, sum(1 for _ in group)) for (part, _), group in groupby(zip(parts, lying, strict=True)))
    ranks: dict[tuple[object, tuple[Part, ...]], int] = {}
    for rank, mine in enumerate(placed):
        ranks.setdefault((on[rank], tuple(parts[stage] for stage in mine)), rank)
    return Cut(stages, parts, runs, tuple((rank, held) for (_, held), rank in ranks.items()), placed)
