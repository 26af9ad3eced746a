"""The search against every legal plan by plain loops; constraints, and what a plan says of itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from mlmdsl.grammar.constraints import ORDERS, SCHEDULES, USUAL
from mlmdsl.planner.assemble import ledger
from mlmdsl.planner.bench import Setting
from mlmdsl.planner.plan import Plan, PlanVariables
from mlmdsl.planner.search import explore, search, single_device
from mlmdsl.planner.verify_layout import verify_layout
from mlmdsl.report.terminal import render_plan
from tests.planner.small import ALIKE, exhausted, fits, legal, planned, problem

ROOT = Path(__file__).resolve().parents[2]
WISH = 1.1  # what a plan's time is multiplied with for each wish that it does not keep
ROOM = "1300 MiB"  # four in ten plans fit, of every schedule

# name: how the cluster and the batch differ
CASES: dict[str, dict[str, int | str]] = {
    "plain": {},
    "tight": {"memory": "1000 MiB"},
    "roomy": {"memory": "8 GiB", "batch": 64},
    "slow links": {"bandwidth": 1, "batch": 8},
    "one node": {"nodes": 1, "per_node": 8, "memory": "1100 MiB"},
    "a few rows": {"nodes": 1, "per_node": 8, "batch": 2, "memory": "4 GiB"},
    "six devices": {"nodes": 1, "per_node": 6, "batch": 12},
    "odd batch": {"nodes": 1, "per_node": 4, "batch": 9, "memory": "4 GiB"},
}


def shortest(plan: Plan) -> float:
    return plan.predicted.step_time_s


# ---- the best of all ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_best_of_all_plans(name: str) -> None:
    spec, graph = problem(**CASES[name])
    every = list(legal(spec, graph))
    fitting = [(place.times(c).total, place, c) for place, c in every if fits(place, c)]
    plan = search(*problem(ALIKE, **CASES[name]))
    assert shortest(plan) == pytest.approx(min(seconds for seconds, _, _ in fitting), rel=1e-8)
    assert any(shortest(plan) == seconds and plan.plan.described == _described(c) for seconds, _, c in fitting)
    assert shortest(search(spec, graph)) <= shortest(plan)
    assert all(r.closest for r in plan.search.rejected)
    left = exhausted(*problem(ALIKE, **CASES[name]))
    refused = {reason: tally.count for (reason, _), tally in left.rejected.items()}
    assert len(left.found) == len(fitting)
    assert refused.pop("memory", 0) == len(every) - len(fitting)
    assert left.candidates == len(every) + sum(refused.values())
    assert plan.search.candidates == plan.search.feasible + plan.search.outpaced + sum(r.count for r in plan.search.rejected)


def _described(c: Any) -> str:
    return PlanVariables(
        tensor=c.tensor, sequence_parallel=c.sequence_parallel, pipeline=c.pipeline, data=c.data, micro_batch=c.micro_batch,
        schedule=c.schedule, interleave=c.interleave, recompute=("none", "selective", "full")[c.recompute], zero=c.zero,
        replicate=c.replicate, stages=c.cut.stages, order=c.order,
    ).described  # fmt: skip


@pytest.mark.parametrize("name", ["plain", "slow links", "a few rows"])
def test_minimize_memory(name: str) -> None:
    spec, graph = problem("minimize memory", **CASES[name])
    least = min(place.peak_bytes(c) for place, c in legal(spec, graph))
    assert max(search(spec, graph).predicted.peak_memory_bytes) == least


def test_minimize_cost_is_time_on_a_given_cluster() -> None:
    assert planned("minimize cost").plan == planned().plan


@pytest.mark.parametrize("bandwidth", [1, 100])
@pytest.mark.parametrize("layers", [9, 12, 17, 24])
def test_degrees_of_interleaving_that_are_left_out_gain_little(layers: int, bandwidth: int) -> None:
    """Of those whose largest virtual stage has as many layers only the least is tried."""
    spec, graph = problem("pin pipeline = 2", "pin tensor = 2", memory="8 GiB", bandwidth=bandwidth)
    regions = tuple(replace(region, count=layers) if region.repeated else region for region in graph.regions)
    longer = replace(graph, regions=regions)
    every = [(p.times(c).total, c) for p, c in legal(spec, longer) if (c.pipeline, c.tensor) == (2, 2) and fits(p, c)]
    best = min(seconds for seconds, _ in every)
    assert best * (1 - 1e-9) <= shortest(search(spec, longer)) <= 1.03 * best


@pytest.mark.parametrize("layers", [16, 19])
def test_the_fullest_rank_is_that_of_the_ledger(layers: int) -> None:
    """Also where several ranks run alike stages."""
    spec, graph = problem(batch=32)
    regions = tuple(replace(region, count=layers) if region.repeated else region for region in graph.regions)
    longer = replace(graph, regions=regions)
    counted: Counter[str] = Counter()
    for place, c in legal(spec, longer):
        if place.pipeline >= 4 and c.zero in (0, 1) and c.interleave < 4:
            assert place.peak_bytes(c) == max(stage.total_bytes for stage in ledger(place, c)), c
            counted[c.schedule] += 1
    assert min(counted[schedule] for schedule in SCHEDULES) >= 10


# ---- layer by layer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pins", "size"),
    [
        ((), dict(nodes=2, per_node=4, memory="1040 MiB")),
        ((), dict(nodes=1, per_node=2, memory="1160 MiB")),
        (("pin pipeline = 2", "pin micro_batch = 2"), dict(nodes=1, per_node=4, memory="1220 MiB")),
    ],
)
def test_the_fewest_layers_are_recomputed(pins: tuple[str, ...], size: dict[str, Any]) -> None:
    """As all counts of each stage's first layers say."""
    spec, graph = problem(*pins, **size)
    plan = search(spec, graph)
    alike = shortest(planned(ALIKE, *pins, **size))
    times = [alike]
    for place, c in legal(spec, graph):
        if pins and (c.pipeline, c.micro_batch) != (2, 2):
            continue
        for mild in range(c.recompute if fits(place, c) else 0):
            if place.times(c._replace(recompute=mild)).total >= alike:
                continue
            for counts in product(*(range(size + 1) for size in c.cut.stages)):
                several = zip(counts, c.cut.stages, strict=True)
                modes = tuple(mode for n, size in several for mode in (*(c.recompute,) * n, *(mild,) * (size - n)))
                if len(set(modes)) > 1 and fits(place, mixed := c._replace(modes=modes)):
                    times.append(place.times(mixed).total)
    assert isinstance(plan.plan.recompute, tuple)
    assert min(times) == pytest.approx(shortest(plan), rel=1e-8) and shortest(plan) < 0.985 * alike


