"""The ledger against what torch holds: values saved between forward and backward pass, weights, gradients, optimizer state."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from dataclasses import asdict
from math import prod
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlmdsl.compile import Compilation, compile_spec
from mlmdsl.planner.bench import Bench, Setting
from mlmdsl.planner.blend import blends
from mlmdsl.planner.holdings import State
from mlmdsl.planner.memory import CONTEXT_BYTES, SLACK, Passing, capacity_bytes
from mlmdsl.planner.moments import Moment
from mlmdsl.planner.passes import MODES
from mlmdsl.planner.plan import Plan
from mlmdsl.planner.pricing import Place
from mlmdsl.runtime.parallel import local_part
from tests.parity.curve import make_trainer
from tests.parity.models import GPT, LLAMA, MODELS, SETTINGS, small_model
from tests.parity.ranks import run_ranks

# Masks and biases of attention, in the models of the parity tests
PADDED = (
    GPT.replace("heads: int)", "heads: int, valid: int[B, S])")
    .replace("heads = 4)", "heads = 4, valid = valid)")
    .replace("  tok =", "  input valid: int[B, S]\n  tok =")
)
VARIANTS = {
    "llama_window": LLAMA.replace("causal = true,", "causal = true, window = 9,"),
    "llama_softcap": LLAMA.replace("causal = true,", "causal = true, softcap = 5.0,"),
    "gpt_alibi": GPT.replace("causal = true", "causal = true, alibi = true"),
    "llama_parallel": LLAMA.replace("h = x + attn", "").replace(
        "h + SwiGLU(RMSNorm(h), hidden = 2 * d)", "x + (attn + SwiGLU(RMSNorm(x), hidden = 2 * d))"
    ),
    "gpt_bias": GPT.replace("causal = true", "position_bias = bias")
    .replace("heads: int)", "heads: int, bias: [heads, S, S])")
    .replace("heads = 4)", "heads = 4, bias = bias)")
    .replace("  tok =", "  bias = RelativePosition(tokens, heads = 4, buckets = 8, max_distance = 12)\n  tok ="),
    "gpt_padding": PADDED.replace("causal = true", "valid = valid"),
    "gpt_causal_padding": PADDED.replace("causal = true", "causal = true, valid = valid"),
    "gpt_alibi_padding": PADDED.replace("causal = true", "alibi = true, valid = valid"),
}
AXES: list[dict[str, Any]] = [{}, {"tensor": 2, "sequence_parallel": True}, {"tensor": 2, "sequence_parallel": False}]


def compiled(model: str, pins: dict[str, Any], *overrides: str) -> tuple[Compilation, Plan, str]:
    world = prod(pins.get(axis, 1) for axis in ("tensor", "context", "pipeline", "data"))
    every = (f"{model.partition('_')[0]}.d=64", f"cluster.devices_per_node={world}", *overrides)
    defaults = {"tensor": 1, "context": 1, "pipeline": 1, "data": 1, "zero": 0, "micro_batch": 4, "recompute": "none"}
    written = [f"{name}={str(value).lower()}" for name, value in (defaults | pins).items()]
    text = (MODELS | VARIANTS).get(model) or small_model(model)
    done = compile_spec(text + SETTINGS, path="/specs/x.mlm", overrides=every, pins=written)
    assert done.plan is not None and done.program is not None
    return done, done.plan, done.program.text


# ---- activations ----------------------------------------------------------------------------------------------------


class Storages(TorchDispatchMode):
    """Every storage that an operation has made: which of them live, and the most bytes that lived at one time."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        """`known`: weights, gradients and inputs, which views are made of."""
        super().__init__()
        self.known = {local_part(x).untyped_storage().data_ptr() for x in known}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = local_part(x).untyped_storage()
                reference = StorageWeakRef(storage)
                if storage.data_ptr() not in self.known:
                    self.made.setdefault(reference.cdata, (reference, storage.nbytes()))
        self.peak = max(self.peak, self.bytes)
        return result

    def resized(self, storage: torch.UntypedStorage) -> None:
        """FSDP2 frees what it has gathered, and makes it again, by the size of the storage."""
        key = StorageWeakRef(storage).cdata
        if key in self.made:
            self.made[key] = (self.made[key][0], storage.nbytes())
            self.peak = max(self.peak, self.bytes)

    @property
    def bytes(self) -> int:
        self.made = {key: (reference, size) for key, (reference, size) in self.made.items() if not reference.expired()}
        return sum(size for _, size in self.made.values())

    @property
    def settled_bytes(self) -> int:
        """What stays: gloo's threads hold what they have sent a moment longer."""
        gc.collect()
        least = self.bytes
        for _ in range(20):
            time.sleep(0.01)
            least = min(least, self.bytes)
        return least


