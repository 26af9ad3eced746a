"""How a program executes the graph, where that differs from what this compiler emits: what published runs were made with.

attention   "unfused": scores pass through memory, as in Megatron-LM before flash attention (arXiv:2104.04473, section 4.2):
            two batched products, one kernel for scale, mask and softmax, one for dropout
compiled    torch.compile: elementwise operations that follow one another are one kernel, and launches cost less
products    what they are computed in, where it is not the training's precision: "tf32", "fp16"
fp8         products of the layers, both operands cast before each (head, embedding and attention stay in bf16)
selective   what is run again: "cheap" all but products, attention and collectives; "attention" its core alone, as in
            Megatron-LM (arXiv:2205.05198, section 5); "alternate" also every second product, as in torchtitan
dropout     after the softmax, after attention and MLP (0.1 in GPT-3's recipe, which Megatron-LM keeps): a mask of a byte
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Literal

from mlmdsl.frozen import frozen
from mlmdsl.graph.graph import Graph, Node
from mlmdsl.graph.ops import CATALOGUE
from mlmdsl.graph.ops.base import Local, Work

# Host's seconds for one kernel of a compiled graph: the driver's launch without Python and the dispatcher
_COMPILED_LAUNCH = 5e-6
_CAST = 5.0  # bytes for each element that is cast to fp8: its largest value (2 read), then 2 read and 1 written
_MASK = 1.0  # bytes
# Bytes for each element, forward and backward, of what is composed of simple operations in fp32: RMS norm as a cast, a square,
# a mean, two products and a cast; rotary positions as a cast, a complex product and a cast
_COMPOSED = {"rms_norm": (38.0, 60.0), "rotary": (26.0, 26.0)}


@frozen
class Execution:
    """The defaults are the emitted program's. Bytes are for each local element of a weight: `gradient_bytes` of the gradients
    that replicas add up, `accumulated_bytes` moved to add a micro-batch's gradient to the sum, `optimizer_bytes` (None: the
    fused optimizer's). `scattered_sends`: stages send a share of the activations for each rank of the tensor axis, and gather
    them again (arXiv:2104.04473, section 4.1). `early_stop`: recomputing ends with the last operation that saves something.
    `composed`: RMS norm and rotary positions of simple operations, each a kernel. `gathers_wait`, `sums_wait`: nothing
    hides ZeRO's gathers of the stepped weights, and the sums of gradients. `overlapped_sums`: without ZeRO something does.
    `fused_gates`: a gate's activation and its product are one kernel; `fused_rotary`: so are rotary positions.
    `shards_sums`: ZeRO 1 keeps this rank's part of the sums beside the whole ones, and buffers for both (FSDP2).
    `static_buffers`: pipeline stages keep a receive buffer for every micro-batch (torch), not for those in flight.
    `loss_copies`: of the logits in fp32 that the loss makes besides. `probabilities`: the loss over a cut vocabulary, too,
    keeps those in fp32 and not the logits."""

    compiled: bool = False
    attention: Literal["flash", "unfused"] = "flash"
    dropout: bool = False
    products: str | None = None
    fp8: bool = False
    gradient_bytes: float = 4.0
    accumulated_bytes: float = 10.0
    optimizer_bytes: float | None = None
    scattered_sends: bool = False
    early_stop: bool = True
    composed: bool = False
    fused_gates: bool = False
    fused_rotary: bool = False
    fused_products: bool = False
    shards_sums: bool = True
    static_buffers: bool = True
    loss_copies: int = 0
    probabilities: bool = False
    gathers_wait: bool = False
    sums_wait: bool = False
    overlapped_sums: bool = False
    launch_seconds: float | None = None
    attention_speed: float = 1.0  # of its flash attention, the device's curves being 1
    selective: Literal["cheap", "attention", "alternate"] = "cheap"

    @property
    def launches(self) -> float | None:
        """Seconds of the host for one kernel; None: as the device says."""
        return _COMPILED_LAUNCH if self.compiled else self.launch_seconds

    def reruns(self, nodes: Sequence[Node]) -> list[Node]:
        """Of a layer's operations those that selective recomputation runs again."""
        if self.selective == "attention":
            return [node for node in nodes if node.op == "attend"]
        products = [node for node in nodes if node.op == "linear"][1::2] if self.selective == "alternate" else []
        return [node for node in nodes if CATALOGUE[node.op].cheap or node in products]

    def works(self, graph: Graph, found: Mapping[str, Work], locals: Mapping[str, Local]) -> Mapping[str, Work]:
        """By node, as this program executes it."""
        if self == Execution():
            return found
        adapted = {path: self._adapted(graph, graph.nodes[path], work, locals[path]) for path, work in found.items()}
        if self.fused_products:
            adapted = _joined(graph, adapted)
        if self.compiled or self.fused_gates:
            adapted = _remade(graph, adapted)
        return _fused(graph, adapted, locals) if self.compiled else adapted

    def _adapted(self, graph: Graph, node: Node, work: Work, local: Local) -> Work:
        layer = graph.region_of[node.path].repeated
        if work.attention is not None and self.attention == "unfused":
            return unfused(work, local, self.dropout)
        if work.attention is not None and self.attention_speed != 1.0:
            return replace(work, computed=work.computed / self.attention_speed)
        if self.fp8 and work.matmul is not None and layer:
            return _in_fp8(work)
        if node.op == "rotary" and (self.compiled or self.fused_rotary):
            moved = 2.0 * prod(local.output) * local.output_bytes
            return replace(work, bytes_forward=moved, bytes_backward=moved, kernels_forward=1, kernels_backward=1)
        if self.composed and node.op in _COMPOSED:
            forward, backward = (each * prod(local.output) for each in _COMPOSED[node.op])
            return replace(work, bytes_forward=forward, bytes_backward=backward, kernels_forward=7, kernels_backward=12)
        if self.dropout and node.op == "add" and layer:
            count = prod(local.output)
            more, back = _MASK * count, (_MASK + 2.0 * local.output_bytes) * count
            return replace(work, bytes_forward=work.bytes_forward + more, bytes_backward=work.bytes_backward + back)
        return work