def test_layers_are_recomputed_as_they_are_pinned() -> None:
    words = ("none", "full", "selective", "none", "none", "full")
    pins = (f"pin recompute = [{', '.join(words)}]", "pin pipeline = 2", "pin schedule = 1f1b")
    several = planned(*pins, memory="4 GiB")
    assert several.plan.recompute == words and "full of 2 layers, selective of 1 layer," in several.plan.described
    none, full = (planned(f"pin recompute = {way}", *pins[1:], memory="4 GiB") for way in ("none", "full"))
    assert none.predicted.breakdown_s["recompute"] == 0 < several.predicted.breakdown_s["recompute"]
    assert several.predicted.breakdown_s["recompute"] < full.predicted.breakdown_s["recompute"]


# ---- pins and rules -------------------------------------------------------------------------------------------------

Keeps = Callable[[PlanVariables], bool]
PINS: dict[str, Keeps] = {
    "pin tensor = 2": lambda v: v.tensor == 2,
    "pin pipeline = 2": lambda v: v.pipeline == 2,
    "pin data = 4": lambda v: v.data == 4,
    "pin zero = 3": lambda v: v.zero == 3,
    "pin micro_batch = 1": lambda v: v.micro_batch == 1,
    "pin schedule = interleaved_1f1b": lambda v: v.schedule == "interleaved_1f1b" and v.interleave > 1 and v.pipeline > 1,
    "pin interleave = 3": lambda v: v.interleave == 3,
    "pin recompute = full": lambda v: v.recompute == "full",
    "pin sequence_parallel = true": lambda v: v.sequence_parallel,
    "pin stages = [2, 4]": lambda v: v.stages == (2, 4),
}
RULES: dict[str, Keeps] = {
    "require pipeline >= 2 and zero in {0, 1}": lambda v: v.pipeline >= 2 and v.zero in (0, 1),
    "forbid data == 8 or micro_batch > 1": lambda v: v.data != 8 and v.micro_batch <= 1,
    "require tensor * pipeline == 4": lambda v: v.tensor * v.pipeline == 4,
    "require recompute in [selective, full]": lambda v: v.recompute in ("selective", "full"),
    "require not sequence_parallel and tensor > 1": lambda v: not v.sequence_parallel and v.tensor > 1,
    "require stages == [3, 3]": lambda v: v.stages == (3, 3),
    "forbid schedule != gpipe": lambda v: v.schedule == "gpipe",
}


