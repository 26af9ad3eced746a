"""The drawn plan: golden text, 80 columns, plain when piped."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest

from mlmdsl.grammar.constraints import Order
from mlmdsl.planner.plan import (
    Alternative,
    ClusterFacts,
    ModelFacts,
    Plan,
    PlanVariables,
    Predicted,
    Rejection,
    SearchReport,
    SoftConstraint,
    StageMemory,
)
from mlmdsl.report.terminal import render_plan, render_summary

GIB = 2**30


def _memory(stage: int, activations: int, logits: int) -> StageMemory:
    parts = {
        "weights_bytes": 6 * GIB,
        "master_weights_bytes": 0,
        "gradients_bytes": 12 * GIB,
        "optimizer_bytes": GIB,
        "activations_bytes": activations * GIB,
        "logits_and_loss_bytes": logits * GIB,
        "unsharded_weights_bytes": 0,
        "buffers_bytes": GIB,
        "workspace_bytes": GIB,
        "context_bytes": GIB // 2,
    }
    return StageMemory(stage=stage, **parts, total_bytes=sum(parts.values()))


def large_plan() -> Plan:
    """Made up: 16 stages on 16,384 devices, every section of the drawing filled."""
    chosen = PlanVariables(
        tensor=8,
        sequence_parallel=True,
        pipeline=16,
        data=128,
        schedule="1f1b",
        zero=1,
        micro_batch=1,
        recompute="selective",
        stages=(7, *(8,) * 14, 7),
    )
    memory = tuple(_memory(s, 40 - 2 * s, 2 * (s == 15)) for s in range(16))
    parts = {"compute": 5.9, "recompute": 0.5, "tensor": 1.2, "pipeline": 0.1, "data": 0.3, "optimizer": 0.05, "bubble": 1.1}
    predicted = Predicted(
        step_time_s=9.15,
        tokens_per_s_per_device=110,
        model_tflops_per_device=402.1,
        mfu=0.406,
        bubble_fraction=0.12,
        peak_memory_bytes=tuple(m.total_bytes for m in memory),
        train_days=60.2,
        cost_usd=2.1e7,
        energy_kwh=1.2e7,
        breakdown_s=parts,
    )
    slower = replace(predicted, step_time_s=10.0)
    return Plan(
        spec_sha256="0" * 64,
        plan=chosen,
        predicted=predicted,
        model=ModelFacts(
            name="llama3_405b", parameters=405_853_388_800, parameters_active=405_853_388_800, flops_per_token=2.5e12
        ),
        cluster=ClusterFacts(
            name="large",
            device="H100_SXM_80GB",
            device_memory_bytes=80 * GIB,
            peak_flops_per_second=989e12,
            nodes=2048,
            devices_per_node=8,
            world_size=16384,
            links={
                "tensor": {"link": "nvlink", "bytes_per_second": 450e9, "latency_seconds": 2e-6},
                "data": {"link": "infiniband", "bytes_per_second": 50e9, "latency_seconds": 5e-6},
            },
        ),
        search=SearchReport(
            candidates=12043,
            feasible=402,
            seconds=0.21,
            rejected=(
                Rejection(
                    reason="memory",
                    count=9122,
                    closest="tensor 8 x pipeline 8 x data 256 needs 83.1 GiB of 79.6 GiB; recompute = full would fit",
                ),
            ),
        ),
        alternatives=(Alternative(plan=replace(chosen, pipeline=8), predicted=slower),),
        soft=(SoftConstraint(text="avoid tensor.crosses_nodes", kept=True, price_s=0.0),),
        notes=("vocab = 50257 is no multiple of tensor = 8, so the head is computed whole on each rank; 50304 would be split",),
        seq_len=8192,
        batch=2048,
        precision="bf16",
        memory=memory,
        layout=(),
        collectives=(),
    )


def test_a_large_plan_is_drawn_as_reviewed(golden: Callable[[str, str], None]) -> None:
    golden("report/large_plan.txt", render_plan(large_plan()) + "\n")


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    assert max(len(line) for line in render_plan(large_plan(), width=width).splitlines()) <= width


def test_colour_is_decoration_only() -> None:
    plan = large_plan()
    coloured = render_plan(plan, color=True)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == render_plan(plan)


def test_cells_hold_their_ranks_in_either_order() -> None:
    plan = large_plan()
    small = PlanVariables(tensor=2, pipeline=2, data=4, context=2, stages=(63, 63), order="data_pipeline_context_tensor")
    drawn = {}
    for order in get_args(Order):
        text = render_plan(replace(plan, plan=replace(small, order=order), memory=plan.memory[:2]))
        drawn[order] = [re.findall(r"[0-9]+-[0-9]+", line)[:4] for line in text.splitlines() if "layers" in line]
    assert drawn["pipeline_data_context_tensor"] == [["0-3", "4-7", "8-11", "12-15"], ["16-19", "20-23", "24-27", "28-31"]]
    assert drawn["data_pipeline_context_tensor"] == [["0-3", "8-11", "16-19", "24-27"], ["4-7", "12-15", "20-23", "28-31"]]
    assert small.described.startswith("tensor 2 x context 2 x pipeline 2 x data 4, data outermost, 1f1b, ")


def test_one_device_has_no_mesh_and_no_links() -> None:
    plan = large_plan()
    alone = PlanVariables(stages=(126,), recompute="none")
    facts = replace(plan.cluster, nodes=1, devices_per_node=1, world_size=1, links={})
    text = render_plan(replace(plan, plan=alone, memory=plan.memory[:1], cluster=facts))
    assert "mesh" not in text
    assert "links" not in text
    assert alone.described == "one device, micro-batch 1, recompute none"


def test_the_summary_names_plan_and_prediction() -> None:
    summary = render_summary(large_plan())
    assert "tensor 8 x pipeline 16 x data 128" in summary
    assert "9.15 s a step" in summary
    assert "61.5 GiB" in summary
