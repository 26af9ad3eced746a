"""The lattice of plans that parity is shown for.

Every mesh of {tensor 1, 2, 4} x {pipeline 1, 2, 4} x {data 1, 2, 4} with up to eight ranks, with every ZeRO stage where the
data axis has ranks to divide by, every schedule where there is a pipeline, and every kind of recomputation. What remains goes
round: even and uneven stages, micro-batch sizes (so: how many are accumulated), sequence parallelism, stages inside ranks of
data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, product
from typing import get_args

from mlmdsl.grammar.constraints import ORDERS, USUAL, ZEROS
from mlmdsl.planner.plan import PlanVariables, Recompute, Schedule
from mlmdsl.planner.schedule import V_SHAPED, executable, recomputes, zeros
from tests.parity.models import BATCH

DEGREES = (1, 2, 4)
MAX_RANKS = 8
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


@dataclass(frozen=True)
class Case:
    """A plan, or why there is none."""

    model: str
    variables: PlanVariables
    illegal: str = ""

    @property
    def name(self) -> str:
        v = self.variables
        stages = ",".join(map(str, v.stages))
        sequence = "+sp" if v.sequence_parallel else ""
        schedule = f" {v.schedule} [{stages}]" if v.pipeline > 1 else ""
        context = f" c{v.context}" if v.context > 1 else ""
        ways = v.recompute if isinstance(v.recompute, str) else ",".join(v.recompute)
        recompute = f" recompute {ways}" if ways != "none" else ""
        expert = f" e{v.expert}" if v.expert > 1 else ""
        inside = " inside" if v.order != USUAL else ""
        mesh = f"t{v.tensor}{sequence}{context} p{v.pipeline}{inside} d{v.data}{expert}"
        zero = f"zero{v.zero}" + (f" x{v.replicate}" if v.replicate > 1 else "")
        return f"{self.model} {mesh} {zero} micro{v.micro_batch}{schedule}{recompute}"


def lattice(model: str) -> Iterator[Case]:
    turn = count()
    for tensor, pipeline, data in product(DEGREES, DEGREES, DEGREES):
        if tensor * pipeline * data > MAX_RANKS:
            continue
        schedules: tuple[Schedule, ...] = SCHEDULES if pipeline > 1 else ("1f1b",)
        for zero, schedule, recompute in product(ZEROS if data > 1 else (0,), schedules, RECOMPUTE):
            if zero in zeros(schedule) and recompute in recomputes(schedule):
                yield _case(model, tensor, pipeline, data, zero, schedule, recompute, next(turn))


def _case(
    model: str, tensor: int, pipeline: int, data: int, zero: int, schedule: Schedule, recompute: Recompute, turn: int
) -> Case:
    interleave = 2 if schedule in ("interleaved_1f1b", *V_SHAPED) else 1
    rows = BATCH // data
    sizes = [size for size in (1, 2, 4, 8) if size <= rows and executable(schedule, pipeline, rows // size)]
    variables = PlanVariables(
        tensor=tensor,
        sequence_parallel=tensor > 1 and turn % 3 != 0,
        pipeline=pipeline,
        interleave=interleave,
        schedule=schedule,
        data=data,
        zero=zero,
        micro_batch=sizes[-1 - turn % min(2, len(sizes))] if sizes else 1,
        recompute=recompute,
        stages=stages(pipeline * interleave, uneven=turn % 2 == 0),
        order=ORDERS[turn // 2 % 2] if pipeline > 1 < data else USUAL,
    )
    illegal = "" if sizes else f"{schedule} over {pipeline} stages needs more micro-batches than the {rows} rows of a data rank"
    return Case(model, variables, illegal)


def stages(number: int, *, uneven: bool) -> tuple[int, ...]:
    """Four layers, or one per stage; uneven: the second stage has one more than the first, or two where the first can give
    one."""
    layers = max(4, number)
    even = [layers // number] * number
    if uneven and number > 1:
        even[0], even[1] = max(1, even[0] - 1), even[1] + 1
    return tuple(even)
