"""Relative positions against transformers' T5, slopes against the published ones."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from mlmdsl.runtime.distances import alibi, relative_positions


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_t5(bidirectional: bool, buckets: int, max_distance: int):
    t5 = import_module("transformers.models.t5.modeling_t5")
    n = 300
    distance = torch.arange(n) - torch.arange(n)[:, None]
    expected = t5.T5Attention._relative_position_bucket(distance, bidirectional, buckets, max_distance)
    table = torch.stack((torch.arange(buckets), 2.0 * torch.arange(buckets)), 1)
    found = relative_positions(torch.zeros(1, n), table, max_distance, bidirectional=bidirectional)
    assert torch.equal(found[0].long(), expected) and torch.equal(found[1], 2 * found[0])


def test_slopes_are_those_of_the_paper():
    """1/2, 1/4, ... 1/256 for eight heads (section 3)."""
    bias = alibi(torch.zeros(1, 5), 8)
    assert bias.shape == (8, 1, 5) and torch.equal(bias[:, 0, -1], torch.zeros(8))
    torch.testing.assert_close(bias[:, 0, -2], -(0.5 ** torch.arange(1.0, 9.0)))
    torch.testing.assert_close(bias[0, 0], torch.tensor([-2.0, -1.5, -1.0, -0.5, 0.0]))


@pytest.mark.parametrize("heads", [8, 12, 112, 1])
def test_slopes_of_any_count_of_heads_are_those_of_mpt(heads: int):
    mpt = import_module("transformers.models.mpt.modeling_mpt")
    torch.testing.assert_close(alibi(torch.zeros(1, 9), heads), mpt.build_mpt_alibi_tensor(heads, 9))


def test_both_directions_fall_alike():
    bias = alibi(torch.zeros(1, 4), 2, bidirectional=True)
    assert bias.shape == (2, 4, 4) and torch.equal(bias, bias.mT)
    one_way = alibi(torch.zeros(1, 4), 2)
    torch.testing.assert_close(bias.tril(), (one_way - one_way.mT).tril())
