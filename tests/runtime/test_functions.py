"""Attention, rotary and position functions against their definitions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mlmdsl.runtime import attend
from mlmdsl.runtime.attend import attention
from mlmdsl.runtime.collectives import sliced
from mlmdsl.runtime.functions import positions, rotary
from mlmdsl.runtime.mesh import Axis


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    group = q.size(2) // k.size(2)
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bshd,bthd->bhst", q, k) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if bias is not None:
        scores = scores + bias
    for i in range(q.size(1)):
        for j in range(k.size(1)):
            if (causal and j > i) or (window is not None and abs(i - j) >= window):
                scores[:, :, i, j] = -torch.inf
            elif valid is not None and not ((causal or window is not None) and i == j):
                scores[:, :, i, j] = scores[:, :, i, j].masked_fill(valid[:, None, j] == 0, -torch.inf)
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v)


def assert_same(found: Tensor, expected: Tensor, inputs: Sequence[Tensor]) -> None:
    """Values and gradients."""
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    for one, other in zip(*(torch.autograd.grad((y * weights).sum(), inputs) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_grouped_heads(kv_heads: int, causal: bool):
    q = torch.randn(2, 6, 4, 8, requires_grad=True)
    k, v = (torch.randn(2, 6, kv_heads, 8, requires_grad=True) for _ in range(2))
    expected = plain_attention(q, k, v, causal=causal, scale=8**-0.5)
    assert_same(attention(q, k, v, causal=causal), expected, (q, k, v))


def test_attention_takes_a_scale():
    q, k, v = (torch.randn(1, 5, 2, 4) for _ in range(3))
    expected = plain_attention(q, k, v, causal=True, scale=0.3)
    torch.testing.assert_close(attention(q, k, v, causal=True, scale=0.3), expected)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("bias", [None, (4, 7, 7), (4, 1, 7), (1, 7, 1)])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 3), (True, 1), (True, 9), (False, None), (False, 2)])
def test_attention_masked_biased_and_capped(
    causal: bool,
    window: int | None,
    softcap: float | None,
    bias: tuple[int, ...] | None,
    kv_heads: int,
    monkeypatch: pytest.MonkeyPatch,
):
    """Over blocks of queries that do not divide the sequence, with values of another size than the keys."""
    monkeypatch.setattr(attend, "QUERY_BLOCK", 3)
    q, k = (torch.randn(2, 7, heads, 8, requires_grad=True) for heads in (4, kv_heads))
    v = torch.randn(2, 7, kv_heads, 6, requires_grad=True)
    b = None if bias is None else torch.randn(bias, requires_grad=True)
    found = attention(q, k, v, b, causal=causal, window=window, softcap=softcap)
    expected = plain_attention(q, k, v, b, causal=causal, scale=8**-0.5, window=window, softcap=softcap)
    assert_same(found, expected, (q, k, v) if b is None else (q, k, v, b))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("bias", [None, (4, 7, 7), (4, 1, 7)])
@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 3), (False, None), (False, 2)])
def test_attention_does_not_see_padding(
    causal: bool,
    window: int | None,
    softcap: float | None,
    learnt: bool,
    bias: tuple[int, ...] | None,
    kv_heads: int,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(attend, "QUERY_BLOCK", 3)
    q = torch.randn(3, 7, 4, 8, requires_grad=True)
    k, v = (torch.randn(3, 7, kv_heads, 8, requires_grad=True) for _ in range(2))
    b = None if bias is None else torch.randn(bias, requires_grad=learnt)
    valid = torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [1] + [0] * 6])
    found = attention(q, k, v, b, valid, causal=causal, window=window, softcap=softcap)
    expected = plain_attention(q, k, v, b, causal=causal, scale=8**-0.5, window=window, softcap=softcap, valid=valid)
    assert_same(found, expected, (q, k, v, b) if b is not None and learnt else (q, k, v))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_attention_over_another_sequence_without_its_padding(softcap: float | None):
    q, k, v = (torch.randn(2, n, 4, 8, requires_grad=True) for n in (5, 9, 9))
    valid = torch.tensor([[1] * 9, [1] * 2 + [0] * 7])
    expected = plain_attention(q, k, v, causal=False, scale=8**-0.5, softcap=softcap, valid=valid)
    assert_same(attention(q, k, v, valid=valid, softcap=softcap), expected, (q, k, v))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("bias", [None, (4, 12, 12), (4, 1, 12)])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 3), (False, None), (False, 2)])
def test_attention_does_not_cross_documents(
    causal: bool, window: int | None, softcap: float | None, bias: tuple[int, ...] | None, kv_heads: int, ranks: int
):
    """Of which some end inside a rank's chunk, and some reach over several."""
    q = torch.randn(2, 12, 4, 8, requires_grad=True)
    k, v = (torch.randn(2, 12, kv_heads, 8, requires_grad=True) for _ in range(2))
    b = None if bias is None else torch.randn(bias, requires_grad=True)
    given = (q, k, v) if b is None else (q, k, v, b)
    settings = {"causal": causal, "window": window, "softcap": softcap}
    documents = torch.tensor([[0] * 4 + [1] * 7 + [-1], [3] + [4] * 2 + [0] * 9])
    alone = [
        torch.cat([attention(*(x[i : i + 1, d] for x in (q, k, v)), sliced_bias(b, d), **settings) for d in found], 1)
        for i, found in enumerate([[slice(0, 4), slice(4, 11), slice(11, 12)], [slice(0, 1), slice(1, 3), slice(3, 12)]])
    ]
    parts: list[Tensor] = []
    for rank in range(ranks):
        cp = Axis("context", ranks, rank, zigzag=True)
        rows = sliced(b, cp, 1) if b is not None and b.size(1) > 1 else b
        parts.append(attention(sliced(q, cp, 1), k, v, rows, documents=documents, cp=cp, **settings))
    whole = torch.cat(alone)
    expected = torch.cat([sliced(whole, Axis("context", ranks, rank, zigzag=True), 1) for rank in range(ranks)], 1)
    assert_same(torch.cat(parts, 1), expected, given)


