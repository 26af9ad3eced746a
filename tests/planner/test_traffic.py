"""The plan's collectives against those that an emitted program makes in one step: kind, axis, bytes and count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import prod
from typing import Any

import pytest
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from mlmdsl.compile import compile_spec
from mlmdsl.planner.plan import Plan
from mlmdsl.runtime.mesh import Axis
from tests.parity.curve import make_trainer
from tests.parity.models import MODELS, SETTINGS, small_model
from tests.parity.ranks import run_ranks

Calls = Counter[tuple[str, str, int]]  # kind, axis, bytes

# operation: kind, which argument is the larger side, which one names the group
FUNCTIONAL = {
    "all_gather_into_tensor": ("all_gather", 0, 2),
    "reduce_scatter_tensor": ("reduce_scatter", 0, 3),
    "all_reduce": ("all_reduce", 0, 2),
    "all_to_all_single": ("all_to_all", 0, 3),
}
PLAIN = {
    "_allgather_base_": ("all_gather", 0, 2),
    "_reduce_scatter_base_": ("reduce_scatter", 1, 2),
    "allreduce_": ("all_reduce", 0, 1),
    "send": ("send", 0, 1),
    "recv_": ("recv", 0, 1),
}
OTHERS = {"wait_tensor"}


class Listener(TorchDispatchMode):
    """Counts collectives by kind, name of the group and bytes of the larger side."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = str(func.overloadpacket).partition(".")
        if space in ("_c10d_functional", "c10d") and name not in OTHERS:
            kind, larger, group = (FUNCTIONAL if space == "_c10d_functional" else PLAIN)[name]
            tensor = args[larger][0] if isinstance(args[larger], list | tuple) else args[larger]
            where = args[group] if isinstance(args[group], str) else dist.ProcessGroup.unbox(args[group]).group_name
            ranks = args[1] if (space, kind) == ("_c10d_functional", "all_gather") else 1
            self.calls[kind, where, tensor.numel() * tensor.element_size() * ranks] += 1
        return func(*args, **(kwargs or {}))


def calls_of_rank(rank: int, text: str) -> tuple[int, dict[tuple[str, str, int], int]]:
    """This rank's stage, and the calls of its second step."""
    trainer = make_trainer(text)
    trainer.step()
    with Listener() as heard:
        trainer.step()
    mesh = trainer.mesh
    named = {"expert": mesh.expert, "copies": mesh.copies, "tensor": mesh.tensor, "context": mesh.context}
    named |= {"pipeline": mesh.pipeline, "data" if mesh.context.size == 1 else "replicas": mesh.replicas}
    if mesh.hybrid is not None:
        named["shards"] = mesh.shards
        named["replicate"] = Axis("replicate", 2, 0, mesh.hybrid.get_group("replicate").group_name)
    axes = {axis.group_name: name for name, axis in named.items() if axis.size > 1}
    found: Calls = Counter()
    for (kind, group, size), count in heard.calls.items():
        found[kind, axes.get(group, "world" if group == dist.group.WORLD.group_name else "pair"), size] += count
    return mesh.pipeline.rank, dict(found)


def compiled(model: str, layers: int, pins: dict[str, Any]) -> tuple[Plan, str]:
    world = prod(pins.get(axis, 1) for axis in ("tensor", "context", "pipeline", "data"))
    overrides = (f"{model}.layers={layers}", f"cluster.devices_per_node={world}")
    defaults = {"tensor": 1, "context": 1, "pipeline": 1, "data": 1, "zero": 0, "micro_batch": 2, "recompute": "none"}
    written = [f"{name}={str(value).lower()}" for name, value in (defaults | pins).items()]
    text = MODELS[model] if model in MODELS else small_model(model)
    done = compile_spec(text + SETTINGS, path="/specs/x.mlm", overrides=overrides, pins=written)
    assert done.plan is not None and done.program is not None
    return done.plan, done.program.text


def merged(plan: Plan, calls: Iterable[tuple[str, str, int, int]]) -> Calls:
    """As they can be told apart: an axis of all ranks is the world; tied weights' pairs are the pipeline's."""
    v = plan.plan
    sizes = {"tensor": v.tensor, "data": v.data, "pipeline": v.pipeline, "context": v.context}
    whole = next((axis for axis, size in sizes.items() if size == v.world_size), "world")
    replicas = "context" if v.data == 1 else whole if v.data * v.context == v.world_size else "replicas"
    names = {"world": whole, "pair": "pipeline", "replicas": replicas}
    found: Calls = Counter()
    for kind, axis, size, count in calls:
        found[kind, names.get(axis, axis), size] += count
    return found


