"""A candidate of the search, and what a step of it takes."""

from __future__ import annotations

from typing import NamedTuple

from mlmdsl.grammar.constraints import USUAL, Order
from mlmdsl.planner.passes import MODES
from mlmdsl.planner.plan import Recompute, Schedule
from mlmdsl.planner.stages import Cut


class Candidate(NamedTuple):
    """The plan's variables, and how its layers are cut."""

    tensor: int
    sequence_parallel: bool
    pipeline: int
    data: int
    micro_batch: int
    schedule: Schedule
    interleave: int
    recompute: int  # index into MODES
    zero: int
    cut: Cut
    context: int = 1
    expert: int = 1
    replicate: int = 1
    modes: tuple[int, ...] = ()  # of every layer, where they are not all recomputed alike; `recompute` is the largest of them
    order: Order = USUAL

    @property
    def recomputed(self) -> Recompute | tuple[Recompute, ...]:
        """In words."""
        each: tuple[Recompute, ...] = tuple(MODES[mode] for mode in self.modes)
        return each or MODES[self.recompute]


class Times(NamedTuple):
    """Seconds of a step. pipeline: all micro-batches through the stages; bubble: of these, the mean rank's idle ones; gathered:
    ZeRO's gathers that nothing hides, once a step; summed: gradients over replicas, partial and tied ones; optimizer; total."""

    pipeline: float
    bubble: float
    gathered: float
    summed: float
    optimizer: float
    total: float