def held_by_rank(rank: int, text: str) -> tuple[int, int]:
    """Bytes that stay after one micro-batch's forward pass and loss, and the most until its backward pass is done: the least of
    three times, for gloo's threads hold what they have sent a moment longer, and masks are made once."""
    trainer = make_trainer(text)
    several = [_held(trainer) for _ in range(3)]
    return min(held for held, _ in several), min(peak for _, peak in several)


def _held(trainer: Any) -> tuple[int, int]:
    engine = trainer.engine
    trainer.state.before_step()
    rows = trainer._local(trainer.data.batch(0, *trainer.rows))
    *inputs, targets = (x[: engine.micro_batch].clone() for x in rows.values())
    weights = [held.parameter for held in trainer.state.held]
    with Storages((*weights, *trainer.state.gradients, *inputs, targets)) as found:
        value = engine.loss(engine.module(*inputs), targets, engine.mesh)
        held = found.settled_bytes
        value.backward()
    return held, found.peak


def bench_of(done: Compilation, plan: Plan) -> Bench:
    assert done.spec is not None and done.graph is not None
    bench = Setting(done.spec, done.graph).shard(plan.plan.tensor, plan.plan.sequence_parallel)
    assert isinstance(bench, Bench)
    bench = bench.over_context(plan.plan.context)
    assert isinstance(bench, Bench)
    return bench.over_experts(plan.plan.expert)


def stepped(done: Compilation, plan: Plan, stage: int) -> State:
    """What a rank holds when the optimizer steps."""
    v, place = plan.plan, Place(bench_of(done, plan), plan.plan.pipeline, plan.plan.data)
    parts = place.given(v.stages, v.schedule).held(stage)
    return place.bench.state(parts, place.sharing(v.zero, v.replicate, 3), Moment("step", (0,) * len(parts)))


def modelled(done: Compilation, plan: Plan) -> Passing:
    """What one micro-batch leaves behind, by the model that the ledger is made of."""
    bench = bench_of(done, plan)
    part, way = Place(bench, 1, 1).given(plan.plan.stages).parts[0], plan.plan.recompute
    several = blends(bench.setting.chain, plan.plan.stages, [MODES.index(word) for word in way]) if way not in MODES else None
    how = several[0] if several else MODES.index(way)
    return bench.part(part, plan.plan.micro_batch, how, False).bytes


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("documents", ["joined", "separate"])
@pytest.mark.parametrize("axes", [{"context": 2}, {"context": 2, "tensor": 2, "sequence_parallel": True}, {}], ids=str)
def test_what_stays_of_a_part_of_each_sequence(axes: dict[str, Any], documents: str, recompute: str) -> None:
    """On the context axis, and where documents are kept apart."""
    done, plan, text = compiled("llama", {"recompute": recompute, **axes}, f"train.documents={documents}")
    expected = modelled(done, plan)
    held, _ = min(run_ranks(held_by_rank, plan.plan.world_size, text))
    assert held == pytest.approx(expected.kept + expected.loss, rel=0.01)


@pytest.mark.parametrize("recompute", ["[full, none, none, selective]", "[none, selective, full, full]"])
@pytest.mark.parametrize("axes", [AXES[0], AXES[1]], ids=["one", "tensor+sp"])
@pytest.mark.parametrize("model", MODELS)
def test_what_stays_where_layers_differ(model: str, axes: dict[str, Any], recompute: str) -> None:
    done, plan, text = compiled(model, {"recompute": recompute, **axes})
    expected = modelled(done, plan)
    held, _ = map(min, zip(*run_ranks(held_by_rank, plan.plan.world_size, text), strict=True))
    assert held == pytest.approx(expected.kept + expected.loss, rel=0.01)


@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("axes", AXES, ids=["one", "tensor+sp", "tensor"])
@pytest.mark.parametrize("model", [*MODELS, *VARIANTS])
def test_what_stays_until_the_backward_pass(model: str, axes: dict[str, Any], recompute: str) -> None:
    """Within one in a hundred; and the most until the backward pass is done, within a fifth: what operations need in passing is
    taken as the most that any one does."""
    done, plan, text = compiled(model, {"recompute": recompute, **axes})
    expected = modelled(done, plan)
    held, peak = map(min, zip(*run_ranks(held_by_rank, plan.plan.world_size, text), strict=True))
    assert held == pytest.approx(expected.kept + expected.loss, rel=0.01)
    most = expected.kept + expected.loss + expected.working + max(expected.transient, expected.loss_transient)
    assert 0.8 * most < peak < 1.1 * most


