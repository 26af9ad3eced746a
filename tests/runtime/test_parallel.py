"""Weights and their places, optimizer and schedule, recomputation, and what a state holds under each plan."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from mlmdsl.grammar.constraints import ORDERS, Order
from mlmdsl.planner.plan import PlanVariables
from mlmdsl.runtime.config import AdamW, Parallel, Schedule
from mlmdsl.runtime.initial import normal, ones, zeros
from mlmdsl.runtime.mesh import Axis, Mesh, create, single
from mlmdsl.runtime.optimizer import Optimizer, learning_rate
from mlmdsl.runtime.parallel import Scope, place, public_name, weight, weights_of
from mlmdsl.runtime.recompute import recomputed
from mlmdsl.runtime.state import Sharded
from mlmdsl.runtime.train import _by_stage
from tests.parity.curve import collected, make_trainer, training
from tests.parity.ranks import run_ranks
from tests.runtime.handwritten import program

CPU = torch.device("cpu")


def test_weights_are_local_and_know_the_whole():
    tp = Axis("tensor", 4, 2, "unused")
    module = Scope(
        a=weight((8, 6), normal(0.1), tp, shard=0), b=weight((6,), zeros, tp, partial=True), c=weight((2, 2), ones, decay=False)
    )
    assert [tuple(p.shape) for p in module.parameters()] == [(2, 6), (6,), (2, 2)]
    a, b, c = weights_of(module).values()
    assert (a.shape, a.shard, a.partial, a.decay) == ((8, 6), 0, False, True)
    assert (b.shape, b.shard, b.partial, b.decay) == ((6,), None, True, False)
    assert not c.decay


def test_one_rank_has_no_parts():
    info = weights_of(
        Scope(a=weight((8,), zeros, Axis("tensor"), shard=0), b=weight((8,), zeros, Axis("tensor"), partial=True))
    )
    assert info["a"].shard is None and not info["b"].partial


def test_names_lose_the_underscores_that_python_needs():
    assert public_name("blocks.0.half_.keys__.weight") == "blocks.0.half.keys_.weight"
    assert public_name("blocks.0.inner._1._2__.weight") == "blocks.0.inner.1._2.weight"


@given(st.integers(1, 40), st.integers(1, 8), st.sampled_from([1, 2, 4]), st.sampled_from([None, 0, 1]))
def test_places_cover_a_weight_once(rows: int, data: int, tensor: int, shard: int | None):
    shape = (rows * tensor, 4)
    info = weights_of(Scope(w=weight(shape, zeros, Axis("tensor", tensor, 0, "x"), shard=shard)))["w"]
    count = torch.zeros(shape)
    for t in range(tensor if info.shard is not None else 1):
        for d in range(data):
            mesh = Mesh(Axis("tensor", tensor, t), Axis("data", data, d), Axis("pipeline"), CPU)
            part = place(info, mesh, sharded=True)
            box = tuple(slice(o, o + n) for o, n in zip(part.offsets, part.shape, strict=True))
            count[box] += 1
    assert (count == 1).all()


# ---- optimizer ------------------------------------------------------------------------------------------------------


def test_schedules():
    cosine = Schedule("cosine", warmup=10, min_lr=0.1)
    rates = [learning_rate(cosine, 1.0, 110, step) for step in range(110)]
    assert rates[:10] == [(i + 1) / 10 for i in range(10)] and rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55) and 0.1 < rates[-1] < 0.101
    assert all(a >= b for a, b in pairwise(rates[9:]))
    linear = Schedule("linear", warmup=0, min_lr=0.2)
    assert [learning_rate(linear, 1.0, 4, s) for s in range(5)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert [learning_rate(Schedule("constant", warmup=2), 3.0, 9, s) for s in (0, 1, 2, 8)] == [1.5, 3.0, 3.0, 3.0]


def test_adamw_by_definition():
    """Algorithm 2 of arXiv:1711.05101, with decay on the first weight alone."""
    settings = AdamW(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.5)
    weights = [torch.randn(3, 2), torch.randn(4), torch.empty(0, 2)]
    expected = [w.double() for w in weights]
    optimizer = Optimizer(settings, weights, [(True, 0.0), (False, 0.0), (True, 0.0)])
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in expected]
    for t in range(1, 4):
        gradients = [torch.randn_like(w) for w in weights]
        rate = 0.1 / t
        optimizer.step(gradients, rate)
        for w, g, (m, v), decay in zip(expected, gradients, moments, (0.5, 0.0, 0.5), strict=True):
            m.mul_(0.8).add_(0.2 * g)
            v.mul_(0.9).add_(0.1 * g.double() ** 2)
            w.mul_(1 - rate * decay)
            w.sub_(rate * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-3))
    for found, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-6)


def test_an_optimizer_goes_on_from_its_moments():
    gradients = [[torch.randn(5)] for _ in range(4)]
    whole, first = [torch.ones(5)], [torch.ones(5)]
    one = Optimizer(AdamW(lr=0.1), whole, [(True, 0.0)])
    other = Optimizer(AdamW(lr=0.1), first, [(True, 0.0)])
    for gradient in gradients:
        one.step(gradient, 0.1)
    for gradient in gradients[:2]:
        other.step(gradient, 0.1)
    second = [first[0].clone()]
    resumed = Optimizer(AdamW(lr=0.1), second, [(True, 0.0)])
    for name, tensor in resumed.moments[0].items():
        tensor.copy_(other.moments[0][name])
    resumed.set_step(2)
    for gradient in gradients[2:]:
        resumed.step(gradient, 0.1)
    assert torch.equal(second[0], whole[0])


# ---- recomputation --------------------------------------------------------------------------------------------------


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        h = self.b(nn.functional.gelu(self.a(x)))
        q = h.unflatten(-1, (2, 4)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(-2) * x.sigmoid()


def operations(how: str) -> tuple[dict[str, int], list[torch.Tensor]]:
    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(2, 3, 8, requires_grad=True)
    with Counter() as counter:
        recomputed(layer, how)(x).sum().backward()
    assert x.grad is not None
    return counter.counts, [x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


def test_recomputation_repeats_what_it_says():
    (none, expected), (selective, chosen), (full, all_) = (operations(how) for how in ("none", "selective", "full"))
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert [c["addmm"] for c in (none, selective, full)] == [2, 2, 4]
    assert [c[attention] for c in (none, selective, full)] == [1, 1, 2]
    assert [c["gelu"] for c in (none, selective, full)] == [1, 2, 2]
    for one, two, three in zip(expected, chosen, all_, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


# ---- state ----------------------------------------------------------------------------------------------------------


def text(parallel: Parallel, **changes: object) -> str:
    return program(repr(parallel), repr(training(**changes)))


def beginnings(rank: int, parallel: Parallel) -> dict[str, torch.Tensor]:
    trainer = make_trainer(text(parallel, batch=24))
    return collected(trainer, [held.master for held in trainer.state.held])


def test_every_plan_starts_from_the_same_bits():
    expected = run_ranks(beginnings, 1, Parallel(stages=(4,)))[0]
    assert len({float(w.flatten()[0]) for name, w in expected.items() if "tok" in name or "attn" in name}) > 10
    for parallel in (
        Parallel(tensor=4, stages=(4,)),
        Parallel(tensor=2, data=2, zero=3, stages=(4,)),
        Parallel(pipeline=2, data=2, zero=1, stages=(3, 1)),
        Parallel(data=3, zero=1, stages=(4,), micro_batch=1),
    ):
        found = run_ranks(beginnings, parallel.world_size, parallel)[0]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), parallel


def precisions(rank: int, parallel: Parallel) -> list[float]:
    trainer = make_trainer(text(parallel, precision="bf16"))
    assert all(held.master.dtype == torch.float32 for held in trainer.state.held)
    losses = [trainer.step().loss for _ in range(4)]
    assert all(gradient.dtype == torch.float32 for gradient in trainer.state.gradients)
    if not isinstance(trainer.state, Sharded):
        assert {held.parameter.dtype for held in trainer.state.held} == {torch.bfloat16}
        assert all(torch.equal(held.parameter, held.master.bfloat16()) for held in trainer.state.held)
    return losses


def test_bf16_computes_in_bf16_and_steps_in_fp32():
    one = run_ranks(precisions, 1, Parallel(stages=(4,), micro_batch=2))[0]
    wide = run_ranks(plain_losses, 1, Parallel(stages=(4,), micro_batch=2))[0]
    assert one != wide and all(math.isclose(a, b, rel_tol=0.02) for a, b in zip(one, wide, strict=True))
    for parallel in (
        Parallel(tensor=2, data=2, stages=(4,), micro_batch=4),
        Parallel(data=2, zero=1, stages=(4,), micro_batch=2),
        Parallel(data=2, zero=2, stages=(4,), micro_batch=2),
        Parallel(data=2, zero=3, stages=(4,), micro_batch=2),
        Parallel(pipeline=2, stages=(1, 3), micro_batch=2),
        Parallel(pipeline=2, interleave=2, schedule="zb_v", stages=(1, 1, 1, 1), micro_batch=2),
        Parallel(pipeline=2, data=2, zero=1, interleave=2, schedule="zb_v", stages=(1, 1, 1, 1), micro_batch=2),
    ):
        for losses in run_ranks(precisions, parallel.world_size, parallel):
            assert all(math.isclose(a, b, rel_tol=0.001) for a, b in zip(losses, one, strict=True)), parallel


def plain_losses(rank: int, parallel: Parallel) -> list[float]:
    trainer = make_trainer(text(parallel, batch=24))
    return [trainer.step().loss for _ in range(4)]


def memory(rank: int, parallel: Parallel) -> tuple[int, int, int]:
    """Elements this rank keeps between steps: masters, moments, gradients of ZeRO 0."""
    trainer = make_trainer(text(parallel, batch=24))
    trainer.step()
    state = trainer.state
    masters = sum(held.master.numel() for held in state.held)
    moments = sum(t.numel() for m in state.optimizer.moments for t in m.values())
    return masters, moments, sum(g.numel() for g in state.gradients)


def test_sharded_state_is_a_share_of_the_whole():
    (whole,) = run_ranks(memory, 1, Parallel(stages=(4,)))
    for zero in (1, 2, 3):
        shares = run_ranks(memory, 2, Parallel(data=2, zero=zero, stages=(4,)))
        assert tuple(map(sum, zip(*shares, strict=True))) == whole


def seen(rank: int, parallel: Parallel) -> dict[str, tuple[int, ...]]:
    """The ranks of this rank's groups; its own place in each is by their order."""
    mesh = create(parallel, CPU)
    assert mesh.devices is not None and mesh.hybrid is not None and mesh.sharers is not None
    names = {"tensor": mesh.tensor, "pipeline": mesh.pipeline, "replicas": mesh.replicas, "context": mesh.context}
    names |= {"expert": mesh.expert, "copies": mesh.copies, "shards": mesh.shards}
    found: dict[str, tuple[int, ...]] = {}
    for name, axis in names.items():
        members = dist.get_process_group_ranks(_resolve_process_group(axis.group_name))
        assert members.index(rank) == axis.rank and len(members) == axis.size
        found[name] = tuple(members)
    return found | {"replicate": tuple(dist.get_process_group_ranks(mesh.hybrid.get_group("replicate")))}


@pytest.mark.parametrize("order", ORDERS)
def test_groups_of_ranks_are_the_planners(order: Order):
    degrees = dict(pipeline=2, data=2, context=2, expert=4, replicate=2)
    parallel = Parallel(**degrees, zero=1, order=order, stages=(2, 2))
    plan = PlanVariables(**degrees, order=order, stages=(2, 2)).mesh(8)
    for rank, found in enumerate(run_ranks(seen, 8, parallel)):
        assert found == {axis: plan.ranks(axis, rank) for axis in found}


def test_memory_is_told_by_stage_in_either_order():
    memory = [rank * 10 for rank in range(8)]
    inside, usual = (Parallel(pipeline=2, data=2, tensor=2, stages=(2, 2), order=order) for order in reversed(ORDERS))
    assert _by_stage(memory, usual) == [30, 70] and _by_stage(memory, inside) == [50, 70]


def test_a_single_mesh_needs_no_process_group():
    mesh = single(CPU)
    assert mesh.world_size == 1 and mesh.tensor.size == 1
