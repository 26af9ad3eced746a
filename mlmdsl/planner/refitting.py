"""Distributions of layers that memory limits, where stages lie on unlike devices.

Layers are first laid on stages by their speed alone. Where such a plan does not fit, another distribution of the same plan may:
stages with less memory, or that hold more micro-batches, get fewer. It is looked for after the plans that fit as they are, and
of plans that are not proved slower than the best one so far.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlmdsl.planner import schedule
from mlmdsl.planner.outcome import Outcome
from mlmdsl.planner.pricing import Candidate, Place
from mlmdsl.planner.proportion import least_seconds, proportion
from mlmdsl.planner.recomputing import Weigh
from mlmdsl.planner.stages import Part


def refine(outcome: Outcome, unfit: Sequence[tuple[Place, Candidate]], weigh: Weigh) -> None:
    """Hands plans that fit and may be faster than the best one to `weigh`."""
    best = outcome.found[0].order()[0] if outcome.found else float("inf")
    promising = sorted((bound(place, c), number) for number, (place, c) in enumerate(unfit))
    for least, number in promising:
        if least >= best:
            break
        place, candidate = unfit[number]
        found = refitted(place, candidate)
        if found is not None:
            weigh(found, place)
            best = min(best, outcome.found[-1].order()[0])


def bound(place: Place, c: Candidate) -> float:
    """Seconds that a step of any distribution takes at least: the slowest rank's passes. Where ranks have one stage each, it
    is no faster than in the plan that was laid out by speed."""
    m = place.micro_batches(c.micro_batch)
    speeds = [bench.speed(c.micro_batch, c.recompute) for bench in place.benches]
    least = least_seconds(place.bench.setting.chain, speeds)
    if c.interleave == 1:
        parts = enumerate(c.cut.parts)
        each = (place.benches[rank].part(part, c.micro_batch, c.recompute, True) for rank, part in parts)
        least = max(least, max(cost.forward + cost.backward for cost in each))
    return m * least


def refitted(place: Place, c: Candidate) -> Candidate | None:
    """The slowest stage as fast as memory allows. Several stages of a rank share its memory evenly: none is larger than if all
    of them were as large."""
    chain, last = place.bench.setting.chain, len(c.cut.stages) - 1

    def room(stage: int, part: Part) -> bool:
        rank = schedule.pipeline_rank(c.schedule, place.pipeline, stage)
        return place.fits(c, rank, tuple(chain.part(part.layers, s == 0, s == last) for s in c.cut.placed[rank]))

    found = proportion(chain, place.speeds(c.micro_batch, c.recompute, c.schedule, c.interleave), room)
    if found is None or found == c.cut.stages:
        return None
    again = c._replace(cut=place.given(found, c.schedule))
    held = place.held_bytes(again)
    return again if place.over_bytes(again, held, place.peak_bytes(again, held)) <= 0 else None
