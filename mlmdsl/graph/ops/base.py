"""What the compiler knows of a primitive operation, declared once.

A family file (`linear.py`, `norm.py`, ...) makes `Op` values and lists them in its `OPS`; `ops/__init__.py` joins the families
into `CATALOGUE`. Everything below is a pure function of the node's static description.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Literal

from mlmdsl.frozen import frozen
from mlmdsl.graph.graph import Scalar
from mlmdsl.graph.placement import Strategy
from mlmdsl.graph.tensor import Init, TensorType, symbols_of

Shapes = tuple[tuple[int, ...], ...]
ContextRule = Callable[[tuple[TensorType, ...], TensorType, Shapes, Mapping[str, Scalar]], tuple[Strategy, ...]]


class ShapeProblem(Exception):
    """Raised by a shape rule; `build` turns it into a positioned diagnostic.

    code: MLM05xx (or MLM04xx for divisibility); argument: which input's origin is the other half of the contradiction
    (its index), or None."""

    def __init__(self, code: str, message: str, argument: int | None = None, help: str = ""):
        super().__init__(message)
        self.code, self.message, self.argument, self.help = code, message, argument, help


@frozen
class WeightSpec:
    """A weight that an operation wants made: its leaf name ("weight", "bias"), shape and initialisation; `expert`: one
    slice of dim 0 per expert, which the expert axis shares out; `balance`: see `Weight`."""

    leaf: str
    shape: tuple[int, ...]
    init: Init
    decay: bool = True
    expert: bool = False
    balance: float = 0.0


@frozen
class Work:
    """What one execution costs on one rank, local sizes. FLOPs count matrix products only (2 M N K; causal attention half);
    bytes are what has to cross HBM, each operand once.

    matmul: (M, K, N) of a "matmul"; attention: (batch, heads, queries, keys, head_dim) of an "attention"; computed: what its
    kernel computes over what its mask leaves, which is what the FLOPs count.
    saved: which values stay until the backward pass, by reference so that a value saved by several operations counts once:
    "in0", "in1", "out"; extra_saved_bytes: what else does (log-sum-exp, masks); extra_cheap_bytes: of these, what selective
    recomputation makes again though it keeps the operation's result."""

    kind: Literal["matmul", "attention", "memory", "none"]
    flops_forward: float = 0.0
    flops_backward: float = 0.0
    bytes_forward: float = 0.0
    bytes_backward: float = 0.0
    saved: tuple[str, ...] = ()
    extra_saved_bytes: float = 0.0
    extra_cheap_bytes: float = 0.0
    standing_bytes: float = 0.0  # stays, but once for all passes of the layer (the mask of a window)
    transient_bytes: float = 0.0  # live only while it runs, forward or backward (fp32 logits, unfused scores)
    kernels_forward: int = 1
    kernels_backward: int = 1
    matmul: tuple[int, int, int] | None = None
    attention: tuple[int, int, int, int, int] | None = None
    computed: float = 1.0
    precision: str | None = None  # of a matrix product, where it is not the training's
    batch: int = 1  # matrix products that one kernel computes side by side: `matmul` is of each
    then: tuple[Work, ...] = ()  # further kernels, one after another: times alone count


@frozen
class Local:
    """A node's sizes on one rank, under one strategy and bound B and S: what `Op.work` is given."""

    inputs: tuple[tuple[int, ...], ...]
    input_bytes: tuple[int, ...]  # bytes per element of each input
    output: tuple[int, ...]
    output_bytes: int
    weights: tuple[tuple[int, ...], ...]
    weight_bytes: int  # bytes per element in the training precision
    attrs: Mapping[str, Scalar]


@frozen
class Emission:
    """What `Op.emit` is given: Python expressions for inputs and weights (None where an optional weight is absent), the node's
    attributes, the name of the tensor-axis variable ("tp"; None when tensor = 1), its size, the strategy in force, and the
    node's local output shape as Python expressions (e.g. ("B", "S", "16", "64"), where "B" and "S" stand for
    `x.size(0)`, `x.size(1)`: -1 safe); `expert` and `context` are the names of the variables of those axes,
    None when the axis has one rank."""

    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    attrs: Mapping[str, Scalar]
    axis: str | None
    axis_size: int
    strategy: Strategy
    input_types: tuple[TensorType, ...]
    output_type: TensorType
    expert: str | None = None
    context: str | None = None

    @property
    def cut(self) -> str:
        """The axes over which the sequence of the first input is cut under "sequence", the outer one first: `cp, tp`."""
        return ", ".join(filter(None, (self.context, self.axis if self.strategy.name == "sequence" else None)))


