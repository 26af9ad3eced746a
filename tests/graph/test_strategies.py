"""Every strategy of every operation computes what the replicated one does, forward and backward.

The ranks of an axis are simulated by threads: inputs are cut, doubled or split into partial sums as the strategy asks, the
emitted text runs on each rank, and outputs, input gradients and weight gradients are put together as their placements say. So
the gradient's half of every placement is proved, not only the value's.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlmdsl import runtime
from mlmdsl.graph.graph import Scalar
from mlmdsl.graph.ops import CATALOGUE
from mlmdsl.graph.ops.base import Emission
from mlmdsl.graph.placement import BROADCAST, PARTIAL, REPLICATE, WHOLE, Placement, Strategy, WeightPlacement
from mlmdsl.graph.tensor import TensorType
from mlmdsl.runtime import experts, functions
from mlmdsl.runtime.balance import Tally

B, S, RANKS = 2, 4, 2
SIZES = {"B": B, "S": S}
TOKENS = TensorType("int", ("B", "S"))


def floats(*shape: int | str) -> TensorType:
    return TensorType("float", shape)


@dataclass(frozen=True)
class Case:
    op: str
    inputs: tuple[TensorType, ...]
    weights: tuple[tuple[int, ...], ...] = ()
    attrs: tuple[tuple[str, Scalar], ...] = ()


def attend(
    causal: bool = False, scale: float | None = None, window: int | None = None, softcap: float | None = None
) -> tuple[tuple[str, Scalar], ...]:
    return (("causal", causal), ("scale", scale), ("window", window), ("softcap", softcap))


def rms(offset: float = 0.0, affine: bool = True) -> tuple[tuple[str, Scalar], ...]:
    return (("eps", 1e-6), ("offset", offset), ("affine", affine))


HEADS = floats("B", "S", 4, 6)
ROTARY = (("theta", 1e4), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0), ("original_max", 8192), ("interleaved", False))
ROWS = floats("B", "S", 6)
RELATIVE = (("heads", 4), ("buckets", 8), ("max_distance", 6))
TOP_K = (("k", 2), ("fill", 0.0), ("groups", 3), ("group_limit", 2), ("group_best", 1))
ROUTING = TensorType("int", (3, "2*B*S+4"))
CASES = [
    Case("embedding", (TOKENS,), ((8, 6),), (("vocab", 8), ("dim", 6))),
    Case("position", (TOKENS,), ((5, 6),), (("max", 5), ("dim", 6))),
    Case("linear", (floats("B", "S", 6),), ((8, 6),), (("out", 8),)),
    Case("bias", (floats("B", "S", 6),), ((6,),)),
    Case("layer_norm", (floats("B", "S", 6),), ((6,), (6,)), (("eps", 1e-5), ("bias", True), ("affine", True))),
    Case("layer_norm", (floats("B", "S", 6),), ((6,),), (("eps", 1e-3), ("bias", False), ("affine", True))),
    *(Case("layer_norm", (floats("B", "S", 6),), (), (("eps", e), ("bias", True), ("affine", False))) for e in (1e-5, 1e-3)),
    *(Case("rms_norm", (x,), ((6,),), rms(o)) for x, o in ((ROWS, 0.0), (ROWS, 1.0), (HEADS, 0.0))),
    Case("rms_norm", (ROWS,), (), rms(affine=False)),
    Case("add", (floats("B", "S", 6), floats("B", "S", 6))),
    Case("add", (floats("B", "S", 6), floats("S", 6))),
    Case("subtract", (floats("B", "S", 6), floats("B", "S", 6))),
    Case("multiply", (floats("B", "S", 6), floats("B", "S", 6))),
    Case("divide", (floats("B", "S", 6), floats("B", "S", 6))),
    Case("scale", (floats("B", "S", 6),), (), (("factor", 0.5),)),
    Case("offset", (floats("B", "S", 6),), (), (("term", 0.5),)),
    Case("gelu", (floats("B", "S", 6),), (), (("tanh", False),)),
    Case("gelu", (floats("B", "S", 6),), (), (("tanh", True),)),
    *(Case(name, (ROWS,)) for name in ("relu", "silu", "sigmoid", "tanh", "exp", "log", "softplus", "reciprocal", "softmax")),
    Case("split_heads", (floats("B", "S", 24),), (), (("heads", 4),)),
    Case("merge_heads", (HEADS,)),
    *(Case("rotary", (HEADS,), (), (*ROTARY, ("factor", f), ("dim", dim))) for f, dim in ((1.0, None), (8.0, None), (1.0, 4))),
    Case("attend", (HEADS, floats("B", "S", 2, 6), floats("B", "S", 2, 6)), (), attend(causal=True)),
    Case("attend", (HEADS, HEADS, HEADS), (), attend(scale=0.3)),
    Case("attend", (HEADS, floats("B", "S", 1, 6), floats("B", "S", 1, 6)), (), attend(causal=True)),
    Case("attend", (HEADS, floats("B", "S", 2, 6), floats("B", "S", 2, 6)), (), attend(causal=True, window=2, softcap=3.0)),
    Case("attend", (HEADS, HEADS, HEADS, floats(4, "S", "S")), (), attend(causal=True)),
    Case("attend", (HEADS, HEADS, HEADS, floats(4, 1, "S")), (), attend(window=2)),
    Case("attend", (HEADS, HEADS, HEADS, floats(1, "S", "S")), (), attend(softcap=3.0)),
    Case("attend", (HEADS, HEADS, HEADS, TOKENS), (), attend()),
    Case("attend", (HEADS, HEADS, HEADS, floats(4, "S", "S"), TOKENS), (), attend(causal=True)),
    Case("attend", (HEADS, floats("B", "S", 2, 6), floats("B", "S", 2, 6), TOKENS), (), attend(window=2)),
    Case("relative_position", (TOKENS,), ((8, 4),), (*RELATIVE, ("bidirectional", True))),
    Case("relative_position", (floats("B", "S", 6),), ((8, 4),), (*RELATIVE, ("bidirectional", False))),
    Case("alibi", (TOKENS,), (), (("heads", 4), ("bidirectional", True))),
    Case("alibi", (floats("B", "S", 6),), (), (("heads", 6), ("bidirectional", False))),
    Case("cross_entropy", (floats("B", "S", 8), TOKENS)),
    Case("top_k", (floats("B", "S", 6),), (), TOP_K),
    Case("top_k", (floats("B", "S", 6), floats("B", "S", 6)), (), TOP_K),
    Case("balanced_top_k", (floats("B", "S", 6),), ((6,),), TOP_K),
    *(Case("add_loss", (x, y), (), (("factor", 0.5),)) for x, y in ((ROWS, floats("B", "S")), (ROWS, floats("B", 1, 4)))),
    Case("load", (ROWS,)),
    Case("limit", (ROWS,), (), (("top_k", 2), ("factor", 0.5))),
    *(Case("sum", (floats("B", "S", 6),), (), (("keep", keep),)) for keep in (False, True)),
    *(Case(name, (floats("B", "S", 6),), (), (("size", 4),)) for name in ("first", "last")),
    Case("concat", (floats("B", "S", 4, 6), floats("B", "S", 1, 2))),
    Case("concat", (floats("B", "S", 6), floats("B", "S", 2))),
    Case("route", (floats("B", "S", 4),), (), (("top_k", 2),)),
    Case("dispatch", (floats("B", "S", 6), ROUTING)),
    Case("grouped_linear", (floats("2*B*S", 6), ROUTING), ((4, 8, 6),), (("out", 8),)),
    Case("combine", (floats("2*B*S", 6), floats("B", "S", 4), ROUTING)),
]  # fmt: skip


def strategies(case: Case) -> list[Strategy]:
    op = CATALOGUE[case.op]
    out = op.infer(case.inputs, dict(case.attrs))
    return list(op.strategies(case.inputs, out, case.weights, dict(case.attrs), RANKS))


ALL = [(case, strategy) for case in CASES for strategy in strategies(case)]


@dataclass(frozen=True)
class FakeAxis:
    rank: int
    size: int = RANKS
    zigzag: bool = False


class Exchange:
    """Sums and maxima over threads that stand for ranks."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(RANKS)
        self._slots: list[Tensor] = [torch.zeros(())] * RANKS

    def reduced(self, x: Tensor, axis: FakeAxis, op: str = "sum") -> Tensor:
        self._slots[axis.rank] = x.detach()
        self._barrier.wait()
        stacked = torch.stack(list(self._slots))
        self._barrier.wait()
        return stacked.sum(0) if op == "sum" else stacked.amax(0)

    def all_reduce(self, x: Tensor, axis: FakeAxis) -> Tensor:
        """Forward the sum, backward the identity."""
        return x + (self.reduced(x, axis) - x).detach()


