"""Peak memory as the run's framework keeps it and its table counts it.

torch.cuda.max_memory_allocated counts tensors, max_memory_reserved with what its allocator keeps besides; nvidia-smi and the
like also the device's context and the libraries' buffers.
"""

from __future__ import annotations

from mlmdsl.planner import memory, schedule
from mlmdsl.planner.candidate import Candidate
from mlmdsl.planner.holdings import State
from mlmdsl.planner.moments import Moment
from mlmdsl.planner.pricing import Place
from mlmdsl.planner.stages import Part
from mlmdsl.validation.runs import Run


def footprint(run: Run, place: Place, c: Candidate) -> int:
    """Of the fullest rank."""
    return max(_of_rank(run, place, c, rank, parts) for rank, parts in c.cut.ranks)


def _of_rank(run: Run, place: Place, c: Candidate, rank: int, parts: tuple[Part, ...]) -> int:
    kind = run.memory_kind.lower()
    slack = memory.SLACK[place.bench.setting.device.kind]
    filling, reserves = place.filling(c, rank, parts), "allocated" not in kind
    most = 0.0
    for _, moment, state in place.moments(c, rank, parts):
        rest = _held(place, c, rank, parts, filling.at(moment), moment)
        reserved = slack * rest + filling.unusable(moment)
        most = max(most, _state(place, c, parts, state) + rest + reserved * reserves)
    return int(most if "allocated" in kind or "reserved" in kind else most + place.context_bytes)


def _state(place: Place, c: Candidate, parts: tuple[Part, ...], state: State) -> int:
    """Where sums are not cut up, they and the weights are there all the time."""
    if place.bench.setting.execution.shards_sums or not c.zero:
        return sum(state)
    held, width = [place.bench.holdings.of(part) for part in parts], place.bench.setting.width
    elements, largest = sum(h.elements for h in held), max(h.largest for h in held)
    return sum(state._replace(weights=width * elements, gradients=4 * elements, buffers=width * largest))


def _held(place: Place, c: Candidate, rank: int, parts: tuple[Part, ...], held: memory.Held, moment: Moment) -> float:
    """Without slack."""
    bench = place.bench
    buffers = float(held.buffers)
    if not bench.setting.execution.static_buffers:
        counts = schedule.in_flight(c.schedule, place.pipeline, c.interleave, place.micro_batches(c.micro_batch), rank)
        stages = [bench.part(part, c.micro_batch, c.recompute, place.pipeline > 1).bytes for part in parts]
        buffers = float(sum(stage.received * count for stage, count in zip(stages, counts, strict=True)))
    copies = 0.0
    if moment.turn == "loss":
        last = bench.part(parts[-1], c.micro_batch, c.recompute, False).bytes
        copies = bench.setting.execution.loss_copies * last.loss_transient / 2  # which are two
    return held.activations + held.loss + held.workspace + buffers + copies
