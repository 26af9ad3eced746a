"""Functions that programs call besides torch's own. B sequences, S positions, H heads (K for keys and values), D head dim.

`cut` names the axes over which the sequence of a value is cut, the outer one first: what depends on positions finds its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlmdsl.runtime.collectives import reduced, sliced
from mlmdsl.runtime.mesh import Axis

IGNORE = -100  # a target that does not count


def sequence_positions(length: int, cut: Sequence[Axis], device: torch.device | None = None) -> Tensor:
    """The positions of this rank's `length` rows of a sequence cut over the axes: [length]."""
    places = torch.arange(length * prod(axis.size for axis in cut), device=device)
    for axis in cut:
        places = sliced(places, axis, 0)
    return places


def concat(x: Tensor, y: Tensor) -> Tensor:
    """The last dims joined; the others broadcast."""
    leading = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
    return torch.cat((x.expand(*leading, -1), y.expand(*leading, -1)), -1)


def rotary(
    x: Tensor,
    theta: float = 10000.0,
    *,
    factor: float = 1.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max: int = 8192,
    dim: int | None = None,
    interleaved: bool = False,
    cut: Sequence[Axis] = (),
) -> Tensor:
    """Rotary positions (arXiv:2104.09864) on x [B, S, H, D], the halves of D paired as in Hugging Face checkpoints.

    `factor` other than 1 stretches low frequencies as Llama 3.1 does; of `dim` features the rest is left as it is (GPT-NeoX);
    `interleaved` pairs neighbours instead of halves, as the paper does."""
    if interleaved:
        halves = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        scaled = {"factor": factor, "low_freq_factor": low_freq_factor, "high_freq_factor": high_freq_factor}
        turned = rotary(halves, theta, **scaled, original_max=original_max, cut=cut)
        return turned.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    places = sequence_positions(x.size(1), cut, x.device)
    if dim is not None and dim < x.size(-1):
        scaling = (factor, low_freq_factor, high_freq_factor, original_max)
        return torch.cat((_turned(x[..., :dim], theta, scaling, places), x[..., dim:]), -1)
    return _turned(x, theta, (factor, low_freq_factor, high_freq_factor, original_max), places)


def _turned(x: Tensor, theta: float, scaling: tuple[float, float, float, int], places: Tensor) -> Tensor:
    half = x.size(-1) // 2
    frequencies = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    if scaling[0] != 1.0:
        frequencies = _stretched(frequencies, *scaling)
    angles = torch.outer(places.float(), frequencies)
    cos, sin = angles.cos()[:, None, :], angles.sin()[:, None, :]  # [S, 1, D/2]
    turned: Tensor = _Rotation.apply(x, cos, sin)
    return turned


class _Rotation(torch.autograd.Function):
    """Pairs (x[i], x[i + D/2]) turned by an angle, in float32, without a copy of x in it: two kernels for each half, which read
    and write 14 bytes for each element in bf16 where simple operations move 48. Backward: by the angle's negative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    a, b = x.chunk(2, -1)
    low, high = out.chunk(2, -1)
    torch.addcmul(a * cos, b, sin, value=-1, out=low)
    torch.addcmul(b * cos, a, sin, out=high)
    return out


def _stretched(frequencies: Tensor, factor: float, low: float, high: float, original_max: int) -> Tensor:
    """Wavelengths above original_max / low are stretched by `factor`, those below original_max / high kept, blended between."""
    turns = original_max * frequencies / (2 * math.pi)  # in the original context
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1 - kept) / factor)


def positions(weight: Tensor, length: int, cut: Sequence[Axis] = ()) -> Tensor:
    """The rows of a table of positions that belong to this rank's `length` ones of the sequence: [length, dim]."""
    return weight[sequence_positions(length, cut, weight.device)] if cut else weight[:length]


def vocab_parallel_embedding(tokens: Tensor, weight: Tensor, tp: Axis) -> Tensor:
    """Rows of a table cut along the vocabulary: zero where another rank has the row, so partial sums. [B, S] -> [B, S, dim]."""
    local = tokens - tp.rank * weight.size(0)
    other = (local < 0) | (local >= weight.size(0))
    return F.embedding(local.masked_fill(other, 0), weight).masked_fill(other[..., None], 0.0)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[target] in float32; targets of -100 do not count. [B, S, V], [B, S] -> []."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="sum", ignore_index=IGNORE)


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, tp: Axis) -> Tensor:
    """`cross_entropy` of logits cut along the vocabulary, [B, S, V/tp]: the whole sum on every rank.

    Three all_reduces of one number per token instead of gathering the logits (arXiv:1909.08053, section 3)."""
    return cross_entropy(logits, targets) if tp.size == 1 else _VocabParallelCrossEntropy.apply(logits, targets, tp)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Saves the logits as they are and the log of the sum; the softmax is taken again in the backward pass. Either way has one
    copy of the logits in float32 at a time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, tp: Axis) -> Tensor:
        local = targets - tp.rank * logits.size(-1)
        other = (local < 0) | (local >= logits.size(-1))
        local = local.masked_fill(other, 0)
        largest = reduced(logits.amax(-1).float(), tp, "max")
        total = reduced((logits - largest[..., None]).exp_().sum(-1, dtype=torch.float32), tp).log() + largest
        target = reduced(logits.gather(-1, local[..., None])[..., 0].float().masked_fill(other, 0.0), tp)
        ctx.save_for_backward(logits, total, local, other, targets)
        return (total - target).masked_fill(targets == IGNORE, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, total, local, other, targets = ctx.saved_tensors
        softmax = (logits - total[..., None]).exp_()
        softmax.scatter_add_(-1, local[..., None], other.to(softmax.dtype)[..., None] - 1.0)
        scale = grad * (targets != IGNORE)
        return softmax.mul_(scale[..., None]).to(logits.dtype), None, None
