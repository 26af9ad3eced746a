"""Recomputation block by block: of each stage only as many layers as it takes to fit.

Recomputing a layer costs time and frees memory, both alike for every layer of a kind. So where a plan that recomputes all
layers fits, and with a milder way of recomputing does not, the best plan in between has on every rank the fewest layers under
the dearer way that its memory allows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

from mlmdsl.planner import schedule
from mlmdsl.planner.blend import How, blend
from mlmdsl.planner.candidate import Candidate
from mlmdsl.planner.pricing import Place

_Chosen = tuple[list[int], int]  # of each of a rank's stages how many layers, and what it holds then
Order = Callable[[Sequence[int], Sequence[int]], list[int]]  # from layers and micro-batches held of each of a rank's stages


def fewest(place: Place, c: Candidate, mild: int, limit_bytes: float) -> Iterator[tuple[Candidate, int]]:
    """Plans with the fewest layers under `c.recompute` on each rank that fit, the others under `mild`, and what their fullest
    ranks hold; of a stage the first layers. A rank with several stages takes them from those that hold most micro-batches, or
    evenly, so that no stage is much slower than the others. Nothing where it takes none, or all do not suffice."""
    blender, seen = _Blender(place, c, mild, limit_bytes), set[tuple[int, ...]]()
    for order in (_most_held, _evenly) if c.interleave > 1 else (_most_held,):
        modes, most = blender.modes(order)
        if len(set(modes)) > 1 and modes not in seen:
            seen.add(modes)
            yield c._replace(modes=modes), most


def _most_held(sizes: Sequence[int], held: Sequence[int]) -> list[int]:
    """Stages, one for each layer, in the order in which layers are chosen."""
    stages = sorted(range(len(sizes)), key=lambda stage: -held[stage])
    return [stage for stage in stages for _ in range(sizes[stage])]


def _evenly(sizes: Sequence[int], held: Sequence[int]) -> list[int]:
    each = [((n + 1) / size, n, stage) for stage, size in enumerate(sizes) for n in range(size)]
    return [stage for _, _, stage in sorted(each)]


class _Blender:
    """A plan whose layers are recomputed in two ways, rank by rank."""

    def __init__(self, place: Place, c: Candidate, mild: int, limit_bytes: float):
        self.place, self.c, self.mild, self.limit_bytes = place, c, mild, limit_bytes
        kinds = tuple(kind for kind, count in place.bench.setting.chain.layers for _ in range(count))
        kept, ends = place.bench.least_activations(c.micro_batch).kept, list(accumulate(c.cut.stages))
        self.freed = place.slack * (kept[mild] - kept[c.recompute]) / len(kinds)  # bytes, by a layer that holds one micro-batch
        self.kinds = [kinds[end - size : end] for end, size in zip(ends, c.cut.stages, strict=True)]

    def modes(self, order: Order) -> tuple[tuple[int, ...], int]:
        """Of every layer, and what the fullest rank holds; () where a rank does not fit."""
        c, counts, most, guess = self.c, [0] * len(self.c.cut.stages), 0, 0
        for ranks in self._alike():
            found = self._of_alike(ranks, order, guess)
            if not found:
                return (), 0
            guess = sum(found[0][0])  # all ranks need about as many
            for rank, (chosen, size) in zip(ranks, found, strict=True):
                for stage, n in zip(c.cut.placed[rank], chosen, strict=True):
                    counts[stage] = n
                most = max(most, size)
        each = zip(counts, c.cut.stages, strict=True)
        return tuple(mode for n, size in each for mode in (*(c.recompute,) * n, *(self.mild,) * (size - n))), most

    def _alike(self) -> Iterable[list[int]]:
        """Ranks that run alike parts on alike devices: of these one holds no more micro-batches than the one before."""
        found: dict[tuple[object, ...], list[int]] = {}
        for rank, bench in enumerate(self.place.benches):
            found.setdefault((bench.site, *self.c.cut.held(rank)), []).append(rank)
        return found.values()

    def _of_alike(self, ranks: Sequence[int], order: Order, guess: int) -> list[_Chosen]:
        """By rank; none where a rank does not fit. A rank needs no more layers than the one before, so those between two that
        need as many need as many, too."""
        first = self._fewest(ranks[0], order, guess)
        if first is None:
            return []
        found: dict[int, _Chosen] = {0: first}
        waiting = [(0, len(ranks) - 1)]
        while waiting:
            low, high = waiting.pop()
            if high not in found:
                last = self._fewest(ranks[high], order, sum(found[low][0]))
                assert last is not None
                found[high] = last
            if found[low][0] == found[high][0]:
                found |= dict.fromkeys(range(low + 1, high), found[low])
            elif high - low > 1:
                middle = (low + high) // 2
                waiting += [(middle, high), (low, middle)]
        return [found[i] for i in range(len(ranks))]

    def _fewest(self, rank: int, order: Order, guess: int) -> _Chosen | None:
        """None where it does not fit."""
        c, place, parts, stages = self.c, self.place, self.c.cut.held(rank), self.c.cut.placed[rank]
        more = place.more_context_bytes(c.replicate)
        limit = min(self.limit_bytes, place.benches[rank].site.capacity_bytes)
        held = schedule.in_flight(c.schedule, place.pipeline, c.interleave, place.micro_batches(c.micro_batch), rank)
        picks, sizes = order([c.cut.stages[stage] for stage in stages], held), dict[int, int]()

        def chosen(n: int) -> list[int]:
            return [picks[:n].count(stage) for stage in range(len(stages))]

        def fits(n: int) -> bool:
            hows = [self._how(stage, count) for stage, count in zip(stages, chosen(n), strict=True)]
            filling = place.filling_under(c, rank, parts, hows)
            sizes[n] = place.rank_bytes(c, rank, parts, filling, limit - more) + more
            return sizes[n] <= limit

        def near(n: int) -> int:
            """As many as free what is over, or leave no room for one less."""
            left = limit - sizes[n]
            while left < 0 and n < len(picks):
                left, n = left + held[picks[n]] * self.freed, n + 1
            while n and (left := left - held[picks[n - 1]] * self.freed) >= 0:
                n -= 1
            return n

        n = least_that(fits, len(picks), guess, near)
        return (chosen(n), sizes[n]) if n <= len(picks) else None

    def _how(self, stage: int, n: int) -> How:
        """With the first n layers under the dearer way."""
        size, dear = self.c.cut.stages[stage], self.c.recompute
        if n in (0, size):
            return dear if n else self.mild
        return blend(self.kinds[stage], (dear,) * n + (self.mild,) * (size - n))


def least_that(holds: Callable[[int], bool], most: int, guess: int, near: Callable[[int], int] | None = None) -> int:
    """The least of 0 .. most for which `holds` does, as it does for all above it; most + 1 if for none. Looked for from a guess
    on, where `near` says, as soon as one is tried, or in steps that double."""
    low, high, step = -1, most + 1, 1  # holds neither at low nor below, and at high and above
    at = min(guess, most)
    while low < at < high:
        if holds(at):
            high, at = at, min(near(at), at - 1) if near else at - step
        else:
            low, at = at, max(near(at), at + 1) if near else at + step
        step *= 2
    return low + 1 + bisect_left(range(low + 1, high), True, key=holds)