OURS = Execution()


def unfused(work: Work, local: Local, dropout: bool) -> Work:
    """Attention whose scores [batch, heads, queries, keys] pass through memory. Saved: what every kernel needs, the scores'
    softmax and with dropout its mask and the dropped softmax too (arXiv:2205.05198, section 4.1: 5 a s^2 b bytes)."""
    assert work.attention is not None
    batch, heads, queries, keys, size = work.attention
    scores, width = float(batch * heads * queries * keys), local.output_bytes
    rows = float(batch * heads * queries * size * width)
    product = Work(
        "matmul",
        flops_forward=2.0 * scores * size,
        flops_backward=4.0 * scores * size,
        bytes_forward=scores * width + 2 * rows,
        bytes_backward=2 * (scores * width + 2 * rows),
        matmul=(queries, size, keys),
        batch=batch * heads,
    )
    dropped = 2 * width + _MASK if dropout else 0.0
    between = Work(
        "memory",
        bytes_forward=scores * (2 * width + dropped) + 2 * rows,
        bytes_backward=scores * (3 * width + dropped) + 4 * rows,
    )
    return replace(
        work,
        flops_forward=0.0,
        flops_backward=0.0,
        bytes_forward=0.0,
        bytes_backward=0.0,
        attention=None,
        kind="memory",
        then=(product, replace(product, matmul=(queries, keys, size)), between),
        extra_saved_bytes=scores * (width + (width + _MASK if dropout else 0.0)),
        extra_cheap_bytes=scores * (width + (width + _MASK if dropout else 0.0)),
        kernels_forward=6 + dropout,
        kernels_backward=8 + dropout,
    )


def _in_fp8(work: Work) -> Work:
    assert work.matmul is not None
    m, k, n = work.matmul
    casts = Work("memory", bytes_forward=_CAST * (m * k + k * n), bytes_backward=_CAST * m * n)
    return replace(
        work,
        precision="fp8",
        then=(casts,),
        kernels_forward=work.kernels_forward + 4,
        kernels_backward=work.kernels_backward + 2,
    )