def test_the_ledger_adds_up() -> None:
    apart = ("stage", "moment", "total_bytes", "slack_bytes")
    for model in MODELS:
        for pins in ({}, {"pipeline": 2, "schedule": "1f1b"}, {"data": 2, "zero": 3}, {"tensor": 2, "recompute": "full"}):
            _, plan, _ = compiled(model, pins)
            for stage, entry in enumerate(plan.memory):
                parts = {key: value for key, value in asdict(entry).items() if key not in apart}
                assert entry.stage == stage and sum(parts.values()) == entry.total_bytes
                assert min(parts.values()) >= 0 and parts["context_bytes"] >= CONTEXT_BYTES["cpu"]
            assert plan.predicted.peak_memory_bytes == tuple(entry.total_bytes for entry in plan.memory)


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_the_ledger_is_made_of_what_stays(recompute: str) -> None:
    done, plan, _ = compiled("gpt", {"recompute": recompute})
    expected, (entry,) = modelled(done, plan), plan.memory
    assert entry.moment == "backward"
    assert (entry.activations_bytes, entry.logits_and_loss_bytes) == (expected.kept + expected.working, 0)


def pipelined_rank(rank: int, text: str) -> tuple[int, int, int]:
    """This rank's stage, the bytes that stay between steps, and the most in the course of one."""
    trainer = make_trainer(text)
    weights = [held.parameter for held in trainer.state.held]
    with Storages((*weights, *trainer.state.gradients)) as found:
        trainer.step()
        between, found.peak = found.settled_bytes, 0
        trainer.step()
    return trainer.mesh.pipeline.rank, between, found.peak


PIPELINES: list[dict[str, Any]] = [
    {"pipeline": 2, "schedule": "1f1b"},
    {"pipeline": 2, "schedule": "gpipe", "recompute": "selective"},
    {"pipeline": 4, "schedule": "1f1b", "recompute": "full"},
    {"pipeline": 2, "schedule": "interleaved_1f1b", "interleave": 2},
    {"pipeline": 2, "schedule": "1f1b", "recompute": "[none, full, none, selective]"},
    {"pipeline": 2, "schedule": "zb_v"},
    {"pipeline": 2, "schedule": "dualpipe_v"},
]


@pytest.mark.parametrize("pins", PIPELINES, ids=lambda pins: " ".join(map(str, pins.values())))
@pytest.mark.parametrize("model", MODELS)
def test_a_step_through_a_pipeline(model: str, pins: dict[str, Any]) -> None:
    """Receive buffers exactly; the peak within a fifth (models as small as these hold a few gradients of weights at a time)."""
    _, plan, text = compiled(model, pins | {"micro_batch": 2 if "interleave" in pins else 1})
    for stage, between, peak in run_ranks(pipelined_rank, plan.plan.world_size, text):
        entry = plan.memory[stage]
        assert entry.buffers_bytes == between
        kept = entry.activations_bytes + entry.logits_and_loss_bytes
        passing = (entry.workspace_bytes - SLACK["cpu"] * (kept + between)) / (1 + SLACK["cpu"])
        assert 0.8 * (kept + entry.buffers_bytes + passing) < peak < 1.2 * (kept + entry.buffers_bytes + passing)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_a_pipeline_holds_as_many_micro_batches_as_the_schedule_says(schedule: str) -> None:
    _, plan, _ = compiled("llama", {"pipeline": 4, "schedule": schedule, "micro_batch": 1, "stages": [1, 1, 1, 1]})
    assert [stage.in_flight for stage in plan.timeline] == ([4, 3, 2, 1] if schedule == "1f1b" else [8] * 4)
    middle, later = plan.memory[1], plan.memory[2]
    assert (middle.activations_bytes > later.activations_bytes) == (schedule == "1f1b")


# ---- state ----------------------------------------------------------------------------------------------------------


def state_of_rank(rank: int, text: str) -> tuple[int, dict[str, int]]:
    """This rank's stage and bytes after a step."""
    trainer = make_trainer(text)
    trainer.step()
    state = trainer.state
    moments = [tensor for each in state.optimizer.moments for tensor in each.values()]
    return trainer.mesh.pipeline.rank, {
        "parameters": total(held.parameter for held in state.held),
        "masters": total(held.master for held in state.held),
        "gradients": total(state.gradients),
        "optimizer": total(moments),
        "whole": sum(4 * held.parameter.numel() for held in state.held),
    }


