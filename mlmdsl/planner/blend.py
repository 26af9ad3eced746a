"""Layers of one virtual stage of which some are recomputed in one way and others in another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, groupby
from typing import NamedTuple

from mlmdsl.planner.stages import Chain, Part

Run = tuple[int, int, int]  # kind of layer, way of recomputing as an index into MODES, how many


class Blend(NamedTuple):
    """layers: alike ones that follow one another, in model order."""

    layers: tuple[Run, ...]


How = int | Blend  # of a stage: all layers in one way, or a blend


def first_of(how: How) -> int:
    """The way of the stage's first layer."""
    return how.layers[0][1] if isinstance(how, Blend) else how


def runs_of(part: Part, how: How) -> Sequence[Run]:
    """In model order."""
    if isinstance(how, Blend):
        return how.layers
    return [(kind, how, count) for kind, count in enumerate(part.layers) if count]


def regions_of(chain: Chain, part: Part, how: How) -> list[tuple[int, int, int]]:
    """The regions that a part runs, (index, way of recomputing, how many passes); straight code is not recomputed."""
    counted: Counter[tuple[int, int]] = Counter()
    for kind, mode, count in runs_of(part, how):
        counted[kind, mode] += count
    layers = [(i, mode, count) for (kind, mode), count in sorted(counted.items()) for i in chain.kinds[kind]]
    return layers + [(i, 0, 1) for i in chain.first * part.first + chain.last * part.last]


def blends(chain: Chain, stages: Sequence[int], modes: Sequence[int]) -> tuple[Blend, ...]:
    """Of each virtual stage, from the way of every layer."""
    kinds = tuple(kind for kind, count in chain.layers for _ in range(count))
    ends, modes = list(accumulate(stages)), tuple(modes)
    return tuple(blend(kinds[end - size : end], modes[end - size : end]) for end, size in zip(ends, stages, strict=True))


@cache
def blend(kinds: tuple[int, ...], modes: tuple[int, ...]) -> Blend:
    """Of a stage whose layers are of these kinds and recomputed in these ways."""
    return Blend(tuple((*key, len(list(run))) for key, run in groupby(zip(kinds, modes, strict=True))))