@pytest.mark.parametrize("line", [*PINS, *RULES])
def test_constraints_hold_and_the_plan_is_the_best_of_those_that_keep_them(line: str) -> None:
    """Also of every runner-up."""
    keeps = (PINS | RULES)[line]
    plan = planned(line, ALIKE, memory=ROOM)
    assert all(keeps(v) for v in (plan.plan, *(a.plan for a in plan.alternatives)))
    if not line.startswith("pin stages"):
        spec, graph = problem(memory=ROOM)
        found = [p.times(c).total for p, c in legal(spec, graph) if fits(p, c) and keeps(_variables(c))]
        assert shortest(plan) == pytest.approx(min(found), rel=1e-8)
        if line in RULES:
            assert plan.search.feasible <= len(found) == len(exhausted(*problem(line, ALIKE, memory=ROOM)).found)


def _variables(c: Any) -> PlanVariables:
    words = c._asdict()
    cut, _ = words.pop("cut"), words.pop("modes")
    return PlanVariables(**{**words, "recompute": c.recomputed}, stages=cut.stages)


def test_rules_over_what_plans_cost() -> None:
    free = planned()
    limit = max(free.predicted.peak_memory_bytes) - 1
    small = planned(f"require memory <= {limit} B")
    assert max(small.predicted.peak_memory_bytes) <= limit and shortest(small) >= shortest(free)
    busy = planned("require bubble >= 0.1")
    assert busy.predicted.bubble_fraction >= 0.1 and busy.plan.pipeline > 1
    slow = planned(f"require step_time >= {shortest(free) * 2} s")
    assert all(p.predicted.step_time_s >= shortest(free) * 2 for p in (slow, *slow.alternatives))
    idle = planned(f"forbid mfu > {free.predicted.mfu / 2}")
    assert all(p.predicted.mfu <= free.predicted.mfu / 2 for p in (idle, *idle.alternatives))


# ---- wishes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "keeps"),
    [
        ("prefer zero == 3", lambda v: v.zero == 3),
        ("prefer tensor == 2", lambda v: v.tensor == 2),
        ("avoid data == 8", lambda v: v.data != 8),
        ("prefer recompute == full", lambda v: v.recompute == "full"),
        ("prefer schedule == gpipe", lambda v: v.schedule == "gpipe"),
    ],
)
def test_a_wish_is_granted_where_it_costs_a_tenth_at_most(line: str, keeps: Keeps) -> None:
    plan = planned(ALIKE, line, memory=ROOM)
    spec, graph = problem(memory=ROOM)
    found = [(p.times(c).total, keeps(_variables(c))) for p, c in legal(spec, graph) if fits(p, c)]
    best = min(seconds for seconds, _ in found)
    keeping = min(seconds for seconds, kept in found if kept)
    (wish,) = plan.soft
    assert wish.text == line and wish.price_s == pytest.approx(keeping - best, abs=1e-9)
    assert wish.kept == keeps(plan.plan) == (keeping <= best * WISH)
    assert shortest(plan) == pytest.approx(keeping if wish.kept else best, rel=1e-8)


def test_a_wish_that_no_plan_keeps_has_no_price() -> None:
    (wish,) = planned("prefer pipeline == 5").soft
    assert (wish.kept, wish.price_s) == (False, None)


def test_wishes_are_weighed_together() -> None:
    spec, graph = problem("prefer zero == 3", "avoid recompute == none", "prefer micro_batch == 1")
    outcome = explore(Setting(spec, graph), spec.plan)
    best = outcome.found[0]
    assert best.order() == min(found.order() for found in outcome.found)
    assert [wish.kept for wish in search(spec, graph).soft] == [not best.broken & 1, not best.broken & 2, not best.broken & 4]


# ---- the same every time --------------------------------------------------------------------------------------------


