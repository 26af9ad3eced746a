"""What a model adds to its loss on the way, and what it leaves out: auxiliary losses, and the capacity of experts.

Both are counted in the backward pass, which runs once for each micro-batch however its forward pass is recomputed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mlmdsl.runtime.mesh import Axis

COUNTS = ("routed_tokens", "dropped_tokens", "padded_tokens")


class Tally:
    """Sums of a step on this rank: `auxiliary_loss`, of which the shares of all ranks add up, and COUNTS, which ranks of the
    tensor and context axes have alike. Their unit is one token for one of its experts."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        value = value.detach().double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def shares(self, counts: bool) -> list[float]:
        """In the order ("auxiliary_loss", *COUNTS); `counts`: this rank tells those, too."""
        names = ("auxiliary_loss", *(name if counts else "" for name in COUNTS))
        return [float(self.sums.get(name, 0.0)) for name in names]


def reported(sums: Sequence[float]) -> dict[str, float]:
    """The sums over the world of `Tally.shares`, by name, without what the model does not have."""
    auxiliary, *counts = sums
    found = {"auxiliary_loss": auxiliary} if auxiliary else {}
    return found | (dict(zip(COUNTS, map(round, counts), strict=True)) if counts[0] else {})


def add_loss(
    x: Tensor, loss: Tensor, weight: float, tally: Tally, *, cut: Sequence[Axis] = (), alike: Axis | None = None
) -> Tensor:
    """x, and on the way back the gradient of `weight` times the mean over each sequence of `loss` [B, ...], for every sequence.

    cut: the axes over which sequences are cut, or gradients partial sums; alike: one whose ranks have the same of both."""
    elements = loss[:1].numel() * math.prod(axis.size for axis in cut)
    return _Added.apply(x, loss, weight / elements, tally, 1 if alike is None else alike.size)


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, factor: float, tally: Tally, ranks: int) -> Tensor:
        ctx.factor, ctx.tally, ctx.ranks = factor, tally, ranks
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (loss,) = ctx.saved_tensors
        ctx.tally.add("auxiliary_loss", loss.double().sum() * ctx.factor / ctx.ranks)
        return grad, torch.full_like(loss, ctx.factor), None, None, None


def load(gates: Tensor) -> Tensor:
    """Gates [B, S, E] -> [B, 1, E]: how many of its fair share of each sequence's tokens every expert is given; 1 where they
    are even. Without gradient."""
    given = (gates.detach() != 0).sum(1, keepdim=True).to(gates.dtype)
    return given * given.size(-1) / given.sum(-1, keepdim=True).clamp(min=1)


def limit(gates: Tensor, k: int, factor: float, tally: Tally) -> Tensor:
    """Gates [B, S, E] without those beyond the capacity of an expert: ceil(factor k S / E) tokens of each sequence."""
    return _Limited.apply(gates, math.ceil(factor * k * gates.size(1) / gates.size(2)), tally)


class _Limited(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, capacity: int, tally: Tally) -> Tensor:
        given = gates != 0
        kept = given & (given.cumsum(1) <= capacity)
        ctx.save_for_backward(given, kept)
        ctx.capacity, ctx.tally = capacity, tally
        return torch.where(kept, gates, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        given, kept = ctx.saved_tensors
        routed, left = given.sum(), kept.sum()
        places = ctx.capacity * given.size(0) * given.size(2)
        for name, count in zip(COUNTS, (routed, routed - left, places - left), strict=True):
            ctx.tally.add(name, count)
        return torch.where(kept, grad, 0.0), None, None