@frozen
class Op:
    """One primitive operation.

    infer(input types, attributes) -> output type; raises ShapeProblem.
    weights(input types, attributes) -> weights to make (empty for a pure function).
    strategies(node input types, output type, weight shapes, attributes, axis size) -> the ways to place it on an axis of that
        size, the replicated one always among them; only legal ones (divisible sizes).
    work(local) -> cost; `work_under`: under strategies of these names, where other bytes are saved or live meanwhile;
        `work_learned`: on a device without a kernel that gives a bias its gradient, of one that has one; `of_shape`: reads the
        shape of its inputs alone, so that no gradient goes back.
    emit(emission) -> one Python expression; `imports` names what it needs from mlmdsl.runtime.
    linear: the operation is linear in its inputs jointly with no constant, so that it maps PARTIAL to PARTIAL.
    collectives: those that the operation itself makes on the axis, forward only: (kind, bytes, count).
    context: the ways to place it on the context axis, over which every sequence is cut and every weight is whole with a partial
        gradient, the best first; where it is not given, `strategies` by name (`on_context`).
    cheap: recomputed under `recompute = selective` (everything but matrix products and flash attention).
    deliveries(local): bytes that an exchange over the expert axis moves on one rank, (forward, backward), where that has ranks.
    active(input types): the share of its weights that one token is computed with.
    """

    name: str
    doc: str
    infer: Callable[[tuple[TensorType, ...], Mapping[str, Scalar]], TensorType]
    strategies: Callable[
        [tuple[TensorType, ...], TensorType, tuple[tuple[int, ...], ...], Mapping[str, Scalar], int], tuple[Strategy, ...]
    ]
    work: Callable[[Local], Work]
    emit: Callable[[Emission], str]
    weights: Callable[[tuple[TensorType, ...], Mapping[str, Scalar]], tuple[WeightSpec, ...]] = lambda types, attrs: ()
    imports: tuple[str, ...] = ()
    cheap: bool = True
    active: Callable[[tuple[TensorType, ...]], float] = lambda types: 1.0
    collectives: Callable[[Strategy, Local], tuple[tuple[str, int, int], ...]] = lambda strategy, local: ()
    deliveries: Callable[[Local], tuple[int, int]] = lambda local: (0, 0)
    context: ContextRule | None = None
    work_under: Mapping[str, Callable[[Local], Work]] = field(default_factory=dict[str, Callable[[Local], Work]])
    work_learned: Callable[[Local], Work] | None = None
    of_shape: bool = False

    def on_context(
        self,
        types: tuple[TensorType, ...],
        output: TensorType,
        weights: tuple[tuple[int, ...], ...],
        attrs: Mapping[str, Scalar],
    ) -> tuple[Strategy, ...]:
        """The ways to place it on the context axis: cut along a sequence, or along rows of its tokens; where it has none, whole
        with partial gradients, or partial sums. Nothing where it mixes positions."""
        types, output = tuple(map(_of_one, types)), _of_one(output)
        if self.context is not None:
            return self.context(types, output, weights, attrs)
        lengthwise = any(sequence_dims(type) for type in (*types, output))
        names = ("sequence",) if lengthwise else ("broadcast", "partial")
        return tuple(s for s in self.strategies(types, output, weights, attrs, 2) if s.name in names)


def sequence_dims(type: TensorType) -> tuple[int, ...]:
    """Dims that are a sequence, or rows of its tokens: sizes by name, but for the batch."""
    return tuple(dim for dim, size in enumerate(type.shape) if symbols_of(size) - {"B"})


def _of_one(type: TensorType) -> TensorType:
    """Rows of tokens as they are of one sequence of the batch, which is what the context axis cuts."""
    sizes = (size if size == "B" or isinstance(size, int) else size.replace("*B*", "*") for size in type.shape)
    return TensorType(type.dtype, tuple(sizes))