def _joined(graph: Graph, works: Mapping[str, Work]) -> dict[str, Work]:
    """Products of one input are one, by weights side by side: queries, keys and values, a gate and what it gates. As many calls
    are left, which take the result apart."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for path, work in works.items():
        node = graph.nodes[path]
        if work.matmul is not None and node.op == "linear" and graph.region_of[path].repeated:
            alike.setdefault(node.inputs, []).append(path)
    found = dict(works)
    for first, *others in alike.values():
        for other in others:
            found[first] = _side_by_side(found[first], works[other])
            left = works[other].kernels_forward, works[other].kernels_backward
            found[other] = Work("matmul", saved=works[other].saved, kernels_forward=left[0], kernels_backward=left[1])
    return found


def _side_by_side(a: Work, b: Work) -> Work:
    assert a.matmul is not None and b.matmul is not None
    m, k, n = a.matmul
    read = 2.0 * m * k  # the input, which is read once
    return replace(
        a,
        flops_forward=a.flops_forward + b.flops_forward,
        flops_backward=a.flops_backward + b.flops_backward,
        bytes_forward=a.bytes_forward + b.bytes_forward - read,
        bytes_backward=a.bytes_backward + b.bytes_backward - 2 * read,
        matmul=(m, k, n + b.matmul[2]),
    )


def _remade(graph: Graph, works: Mapping[str, Work]) -> dict[str, Work]:
    """What an elementwise operation makes of values that are saved anyway is not saved for the one that follows it in the same
    kernel, but made again there."""

    def remade(source: str, path: str) -> bool:
        work = works[source]
        alike = graph.region_of[path] is graph.region_of[source] and work.kind == works[path].kind == "memory"
        return alike and work.saved == ("in0",)

    found: dict[str, Work] = {}
    for path, work in works.items():
        inputs = graph.nodes[path].inputs
        kept = tuple(name for name in work.saved if name == "out" or not remade(inputs[int(name[2:])], path))
        found[path] = work if kept == work.saved else replace(work, saved=kept)
    return found


def _fused(graph: Graph, works: Mapping[str, Work], locals: Mapping[str, Local]) -> Mapping[str, Work]:
    """Elementwise operations in a row are one kernel: what one hands to the next is not read, and not written unless it is
    saved or something else uses it."""
    users: dict[str, list[str]] = {}
    for node in graph.nodes.values():
        for source in node.inputs:
            users.setdefault(source, []).append(node.path)
    saved = {node.inputs[int(name[2:])] for node in graph.nodes.values() for name in works[node.path].saved if name != "out"}
    saved |= {path for path, work in works.items() if "out" in work.saved}

    def joins(path: str, other: str) -> bool:
        alike = graph.region_of[path] is graph.region_of[other]
        return alike and works[path].kind == works[other].kind == "memory" and not works[path].then

    found: dict[str, Work] = {}
    for path, work in works.items():
        node, local = graph.nodes[path], locals[path]
        if work.kind != "memory" or work.then or not work.bytes_forward:
            found[path] = work
            continue
        read = _read(node.inputs, local, [joins(source, path) for source in node.inputs])
        onwards = users.get(path, [])
        hidden = path not in saved and bool(onwards) and all(joins(path, user) for user in onwards)
        left = max(0.0, work.bytes_forward - read - hidden * prod(local.output) * local.output_bytes) / work.bytes_forward
        kernels = 0 if read else work.kernels_forward and 1
        found[path] = replace(
            work,
            bytes_forward=work.bytes_forward * left,
            bytes_backward=work.bytes_backward * left,
            kernels_forward=kernels,
            kernels_backward=kernels,
        )
    return found


def _read(inputs: Sequence[str], local: Local, joined: Sequence[bool]) -> float:
    """Bytes of the inputs that are there already."""
    sizes = [prod(shape) * width for shape, width in zip(local.inputs, local.input_bytes, strict=True)]
    return float(sum(size for size, there in zip(sizes, joined, strict=True) if there))
