"""Every transition on forked ranks, forward and backward, against one process that has the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mlmdsl.runtime import collectives as c
from mlmdsl.runtime.config import Parallel
from mlmdsl.runtime.functions import cross_entropy, vocab_parallel_cross_entropy, vocab_parallel_embedding
from mlmdsl.runtime.mesh import Axis, create, single
from tests.parity.ranks import run_ranks

CPU = torch.device("cpu")
SHAPE = (4, 8, 12)


def whole(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def part(x: Tensor, axis: Axis, dim: int) -> Tensor:
    return x.chunk(axis.size, dim)[axis.rank]


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def backward(y: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    return torch.autograd.grad(y, x, grad)[0]


def all_transitions(rank: int, size: int) -> None:
    tp = create(Parallel(tensor=size), CPU).tensor
    values = [whole(r) for r in range(size)]  # one partial sum of each rank
    grads = [whole(100 + r) for r in range(size)]
    total, total_grad = sum(values), sum(grads)
    assert isinstance(total, Tensor) and isinstance(total_grad, Tensor)
    for dim in range(3):
        x = part(values[0], tp, dim).requires_grad_()  # a view: not contiguous for dim > 0
        y = c.all_gather(x, tp, dim)
        close(y, values[0])
        close(backward(y, x, grads[rank]), part(total_grad, tp, dim))
        y = c.gather(x, tp, dim)
        close(y, values[0])
        close(backward(y, x, grads[0]), part(grads[0], tp, dim))
        x = values[rank].clone().requires_grad_()
        y = c.reduce_scatter(x, tp, dim)
        close(y, part(total, tp, dim))
        close(backward(y, x, part(grads[0], tp, dim)), grads[0])
        x = values[0].clone().requires_grad_()
        y = c.split(x, tp, dim)
        close(y, part(values[0], tp, dim))
        close(backward(y, x, part(grads[0], tp, dim)), grads[0])
    for source, target in ((0, 1), (1, 0), (1, 2), (2, 1)):
        x = part(values[0], tp, source).requires_grad_()
        y = c.all_to_all(x, tp, source, target)
        close(y, part(values[0], tp, target))
        close(backward(y, x, part(grads[0], tp, target)), part(grads[0], tp, source))
    x = values[rank].clone().requires_grad_()
    close(c.all_reduce(x, tp), total)
    close(backward(c.all_reduce(x, tp), x, grads[0]), grads[0])
    close(c.all_reduce_both(x, tp), total)
    close(backward(c.all_reduce_both(x, tp), x, grads[rank]), total_grad)
    x = values[0].clone().requires_grad_()
    close(c.copy_to(x, tp), values[0])
    close(backward(c.copy_to(x, tp), x, grads[rank]), total_grad)


@pytest.mark.parametrize("size", [2, 4])
def test_transitions_and_their_duals(size: int):
    run_ranks(all_transitions, size, size)


def context_transitions(rank: int, size: int) -> None:
    """Slices in zigzag order: rank r has numbers r and 2 size - 1 - r."""
    cp = create(Parallel(context=size), CPU).context
    values, grads = ([torch.cat([whole(100 * k + r)] * 2, 1) for r in range(size)] for k in (1, 2))
    total = sum(grads)
    assert isinstance(total, Tensor)

    def mine(x: Tensor) -> Tensor:
        parts = x.chunk(2 * size, 1)
        return torch.cat((parts[rank], parts[2 * size - 1 - rank]), 1)

    x = mine(values[0]).requires_grad_()
    y = c.all_gather(x, cp, 1)
    close(y, values[0])
    close(backward(y, x, grads[rank]), mine(total))
    y = c.gather(x, cp, 1)
    close(backward(y, x, grads[0]), mine(grads[0]))
    x = values[0].clone().requires_grad_()
    y = c.split(x, cp, 1)
    close(y, mine(values[0]))
    close(backward(y, x, mine(grads[0])), grads[0])


@pytest.mark.parametrize("size", [2, 4])
def test_transitions_over_the_context_axis(size: int):
    run_ranks(context_transitions, size, size)


def odd_layouts(rank: int) -> None:
    tp = create(Parallel(tensor=2), CPU).tensor
    x = whole(0).transpose(0, 2).requires_grad_()
    assert not x.is_contiguous()
    expanded = torch.ones(()).expand(12, 8, 4)
    for y in (c.all_reduce_both(x, tp), c.copy_to(x, tp)):
        close(backward(y, x, expanded), torch.full((12, 8, 4), 2.0))
    y = c.reduce_scatter(x, tp, 1)
    close(backward(y, x, expanded[:, :4]), torch.ones(12, 8, 4))


def test_layouts_that_are_not_contiguous():
    run_ranks(odd_layouts, 2)


def narrow(rank: int) -> None:
    tp = create(Parallel(tensor=4), CPU).tensor
    values = [whole(r).bfloat16() for r in range(4)]
    total = sum(v.float() for v in values)
    assert isinstance(total, Tensor)
    assert torch.equal(c.all_reduce(values[rank], tp), total.bfloat16())
    assert torch.equal(c.reduce_scatter(values[rank], tp, 1), part(total, tp, 1).bfloat16())
    assert c.all_gather(part(values[0], tp, 2), tp, 2).dtype == torch.bfloat16


def test_sums_of_bfloat16_are_rounded_once():
    run_ranks(narrow, 4)


def test_one_rank_moves_nothing():
    tp = single(CPU).tensor
    x = whole(0)
    results = [f(x, tp, 1) for f in (c.all_gather, c.gather, c.reduce_scatter, c.split)]
    results += [f(x, tp) for f in (c.all_reduce, c.copy_to, c.all_reduce_both)] + [c.all_to_all(x, tp, 0, 1)]
    assert all(y is x for y in results)


def integers(rank: int) -> None:
    tp = create(Parallel(tensor=2), CPU).tensor
    x = torch.arange(8).view(2, 4)
    assert torch.equal(c.split(x, tp, 1), part(x, tp, 1))
    assert torch.equal(c.all_gather(part(x, tp, 1), tp, 1), x)


def test_integers_travel():
    run_ranks(integers, 2)


# ---- functions cut along the vocabulary -----------------------------------------------------------------------------


def vocabulary(rank: int, size: int, dtype: torch.dtype) -> None:
    tp = create(Parallel(tensor=size), CPU).tensor
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(3, 5, 16, generator=generator)).to(dtype)
    targets = torch.randint(0, 16, (3, 5), generator=generator)
    targets[0, 2:], targets[2] = -100, -100
    one = logits.clone().requires_grad_()
    expected = cross_entropy(one, targets)
    (expected / 7).backward()
    mine = part(logits, tp, 2).clone().requires_grad_()
    found = vocab_parallel_cross_entropy(mine, targets, tp)
    (found / 7).backward()
    torch.testing.assert_close(found, expected)
    assert one.grad is not None and mine.grad is not None
    torch.testing.assert_close(mine.grad, part(one.grad, tp, 2))
    table = torch.randn(16, 6, generator=generator)
    local = part(table, tp, 0).clone().requires_grad_()
    tokens = targets.clamp(min=0)
    y = c.all_reduce(vocab_parallel_embedding(tokens, local, tp), tp)
    close(y, table[tokens])
    y.sum().backward()
    assert local.grad is not None
    close(local.grad[:, 0], part(torch.bincount(tokens.flatten(), minlength=16).float(), tp, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_embedding_over_the_vocabulary(dtype: torch.dtype):
    run_ranks(vocabulary, 4, 4, dtype)


def test_rows_without_a_valid_target_have_no_loss():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.full((2, 3), -100))
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()