def test_copies_that_are_left_out_gain_nothing() -> None:
    spec, graph = problem()
    best = shortest(search(spec, graph))
    others = (
        (place, c._replace(replicate=n))
        for place, c in legal(spec, graph)
        for n in range(2, c.data)
        if c.zero and c.replicate == 1 and c.data % n == 0
    )
    assert all(place.times(c).total >= best for place, c in others if fits(place, c))


def test_copies_of_shards_spare_slow_links() -> None:
    """Four nodes of two devices without anything but data parallelism: what is sent for every micro-batch stays in the node."""
    pins = ("pin tensor = 1", "pin pipeline = 1", "pin micro_batch = 1", "pin zero = 3")
    size = dict(nodes=4, per_node=2, batch=64, memory="4 GiB")
    alone, several = planned(*pins, "pin replicate = 1", **size), planned(*pins, **size)
    assert several.plan.replicate == 4 and shortest(several) < 0.95 * shortest(alone)
    assert planned(*pins, "pin replicate = 2", **size).plan.replicate == 2
    assert planned(*pins, "avoid replicate.crosses_nodes", **size).soft[0].price_s is not None


# ---- the order of ranks ---------------------------------------------------------------------------------------------

_MANY = dict(nodes=2, per_node=4, batch=256, memory="4 GiB")  # activations over a slow network, for few gradients


def test_stages_share_a_node_where_they_send_much() -> None:
    """Two stages, four replicas: between nodes either activations of every micro-batch travel, or gradients once."""
    inside, usual = (planned("pin pipeline = 2", f"pin order = {order}", **_MANY) for order in reversed(ORDERS))
    chosen = planned("pin pipeline = 2", **_MANY)
    assert chosen.plan == inside.plan and chosen.plan.order == "data_pipeline_context_tensor"
    assert shortest(chosen) < 0.92 * shortest(usual)
    assert (
        inside.cluster.links["pipeline"] == usual.cluster.links["data"] and inside.cluster.links["pipeline"]["link"] == "nvlink"
    )
    assert inside.cluster.links["data"] == usual.cluster.links["pipeline"]
    assert inside.predicted.breakdown_s["pipeline"] < 0.25 * usual.predicted.breakdown_s["pipeline"]
    preview = render_plan(chosen)
    assert "pipeline 2 x data 4, data outermost, interleaved_1f1b" in preview
    assert re.search(r"stage 0 +0 +2 +4 +6 .*\n.*stage 1 +1 +3 +5 +7 ", preview)
    said = " ".join(chosen.notes)
    assert "share a node and send over nvlink at 100 GB/s; in the usual order of ranks" in said
    longer = re.search(r"over infiniband at 10 GB/s, and a step of this plan take ([0-9.]+) % longer", said)
    same = planned(pins=[*_pins(chosen.plan), f"order={USUAL}"], **_MANY)
    assert longer and float(longer[1]) == pytest.approx(100 * (shortest(same) / shortest(chosen) - 1), abs=0.6)
    assert "outermost" not in usual.plan.described and not any("order of ranks" in note for note in usual.notes)


def test_replicas_share_a_node_where_gradients_weigh_more() -> None:
    """The same cluster with few rows."""
    chosen = planned("pin pipeline = 2", **_MANY | {"batch": 8})
    inside = planned("pin pipeline = 2", f"pin order = {ORDERS[1]}", **_MANY | {"batch": 8})
    assert chosen.plan.order == USUAL and shortest(chosen) < shortest(inside)


@pytest.mark.parametrize("size", [dict(nodes=4, per_node=2), dict(nodes=3, per_node=4, batch=12), dict(nodes=2, per_node=6)])
def test_orders_that_are_left_out_gain_nothing(size: dict[str, Any]) -> None:
    """With the same degrees, copies and schedule."""
    spec, graph = problem(memory="4 GiB", **size)
    inside = {(c.tensor, c.pipeline) for _, c in legal(spec, graph) if c.order != USUAL}
    counted = 0
    for place, c in legal(spec, graph):
        if c.pipeline > 1 and (c.tensor, c.pipeline) not in inside:
            other = replace(place, order=ORDERS[1], _exchanges={})
            assert other.times(c._replace(order=ORDERS[1])).total >= place.times(c).total * (1 - 1e-9)
            counted += 1
    assert counted > 100


