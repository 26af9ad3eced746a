"""Time of operations on one device: a roofline with the efficiency that kernels of a shape reach, never below the launch overhead.

matrix products    2 M N K / (peak x efficiency(M, N, K)), or their bytes over the memory bandwidth, the larger
flash attention    FLOPs / (peak x efficiency(sequence, head dim)); the backward pass computes 2.5 times the forward's FLOPs
                   (it recomputes the scores: arXiv:2307.08691), of which the model's FLOPs count 2
everything else    bytes / bandwidth
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mlmdsl.grammar.spec import Device
from mlmdsl.graph.ops.base import Work

# Shares of the peaks that large kernels reach and the time that filling and draining the device takes, measured on one H100 SXM with
# torch 2.11 and CUDA 13.0 (bf16 F.linear of 276 shapes, causal flash attention of 12, copies and additions); the same shares are
# taken for every GPU until it is measured itself. On a CPU: fp32 F.linear on one thread.
_MATMUL_SHARE = {"cuda": 0.72, "rocm": 0.6, "cpu": 0.9}
_ATTENTION_SHARE = {"forward": 0.63, "backward": 0.53}  # heads of 128; smaller heads fill the tensor cores less
_MEMORY_SHARE = 0.88
_FILL_SECONDS = {"cuda": 6e-6, "rocm": 10e-6, "cpu": 0.0}


@dataclass(frozen=True)
class Kernels:
    """Times on one device in one precision, eager: each kernel costs its launch at least."""

    device: Device
    precision: str

    @cached_property
    def peak(self) -> float:
        """FLOP/s of matrix products; fp32 programs use tf32 only where the device has nothing else to say."""
        peaks = self.device.peak_flops_per_second
        return peaks.get(self.precision) or peaks.get("fp16") or max(peaks.values())

    @cached_property
    def bytes_per_second(self) -> float:
        return self.device.memory_bytes_per_second * _MEMORY_SHARE

    def forward_seconds(self, work: Work) -> float:
        return self._seconds(work, work.flops_forward, work.bytes_forward, work.kernels_forward, "forward")

    def backward_seconds(self, work: Work) -> float:
        flops = work.flops_backward * (1.25 if work.kind == "attention" else 1.0)
        return self._seconds(work, flops, work.bytes_backward, work.kernels_backward, "backward")

    def busy_seconds(self, work: Work) -> float:
        """Forward and backward without the launches' floor."""
        return self._busy(work, work.flops_forward, work.bytes_forward, "forward") + self._busy(
            work, work.flops_backward, work.bytes_backward, "backward"
        )

    def _busy(self, work: Work, flops: float, moved: float, direction: str) -> float:
        return max(moved / self.bytes_per_second, flops / (self.peak * self._share(work, direction)) if flops else 0.0)

    def _seconds(self, work: Work, flops: float, moved: float, kernels: int, direction: str) -> float:
        busy = moved / self.bytes_per_second
        if flops:
            fill = _FILL_SECONDS[self.device.kind] * kernels
            busy = max(busy, flops / (self.peak * self._share(work, direction))) + fill
        return max(busy, kernels * self.device.launch_seconds)

    def _share(self, work: Work, direction: str) -> float:
        kind = self.device.kind
        if work.attention is None:
            return _MATMUL_SHARE[kind]
        if kind == "cpu":
            return 0.5 * _MATMUL_SHARE[kind]
        return _ATTENTION_SHARE[direction] * min(1.0, work.attention[4] / 128) ** 0.9

    def memory_seconds(self, moved: float) -> float:
        return moved / self.bytes_per_second
