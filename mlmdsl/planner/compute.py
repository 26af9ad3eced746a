"""Time of operations on one device: a roofline under which kernels stay by an efficiency that depends on their shape.

    matrix product     (arithmetic^4 + traffic^4)^(1/4) + fill, where arithmetic is 2 M N K / (peak x share x K / (K +
    half_depth)) and
                       traffic the operands once over HBM: a roofline (Williams et al. 2009) without its corner
    flash attention    FLOPs / (peak x share x L / (L + half_length) x D / (D + half_head)) + fill for L keys and heads of D
    everything else    bytes / (bandwidth x share)

Eager kernels never take less than the host needs to launch them. The curves' parameters stand in hardware/, one file per
measured device, each with its origin; a device without a file takes those of its kind over its own datasheet's peaks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from mlmdsl.grammar.spec import Device
from mlmdsl.graph.ops.base import Work

# The backward pass of flash attention takes the scores again: five matrix products for the forward's two (arXiv:2307.08691,
# section 3.1). The model's FLOPs count four.
_ATTENTION_AGAIN = 5 / 4


@dataclass(frozen=True, slots=True)
class MatmulCurve:
    share: float  # of the peak, for long inner dims
    half_depth: float  # the inner dim at which half of that is reached
    fill_seconds: float  # first loads, last stores


@dataclass(frozen=True, slots=True)
class AttentionCurve:
    share: float
    half_length: float
    half_head: float
    fill_seconds: float


@dataclass(frozen=True, slots=True)
class MemoryCurve:
    share: float
    optimizer_share: float  # fused AdamW: seven streams at once


@dataclass(frozen=True, slots=True)
class Curves:
    """What one file of hardware/ says. `origin`: what was measured, on what, and how well the curve fits."""

    origin: str
    matmul: MatmulCurve
    attention_forward: AttentionCurve
    attention_backward: AttentionCurve
    memory: MemoryCurve


@lru_cache(maxsize=1)
def _library() -> Mapping[str, Curves]:
    """Curves by device name and, for the rest, by kind."""
    found: dict[str, Curves] = {}
    for path in sorted((Path(__file__).parent / "hardware").glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        curves = Curves(
            data["origin"],
            MatmulCurve(**data["matmul"]),
            AttentionCurve(**data["attention_forward"]),
            AttentionCurve(**data["attention_backward"]),
            MemoryCurve(**data["memory"]),
        )
        found.update(dict.fromkeys(data["devices"], curves))
    return found


def curves_of(device: Device) -> Curves:
    """The measured curves of this device, or those of its kind."""
    library = _library()
    return library.get(device.name) or library[device.kind]


@dataclass(frozen=True)
class Kernels:
    """Times on one device in one precision, eager: each kernel costs its launch at least."""

    device: Device
    precision: str

    @cached_property
    def curves(self) -> Curves:
        return curves_of(self.device)

    @cached_property
    def peak(self) -> float:
        """The datasheet's dense FLOP/s of matrix products."""
        peaks = self.device.peak_flops_per_second
        return peaks.get(self.precision) or peaks.get("fp16") or max(peaks.values())

    @cached_property
    def bytes_per_second(self) -> float:
        """What copies reach."""
        return self.device.memory_bytes_per_second * self.curves.memory.share

    def forward_seconds(self, work: Work) -> float:
        return max(self._forward(work), work.kernels_forward * self.device.launch_seconds)

    def backward_seconds(self, work: Work) -> float:
        return max(self._backward(work), work.kernels_backward * self.device.launch_seconds)

    def weight_seconds(self, work: Work) -> float:
        """Of the backward pass what gradients of weights take, where it is taken apart: one of a matrix product's two, and of
        what else has weights about half."""
        if work.matmul is not None:
            return self._product(work.flops_backward / 2, work.bytes_backward / 2, work.matmul[0])
        return self._backward(work) / 2

    def busy_seconds(self, work: Work) -> float:
        """Forward and backward without the launches."""
        return self._forward(work) + self._backward(work)

    def memory_seconds(self, moved: float) -> float:
        """Time to read and write this many bytes in all."""
        return moved / self.bytes_per_second

    def optimizer_seconds(self, moved: float) -> float:
        """Time of a fused optimizer's pass that reads and writes this many bytes."""
        return moved / (self.device.memory_bytes_per_second * self.curves.memory.optimizer_share)

    def _forward(self, work: Work) -> float:
        if work.matmul is not None:
            return self._product(work.flops_forward, work.bytes_forward, work.matmul[1])
        if work.attention is not None:
            return self._attend(work, work.flops_forward * work.computed, work.bytes_forward, self.curves.attention_forward)
        return work.bytes_forward / self.bytes_per_second

    def _backward(self, work: Work) -> float:
        if work.matmul is not None:  # the input's gradient sums over N, the weight's over M
            m, _, n = work.matmul
            flops, moved = work.flops_backward / 2, work.bytes_backward / 2
            return self._product(flops, moved, n) + self._product(flops, moved, m)
        if work.attention is not None:
            flops = work.flops_backward * work.computed * _ATTENTION_AGAIN
            return self._attend(work, flops, work.bytes_backward, self.curves.attention_backward)
        return work.bytes_backward / self.bytes_per_second

    def _product(self, flops: float, moved: float, depth: int) -> float:
        curve = self.curves.matmul
        arithmetic = flops * (depth + curve.half_depth) / (self.peak * curve.share * depth)
        return _corner(arithmetic, moved / self.bytes_per_second) + curve.fill_seconds

    def _attend(self, work: Work, flops: float, moved: float, curve: AttentionCurve) -> float:
        assert work.attention is not None
        _, _, _, length, head = work.attention
        share = curve.share * length / (length + curve.half_length) * head / (head + curve.half_head)
        return _corner(flops / (self.peak * share), moved / self.bytes_per_second) + curve.fill_seconds


def _corner(arithmetic: float, traffic: float) -> float:
    """The larger of two times that overlap, and a little more where they are alike."""
    return (arithmetic**4 + traffic**4) ** 0.25
