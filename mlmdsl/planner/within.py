"""`mlmdsl plan --within "30 days"`: the cheapest cluster of the spec's kind that ends in time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mlmdsl.diagnostics import Diagnostic, UsageError
from mlmdsl.frozen import frozen
from mlmdsl.grammar.spec import Spec
from mlmdsl.graph.graph import Graph
from mlmdsl.planner.assemble import plan_of
from mlmdsl.planner.bench import Setting
from mlmdsl.planner.operation import Bill, Goodput, bill, goodput
from mlmdsl.planner.plan import Plan, PlanVariables, SearchReport
from mlmdsl.planner.search import explore
from mlmdsl.units import quantity

_MOST = 1 << 17  # devices
_PARTS = 8  # of the way from one power of two to the next
_EMPTY = SearchReport(candidates=0, feasible=0, seconds=0.0, rejected=())


@frozen
class Sized:
    """The best plan on so many nodes; goodput and bill: of the whole run."""

    nodes: int
    devices: int
    plan: PlanVariables
    step_time_s: float
    goodput: Goodput
    bill: Bill


@frozen
class Within:
    """cheapest: of the sizes that end in time; None where none of those looked at does. sizes: by nodes."""

    asked_days: float
    cheapest: Sized | None
    sizes: tuple[Sized, ...]
    reason: str = ""


def days_of(text: str) -> float:
    """`30 days`, `36 hours`. Raises UsageError (MLM0750)."""
    number, _, unit = text.strip().partition(" ")
    try:
        found = quantity(float(number.replace("_", "")), unit.strip())
    except ValueError:
        found = None
    if found is None or found.dimension != "seconds" or not 0 < found.value < float("inf"):
        raise UsageError([Diagnostic("MLM0750", f"{text!r} is no time", help='write --within "30 days"')])
    return found.value / 86_400


def within(spec: Spec, graph: Graph, days: float) -> Within:
    """Powers of two of nodes until one is in time, then what lies between it and the one before."""
    if len(spec.cluster.pools) > 1:
        return Within(asked_days=days, cheapest=None, sizes=(), reason="a cluster of several pools has no one size to vary")
    found: dict[int, Sized | None] = {}
    for nodes in _doubling(spec):
        found[nodes] = sized(spec, graph, nodes)
        if _in_time(found[nodes], days):
            for between in _between(nodes):
                found[between] = sized(spec, graph, between)
            break
    sizes = tuple(size for _, size in sorted(found.items()) if size is not None)
    meeting = [size for size in sizes if _in_time(size, days)]
    cheapest = min(meeting, key=lambda size: (_cost(size), size.nodes), default=None)
    return Within(asked_days=days, cheapest=cheapest, sizes=sizes, reason="" if cheapest else _reason(spec, sizes))


def _doubling(spec: Spec) -> Iterator[int]:
    nodes = 1
    while nodes * spec.cluster.pools[0].devices_per_node <= _MOST:
        yield nodes
        if spec.cluster.inter is None:
            return
        nodes *= 2


def _between(nodes: int) -> list[int]:
    half = nodes // 2
    return sorted({half + (nodes - half) * part // _PARTS for part in range(1, _PARTS)} - {half, nodes, 0})


def _in_time(size: Sized | None, days: float) -> bool:
    return size is not None and size.bill.days <= days


def _cost(size: Sized) -> float:
    """USD, or device-hours where nothing has a price."""
    return size.bill.usd if size.bill.usd is not None else size.bill.days * size.devices


def _reason(spec: Spec, sizes: tuple[Sized, ...]) -> str:
    if spec.cluster.inter is None:
        return "one node is not enough, and the cluster names no `inter` link for more"
    return "no size up to 131,072 devices ends in time" if sizes else "no plan fits on any size up to 131,072 devices"


def sized(spec: Spec, graph: Graph, nodes: int) -> Sized | None:
    """The best plan on so many nodes of the spec's cluster; None where none fits."""
    resized = with_nodes(spec, nodes)
    plan = best_plan(resized, graph)
    if plan is None:
        return None
    run = goodput(resized, plan)
    devices = resized.cluster.world_size
    costs = bill(resized, run.train_days)
    return Sized(nodes=nodes, devices=devices, plan=plan.plan, step_time_s=plan.predicted.step_time_s, goodput=run, bill=costs)


def with_nodes(spec: Spec, nodes: int) -> Spec:
    """The first pool with so many nodes."""
    pool, *others = spec.cluster.pools
    pools = (replace(pool, nodes=nodes), *others)
    return replace(spec, cluster=replace(spec.cluster, pools=pools))


def best_plan(spec: Spec, graph: Graph) -> Plan | None:
    """Without runners-up and the search's report."""
    outcome = explore(Setting(spec, graph), spec.plan)
    if not outcome.found:
        return None
    return plan_of(outcome.found[0].place, outcome.found[0].candidate, _EMPTY)
