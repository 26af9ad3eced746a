"""Routing and products of experts beside a plain loop over tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlmdsl.runtime.config import AdamW
from mlmdsl.runtime.experts import balanced_top_k, combine, dispatch, grouped_linear, route, top_k
from mlmdsl.runtime.optimizer import Optimizer

B, S, D, E, K = 2, 5, 6, 8, 3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- top_k ----------------------------------------------------------------------------------------------------------


def test_the_k_largest_are_kept() -> None:
    x = torch.tensor([[0.1, 0.4, -2.0, 0.3]])
    assert top_k(x, 2).tolist() == torch.tensor([[0.0, 0.4, 0.0, 0.3]]).tolist()
    assert top_k(x, 2, fill=-9.0).tolist() == torch.tensor([[-9.0, 0.4, -9.0, 0.3]]).tolist()


def test_of_equal_values_the_first_are_kept() -> None:
    assert top_k(torch.ones(1, 64), 3).nonzero()[:, 1].tolist() == [0, 1, 2]
    assert top_k(torch.tensor([[1.0, 2.0, 1.0, 1.0]]), 2).tolist() == [[1.0, 2.0, 0.0, 0.0]]


def test_what_is_kept_is_chosen_by_other_values_without_gradient() -> None:
    x, by = random(4, E).requires_grad_(), random(4, E, seed=1).requires_grad_()
    y = top_k(x, 2, by=by)
    y.sum().backward()
    kept = by.topk(2).indices
    assert torch.equal(x.grad, torch.zeros(4, E, dtype=torch.float64).scatter(1, kept, 1.0))
    assert by.grad is None


def test_groups_are_limited_as_deepseek_v3_does() -> None:
    """Its own words: the two best of each group added up, the best groups' experts, of them the best."""
    scores = random(40, E).sigmoid()
    best = scores.view(40, 4, 2).topk(2).values.sum(-1).topk(2).indices
    eligible = torch.zeros(40, 4).scatter(1, best, 1.0).repeat_interleave(2, 1).bool()
    wanted = scores.masked_fill(~eligible, -1.0).topk(3).indices.sort().values
    assert torch.equal(top_k(scores, 3, groups=4, group_limit=2).nonzero()[:, 1].view(40, 3), wanted)


# ---- balance --------------------------------------------------------------------------------------------------------


def test_a_bias_chooses_and_counts() -> None:
    scores, bias = random(2, 20, E).sigmoid().requires_grad_(), random(E, seed=1).requires_grad_()
    gates = balanced_top_k(scores, bias, K)
    assert torch.equal(gates, top_k(scores, K, by=scores + bias))
    gates.sum().backward()
    chosen = gates != 0
    assert torch.equal(scores.grad, chosen.double())
    assert bias.grad.tolist() == (E * chosen.sum((0, 1)) - K * 40).tolist()


def test_steps_of_the_bias_balance_what_is_chosen() -> None:
    """Scores that favour the first experts; the bias ends up against them (arXiv:2408.15664, algorithm 1)."""
    scores = (random(400, E) - 0.2 * torch.arange(E)).sigmoid()
    bias = torch.zeros(E, requires_grad=True)
    optimizer = Optimizer(AdamW(lr=0.0), [bias.data], [(False, 0.01)])
    before = (top_k(scores, K) != 0).sum(0)
    for _ in range(100):
        bias.grad = None
        balanced_top_k(scores.requires_grad_(), bias, K).sum().backward()
        optimizer.step([bias.grad], 0.0)
    after = (balanced_top_k(scores, bias, K) != 0).sum(0)
    even = K * 400 / E
    assert before.max() > 1.5 * even and after.max() < 1.1 * even and after.min() > 0.9 * even
    assert optimizer.moments == [{}]


# ---- experts --------------------------------------------------------------------------------------------------------


def mixture(x: Tensor, gates: Tensor, weight: Tensor, k: int = K) -> Tensor:
    routing = route(gates, k)
    return combine(F.silu(grouped_linear(dispatch(x, routing, k), weight, routing)), gates, routing)


def plain(x: Tensor, gates: Tensor, weight: Tensor) -> Tensor:
    """Every expert for every token."""
    return torch.einsum("bse,bsef->bsf", gates, F.silu(torch.einsum("bsd,efd->bsef", x, weight)))


@pytest.mark.parametrize("dropped", [0, 1, K])
def test_a_mixture_is_the_sum_over_all_experts(dropped: int) -> None:
    """Value and gradients; `dropped` of the first tokens' gates are closed, so that some of their rows go nowhere."""
    gates = top_k(random(B, S, E).sigmoid(), K)
    gates[0, :2] = top_k(gates[0, :2], K - dropped)
    inputs = [random(B, S, D, seed=1), gates, random(E, 4, D, seed=2)]
    one, other = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    found, expected = mixture(*one), plain(*other)
    torch.testing.assert_close(found, expected)
    upstream = random(B, S, 4, seed=3)
    found.backward(upstream)
    expected.backward(upstream)
    open_gates = gates != 0
    torch.testing.assert_close(one[0].grad, other[0].grad)
    torch.testing.assert_close(one[1].grad, other[1].grad * open_gates)
    torch.testing.assert_close(one[2].grad, other[2].grad)


def test_a_routing_says_where_rows_come_from() -> None:
    gates = torch.zeros(1, 3, 4)
    gates[0, 0, 3] = gates[0, 0, 1] = gates[0, 1, 1] = gates[0, 2, 0] = 0.5
    routing = route(gates, 2)
    assert routing[0].tolist() == [4, 0, 2, 1, 3, 5, 1, 2, 0, 1]  # six rows, and how many each expert has
    assert routing[2, :6].tolist() == [0, 1, 1, 3, 4, 4]
    assert routing[0, :6][routing[1, :6]].tolist() == list(range(6))


def test_an_expert_without_rows_has_a_gradient_of_zero() -> None:
    gates = torch.zeros(1, 3, 4)
    gates[..., 2] = 1.0
    x, weight = torch.ones(1, 3, D, requires_grad=True), torch.ones(4, 5, D, requires_grad=True)
    mixture(x, gates, weight, 1).sum().backward()
    assert weight.grad is not None and [bool(g.any()) for g in weight.grad] == [False, False, True, False]


def test_shapes_are_known_without_values() -> None:
    """On the meta device, where pipelines find the shapes between their stages."""
    x, gates, weight = (torch.empty(shape, device="meta") for shape in ((B, S, D), (B, S, E), (E, 4, D)))
    assert mixture(x, gates, weight).shape == (B, S, 4)
