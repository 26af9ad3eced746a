"""Auxiliary losses and capacities beside their definitions, written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from mlmdsl.runtime.balance import Tally, add_loss, limit, load, reported
from mlmdsl.runtime.experts import top_k
from mlmdsl.runtime.mesh import Axis

B, S, E, K = 3, 7, 4, 2


def scores(seed: int = 0) -> Tensor:
    return torch.randn(B, S, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)


def test_the_loss_for_balance_is_that_of_each_sequence() -> None:
    """Equation 4 of arXiv:2101.03961 over one sequence: E times the sum over experts of the share of tokens times the mean
    score. Gradients by torch's own differentiation of it."""
    p = scores().requires_grad_()
    gates = top_k(p, K)
    (expected_grad,) = torch.autograd.grad(sum(_by_definition(p[b], gates[b]) for b in range(B)) * 0.1 / 5, p)
    tally = Tally()
    out = add_loss(gates, (load(gates) * p).sum(-1), 0.1 / 5, tally)  # a global batch of five
    assert torch.equal(out, gates)
    out.mul(0.0).sum().backward()
    torch.testing.assert_close(p.grad, expected_grad)
    value = sum(float(_by_definition(p[b], gates[b]).detach()) for b in range(B)) * 0.1 / 5
    assert tally.shares(counts=True)[0] == pytest.approx(value)


def _by_definition(p: Tensor, gates: Tensor) -> Tensor:
    share = (gates != 0).double().sum(0) / (K * S)
    return E * (share * p.mean(0)).sum()


def test_even_loads_are_ones() -> None:
    assert torch.equal(load(torch.eye(E).repeat(2, 1)[None]), torch.ones(1, 1, E))
    assert load(torch.tensor([[[0.5, 0.0], [0.1, 0.0]]])).tolist() == [[[2.0, 0.0]]]
    assert load(torch.zeros(1, 3, 2)).tolist() == [[[0.0, 0.0]]]


def test_ranks_share_a_loss() -> None:
    loss = torch.ones(B, S, requires_grad=True)
    tally = Tally()
    add_loss(
        torch.zeros(1, requires_grad=True), loss, 1.0, tally, cut=(Axis("context", 2),), alike=Axis("tensor", 4)
    ).backward()
    assert loss.grad is not None and loss.grad.unique().tolist() == [pytest.approx(1 / (2 * S))]
    assert tally.shares(counts=False)[0] == pytest.approx(B / 2 / 4)


def test_an_evaluation_counts_nothing() -> None:
    tally = Tally()
    with torch.no_grad():
        limit(add_loss(scores(), scores(), 1.0, tally), K, 1.0, tally)
    assert reported(tally.shares(counts=True)) == {}


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 4.0])
def test_the_first_of_a_sequence_are_kept(factor: float) -> None:
    gates = top_k(scores(), K).detach().requires_grad_()
    capacity, wanted = math.ceil(factor * K * S / E), gates.detach().clone()
    for b in range(B):
        for e in range(E):
            places = wanted[b, :, e].nonzero().flatten()
            wanted[b, places[capacity:], e] = 0.0
    tally = Tally()
    found = limit(gates, K, factor, tally)
    assert torch.equal(found, wanted)
    found.sum().backward()
    assert torch.equal(gates.grad, (wanted != 0).double())
    kept = int((wanted != 0).sum())
    assert reported(tally.shares(counts=True)) == {
        "routed_tokens": B * S * K,
        "dropped_tokens": B * S * K - kept,
        "padded_tokens": B * E * capacity - kept,
    }
    assert tally.shares(counts=False) == [0.0] * 4


def test_recomputed_passes_count_once() -> None:
    tally, gates = Tally(), top_k(scores(), K).detach().requires_grad_()
    torch.utils.checkpoint.checkpoint(lambda x: limit(x, K, 1.0, tally), gates, use_reentrant=False).sum().backward()
    assert tally.shares(counts=True)[1] == B * S * K


def test_sums_go_on_until_they_are_taken() -> None:
    tally = Tally()
    for _ in range(3):
        x = torch.ones(1, 2, requires_grad=True)
        F.silu(add_loss(x, x, 0.5, tally)).sum().backward()
    assert reported(tally.shares(counts=True)) == {"auxiliary_loss": pytest.approx(1.5)}
