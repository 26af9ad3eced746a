"""`python -m tests.parity.lattice`: every plan of the lattice against one process, one line each. Exit status 1 where a plan
differs by 1e-5 or more, or fails.

    --only WORDS    cases whose name has all of them ("gpt", "t4", "zero3", ...)
    --every N       one case in N
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import lru_cache

from mlmdsl.planner.plan import PlanVariables
from tests.parity.curve import Curve, compare, train_curve
from tests.parity.models import BATCH, MODELS, program_text
from tests.parity.plans import Case, lattice
from tests.parity.ranks import RankFailed

TOLERANCE = 1e-5


@lru_cache
def one_process(model: str, layers: int) -> Curve:
    """Everything at once: one rank, one micro-batch."""
    return train_curve(program_text(model, PlanVariables(stages=(layers,), micro_batch=BATCH)), 1)


def run(case: Case) -> tuple[bool, str]:
    """Whether the case holds, and its line."""
    if case.illegal:
        return True, f"illegal: {case.illegal}"
    started = time.monotonic()
    try:
        found = train_curve(program_text(case.model, case.variables), case.variables.world_size, timeout=300.0)
    except RankFailed as error:
        return False, f"FAILED\n{error}"
    d = compare(one_process(case.model, sum(case.variables.stages)), found)
    holds = d.largest < TOLERANCE
    errors = f"loss {d.loss:.1e}  norm {d.norm:.1e}  validation {d.validation:.1e}  gradients {d.gradient:.1e}"
    return holds, f"{errors}  {time.monotonic() - started:5.1f} s" + ("" if holds else f"  DIFFERS at {d.worst}")


def main() -> int:
    options = _options()
    cases = [case for model in MODELS for case in lattice(model)]
    chosen = [case for case in cases if all(word in case.name.split() or word in case.name for word in options.only)]
    chosen = chosen[:: options.every]
    width = max((len(case.name) for case in chosen), default=0)
    failures: list[str] = []
    for case in chosen:
        holds, line = run(case)
        print(f"{case.name:{width}}  {line}", flush=True)
        failures += [] if holds else [case.name]
    illegal = sum(bool(case.illegal) for case in chosen)
    print(f"{len(chosen)} plans: {len(chosen) - illegal - len(failures)} hold, {len(failures)} do not, {illegal} are illegal")
    print("relative differences from one process over 5 steps; gradients: largest of all weights, after them")
    print("\n".join(f"does not hold: {name}" for name in failures))
    return 1 if failures else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD")
    parser.add_argument("--every", type=int, default=1, metavar="N")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
