"""Attention, rotary and position functions against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mlmdsl.runtime.functions import attention, positions, rotary


def plain_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    group = q.size(2) // k.size(2)
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bshd,bthd->bhst", q, k) * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_grouped_heads(kv_heads: int, causal: bool):
    q = torch.randn(2, 6, 4, 8, requires_grad=True)
    k, v = (torch.randn(2, 6, kv_heads, 8, requires_grad=True) for _ in range(2))
    found, expected = attention(q, k, v, causal=causal), plain_attention(q, k, v, causal, 8**-0.5)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    for one, other in zip(*(torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_attention_takes_a_scale():
    q, k, v = (torch.randn(1, 5, 2, 4) for _ in range(3))
    torch.testing.assert_close(attention(q, k, v, causal=True, scale=0.3), plain_attention(q, k, v, True, 0.3))


def test_rotary_turns_pairs_by_their_position():
    x = torch.randn(1, 7, 2, 8)
    y = rotary(x, 100.0)
    for s in range(7):
        for i in range(4):
            angle = s * 100.0 ** (-i / 4)
            a, b = x[0, s, :, i], x[0, s, :, i + 4]
            torch.testing.assert_close(y[0, s, :, i], a * math.cos(angle) - b * math.sin(angle))
            torch.testing.assert_close(y[0, s, :, i + 4], b * math.cos(angle) + a * math.sin(angle))
    torch.testing.assert_close(rotary(x[:, 3:], 100.0, offset=3), y[:, 3:])


def test_rotary_of_a_part_leaves_the_rest():
    x = torch.randn(1, 7, 2, 8)
    y = rotary(x, 100.0, dim=4)
    torch.testing.assert_close(y[..., :4], rotary(x[..., :4].contiguous(), 100.0))
    assert torch.equal(y[..., 4:], x[..., 4:]) and torch.equal(rotary(x, dim=8), rotary(x))


def test_rotary_keeps_dot_products_of_distances():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    products = [(rotary(q, offset=a) * rotary(k, offset=a + 5)).sum() for a in (0, 3, 40)]
    torch.testing.assert_close(torch.stack(products), products[0].expand(3), rtol=1e-4, atol=1e-4)


def test_rotary_stretches_low_frequencies_as_llama_3_does():
    """As Meta's reference has it: kept above high_freq_factor turns, divided below low_freq_factor, blended between."""
    factor, low, high, length, theta, half = 8.0, 1.0, 4.0, 64, 10_000.0, 16
    expected: list[float] = []
    for i in range(half):
        frequency = theta ** (-i / half)
        wavelength = 2 * math.pi / frequency
        smooth = (length / wavelength - low) / (high - low)
        if wavelength < length / high:
            expected.append(frequency)
        elif wavelength > length / low:
            expected.append(frequency / factor)
        else:
            expected.append((1 - smooth) * frequency / factor + smooth * frequency)
    x = torch.cat((torch.ones(half), torch.zeros(half))).expand(1, 2, 1, -1)
    y = rotary(x, theta, factor=factor, low_freq_factor=low, high_freq_factor=high, original_max=length)
    torch.testing.assert_close(y[0, 1, 0, :half], torch.tensor(expected).cos())


def test_positions_are_rows_of_a_table():
    table = torch.randn(16, 4)
    assert torch.equal(positions(table, 4, 8), table[8:12])
