"""Elementwise operations: arithmetic of tensors, activations, softmax."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from mlmdsl.graph.graph import Scalar
from mlmdsl.graph.ops.base import Emission, Local, Op, ShapeProblem, Work
from mlmdsl.graph.ops.common import memory_bound, partial, pointwise
from mlmdsl.graph.tensor import TensorType

Types = tuple[TensorType, ...]
Attributes = Mapping[str, Scalar]


def _same(types: Types, attrs: Attributes) -> TensorType:
    _float(types[0], 0)
    return types[0]


def _float(type: TensorType, argument: int) -> None:
    if type.dtype == "int":
        raise ShapeProblem("MLM0502", f"this wants floating-point values, not {type}", argument)


def _joined(types: Types, attrs: Attributes) -> TensorType:
    """Shapes broadcast from the right, as in PyTorch."""
    left, right = types
    _float(left, 0)
    _float(right, 1)
    longer, shorter = (left, right) if len(left.shape) >= len(right.shape) else (right, left)
    offset = len(longer.shape) - len(shorter.shape)
    shape = list(longer.shape)
    for dim, size in enumerate(shorter.shape, offset):
        if shape[dim] == 1:
            shape[dim] = size
        elif size not in (1, shape[dim]):
            raise ShapeProblem("MLM0501", f"the shapes {left} and {right} do not fit together", 0)
    return TensorType("fp32" if "fp32" in (left.dtype, right.dtype) else "float", tuple(shape))


def _unary(name: str, doc: str, text: str | Callable[[Emission], str], saved: tuple[str, ...], *, linear: bool = False) -> Op:
    """`text` has `{x}` where the operand stands, or is a function of the emission."""

    def emit(e: Emission) -> str:
        return text.format(x=e.inputs[0]) if isinstance(text, str) else text(e)

    return Op(
        name=name,
        doc=doc,
        infer=_same,
        strategies=lambda types, out, weights, attrs, n: pointwise(types, out, n, 0) + ((partial(1),) if linear else ()),
        work=lambda local: memory_bound(local, saved),
        emit=emit,
    )


def _binary(name: str, sign: str, saved: tuple[str, ...], *, linear: bool = False) -> Op:
    def work(local: Local) -> Work:
        """Where nothing is saved the gradient passes through; that of a value with several uses is added up: one for each. A
        product's gradients are a kernel each."""
        work = memory_bound(local, saved, backward=2.0 if saved else 1.0)
        return replace(work, kernels_backward=2) if saved else work

    return Op(
        name=name,
        doc=f"`x {sign} y` elementwise, shapes broadcast from the right.",
        infer=_joined,
        strategies=lambda types, out, weights, attrs, n: pointwise(types, out, n, 0) + ((partial(2),) if linear else ()),
        work=work,
        emit=lambda e: f"{e.inputs[0]} {sign} {e.inputs[1]}",
    )


def _gelu(e: Emission) -> str:
    return f'F.gelu({e.inputs[0]}, approximate="tanh")' if e.attrs["tanh"] else f"F.gelu({e.inputs[0]})"


SOFTMAX = Op(
    name="softmax",
    doc="Softmax over the last dim.",
    infer=_same,
    strategies=lambda types, out, weights, attrs, n: pointwise(types, out, n, 0, besides=(len(out.shape) - 1,)),
    work=lambda local: memory_bound(local, ("out",)),
    emit=lambda e: f"F.softmax({e.inputs[0]}, dim=-1)",
)

OPS = (
    _binary("add", "+", (), linear=True),
    _binary("subtract", "-", (), linear=True),
    _binary("multiply", "*", ("in0", "in1")),
    _binary("divide", "/", ("in0", "in1")),
    _unary("scale", "A tensor times the number `factor`.", lambda e: f"{e.inputs[0]} * {e.attrs['factor']!r}", (), linear=True),
    _unary("offset", "A tensor plus the number `term`.", lambda e: f"{e.inputs[0]} + {e.attrs['term']!r}", ()),
    _unary("gelu", "GELU (arXiv:1606.08415), with `tanh = true` in its tanh approximation as in GPT-2.", _gelu, ("in0",)),
    _unary("relu", "ReLU.", "F.relu({x})", ("out",)),
    _unary("silu", "SiLU, x sigmoid(x) (arXiv:1702.03118).", "F.silu({x})", ("in0",)),
    _unary("sigmoid", "Logistic sigmoid.", "torch.sigmoid({x})", ("out",)),
    _unary("tanh", "Hyperbolic tangent.", "torch.tanh({x})", ("out",)),
    _unary("exp", "Exponential.", "torch.exp({x})", ("out",)),
    _unary("log", "Natural logarithm.", "torch.log({x})", ("in0",)),
    _unary("softplus", "log(1 + exp(x)), a smooth ReLU.", "F.softplus({x})", ("in0",)),
    _unary("reciprocal", "One over a tensor, as in `1 / x`.", "1.0 / {x}", ("out",)),
    SOFTMAX,
)
