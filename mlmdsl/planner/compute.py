"""Time of operations on one device: a roofline under which kernels stay by an efficiency that depends on their shape.

    matrix product     (arithmetic^4 + traffic^4)^(1/4) + fill: a roofline (Williams et al. 2009) without its corner, where
                       arithmetic is 2 M N K / (peak x share), longer by half_depth / K (filling and draining the inner loop)
                       and by (1 + (wave / M N)^4)^(1/4) (less than one wave of output tiles over the multiprocessors);
                       traffic is the operands once over HBM
    flash attention    FLOPs / (peak x share), longer by half_length / L for L keys, half_head / D for heads of D, and
                       half_rows / R for R rows of queries over all heads (blocks of rows fill the multiprocessors); + fill
    everything else    bytes / (bandwidth x share)

The host launches kernels one after another while the device computes: a pass takes what the slower of the two takes
(`joined`). On a CPU they are one and the same, so that both add up. The curves' parameters stand in hardware/, one file per
measured device, each with its origin; a device without a file takes those of its kind over its own datasheet's peaks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property, lru_cache
from math import log, pi, sqrt
from pathlib import Path
from typing import Any

from mlmdsl.frozen import frozen
from mlmdsl.grammar.spec import Device
from mlmdsl.graph.ops.base import Work

# The backward pass of flash attention takes the scores again: five matrix products for the forward's two (arXiv:2307.08691,
# section 3.1). The model's FLOPs count four.
_ATTENTION_AGAIN = 5 / 4
# Of the share of the peak that products reach, what is left in fp8: an H100's best is 1,403 of 1,979 TFLOP/s, and 792 of 989 in
# bf16 (github.com/stas00/ml-engineering, compute/accelerator)
_FP8 = 0.88
# GPUs of one make differ in speed where they are bound by power, and a step waits for the slowest: a standard deviation of
# 1.5 % (Sinha et al. 2022, Not All GPUs Are Created Equal, SC22: 8 % from the slowest to the fastest of a cluster on average)
_SPREAD = 0.015


@frozen
class MatmulCurve:
    share: float  # of the peak, for long inner dims
    half_depth: float  # the inner dim at which half of that is reached
    wave_outputs: float  # elements of the output that give every multiprocessor one tile
    fill_seconds: float  # first loads, last stores


@frozen
class AttentionCurve:
    share: float
    half_length: float
    half_head: float
    half_rows: float
    fill_seconds: float


@frozen
class MemoryCurve:
    share: float
    optimizer_share: float  # fused AdamW: seven streams at once


@frozen
class Curves:
    """What one file of hardware/ says. `origin`: what was measured, on what, and how well the curve fits; `measured`: whether
    it is of this very device; `sustained`: of the arithmetic that a kernel reaches by itself, what is left in a step that never
    pauses, where power limits the clock."""

    origin: str
    measured: bool
    matmul: MatmulCurve
    attention_forward: AttentionCurve
    attention_backward: AttentionCurve
    memory: MemoryCurve
    sustained: float = 1.0


def read_curves(data: Mapping[str, Any]) -> Curves:
    """The form of a file of hardware/."""
    return Curves(
        data["origin"],
        data["measured"],
        MatmulCurve(**data["matmul"]),
        AttentionCurve(**data["attention_forward"]),
        AttentionCurve(**data["attention_backward"]),
        MemoryCurve(**data["memory"]),
        data.get("sustained", 1.0),
    )


@lru_cache(maxsize=1)
def _library() -> Mapping[str, Curves]:
    """Curves by device name and, for the rest, by kind."""
    found: dict[str, Curves] = {}
    for path in sorted((Path(__file__).parent / "hardware").glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        found.update(dict.fromkeys(data["devices"], read_curves(data)))
    return found


def curves_of(device: Device) -> Curves:
    """The measured curves of this device (its own, of `mlmdsl probe`; else those of its name), or those of its kind."""
    if device.curves:
        parts = {"memory" if part == "streams" else part: values for part, values in device.curves.items()}
        return read_curves({"origin": f"{device.name}, as probe measured it", "measured": True, **parts})
    library = _library()
    return library.get(device.name) or library[device.kind]


def slowest_of(kind: str, devices: int) -> float:
    """How much longer arithmetic takes on the slowest of so many devices than on one: the mean of the largest of as many normal
    values (Cramer 1946, section 28.6). Processes on one host are as fast as each other."""
    if devices == 1 or kind == "cpu":
        return 1.0
    root = sqrt(2 * log(devices))
    return 1 + _SPREAD * max(0.0, root - (log(log(devices)) + log(4 * pi)) / (2 * root))


@frozen
class Kernels:
    """Times on one device in one precision ("fp32", "tf32", "fp16", "bf16", "fp8"). `launch_seconds`: the host's for one
    kernel; None: the device's, of eager PyTorch. `slowest`: by `slowest_of`."""

    device: Device
    precision: str
    launch_seconds: float | None = None
    slowest: float = 1.0

    @cached_property
    def curves(self) -> Curves:
        return curves_of(self.device)

    @cached_property
    def peak(self) -> float:
        """The datasheet's dense FLOP/s of matrix products."""
        return self.peak_of(self.precision)

    def peak_of(self, precision: str) -> float:
        peaks = self.device.peak_flops_per_second
        return peaks.get(precision) or peaks.get("fp16") or max(peaks.values())

    @cached_property
    def bytes_per_second(self) -> float:
        """What copies reach."""
        return self.device.memory_bytes_per_second * self.curves.memory.share

    @cached_property
    def launch(self) -> float:
        return self.device.launch_seconds if self.launch_seconds is None else self.launch_seconds

    @cached_property
    def slowed(self) -> float:
        """How much longer arithmetic takes in a step of many devices than by itself on one."""
        return self.slowest / self.curves.sustained

    def forward_seconds(self, work: Work) -> float:
        """Of one operation by itself."""
        return self.joined(self.forward_busy(work), work.kernels_forward)

    def backward_seconds(self, work: Work) -> float:
        return self.joined(self.backward_busy(work), work.kernels_backward)

    def joined(self, busy: float, kernels: float, waiting: float = 0.0) -> float:
        """Of kernels in a row: the device's time, or the host's to launch them, as far as it is not `waiting` for collectives
        meanwhile; on a CPU both."""
        host = kernels * self.launch
        return busy + host if self.device.kind == "cpu" else max(busy, host - waiting)

    def weight_seconds(self, work: Work) -> float:
        """Of the backward pass what gradients of weights take, where it is taken apart: one of a matrix product's two, and of
        what else has weights about half."""
        if work.matmul is not None:
            m, k, n = work.matmul
            return self._product(work, work.flops_backward / 2, work.bytes_backward / 2, m, n * k)
        return self.backward_busy(work) / 2

    def busy_seconds(self, work: Work) -> float:
        """Forward and backward without the launches."""
        return self.forward_busy(work) + self.backward_busy(work)

    def memory_seconds(self, moved: float) -> float:
        """Time to read and write this many bytes in all."""
        return moved / self.bytes_per_second

    def optimizer_seconds(self, moved: float) -> float:
        """Time of a fused optimizer's pass that reads and writes this many bytes."""
        return moved / (self.device.memory_bytes_per_second * self.curves.memory.optimizer_share)

    def forward_busy(self, work: Work) -> float:
        """The device's time."""
        return self._forward(work) + sum(map(self.forward_busy, work.then))

    def backward_busy(self, work: Work) -> float:
        return self._backward(work) + sum(map(self.backward_busy, work.then))

    def _forward(self, work: Work) -> float:
        if work.matmul is not None:
            m, k, n = work.matmul
            return self._product(work, work.flops_forward, work.bytes_forward, k, m * n)
        if work.attention is not None:
            return self._attend(work, work.flops_forward * work.computed, work.bytes_forward, self.curves.attention_forward)
        return work.bytes_forward / self.bytes_per_second

    def _backward(self, work: Work) -> float:
        if work.matmul is not None:  # the input's gradient sums over N, the weight's over M
            m, k, n = work.matmul
            flops, moved = work.flops_backward / 2, work.bytes_backward / 2
            return self._product(work, flops, moved, n, m * k) + self._product(work, flops, moved, m, n * k)
        if work.attention is not None:
            flops = work.flops_backward * work.computed * _ATTENTION_AGAIN
            return self._attend(work, flops, work.bytes_backward, self.curves.attention_backward)
        return work.bytes_backward / self.bytes_per_second

    def _product(self, work: Work, flops: float, moved: float, depth: int, outputs: int) -> float:
        curve = self.curves.matmul
        waves = (1 + (curve.wave_outputs / (outputs * work.batch)) ** 4) ** 0.25
        share = curve.share * (_FP8 if work.precision == "fp8" else 1.0)
        arithmetic = (
            self.slowed
            * flops
            * (1 + curve.half_depth / depth)
            * waves
            / (self.peak_of(work.precision or self.precision) * share)
        )
        return _corner(arithmetic, moved / self.bytes_per_second) + curve.fill_seconds

    def _attend(self, work: Work, flops: float, moved: float, curve: AttentionCurve) -> float:
        assert work.attention is not None
        batch, heads, queries, length, head = work.attention
        longer = (1 + curve.half_length / length) * (1 + curve.half_head / head)
        longer *= 1 + curve.half_rows / (batch * heads * queries)
        return (
            _corner(self.slowed * flops * longer / (self.peak * curve.share), moved / self.bytes_per_second)
            + curve.fill_seconds
        )


def _corner(arithmetic: float, traffic: float) -> float:
    """The larger of two times that overlap, and a little more where they are alike."""
    return (arithmetic**4 + traffic**4) ** 0.25