def random_input(type: TensorType, generator: torch.Generator) -> Tensor:
    shape = type.sizes(SIZES)
    if type == ROUTING:
        return experts.route(experts.top_k(torch.rand(B, S, 4, generator=generator), 2), 2)
    if type.dtype == "int":
        return torch.randint(0, 8, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64) + 3.0


def cut(x: Tensor, placement: Placement, rank: int, parts: list[Tensor]) -> Tensor:
    """A rank's share of a value; `parts` are its partial sums."""
    if placement.is_shard:
        return x.chunk(RANKS, placement.dim)[rank].clone()
    return (parts[rank] if placement == PARTIAL else x).clone()


def partial_sums(x: Tensor, generator: torch.Generator) -> list[Tensor]:
    if not x.is_floating_point():
        return [x] * RANKS
    first = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return [first, x - first]


def assert_close(found: Tensor, expected: Tensor) -> None:
    """To float32: rotary positions and the loss compute in it whatever they are given."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def joined(parts: list[Tensor], kind: str, dim: int) -> Tensor:
    """The whole again: kind is shard, sum, or same (every rank has it)."""
    if kind == "shard":
        return torch.cat(parts, dim)
    if kind == "sum":
        return torch.stack(parts).sum(0)
    for part in parts[1:]:
        assert_close(part, parts[0])
    return parts[0]


def value_kind(placement: Placement) -> str:
    return "shard" if placement.is_shard else "sum" if placement == PARTIAL else "same"


def gradient_kind(placement: Placement) -> str:
    return "shard" if placement.is_shard else "sum" if placement == BROADCAST else "same"


def weight_kind(placement: WeightPlacement) -> str:
    return "shard" if placement.dim is not None else "sum" if placement.partial_gradient else "same"


def emitted(case: Case, strategy: Strategy, axis: str | None, size: int) -> str:
    op = CATALOGUE[case.op]
    attrs = dict(case.attrs)
    return op.emit(
        Emission(
            inputs=tuple(f"x{i}" for i in range(len(case.inputs))),
            weights=tuple(f"w{i}" for i in range(len(case.weights))),
            attrs=attrs,
            axis=axis,
            axis_size=size,
            strategy=strategy,
            input_types=case.inputs,
            output_type=op.infer(case.inputs, attrs),
        )
    )


def run(text: str, inputs: list[Tensor], weights: list[Tensor], extra: dict[str, Any]) -> Tensor:
    names = {name: getattr(runtime, name) for name in runtime.__all__} | {"torch": torch, "F": F, **extra}
    names |= {"TRAINING": SimpleNamespace(batch=B), "tally": Tally()}
    names |= {f"x{i}": x for i, x in enumerate(inputs)} | {f"w{i}": w for i, w in enumerate(weights)}
    return eval(text, names)


def leaf(x: Tensor) -> Tensor:
    return x.requires_grad_() if x.is_floating_point() else x


def gradient(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad


@pytest.mark.parametrize(("case", "strategy"), ALL, ids=[f"{c.op}-{s.name}-{i}" for i, (c, s) in enumerate(ALL)])
def test_a_strategy_equals_the_replicated_computation(case: Case, strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [random_input(t, generator) for t in case.inputs]
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in case.weights]
    whole = Strategy("replicated", (REPLICATE,) * len(inputs), (WHOLE,) * len(weights), REPLICATE)
    reference = [leaf(x.clone()) for x in inputs], [leaf(w.clone()) for w in weights]
    expected = run(emitted(case, whole, None, 1), *reference, {})
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64).to(expected.dtype)
    if expected.requires_grad:
        expected.backward(upstream)
    sums = [partial_sums(x, generator) for x in inputs]
    upstream_sums = partial_sums(upstream, generator)
    exchange = Exchange()
    monkeypatch.setattr(functions, "reduced", exchange.reduced)

    def on_rank(rank: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        mine = [leaf(cut(x, p, rank, parts)) for x, p, parts in zip(inputs, strategy.inputs, sums, strict=True)]
        held = [
            leaf((w if p.dim is None else w.chunk(RANKS, p.dim)[rank]).clone())
            for w, p in zip(weights, strategy.weights, strict=True)
        ]
        text = emitted(case, strategy, "tp", RANKS)
        out = run(text, mine, held, {"tp": FakeAxis(rank), "all_reduce": exchange.all_reduce})
        if strategy.output.is_shard:
            given = upstream.chunk(RANKS, strategy.output.dim)[rank]
        else:
            given = upstream_sums[rank] if strategy.output == BROADCAST else upstream
        if out.requires_grad:
            out.backward(given)
        return out.detach(), mine, held

    with ThreadPoolExecutor(RANKS) as pool:
        found = list(pool.map(on_rank, range(RANKS)))
    dim = strategy.output.dim
    assert_close(joined([f[0] for f in found], value_kind(strategy.output), dim), expected.detach())
    for i, placement in enumerate(strategy.inputs):
        if inputs[i].is_floating_point():
            grads = [gradient(f[1][i]) for f in found]
            assert_close(joined(grads, gradient_kind(placement), placement.dim), gradient(reference[0][i]))
    for i, held in enumerate(strategy.weights):
        grads = [gradient(f[2][i]) for f in found]
        assert_close(joined(grads, weight_kind(held), held.dim or 0), reference[1][i].grad)


def test_every_operation_is_tried() -> None:
    assert {case.op for case in CASES} == set(CATALOGUE) - {"input", "carry"}


def test_the_replicated_strategy_is_always_offered() -> None:
    for case in CASES:
        assert any(s.output == REPLICATE and REPLICATE in (*s.inputs, REPLICATE) for s in strategies(case)), case.op
