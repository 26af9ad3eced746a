"""How far to trust a predicted step: the band of published runs (accuracy.json, by benchmarks/accuracy.py), and whether the
device's kernels were measured."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from mlmdsl.frozen import frozen
from mlmdsl.grammar.spec import Spec
from mlmdsl.planner.compute import curves_of
from mlmdsl.planner.plan import Plan


@frozen
class Accuracy:
    """low_s and high_s: four of five published runs were measured within this band about their prediction; runs: how many;
    measured: whether kernels of this very device were, by `origin`."""

    low_s: float
    high_s: float
    runs: int
    sources: tuple[str, ...]
    measured: bool
    origin: str


@cache
def _bands() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "accuracy.json").read_text(encoding="utf-8"))


def accuracy(spec: Spec, plan: Plan) -> Accuracy:
    """Of the weakest curves among the cluster's devices."""
    bands = _bands()
    band = bands["many_nodes" if plan.cluster.nodes > 1 else "one_node"]
    curves = [curves_of(pool.device) for pool in spec.cluster.pools]
    weakest = min(curves, key=lambda each: each.measured)
    step = plan.predicted.step_time_s
    return Accuracy(
        low_s=step / band["high"],
        high_s=step / band["low"],
        runs=band["runs"],
        sources=tuple(bands["origin"]),
        measured=weakest.measured,
        origin=weakest.origin,
    )
