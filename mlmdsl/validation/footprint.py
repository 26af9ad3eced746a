"""Peak memory as the run's framework keeps it and its table counts it.

torch.cuda.max_memory_allocated counts tensors, max_memory_reserved with what its allocator keeps besides; nvidia-smi and the
like also the device's context and the libraries' buffers.
"""

from __future__ import annotations

from mlmdsl.planner import memory, schedule
from mlmdsl.planner.pricing import Candidate, Place
from mlmdsl.planner.stages import Part
from mlmdsl.validation.runs import Run


def footprint(run: Run, place: Place, c: Candidate) -> int:
    """Of the fullest rank."""
    return max(_of_rank(run, place, c, rank, parts) for rank, parts in c.cut.ranks)


def _of_rank(run: Run, place: Place, c: Candidate, rank: int, parts: tuple[Part, ...]) -> int:
    kind = run.memory_kind.lower()
    slack = memory.SLACK[place.bench.setting.device.kind]
    rest = _held(place, c, rank, parts)
    tensors = _state(place, c, parts) + rest
    if "allocated" in kind:
        return int(tensors)
    reserved = tensors + slack * rest
    return int(reserved if "reserved" in kind else reserved + place.context_bytes)


def _state(place: Place, c: Candidate, parts: tuple[Part, ...]) -> int:
    state = place.state(c, parts)
    if place.bench.setting.execution.shards_sums or not c.zero:
        return sum(state)
    held = [place.bench.holdings.of(part) for part in parts]
    elements, largest = sum(h.elements for h in held), max(h.largest for h in held)
    return sum(state._replace(gradients=4 * elements, buffers=place.bench.setting.width * largest))


def _held(place: Place, c: Candidate, rank: int, parts: tuple[Part, ...]) -> float:
    """Without slack."""
    held, bench = place.held(c, rank, parts), place.bench
    slack = memory.SLACK[bench.setting.device.kind]
    buffers = float(held.buffers)
    if not bench.setting.execution.static_buffers:
        counts = schedule.in_flight(c.schedule, place.pipeline, c.interleave, place.micro_batches(c.micro_batch), rank)
        stages = [bench.part(part, c.micro_batch, c.recompute, place.pipeline > 1).bytes for part in parts]
        buffers = float(sum(stage.received * count for stage, count in zip(stages, counts, strict=True)))
    copies = bench.setting.execution.loss_copies * bench.part(parts[-1], c.micro_batch, c.recompute, False).bytes.loss_transient
    return sum(held) / (1 + slack) - held.buffers + buffers + copies
