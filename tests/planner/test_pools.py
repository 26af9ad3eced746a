"""Clusters of unlike pools: what stages lie on, how layers are laid on them, what the plan says of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmdsl.compile import compile_spec
from mlmdsl.diagnostics import PlanError
from mlmdsl.grammar.constraints import ORDERS, USUAL
from mlmdsl.grammar.spec import Spec
from mlmdsl.planner.bench import Bench, Setting
from mlmdsl.planner.mesh import Mesh
from mlmdsl.planner.plan import Plan
from mlmdsl.planner.pools import Sites, group_on, mean_peak, pools_of
from mlmdsl.planner.pricing import Place
from mlmdsl.planner.search import search
from mlmdsl.planner.whatif import what_if
from mlmdsl.report.terminal import render_plan
from tests.planner.small import pooled, pooled_text_of, text_of

PIPED = (
    "pin pipeline = 2",
    "pin tensor = 1",
    "pin schedule = 1f1b",
    "pin recompute = none",
    "pin zero = 0",
    "pin micro_batch = 1",
)


def planned(*plan: str, **changes: int | str) -> Plan:
    """The layout is verified on the way."""
    done = compile_spec(pooled_text_of(*plan, **changes), path="/specs/x.mlm", until="plan")
    assert done.plan is not None
    return done.plan


def sites_of(spec: Spec) -> Sites:
    return Sites(spec.cluster, "bf16", None)


# ---- what stages lie on ---------------------------------------------------------------------------------------------


def test_stages_are_runs_of_ranks_and_ranks_fill_the_pools_in_order() -> None:
    spec, _ = pooled(nodes=1, per_node=4, other_nodes=2, other_per_node=4)
    assert pools_of(spec.cluster, 3, 4) == ((0,), (1,), (1,))
    assert pools_of(spec.cluster, 2, 6) == ((0, 1), (1,))
    assert pools_of(spec.cluster, 1, 12) == ((0, 1),)


def test_a_stage_on_both_pools_is_planned_as_the_weakest_in_every_respect() -> None:
    spec, _ = pooled(memory="2 GiB", other_memory="1 GiB", speed=300, bandwidth=100)
    sites = sites_of(spec)
    one, two, both = sites.on((0,)), sites.on((1,)), sites.on((0, 1))
    assert sites.of(4, 2) == (one, one, two, two) and sites.of(1, 8) == (both,) == (sites.weakest,)
    assert both.device.name == "one" and both.kernels.peak == one.kernels.peak < two.kernels.peak
    assert both.capacity_bytes == two.capacity_bytes < one.capacity_bytes
    assert both.device.memory_bytes_per_second == one.device.memory_bytes_per_second < two.device.memory_bytes_per_second
    assert both.network.intra == two.network.intra != one.network.intra


def test_the_peak_of_all_is_the_sum_of_the_pools() -> None:
    spec, _ = pooled(nodes=1, per_node=2, other_nodes=3, other_per_node=2, speed=300)
    assert mean_peak(spec.cluster, "bf16") * 8 == pytest.approx(2 * 100e12 + 6 * 300e12)


@pytest.mark.parametrize("order", ORDERS)
def test_a_plan_names_the_pools_of_each_stage(order: str) -> None:
    """Of two stages a pool each, or both on both."""
    pins = (*PIPED, f"pin order = {order}")
    plan = planned(*pins, nodes=1, per_node=4, other_nodes=1, other_per_node=4, memory="4 GiB", other_memory="2 GiB")
    mesh = plan.plan.mesh(plan.cluster.devices_per_node)
    for stage in range(2):
        ranks = [rank for rank in range(8) if mesh.coordinates(rank)[0] == stage]
        assert [pool.name for pool in plan.cluster.pools_of(stage)] == list(
            dict.fromkeys("one" if r < 4 else "two" for r in ranks)
        )
    least = 2 * 2**30
    assert [plan.cluster.memory_of(stage) for stage in range(2)] == ([2 * least, least] if order == USUAL else [least, least])


@given(
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 4, 6, 8]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_no_group_has_more_members_on_a_node_than_its_time_says(
    nodes: int, per_node: int, other_nodes: int, other_per_node: int, data: st.DataObject
) -> None:
    """With nodes of unlike sizes, too, whichever pools the stage lies on."""
    spec, _ = pooled(nodes=nodes, per_node=per_node, other_nodes=other_nodes, other_per_node=other_per_node)
    sizes = [per_node] * nodes + [other_per_node] * other_nodes
    node_of = [node for node, size in enumerate(sizes) for _ in range(size)]
    world = len(node_of)
    pipeline = data.draw(st.sampled_from([n for n in range(1, world + 1) if world % n == 0]))
    tensor = data.draw(st.sampled_from([n for n in range(1, world // pipeline + 1) if world // pipeline % n == 0]))
    mesh = Mesh(tensor, world // pipeline // tensor, pipeline, 1)
    sites = sites_of(spec).of(pipeline, world // pipeline)
    for axis in ("tensor", "data"):
        for ranks in mesh.groups(axis):
            stage = ranks[0] // (world // pipeline)
            there = [sum(node_of[rank] == node for rank in ranks) for node in {node_of[rank] for rank in ranks}]
            assert group_on(sites[stage], mesh, axis).per_node <= min(there)


def test_alike_pools_make_one_cluster() -> None:
    """Bit for bit."""
    whole = text_of(nodes=2, per_node=4, memory="2 GiB")
    start, end = whole.index("cluster here"), whole.index("train {")
    device = "gpu(memory = 2 GiB, bf16 = 100 TFLOPS, fp32 = 20 TFLOPS, bandwidth = 1 TB/s)"
    pool = f"nodes = 1\n devices_per_node = 4\n device = {device}\n intra = nvlink(bandwidth = 100 GB/s per gpu)"
    cluster = (
        f"cluster here {{ inter = infiniband(bandwidth = 10 GB/s per gpu)\n pool a {{ {pool} }}\n pool b {{ {pool} }}\n}}\n"
    )
    plans = [compile_spec(text, path="/x.mlm", until="plan").plan for text in (whole, whole[:start] + cluster + whole[end:])]
    one, two = (plan for plan in plans if plan is not None)
    assert one.predicted == two.predicted and one.plan == two.plan and one.memory == two.memory
    assert one.alternatives == two.alternatives and one.notes == two.notes
    assert one.cluster == replace(two.cluster, pools=())
    assert [pool.first_rank for pool in two.cluster.pools] == [0, 4]


# ---- layers ---------------------------------------------------------------------------------------------------------


def test_the_faster_pool_gets_more_layers() -> None:
    slow, fast = (planned(*PIPED, speed=speed, memory="4 GiB", other_memory="4 GiB").plan.stages for speed in (40, 300))
    assert slow[0] > slow[1] and fast[0] < fast[1]
    assert sum(slow) == sum(fast) == 6


def test_the_pool_with_less_memory_gets_fewer_layers_where_memory_binds() -> None:
    """No distribution that fits has a faster slowest stage; the plan says which stage is full."""
    rich = planned(*PIPED, memory="4 GiB", other_memory="4 GiB", speed=300)
    poor = planned(*PIPED, memory="4 GiB", other_memory="1250 MiB", speed=300)
    assert poor.plan.stages[1] < rich.plan.stages[1] and sum(poor.plan.stages) == 6
    assert all(stage.total_bytes <= 0.95 * poor.cluster.memory_of(stage.stage) for stage in poor.memory)
    with pytest.raises(PlanError):
        planned(*PIPED, f"pin stages = [{', '.join(map(str, rich.plan.stages))}]", memory="4 GiB", other_memory="1250 MiB")


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved_1f1b", "zb_v", "dualpipe_v"])
def test_every_schedule_times_a_virtual_stage_on_its_ranks_device(schedule: str) -> None:
    """Forward and backward passes of stages with as many layers differ by the device alone."""
    plan = planned(
        "pin pipeline = 2", f"pin schedule = {schedule}", "pin tensor = 4", memory="8 GiB", other_memory="8 GiB", speed=20
    )
    spec, graph = pooled(memory="8 GiB", other_memory="8 GiB", speed=20)
    bench = Setting(spec, graph).shard(4, plan.plan.sequence_parallel)
    assert isinstance(bench, Bench)
    place = Place(bench, 2, 1)
    one, two = (each.speed(plan.plan.micro_batch, 0).layers[0] for each in place.benches)
    assert two > 1.5 * one
    layers = [
        sum(plan.plan.stages[stage] for stage in place.given(plan.plan.stages, plan.plan.schedule).placed[rank])
        for rank in (0, 1)
    ]
    assert layers[0] > layers[1]
    busy = [stage.busy_s / layers[stage.stage] for stage in plan.timeline]
    assert busy[1] > 1.3 * busy[0]


# ---- what the plan says ---------------------------------------------------------------------------------------------


def test_the_drawing_says_what_lies_where() -> None:
    plan = planned(*PIPED, memory="4 GiB", other_memory="2 GiB")
    drawn = render_plan(plan)
    assert "4 x one (1 node of 4)" not in drawn and "on 4 x one (1 node) + 4 x two (1 node)" in drawn
    assert "stages lie on the pools one (one) and two (two)" in drawn
    lines = [line for line in drawn.splitlines() if "layers" in line and "stage" in line]
    assert [line.rsplit(" on ")[1] for line in lines[:2]] == ["one", "two"]
    assert "per device at its peak, of 4.0 GiB and 2.0 GiB" in drawn
    share = plan.memory[1].total_bytes / 2**31
    assert f"{100 * share:.0f} %" in next(
        line for line in drawn.splitlines() if line.startswith("        stage 1  ") and "GiB" in line
    )


def test_mfu_is_a_share_of_all_peaks() -> None:
    plan = planned(*PIPED, memory="4 GiB", other_memory="4 GiB", speed=300)
    rate = plan.model.flops_per_token * plan.batch * plan.seq_len / plan.predicted.step_time_s
    assert plan.predicted.mfu == pytest.approx(rate / (4 * 100e12 + 4 * 300e12))
    assert any("sum of all pools' peaks" in note for note in plan.notes)


ROOMY: dict[str, int | str] = {"memory": "4 GiB", "other_memory": "4 GiB", "batch": 12}
ODD: dict[str, int | str] = {"nodes": 1, "per_node": 2, "other_nodes": 2, "other_per_node": 2}


def test_a_note_says_which_ranks_go_at_the_pace_of_the_weakest() -> None:
    alone = planned("pin pipeline = 1", **ROOMY)
    said = "every rank is planned as the weakest of what it lies on, pools one and two"
    assert any(note.startswith(said) for note in alone.notes)
    each = planned("pin pipeline = 3", **ROOMY, **ODD)
    assert [pool.stages for pool in each.cluster.pools] == [(0,), (1, 2)]
    assert not any("weakest" in note for note in each.notes)
    straddling = planned("pin pipeline = 2", **ROOMY, **ODD)
    assert [pool.stages for pool in straddling.cluster.pools] == [(0,), (0, 1)]
    assert any(note.startswith("stage 0 is planned as the weakest") for note in straddling.notes)


def test_a_note_says_where_the_pools_would_better_stand_the_other_way_round() -> None:
    """The last stage has the head to compute, too."""
    pins = ("pin pipeline = 2", "pin schedule = 1f1b", "pin micro_batch = 1", "pin zero = 0", "pin tensor = 4")
    spec, graph = pooled(*pins, memory="4 GiB", other_memory="4 GiB", speed=100)
    turned = replace(spec, cluster=replace(spec.cluster, pools=spec.cluster.pools[::-1]))
    there, back = search(spec, graph), search(turned, graph)
    assert back.predicted.step_time_s < 0.99 * there.predicted.step_time_s
    assert any("in reverse order the same mesh would take" in note for note in there.notes)
    assert not any("in reverse order" in note for note in back.notes)
    asked = {each.change: each.step_time_s for each in what_if(spec, graph)}
    assert asked["the pools in reverse order"] == back.predicted.step_time_s
    assert {"one node more of pool one", "one node more of pool two", "twice the nodes"} <= asked.keys()


def test_what_does_not_fit_is_told_by_its_stage() -> None:
    with pytest.raises(PlanError) as refused:
        planned(*PIPED, memory="4 GiB", other_memory="900 MiB")
    [diagnostic] = refused.value.diagnostics
    assert diagnostic.code == "MLM0601" and "4 x one + 4 x two" in diagnostic.message
    assert diagnostic.help is not None and "of stage 1's two" in diagnostic.help
