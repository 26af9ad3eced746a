"""Recomputation block by block: of each stage only as many layers as it takes to fit.

Recomputing a layer costs time and frees memory, both alike for every layer of a kind. So where a plan that recomputes all
layers fits, and with a milder way of recomputing does not, the best plan in between has on every rank the fewest layers under
the dearer way that its memory allows. These are counted here, after the plans that treat all layers alike: of those that are
not proved slower than the best one so far.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from math import inf

from mlmdsl.planner import schedule
from mlmdsl.planner.blend import How, blend
from mlmdsl.planner.outcome import Branch, Found, Outcome
from mlmdsl.planner.pricing import Candidate, Place

Weigh = Callable[[Candidate, Place], None]
Bound = Callable[
    [Branch, Iterable[int]], float
]  # seconds at least of what a branch has with fewer layers recomputed, by milder way
Order = Callable[[Sequence[int], Sequence[int]], list[int]]  # from layers and micro-batches held of each of a rank's stages


def refine(outcome: Outcome, limit_bytes: float, weigh: Weigh, bound: Bound) -> None:
    """Hands plans that fit in `limit_bytes` and may be faster than the best one, which comes first, to `weigh`. Branches are
    opened as far as theirs may be; `bound` is asked when a quicker one is not enough."""
    best = outcome.found[0].order()[0]
    waiting = [promise for number in range(len(outcome.found)) for promise in _promising(outcome, number)]
    waiting += [(branch.milder, number, -1) for number, branch in outcome.branches.items()]
    heapify(waiting)
    while waiting and waiting[0][0] < best:
        least, number, mild = heappop(waiting)
        if mild < 0:
            branch = outcome.branches[number]
            if branch.mode is not None and (closer := bound(branch, range(branch.mode))) > least:
                heappush(waiting, (closer, number, mild))
                continue
            branches, plans = outcome.opened(number)
            for promise in [promise for new in plans for promise in _promising(outcome, new)]:
                heappush(waiting, promise)
            for new, branch in branches:
                heappush(waiting, (branch.milder, new, -1))
            continue
        found = outcome.found[number]
        if (closer := bound(_branch_of(found), (mild,))) > least:
            heappush(waiting, (closer, number, mild))
            continue
        for candidate in fewest(found.place, found.candidate, mild, limit_bytes, best):
            before = len(outcome.found)
            weigh(candidate, found.place)
            for new in range(before, len(outcome.found)):
                if outcome.found[new].order()[0] < best:
                    best = min(best, outcome.made_exact(new).order()[0])


def _branch_of(found: Found) -> Branch:
    """Of which a plan is the only candidate."""
    c = found.candidate
    share = (c.zero, c.replicate)
    branch = Branch(found.objective, found.broken, found.place, (c.micro_batch,), (share,), c.recompute)
    return branch._replace(schedule=c.schedule, interleave=c.interleave)


def _promising(outcome: Outcome, number: int) -> Iterator[tuple[float, int, int]]:
    """(bound, number in `found`, milder way of recomputing)."""
    found = outcome.found[number]
    for mild in range(found.candidate.recompute if not found.candidate.modes else 0):
        yield _least(found, mild), number, mild


def _least(found: Found, mild: int) -> float:
    """No plan that recomputes some layers in the milder way takes less: every pass is as short as if all did. Holds where
    the times of `found` are bounds, too."""
    c, times = found.candidate, found.times
    share = found.place.least_layer(c.micro_batch, mild, c.recompute)
    return times.total - (1 - share) * times.pipeline


def fewest(place: Place, c: Candidate, mild: int, limit_bytes: float, seconds: float = inf) -> Iterator[Candidate]:
    """Plans with the fewest layers under `c.recompute` on each rank that fit, the others under `mild`; of a stage the first. A
    rank with several stages takes them from those that hold most micro-batches, which are the fewest of all, or evenly, so that
    no stage is much slower than the others. Nothing where it takes none, all do not suffice, or a rank is busy for
    `seconds`."""
    seen: set[tuple[int, ...]] = set()
    for order in (_most_held, _evenly) if c.interleave > 1 else (_most_held,):
        modes = _modes(place, c, mild, limit_bytes, order, seconds)
        if len(set(modes)) > 1 and modes not in seen:
            seen.add(modes)
            yield c._replace(modes=modes)


def _modes(place: Place, c: Candidate, mild: int, limit_bytes: float, order: Order, seconds: float) -> tuple[int, ...]:
    """Of every layer; () where a rank does not fit, or takes too long."""
    counts, guess = dict[int, int](), 0
    for rank, stages in enumerate(c.cut.placed):
        one = _Rank(place, c, rank, stages, mild, limit_bytes)
        found = one.fewest(order, guess)
        if found is None or one.busy_seconds(found) >= seconds:
            return ()
        counts |= zip(stages, found, strict=True)
        guess = sum(found)  # neighbours need about as many
    each = ((counts[stage], size) for stage, size in enumerate(c.cut.stages))
    return tuple(mode for n, size in each for mode in (*(c.recompute,) * n, *(mild,) * (size - n)))


def _most_held(sizes: Sequence[int], held: Sequence[int]) -> list[int]:
    """Stages, one for each layer, in the order in which layers are chosen."""
    stages = sorted(range(len(sizes)), key=lambda stage: -held[stage])
    return [stage for stage in stages for _ in range(sizes[stage])]


def _evenly(sizes: Sequence[int], held: Sequence[int]) -> list[int]:
    each = [((n + 1) / size, n, stage) for stage, size in enumerate(sizes) for n in range(size)]
    return [stage for _, _, stage in sorted(each)]


class _Rank:
    """One rank's stages, and what it takes for them to fit."""

    def __init__(self, place: Place, c: Candidate, rank: int, stages: Sequence[int], mild: int, limit_bytes: float):
        self.place, self.c, self.rank, self.mild = place, c, rank, mild
        self.parts = c.cut.held(rank)
        self.sizes = [c.cut.stages[stage] for stage in stages]
        self.starts = [sum(c.cut.stages[:stage]) for stage in stages]
        self.limit_bytes = min(limit_bytes, place.benches[rank].site.capacity_bytes) - place.more_context_bytes(c)
        self.kinds = [kind for kind, count in place.bench.setting.chain.layers for _ in range(count)]

    def fewest(self, order: Order, guess: int) -> list[int] | None:
        """Of each stage how many layers."""
        c, place = self.c, self.place
        micro_batches = place.micro_batches(c.micro_batch)
        held = schedule.in_flight(c.schedule, place.pipeline, c.interleave, micro_batches, self.rank)
        picks = order(self.sizes, held)

        def chosen(n: int) -> list[int]:
            return [picks[:n].count(stage) for stage in range(len(self.sizes))]

        n = least_that(lambda n: self.fits(chosen(n)), len(picks), guess)
        return chosen(n) if n <= len(picks) else None

    def fits(self, chosen: Sequence[int]) -> bool:
        hows = [self.how(stage, n) for stage, n in enumerate(chosen)]
        filling = self.place.filling_under(self.c, self.rank, self.parts, hows)
        return self.place.rank_bytes(self.c, self.rank, self.parts, filling) <= self.limit_bytes

    def busy_seconds(self, chosen: Sequence[int]) -> float:
        """Of a step, sends left aside."""
        bench, piped, micro_batch = self.place.benches[self.rank], self.place.pipeline > 1, self.c.micro_batch
        costs = (bench.part(part, micro_batch, self.how(i, chosen[i]), piped) for i, part in enumerate(self.parts))
        return self.place.micro_batches(micro_batch) * sum(cost.forward + cost.backward for cost in costs)

    def how(self, stage: int, n: int) -> How:
        """With the first n layers under the dearer way."""
        size, dear = self.sizes[stage], self.c.recompute
        if n in (0, size):
            return dear if n else self.mild
        kinds = self.kinds[self.starts[stage] : self.starts[stage] + size]
        return blend(kinds, (dear,) * n + (self.mild,) * (size - n))


def least_that(holds: Callable[[int], bool], most: int, guess: int) -> int:
    """The least of 0 .. most for which `holds` does, as it does for all above it; most + 1 if for none. Looked for from a guess
    on, in steps that double."""
    low, high, step = -1, most + 1, 1  # holds neither at low nor below, and at high and above
    at = min(guess, most)
    while low < at < high:
        if holds(at):
            high, at = at, at - step
        else:
            low, at = at, at + step
        step *= 2
    return low + 1 + bisect_left(range(low + 1, high), True, key=holds)
