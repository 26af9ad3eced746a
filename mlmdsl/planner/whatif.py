"""`mlmdsl plan --what-if`: the best plan's step where one thing were different."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mlmdsl.frozen import frozen
from mlmdsl.grammar.spec import Cluster, Link, PlanConstraints, Pool, Spec
from mlmdsl.graph.graph import Graph
from mlmdsl.planner import explain
from mlmdsl.planner.plan import Plan, PlanVariables
from mlmdsl.planner.within import best_plan


@frozen
class WhatIf:
    """`change`: what would be different; the best plan then, None where none fits; kind: of the machine, or of the text."""

    change: str
    kind: str  # "machine", "constraint"
    plan: PlanVariables | None
    step_time_s: float | None
    tokens_per_s: float | None


def what_if(spec: Spec, graph: Graph) -> tuple[WhatIf, ...]:
    """A search each."""
    changed = [("machine", *each) for each in _machines(spec)] + [("constraint", *each) for each in _freed(spec)]
    return tuple(_asked(kind, change, other, graph) for kind, change, other in changed)


def _asked(kind: str, change: str, spec: Spec, graph: Graph) -> WhatIf:
    plan = best_plan(spec, graph)
    if plan is None:
        return WhatIf(change=change, kind=kind, plan=None, step_time_s=None, tokens_per_s=None)
    step = plan.predicted.step_time_s
    return WhatIf(change=change, kind=kind, plan=plan.plan, step_time_s=step, tokens_per_s=plan.batch * plan.seq_len / step)


def _machines(spec: Spec) -> Iterator[tuple[str, Spec]]:
    cluster = spec.cluster
    if any(pool.devices_per_node > 1 for pool in cluster.pools):
        pools = tuple(replace(pool, intra=_doubled(pool.intra)) for pool in cluster.pools)
        kinds = dict.fromkeys(pool.intra.kind for pool in cluster.pools)
        yield f"{' and '.join(kinds)} twice as fast", _with(spec, replace(cluster, pools=pools))
    if cluster.inter is not None and sum(pool.nodes for pool in cluster.pools) > 1:
        faster = replace(cluster, inter=_doubled(cluster.inter))
        yield f"{cluster.inter.kind} twice as fast", _with(spec, faster)
    if cluster.inter is not None:
        several = len(cluster.pools) > 1
        for i, pool in enumerate(cluster.pools):
            more = (*cluster.pools[:i], replace(pool, nodes=pool.nodes + 1), *cluster.pools[i + 1 :])
            yield f"one node more{f' of pool {pool.name}' * several}", _pooled(spec, more)
        yield "twice the nodes", _pooled(spec, [replace(pool, nodes=2 * pool.nodes) for pool in cluster.pools])
        if several:
            yield "the pools in reverse order", _pooled(spec, cluster.pools[::-1])
    yield "twice the memory", _with(spec, replace(cluster, pools=tuple(_roomier(cluster))))


def _pooled(spec: Spec, pools: Sequence[Pool]) -> Spec:
    return _with(spec, replace(spec.cluster, pools=tuple(pools)))


def _with(spec: Spec, cluster: Cluster) -> Spec:
    return replace(spec, cluster=cluster)


def _doubled(link: Link) -> Link:
    return replace(link, bytes_per_second=2 * link.bytes_per_second)


def _roomier(cluster: Cluster) -> Iterator[Pool]:
    for pool in cluster.pools:
        device = replace(pool.device, memory_bytes=2 * pool.device.memory_bytes)
        yield replace(pool, device=device)


def _freed(spec: Spec) -> Iterator[tuple[str, Spec]]:
    """Without each constraint of the text."""
    limits = spec.plan
    for pin in limits.pins:
        others = tuple(other for other in limits.pins if other != pin)
        yield f"without pin {explain.pinned(pin)}", _limited(spec, replace(limits, pins=others))
    for rule in limits.rules:
        others = tuple(other for other in limits.rules if other != rule)
        text = " ".join(rule.text.split())
        yield f"without {text}", _limited(spec, replace(limits, rules=others))


def _limited(spec: Spec, limits: PlanConstraints) -> Spec:
    return replace(spec, plan=limits)


def change_of(plan: Plan, other: WhatIf) -> float | None:
    """Share of the plan's step by which it would be longer."""
    return None if other.step_time_s is None else other.step_time_s / plan.predicted.step_time_s - 1
