"""Routing of tokens to experts. B sequences, S positions, d features, E experts, k experts a token, R = k B S rows.

A routing is one tensor of integers, [3, R + E]:

    row 0    R: which (token, slot) = token * k + slot each row is, sorted by expert; then E: rows of each expert
    row 1    R: at which row each (token, slot) is; then E: rows that come from each rank of the expert axis for each of this
             rank's experts, rank by rank
    row 2    R: the expert of each row, E where it goes nowhere, which sorts last; then E zeros

Rows that go nowhere (a token with fewer gates than k) are zero. With an expert axis rows travel to the ranks that have their
experts and back, as many as there are: nothing is padded. Everything is sorted stably, and gradients are gathered, never
scattered, so that results repeat on every device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlmdsl.runtime.collectives import deliver, delivered
from mlmdsl.runtime.mesh import Axis


def top_k(
    x: Tensor,
    k: int,
    *,
    by: Tensor | None = None,
    fill: float = 0.0,
    groups: int = 1,
    group_limit: int | None = None,
    group_best: int = 2,
) -> Tensor:
    """x where `by` (x) is among its k largest of the last dim, `fill` elsewhere; of equal values the first.

    With `group_limit` only that many of `groups` equal groups are eligible, those whose `group_best` largest have the largest
    sum (arXiv:2412.19437, section 2.1.2)."""
    return torch.where(_chosen(x if by is None else by, k, groups, group_limit, group_best), x, fill)


def balanced_top_k(
    x: Tensor, bias: Tensor, k: int, *, groups: int = 1, group_limit: int | None = None, group_best: int = 2
) -> Tensor:
    """top_k of x [..., E] by x + bias [E]. The bias is given no gradient of the loss but a count: E times the tokens that chose
    each value, less k times all tokens; above zero where more than on average did."""
    chosen = _chosen(x + bias, k, groups, group_limit, group_best)
    return torch.where(chosen, x, 0.0) + _Counted.apply(bias, chosen, k)


class _Counted(torch.autograd.Function):
    """Zeros [E], whose gradient is the count: taken with the backward pass, once for each micro-batch however it is recomputed.
    The bias meets x in an addition of torch's own: where backward passes are taken apart torch 2.11 begins those of weights at
    such a node, and cannot at one of ours."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, chosen: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(chosen)
        ctx.k = k
        return torch.zeros_like(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (chosen,) = ctx.saved_tensors
        rows = chosen.flatten(0, -2)
        count = rows.sum(0) * rows.size(1) - ctx.k * rows.size(0)
        return count.to(grad.dtype), None, None


def _chosen(scores: Tensor, k: int, groups: int, group_limit: int | None, group_best: int) -> Tensor:
    scores = scores.detach()
    if group_limit is not None and group_limit < groups:
        grouped = scores.unflatten(-1, (groups, -1))
        best = _largest(grouped, min(group_best, grouped.size(-1)))
        eligible = _largest(grouped.where(best, 0.0).sum(-1), group_limit)
        scores = grouped.masked_fill(~eligible[..., None], float("-inf")).flatten(-2)
    return _largest(scores, k)


def _largest(scores: Tensor, k: int) -> Tensor:
    """Where the k largest of the last dim are."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)


# ---- rows -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def route(gates: Tensor, k: int, ep: Axis | None = None) -> Tensor:
    """Gates [B, S, E], zero but for the experts of each token -> the routing, [3, R + E]."""
    experts = gates.size(-1)
    closed = gates.flatten(0, -2) == 0
    chosen = closed.to(torch.uint8).argsort(dim=-1, stable=True)[:, :k]  # open gates first, in the order of experts
    expert = chosen.masked_fill(closed.gather(-1, chosen), experts).flatten()
    ordered, order = expert.sort(stable=True)
    ends = torch.searchsorted(ordered, torch.arange(experts + 1, device=gates.device))
    none = torch.zeros(experts, dtype=torch.int64, device=gates.device)
    counts = ends.diff()
    coming = counts
    if ep is not None and not gates.is_meta:
        coming = delivered(counts, ep, *[[experts // ep.size] * ep.size] * 2)
    rows = (torch.cat((order, counts)), torch.cat((_inverse(order), coming)), torch.cat((ordered, none)))
    return torch.stack(rows)


def dispatch(x: Tensor, routing: Tensor, k: int, ep: Axis | None = None) -> Tensor:
    """Tokens [B, S, d] -> rows [R, d], sorted by expert; on an expert axis those of all its ranks for this rank's experts."""
    count = x[..., 0].numel() * k
    rows = _Dispatched.apply(x, routing[:, :count], k)
    if ep is None or rows.is_meta:
        return rows
    journey = _Journey(routing[:, count:], ep, count)
    arrived = deliver(rows[: sum(journey.sent)], ep, journey.sent, journey.received)
    return _Permuted.apply(arrived, *journey.sorting)


def combine(rows: Tensor, gates: Tensor, routing: Tensor, ep: Axis | None = None) -> Tensor:
    """Rows [R, d] -> tokens [B, S, d]: each token's rows, weighted by its gates [B, S, E]."""
    count = routing.size(1) - gates.size(-1)
    if ep is not None and not rows.is_meta:
        journey = _Journey(routing[:, count:], ep, count)
        order, inverse = journey.sorting
        back = deliver(_Permuted.apply(rows, inverse, order), ep, journey.received, journey.sent)
        rows = F.pad(back, (0, 0, 0, count - back.size(0)))
    return _Combined.apply(rows, gates, routing[:, :count])


class _Journey:
    """Of rows over the expert axis: how many this rank sends to and receives from each, and how what arrives, rank by rank, is
    sorted by this rank's experts, with the way back."""

    def __init__(self, counts: Tensor, ep: Axis, rows: int):
        coming = counts[1].view(ep.size, -1)
        self.sent = listed(counts[0].view(ep.size, -1).sum(1), rows)
        self.received = listed(coming.sum(1), rows)
        expert = torch.arange(coming.size(1), device=counts.device).repeat(ep.size)
        order = expert.repeat_interleave(coming.flatten(), output_size=sum(self.received)).argsort(stable=True)
        self.sorting = order, _inverse(order)


def listed(counts: Tensor, rows: int) -> list[int]:
    """How many go to each; `rows` in all, those that go nowhere included."""
    return counts.tolist()


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


class _Permuted(torch.autograd.Function):
    """Rows in another order; `inverse` is the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


class _Dispatched(torch.autograd.Function):
    """The gradient of a token is the sum of its rows'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, routing: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(routing)
        ctx.shape = x.shape
        return x.flatten(0, -2)[routing[0] // k]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (routing,) = ctx.saved_tensors
        *leading, size = ctx.shape
        return grad[routing[1]].view(*leading, -1, size).sum(-2), None, None


class _Combined(torch.autograd.Function):
    """Of the rows only those of the token at hand are looked at: its gates' gradients are products with its rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gates: Tensor, routing: Tensor) -> Tensor:
        ctx.save_for_backward(rows, gates, routing)
        weights, _ = _by_slot(gates, routing)
        mine = rows[routing[1]].view(*weights.shape, -1)
        return (mine * weights.to(rows.dtype)[..., None]).sum(-2).view(*gates.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, gates, routing = ctx.saved_tensors
        weights, expert = _by_slot(gates, routing)
        grad = grad.flatten(0, -2)[:, None]
        mine = rows[routing[1]].view(*weights.shape, -1)
        products = (mine * grad).sum(-1).to(gates.dtype)
        to_gates = torch.zeros(grad.size(0), gates.size(-1) + 1, dtype=gates.dtype, device=gates.device)
        to_gates = to_gates.scatter(-1, expert, products)[:, :-1].reshape(gates.shape)
        to_rows = (grad * weights.to(rows.dtype)[..., None]).flatten(0, 1)
        return to_rows[routing[0]], to_gates, None


def _by_slot(gates: Tensor, routing: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and expert of each token's slots [tokens, k]; a slot that goes nowhere has gate 0 and expert E."""
    flat = gates.flatten(0, -2)
    expert = routing[2][routing[1]].view(flat.size(0), -1)
    return F.pad(flat, (0, 1)).gather(-1, expert), expert


# ---- products -------------------------------------------------------------------------------------------------------


def grouped_linear(rows: Tensor, weight: Tensor, routing: Tensor, ep: Axis | None = None) -> Tensor:
    """Rows [R, d] sorted by expert, each expert's times its own matrix: weight [E, out, d] -> [R, out]; on an expert axis this
    rank's experts, in order.

    Rows that go nowhere give zero. One kernel for all experts where torch has a fast one (bfloat16 on CUDA), elsewhere one
    product per expert."""
    ranks = 1 if ep is None else ep.size
    tail = routing[:, routing.size(1) - ranks * weight.size(0) :]
    counts = tail[0] if ep is None else tail[1].view(ranks, -1).sum(0)
    if rows.is_cuda and rows.dtype is torch.bfloat16:
        ends = counts.cumsum(0)
        y = F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends.to(torch.int32))
        open_rows = torch.arange(rows.size(0), device=rows.device) < ends[-1]
        return torch.where(open_rows[:, None], y, 0.0)
    sizes = [rows.size(0) // weight.size(0)] * weight.size(0) if rows.is_meta else listed(counts, rows.size(0))
    parts = rows.split([*sizes, rows.size(0) - sum(sizes)])
    products = [F.linear(part, matrix) for part, matrix in zip(parts, weight.unbind(), strict=False)]
    return torch.cat((*products, rows.new_zeros(parts[-1].size(0), weight.size(1))))