def test_either_order_may_be_pinned() -> None:
    for pins in (("pin pipeline = 1",), ("pin pipeline = 4",), ("pin pipeline = 2", "pin tensor = 4")):
        plan = planned(*pins, f"pin order = {ORDERS[1]}", memory="4 GiB")
        assert plan.plan.order == ORDERS[1] and all(a.plan.order == ORDERS[1] for a in plan.alternatives)
    assert planned("pin pipeline = 2", f"forbid order == {ORDERS[1]}", **_MANY).plan.order == USUAL
    (wish,) = planned("pin pipeline = 2", "avoid pipeline.crosses_nodes", **_MANY).soft
    assert (wish.kept, wish.price_s) == (True, 0.0)


_WISHES = ("prefer zero == 3", "avoid tensor.crosses_nodes")
_PRINTED = f"from tests.planner.small import planned; print(planned(*{_WISHES!r}).saved().to_json())"


def test_the_same_text_gives_the_same_bytes() -> None:
    mine = planned(*_WISHES).saved().to_json() + "\n"
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", _PRINTED]
        assert subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout == mine


# ---- what a plan says of itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("line", ["", "pin pipeline = 2", "pin zero = 3", "pin recompute = full"])
def test_a_plan_adds_up(name: str, line: str) -> None:
    spec, graph = problem(*filter(None, [line]), **CASES[name] | {"memory": "8 GiB"})
    plan = search(spec, graph)
    verify_layout(graph, plan)
    v, p = plan.plan, plan.predicted
    assert v.world_size == spec.cluster.world_size and sum(v.stages) == graph.layers
    assert sum(p.breakdown_s.values()) == pytest.approx(p.step_time_s, rel=1e-9)
    assert min(p.breakdown_s.values()) >= -1e-12
    assert p.peak_memory_bytes == tuple(entry.total_bytes for entry in plan.memory) and len(plan.memory) == v.pipeline
    assert 0 <= p.bubble_fraction < 1 and (v.pipeline > 1 or p.bubble_fraction == 0)
    assert p.tokens_per_s_per_device == pytest.approx(plan.batch * plan.seq_len / p.step_time_s / v.world_size)
    assert len(plan.timeline) == v.pipeline and sum(stage.layers for stage in plan.timeline) == graph.layers


def _pins(v: PlanVariables) -> list[str]:
    names = ("context", "expert")
    values = asdict(v).items()
    written = ((name, f"[{', '.join(map(str, x))}]" if isinstance(x, tuple) else str(x).lower()) for name, x in values)
    return [f"{name}={text}" for name, text in written if name not in names]


@pytest.mark.parametrize("name", CASES)
def test_runners_up_are_what_pinning_them_gives(name: str) -> None:
    plan = planned(**CASES[name])
    times = [a.predicted.step_time_s for a in plan.alternatives]
    assert times == sorted(times) and len(times) == min(5, plan.search.feasible - 1)
    assert all(seconds >= shortest(plan) for seconds in times)
    for alternative in plan.alternatives:
        pinned = planned(pins=_pins(alternative.plan), **CASES[name])
        assert pinned.plan == alternative.plan and pinned.predicted == alternative.predicted
    meshes = {(v.tensor, v.pipeline, v.data) for v in (plan.plan, *(a.plan for a in plan.alternatives))}
    spec, graph = problem(**CASES[name])
    every = {(c.tensor, c.pipeline, c.data) for p, c in legal(spec, graph) if fits(p, c)}
    assert len(meshes) == min(6, len(every))


def test_runners_up_are_the_best_of_their_mesh() -> None:
    spec, graph = problem()
    plan = planned(ALIKE)
    for alternative in plan.alternatives:
        mesh = (alternative.plan.tensor, alternative.plan.pipeline, alternative.plan.data)
        times = [p.times(c).total for p, c in legal(spec, graph) if (c.tensor, c.pipeline, c.data) == mesh and fits(p, c)]
        assert alternative.predicted.step_time_s == pytest.approx(min(times), rel=1e-8)


def test_more_memory_is_never_slower() -> None:
    times = [shortest(planned(memory=f"{size} MiB")) for size in (1000, 1100, 1200, 1500, 4000, 16000)]
    assert times == sorted(times, reverse=True) and times[0] > times[-1]


def test_a_single_device_ignores_cluster_and_memory() -> None:
    spec, graph = problem(memory="100 MiB")
    plan = single_device(spec, graph)
    assert plan.plan.world_size == 1 and plan.collectives == () and plan.plan.stages == (6,)
    verify_layout(graph, plan)