def sliced_bias(bias: Tensor | None, document: slice) -> Tensor | None:
    return None if bias is None else bias[:, document if bias.size(1) > 1 else slice(None), document]


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_attention_over_another_sequence(softcap: float | None):
    q, k, v = (torch.randn(2, n, 4, 8, requires_grad=True) for n in (5, 9, 9))
    expected = plain_attention(q, k, v, causal=False, scale=8**-0.5, softcap=softcap)
    assert_same(attention(q, k, v, softcap=softcap), expected, (q, k, v))


def test_a_bias_in_fp32_keeps_its_precision_beside_bf16():
    """Positions of a long sequence are not rounded: only differences from the largest of a row are."""
    q, k, v = (torch.randn(1, 1024, 1, 16, dtype=torch.bfloat16) for _ in range(3))
    bias = (0.5 * torch.arange(1024, dtype=torch.float32) + 0.3)[None, None]
    found = attention(q, k, v, bias, causal=True)
    distance = bias - bias.mT
    expected = attention(q.float(), k.float(), v.float(), distance, causal=True)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)


def test_blockwise_attention_keeps_no_scores():
    q, k, v = (torch.randn(1, 600, 2, 8, requires_grad=True) for _ in range(3))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        attention(q, k, v, causal=True, softcap=5.0)
    assert sum(kept) == 4 * q.numel()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("bias", [None, (4, 16, 16), (1, 1, 16)])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 3), (True, 9), (False, None), (False, 5)])
def test_attention_over_the_context_axis_is_its_part_of_the_whole(
    causal: bool,
    window: int | None,
    padded: bool,
    softcap: float | None,
    bias: tuple[int, ...] | None,
    ranks: int,
    monkeypatch: pytest.MonkeyPatch,
):
    """Outputs are each rank's rows, gradients of keys, values and a shared bias add up."""
    monkeypatch.setattr(attend, "QUERY_BLOCK", 3)
    settings: dict[str, Any] = {"causal": causal, "window": window, "softcap": softcap}
    q = torch.randn(2, 16, 4, 8, requires_grad=True)
    k, v = (torch.randn(2, 16, 2, 8, requires_grad=True) for _ in range(2))
    b = None if bias is None else torch.randn(bias, requires_grad=True)
    given = (q, k, v) if b is None else (q, k, v, b)
    valid = torch.tensor([[1] * 16, [1] * 6 + [0] * 10]) if padded else None
    whole = attention(q, k, v, b, valid, **settings)
    weights = torch.randn_like(whole)
    expected = torch.autograd.grad((whole * weights).sum(), given)
    found = [torch.zeros_like(x) for x in given]
    for rank in range(ranks):
        cp = Axis("context", ranks, rank, zigzag=True)
        rows = sliced(b, cp, 1) if b is not None and b.size(1) > 1 else b
        part = attention(sliced(q, cp, 1), k, v, rows, valid, cp=cp, **settings)
        torch.testing.assert_close(part, sliced(whole, cp, 1))
        for sum, gradient in zip(found, torch.autograd.grad((part * sliced(weights, cp, 1)).sum(), given), strict=True):
            sum += gradient
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_rotary_turns_pairs_by_their_position():
    x = torch.randn(1, 7, 2, 8)
    y = rotary(x, 100.0)
    for s in range(7):
        for i in range(4):
            angle = s * 100.0 ** (-i / 4)
            a, b = x[0, s, :, i], x[0, s, :, i + 4]
            torch.testing.assert_close(y[0, s, :, i], a * math.cos(angle) - b * math.sin(angle))
            torch.testing.assert_close(y[0, s, :, i + 4], b * math.cos(angle) + a * math.sin(angle))


def test_rotary_of_a_cut_sequence_turns_by_true_positions():
    x = torch.randn(1, 16, 2, 8)
    y = rotary(x, 100.0)
    for cut in ([Axis("tensor", 2, 1)], [Axis("context", 2, 1, zigzag=True), Axis("tensor", 2, 0)]):
        mine, expected = x, y
        for axis in cut:
            mine, expected = sliced(mine, axis, 1), sliced(expected, axis, 1)
        torch.testing.assert_close(rotary(mine, 100.0, cut=cut), expected)


def test_rotary_of_a_part_leaves_the_rest():
    x = torch.randn(1, 7, 2, 8)
    y = rotary(x, 100.0, dim=4)
    torch.testing.assert_close(y[..., :4], rotary(x[..., :4].contiguous(), 100.0))
    assert torch.equal(y[..., 4:], x[..., 4:]) and torch.equal(rotary(x, dim=8), rotary(x))


def test_rotary_keeps_dot_products_of_distances():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    products = [(rotary(q.expand(1, 64, 1, 16))[:, a] * rotary(k.expand(1, 64, 1, 16))[:, a + 5]).sum() for a in (0, 3, 40)]
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
    assert torch.equal(positions(table, 4), table[:4])
    assert torch.equal(positions(table, 4, (Axis("tensor", 4, 2),)), table[8:12])
    cp = Axis("context", 2, 0, zigzag=True)
    assert torch.equal(positions(table, 8, (cp,)), torch.cat((table[:4], table[12:])))
    assert torch.equal(positions(table, 4, (cp, Axis("tensor", 2, 1))), table[12:])
