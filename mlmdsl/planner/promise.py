"""What a plan promises of one rank's step beside what was measured of its program: `mlmdsl verify`.

Collectives are told apart by kind, the ranks of their group and bytes; their counts and the FLOPs of matrix products are to
agree exactly, the peak of memory within TOLERANCE. The ledger's figure is that of tensors: without device context and what the
allocator loses, at the moment when they are the most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from mlmdsl.frozen import frozen
from mlmdsl.planner.plan import Plan, PlanVariables, StageMemory
from mlmdsl.runtime.measured import Heard, Measured

TOLERANCE = 0.05  # of the peak of memory

Said = tuple[str, tuple[int, ...], int]  # kind, ranks, bytes


@frozen
class Row:
    """Calls that are alike, planned and found in one step."""

    kind: str
    axis: str
    ranks: tuple[int, ...]
    bytes: int
    planned: int
    found: int

    @property
    def agrees(self) -> bool:
        return self.planned == self.found


@frozen
class Verdict:
    """Memory in bytes of live tensors; `moment` is that of the peak that was found, `parts` what was alive then."""

    rank: int
    world_size: int
    stage: int
    collectives: tuple[Row, ...]
    planned_flops: float
    found_flops: float
    planned_peak_bytes: int
    found_peak_bytes: int
    planned_parts: dict[str, int]
    found_parts: dict[str, int]
    moment: str

    @property
    def flops_agree(self) -> bool:
        return self.planned_flops == self.found_flops

    @property
    def memory_error(self) -> float:
        return self.planned_peak_bytes / self.found_peak_bytes - 1

    @property
    def memory_agrees(self) -> bool:
        return abs(self.memory_error) <= TOLERANCE

    @property
    def agrees(self) -> bool:
        return all(row.agrees for row in self.collectives) and self.flops_agree and self.memory_agrees


def compare(plan: Plan, rank: int, measured: Measured) -> Verdict:
    v = plan.plan
    stage = v.mesh(v.world_size).coordinates(rank)[0]
    ledger = (plan.tensors or plan.memory)[stage]  # plans of earlier versions lack them
    parts = _parts(ledger)
    return Verdict(
        rank=rank,
        world_size=v.world_size,
        stage=stage,
        collectives=_rows(plan, stage, rank, measured.collectives),
        planned_flops=plan.flops[stage],
        found_flops=measured.flops,
        planned_peak_bytes=sum(parts.values()),
        found_peak_bytes=measured.peak_bytes,
        planned_parts=parts,
        found_parts=dict(measured.parts),
        moment=measured.moment,
    )


def group(v: PlanVariables, axis: str, rank: int) -> tuple[int, ...]:
    """The ranks that `rank` makes collectives over `axis` with."""
    return v.mesh(v.world_size).ranks(axis, rank)


def _rows(plan: Plan, stage: int, rank: int, heard: Iterable[Heard]) -> tuple[Row, ...]:
    v = plan.plan
    names: dict[tuple[int, ...], str] = {}
    planned, found = Counter[Said](), Counter[Said]()
    for item in plan.collectives:
        if item.stage == stage and item.kind != "split":
            ranks = group(v, item.axis, rank)
            names.setdefault(ranks, item.axis)
            planned[item.kind, ranks, item.bytes] += item.count
    column = group(v, "pipeline", rank)
    for call in heard:  # weights that some stages share are summed over those: a part of the pipeline's ranks
        tied = call.kind == "all_reduce" and set(call.ranks) < set(column)
        found[call.kind, column if tied else call.ranks, call.bytes] += call.count
    keys = sorted({**planned, **found}, key=lambda key: (names.get(key[1], "another"), key[0], -key[2]))
    return tuple(
        Row(kind=k, axis=names.get(r, "another"), ranks=r, bytes=b, planned=planned[k, r, b], found=found[k, r, b])
        for k, r, b in keys
    )


def _parts(ledger: StageMemory) -> dict[str, int]:
    """Of tensors, as the ledger has them."""
    return {
        "weights": ledger.weights_bytes + ledger.unsharded_weights_bytes,
        "master weights": ledger.master_weights_bytes,
        "gradients": ledger.gradients_bytes,
        "optimizer": ledger.optimizer_bytes,
        "activations": ledger.activations_bytes,
        "logits and loss": ledger.logits_and_loss_bytes,
        "buffers": ledger.buffers_bytes,
        "one operation": ledger.workspace_bytes - ledger.slack_bytes,
    }
