"""Transitions between placements on the tensor or the context axis: each a collective and its dual in the backward pass.

    name              forward          backward          placements
    all_gather        all_gather       reduce_scatter    shard -> broadcast
    gather            all_gather       split             shard -> replicate
    copy_to           nothing          all_reduce        replicate -> broadcast   (Megatron's f, arXiv:1909.08053)
    all_reduce        all_reduce       nothing           partial -> replicate     (Megatron's g)
    reduce_scatter    reduce_scatter   all_gather        partial -> shard         (arXiv:2205.05198)
    split             split            all_gather        replicate -> shard
    all_reduce_both   all_reduce       all_reduce        partial -> broadcast
    all_to_all        all_to_all       all_to_all        shard(a) -> shard(b)

The functional collectives that torch registers gradients for give all_reduce another all_reduce as its backward, which is
wrong by the size of the group for a partial sum that becomes replicated: hence pairs of our own. They stand on the raw
operations, whose names are alike in torch 2.11 and 2.13. Sums in bfloat16 on the CPU are taken in float32: gloo's own err by
0.02 to 0.08 at four ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mlmdsl.runtime.mesh import Axis

_ops = torch.ops._c10d_functional


# ---- without gradients ----------------------------------------------------------------------------------------------


def gathered(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """The slices of all ranks joined along `dim`."""
    if axis.size == 1:
        return x
    y = _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), axis.size, axis.group_name))
    if axis.zigzag:
        pairs = [part.chunk(2, dim) for part in y.chunk(axis.size, 0)]
        return torch.cat([first for first, _ in pairs] + [second for _, second in reversed(pairs)], dim)
    return y if dim % x.dim() == 0 else torch.cat(y.chunk(axis.size, 0), dim)


def reduced(x: Tensor, axis: Axis, op: str = "sum") -> Tensor:
    """Sum ("sum") or largest ("max") over the ranks."""
    if axis.size == 1:
        return x
    return _ops.wait_tensor(_ops.all_reduce(_summable(x), op, axis.group_name)).to(x.dtype)


def scattered(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's slice along `dim` of the sum over the ranks."""
    if axis.size == 1:
        return x
    if axis.zigzag:
        slices = x.chunk(2 * axis.size, dim)
        parts = torch.cat([part for rank in range(axis.size) for part in (slices[rank], slices[-1 - rank])], 0)
    else:
        parts = x if dim % x.dim() == 0 else torch.cat(x.chunk(axis.size, dim), 0)
    y = _ops.wait_tensor(_ops.reduce_scatter_tensor(_summable(parts), "sum", axis.size, axis.group_name)).to(x.dtype)
    return torch.cat(y.chunk(2, 0), dim) if axis.zigzag else y


def sliced(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's slice along `dim` of a value that all ranks have."""
    if axis.size == 1:
        return x
    if axis.zigzag:
        slices = x.chunk(2 * axis.size, dim)
        return torch.cat((slices[axis.rank], slices[-1 - axis.rank]), dim)
    return x.chunk(axis.size, dim)[axis.rank].contiguous()


def exchanged(x: Tensor, axis: Axis, source_dim: int, target_dim: int) -> Tensor:
    """A value cut along `source_dim`, cut along `target_dim` instead."""
    if axis.size == 1:
        return x
    assert not axis.zigzag, "no plan moves a cut of the context axis to another dim"
    sent = torch.cat(x.chunk(axis.size, target_dim), 0).contiguous()
    sizes = [sent.size(0) // axis.size] * axis.size
    received = _ops.wait_tensor(_ops.all_to_all_single(sent, sizes, sizes, axis.group_name))
    return torch.cat(received.chunk(axis.size, 0), source_dim)


def delivered(x: Tensor, axis: Axis, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """Rows from every rank, in the order of ranks: `sent` of this rank's go to each, `received` come from each."""
    return _ops.wait_tensor(_ops.all_to_all_single(x.contiguous(), list(received), list(sent), axis.group_name))


def _summable(x: Tensor) -> Tensor:
    """Contiguous (torch 2.11 refuses others on gloo, expanded gradients too), and wide enough to add up on the CPU."""
    wide = x.float() if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) else x
    return wide.contiguous()


# ---- what programs call ---------------------------------------------------------------------------------------------

Local = Callable[[Tensor], Tensor]


class _Pair(torch.autograd.Function):
    """One thing on the way forward, its dual on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Local, backward: Local) -> Tensor:
        ctx.dual = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.dual(grad), None, None


def _paired(x: Tensor, tp: Axis, forward: Local, backward: Local) -> Tensor:
    return x if tp.size == 1 else _Pair.apply(x, forward, backward)


def all_gather(x: Tensor, tp: Axis, dim: int) -> Tensor:
    """The whole of a value cut along `dim`; its gradient comes as partial sums, which are added up and cut again."""
    return _paired(x, tp, lambda x: gathered(x, tp, dim), lambda grad: scattered(grad, tp, dim))


def gather(x: Tensor, tp: Axis, dim: int) -> Tensor:
    """The whole of a value cut along `dim`, where every rank computes the whole gradient."""
    return _paired(x, tp, lambda x: gathered(x, tp, dim), lambda grad: sliced(grad, tp, dim))


def reduce_scatter(x: Tensor, tp: Axis, dim: int) -> Tensor:
    """This rank's slice along `dim` of the sum of partial sums."""
    return _paired(x, tp, lambda x: scattered(x, tp, dim), lambda grad: gathered(grad, tp, dim))


def split(x: Tensor, tp: Axis, dim: int) -> Tensor:
    """This rank's slice along `dim` of a replicated value; the slices of the gradient are joined."""
    return _paired(x, tp, lambda x: sliced(x, tp, dim), lambda grad: gathered(grad, tp, dim))


def all_reduce(x: Tensor, tp: Axis) -> Tensor:
    """The sum of partial sums; every rank has the whole gradient already."""
    return _paired(x, tp, lambda x: reduced(x, tp), lambda grad: grad)


def copy_to(x: Tensor, tp: Axis) -> Tensor:
    """A replicated value whose consumers are spread over the ranks: their partial gradients are added up."""
    return _paired(x, tp, lambda x: x.view_as(x), lambda grad: reduced(grad, tp))


def all_reduce_both(x: Tensor, tp: Axis) -> Tensor:
    """The sum of partial sums, for consumers that are spread over the ranks."""
    return _paired(x, tp, lambda x: reduced(x, tp), lambda grad: reduced(grad, tp))


def all_to_all(x: Tensor, tp: Axis, source_dim: int, target_dim: int) -> Tensor:
    """A value cut along `source_dim`, cut along `target_dim` instead."""
    there, back = (source_dim, target_dim), (target_dim, source_dim)
    return _paired(x, tp, lambda x: exchanged(x, tp, *there), lambda grad: exchanged(grad, tp, *back))


def deliver(x: Tensor, ep: Axis, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """Rows from every rank, `sent` and `received` of them; their gradients go back the same way."""
    return _paired(x, ep, lambda x: delivered(x, ep, sent, received), lambda grad: delivered(grad, ep, received, sent))
