"""The shipped architectures, tiny: the models of specs/models with small sizes, under plans of every axis.

`python -m tests.parity.families` prints the whole table; a part of it is in every test run.
"""

from __future__ import annotations

import sys

from mlmdsl.diagnostics import PlanError, SpecError
from mlmdsl.grammar.constraints import ORDERS
from mlmdsl.planner.plan import PlanVariables
from tests.parity.curve import compare, train_curve
from tests.parity.lattice import TOLERANCE, one_process
from tests.parity.models import FAMILIES, OTHERS, program_text
from tests.parity.plans import Case

PLANS = (
    PlanVariables(tensor=2, sequence_parallel=True, micro_batch=4, stages=(4,)),
    PlanVariables(pipeline=2, micro_batch=2, stages=(3, 1)),
    PlanVariables(data=2, zero=3, micro_batch=2, recompute="full", stages=(4,)),
    PlanVariables(tensor=2, pipeline=2, data=2, zero=1, micro_batch=2, recompute="selective", stages=(1, 3)),
    PlanVariables(
        tensor=4,
        sequence_parallel=True,
        pipeline=2,
        interleave=2,
        schedule="interleaved_1f1b",
        micro_batch=2,
        stages=(1, 1, 1, 1),
    ),
    PlanVariables(context=2, micro_batch=4, stages=(4,)),
    PlanVariables(
        tensor=2, sequence_parallel=True, context=2, pipeline=2, zero=1, micro_batch=2, recompute="selective", stages=(2, 2)
    ),
)


INSIDE = ORDERS[1]
EXPERT_FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "limited")
EXPERT_PLANS = (
    PlanVariables(data=2, expert=2, zero=3, micro_batch=2, recompute="full", stages=(2,)),
    PlanVariables(data=4, expert=4, micro_batch=2, stages=(2,)),
    PlanVariables(data=4, expert=2, zero=1, micro_batch=1, recompute="selective", stages=(2,)),
    PlanVariables(tensor=2, sequence_parallel=True, pipeline=2, data=2, expert=2, zero=1, micro_batch=2, stages=(1, 1)),
    PlanVariables(pipeline=2, data=4, expert=2, zero=3, micro_batch=1, stages=(1, 1)),
    PlanVariables(
        pipeline=2, data=2, expert=2, zero=1, interleave=2, schedule="dualpipe_v", micro_batch=1, stages=(1, 1, 1, 1)
    ),
    PlanVariables(pipeline=2, data=2, expert=2, interleave=2, schedule="zb_v", micro_batch=1, stages=(1, 1, 1, 1)),
    PlanVariables(context=2, data=2, expert=4, zero=1, micro_batch=2, recompute="selective", stages=(2,)),
    PlanVariables(tensor=2, sequence_parallel=True, data=4, expert=2, zero=3, micro_batch=1, recompute="full", stages=(2,)),
    PlanVariables(pipeline=2, data=2, expert=2, zero=3, micro_batch=2, stages=(1, 1), order=INSIDE),
    PlanVariables(pipeline=2, context=2, data=2, expert=4, zero=1, micro_batch=1, stages=(1, 1), order=INSIDE),
)


def plans_of(family: str) -> tuple[PlanVariables, ...]:
    return (*PLANS, *EXPERT_PLANS) if family in EXPERT_FAMILIES else PLANS


def largest_difference(family: str, variables: PlanVariables) -> float:
    """Of losses, norms and gradients from those of one process."""
    found = train_curve(program_text(family, variables), variables.world_size)
    return compare(one_process(family, sum(variables.stages)), found).largest


def main() -> int:
    """A plan that a family cannot have is printed with the reason."""
    failures = 0
    for family in (*FAMILIES, *OTHERS):
        for variables in plans_of(family):
            name = f"{Case(family, variables).name:90}"
            try:
                difference = largest_difference(family, variables)
            except (SpecError, PlanError) as problem:
                print(f"{name} illegal: {problem}", flush=True)
                continue
            failures += difference >= TOLERANCE
            print(f"{name} {difference:.1e}{'  DIFFERS' * (difference >= TOLERANCE)}", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