CASES = [
    ("gpt", dict(tensor=2, sequence_parallel=True)),
    ("gpt", dict(tensor=2, sequence_parallel=False)),
    ("llama", dict(tensor=2, sequence_parallel=True)),
    ("llama", dict(tensor=2, sequence_parallel=False)),
    ("gpt", dict(tensor=2, sequence_parallel=True, recompute="full")),
    ("gpt", dict(tensor=2, sequence_parallel=False, recompute="full")),
    ("llama", dict(tensor=2, sequence_parallel=True, recompute="full")),
    ("llama", dict(tensor=2, sequence_parallel=False, recompute="full")),
    ("llama", dict(tensor=2, sequence_parallel=True, recompute="selective")),
    ("gpt", dict(tensor=2, sequence_parallel=False, recompute="selective")),
    ("gpt", dict(pipeline=2, schedule="1f1b")),
    ("llama", dict(pipeline=2, schedule="gpipe")),
    ("llama", dict(pipeline=2, schedule="interleaved_1f1b", interleave=2)),
    ("gpt", dict(pipeline=2, schedule="zb_v")),
    ("llama", dict(pipeline=2, schedule="dualpipe_v", data=2, zero=1, micro_batch=1)),
    ("gpt", dict(data=2, zero=0)),
    ("gpt", dict(data=2, zero=1)),
    ("gpt", dict(data=2, zero=2)),
    ("gpt", dict(data=2, zero=3)),
    ("llama", dict(data=2, zero=1, micro_batch=4)),
    ("llama", dict(data=2, zero=3, recompute="full")),
    ("gpt", dict(data=2, zero=3, recompute="selective")),
    ("gpt", dict(pipeline=2, data=2, zero=1)),
    ("gpt", dict(pipeline=2, data=2, zero=3, recompute="[full, none, selective, none]")),
    ("llama", dict(tensor=2, sequence_parallel=True, recompute="[full, none, selective, full]")),
    ("gpt", dict(pipeline=2, data=2, zero=2)),
    ("gpt", dict(data=4, zero=1, replicate=2, micro_batch=1)),
    ("llama", dict(data=4, zero=2, replicate=2, micro_batch=1)),
    ("gpt", dict(data=4, zero=3, replicate=2, micro_batch=1)),
    ("gpt", dict(pipeline=2, data=4, zero=2, replicate=2, micro_batch=1)),
    ("gpt", dict(pipeline=2, data=4, zero=3, replicate=2, micro_batch=1)),
    ("gpt", dict(tensor=2, sequence_parallel=True, data=4, zero=3, replicate=2, micro_batch=1)),
    ("gpt", dict(pipeline=2, data=2, zero=3)),
    ("llama", dict(pipeline=2, tensor=2, sequence_parallel=True, schedule="1f1b")),
    ("llama", dict(tensor=2, data=2, zero=1, sequence_parallel=True)),
    ("gpt", dict(tensor=2, data=2, zero=3, sequence_parallel=True, recompute="full")),
    ("gpt", dict(pipeline=2, schedule="interleaved_1f1b", interleave=2, data=2, zero=0)),
    ("gpt", dict(context=2)),
    ("llama", dict(context=2, zero=3, recompute="full")),
    ("llama", dict(context=2, tensor=2, sequence_parallel=True, recompute="selective")),
    ("gpt", dict(context=2, data=2, zero=1)),
    ("llama", dict(context=2, pipeline=2, schedule="1f1b")),
]


@pytest.mark.parametrize(("model", "pins"), CASES, ids=lambda x: x if isinstance(x, str) else " ".join(map(str, x.values())))
def test_collectives_of_a_step(model: str, pins: dict[str, Any]) -> None:
    plan, text = compiled(model, 4, pins)
    for stage, calls in run_ranks(calls_of_rank, plan.plan.world_size, text):
        planned = ((item.kind, item.axis, item.bytes, item.count) for item in plan.collectives if item.stage == stage)
        assert merged(plan, ((*call, count) for call, count in calls.items())) == merged(plan, planned)


@pytest.mark.parametrize(
    "pins",
    [
        dict(data=4, expert=2),
        dict(data=4, expert=2, zero=1, recompute="selective"),
        dict(data=4, expert=2, zero=3, recompute="full"),
        dict(tensor=2, sequence_parallel=True, data=4, expert=2, zero=1),
        dict(tensor=2, sequence_parallel=False, data=2, expert=2, zero=3, recompute="selective"),
        dict(context=2, data=2, expert=4, zero=1),
        dict(pipeline=2, data=2, expert=2, schedule="1f1b"),
        dict(pipeline=2, data=4, expert=2, zero=1, schedule="gpipe"),
    ],
    ids=lambda x: " ".join(map(str, x.values())),
)
def test_rows_travel_to_their_experts(pins: dict[str, Any]) -> None:
    """As often as planned, and over all ranks of a stage as many bytes: where one rank gets more another one gets fewer."""
    plan, text = compiled("mixtral", 2, pins)
    every = run_ranks(calls_of_rank, plan.plan.world_size, text)
    for stage in range(plan.plan.pipeline):
        ranks = [calls for at, calls in every if at == stage]
        heard = [(size, n) for calls in ranks for (kind, _, size), n in calls.items() if kind == "all_to_all"]
        planned = [item for item in plan.collectives if item.stage == stage]
        rows = [item for item in planned if item.kind == "all_to_all"]
        others = [(item.kind, item.axis, item.bytes, item.count) for item in planned if item.kind != "all_to_all"]
        assert sum(n for _, n in heard) == len(ranks) * sum(item.count for item in rows)
        assert sum(size * n for size, n in heard) == len(ranks) * sum(item.bytes * item.count for item in rows)
        for calls in ranks:
            rest = ((*call, count) for call, count in calls.items() if call[0] != "all_to_all")
            assert merged(plan, rest) == merged(plan, others)


def test_nothing_is_said_on_one_device() -> None:
    plan, text = compiled("gpt", 4, {})
    assert plan.collectives == ()
    with Listener() as heard:
        make_trainer(text).step()
    assert not heard.calls