def total(tensors: Iterable[Tensor]) -> int:
    """Bytes of this rank's parts."""
    return sum(local_part(x).numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize(
    "pins",
    [
        {},
        {"tensor": 2, "sequence_parallel": True},
        {"pipeline": 2, "schedule": "1f1b", "stages": [1, 3]},
        {"data": 2, "zero": 0},
        {"data": 2, "zero": 1},
        {"data": 2, "zero": 2},
        {"pipeline": 2, "data": 2, "zero": 2, "schedule": "1f1b", "micro_batch": 2},
        {"data": 2, "zero": 3},
        {"data": 4, "zero": 3, "micro_batch": 2},
        {"data": 4, "zero": 1, "micro_batch": 2, "replicate": 2},
        {"data": 4, "zero": 3, "micro_batch": 1, "replicate": 2},
        {"tensor": 2, "data": 2, "zero": 1, "sequence_parallel": False},
        {"pipeline": 2, "data": 2, "zero": 1, "schedule": "interleaved_1f1b", "interleave": 2},
    ],
    ids=lambda pins: " ".join(f"{name}={value}" for name, value in pins.items()) or "one",
)
@pytest.mark.parametrize("model", MODELS)
def test_state(model: str, pins: dict[str, Any]) -> None:
    """Exactly what the state holds, when the optimizer steps and at the peak."""
    done, plan, text = compiled(model, pins)
    for stage, held in run_ranks(state_of_rank, plan.plan.world_size, text):
        entry = plan.memory[stage]
        assert entry.optimizer_bytes == held["optimizer"]
        if plan.plan.zero:
            assert entry.master_weights_bytes == held["masters"] == held["parameters"]
            assert stepped(done, plan, stage).gradients == held["gradients"]
            assert entry.gradients_bytes <= held["gradients"] + held["whole"]
            gathered = entry.unsharded_weights_bytes if plan.plan.zero == 3 else entry.weights_bytes
            assert entry.weights_bytes + entry.unsharded_weights_bytes == gathered
            if entry.moment in ("loss", "backward") and plan.plan.zero < 3:
                assert gathered == held["whole"]
            assert 0 < gathered <= held["whole"]
        else:
            assert entry.weights_bytes == held["parameters"] == held["masters"] and entry.master_weights_bytes == 0
            assert entry.gradients_bytes == held["gradients"]


@pytest.mark.parametrize(("zero", "copies"), [(0, 2), (1, 1), (1, 2), (2, 2), (3, 2)])
def test_state_of_experts_that_ranks_share(zero: int, copies: int) -> None:
    """Weights and gradients whole on each of the ranks that have them; masters and moments cut over the copies by ZeRO."""
    pins = {"data": 4, "expert": 4 // copies, "zero": zero, "micro_batch": 2}
    done, plan, text = compiled("mixtral", pins, "mixtral.layers=2")
    assert done.graph is not None
    experts = [w for w in done.graph.weights.values() if w.expert]
    own = 4 * sum(w.elements * done.graph.count_of(w) for w in experts) * copies // 4
    entry = plan.memory[0]
    for _, held in run_ranks(state_of_rank, plan.plan.world_size, text):
        assert entry.optimizer_bytes == held["optimizer"]
        masters = entry.weights_bytes if not zero else entry.master_weights_bytes + own * (copies == 1)
        assert masters == held["masters"]
        whole = stepped(done, plan, 0).gradients - own * (zero > 0 and copies > 1)
        assert whole == held["gradients"] and entry.gradients_bytes <= held["gradients"] + held["whole"]


def peak_of_rank(rank: int, text: str) -> int:
    """The most that a step makes besides masters and optimizer state: weights that are gathered, gradients, activations. The
    least of three steps: gloo's threads hold what they have sent a moment longer."""
    trainer = make_trainer(text)
    kept = [held.master for held in trainer.state.held]
    moments = [tensor for each in trainer.state.optimizer.moments for tensor in each.values()]
    resize = torch.UntypedStorage.resize_
    with Storages((*kept, *moments)) as found:

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            done = resize(storage, size)
            found.resized(storage)
            return done

        with mock.patch.object(torch.UntypedStorage, "resize_", resized):
            trainer.step()
            peaks: list[int] = []
            for _ in range(3):
                found.peak = 0
                trainer.step()
                peaks.append(found.peak)
    return min(peaks)


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_a_sharded_step(model: str, micro_batch: int, zero: int) -> None:
    """As the ledger says, but for what the allocator takes besides."""
    _, plan, text = compiled(model, {"data": 2, "zero": zero, "micro_batch": micro_batch}, f"{model}.d=128")
    (entry,) = plan.memory
    kept = entry.master_weights_bytes + entry.optimizer_bytes + entry.context_bytes
    said = entry.total_bytes - kept - entry.slack_bytes
    peak = max(run_ranks(peak_of_rank, 2, text))
    assert peak == pytest.approx(said, rel=0.05)


def test_capacity_leaves_some_memory_free() -> None:
    done, _, _ = compiled("gpt", {})
    assert done.spec is not None
    device = done.spec.cluster.pools[0].device
    assert 0.949 * device.memory_bytes < capacity_bytes(device) < 0.951 * device.memory_bytes
