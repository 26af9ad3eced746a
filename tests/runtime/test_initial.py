"""Initial weights: numbers of the right kind, the same bits in every layout."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmdsl.runtime import initial
from mlmdsl.runtime.initial import fill, normal, ones, standard_normal, zeros


def whole(name: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    out = torch.empty(shape)
    fill(out, name, normal(0.02), seed, shape, (0,) * len(shape))
    return out


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.data(),
)
def test_a_part_holds_the_bits_of_the_whole(shape: list[int], data: st.DataObject):
    lows = [data.draw(st.integers(0, size - 1)) for size in shape]
    sizes = [data.draw(st.integers(0, size - low)) for size, low in zip(shape, lows, strict=True)]
    part = torch.empty(sizes)
    fill(part, "w", normal(0.02), 3, shape, lows)
    box = tuple(slice(low, low + size) for low, size in zip(lows, sizes, strict=True))
    assert torch.equal(part, whole("w", tuple(shape), 3)[box])


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch):
    one = whole("w", (50, 7))
    monkeypatch.setattr(initial, "CHUNK_ELEMENTS", 20)
    assert torch.equal(whole("w", (50, 7)), one)


def test_names_and_seeds_give_different_weights():
    base = whole("a.weight", (100,))
    for other in (whole("b.weight", (100,)), whole("a.weight", (100,), 1)):
        assert abs(float(torch.corrcoef(torch.stack((base, other)))[0, 1])) < 0.4
        assert not (base == other).any()


def splitmix64(counter: int, key: int) -> int:
    x = (counter * 0x9E3779B97F4A7C15 + key) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_numbers_by_definition():
    """In Python's integers, and its own inverse of the normal distribution."""
    places = [0, 1, 2, 3, 10**12, 2**62]
    values = standard_normal(torch.tensor(places), 12345)
    uniform = [((splitmix64(place, 12345) >> 11) + 0.5) * 2.0**-53 for place in places]
    expected = torch.tensor([NormalDist().inv_cdf(p) for p in uniform], dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)


def test_the_distribution_is_normal():
    values = standard_normal(torch.arange(400_000), 1)
    assert abs(float(values.mean())) < 0.01 and abs(float(values.std()) - 1) < 0.01
    assert abs(float((values**3).mean())) < 0.02 and abs(float((values**4).mean()) - 3) < 0.06
    for z in (-3.0, -1.0, 0.0, 0.5, 2.0):
        assert abs(float((values < z).double().mean()) - 0.5 * math.erfc(-z / math.sqrt(2))) < 0.003
    assert abs(float(torch.corrcoef(torch.stack((values[:-1], values[1:])))[0, 1])) < 0.01


@pytest.mark.parametrize("z", [-7.5, -5.5, -4.0, -1.2, -0.3, 0.0, 0.7, 2.5, 5.2])
def test_quantiles(z: float):
    p = torch.tensor(0.5 * math.erfc(-z / math.sqrt(2)), dtype=torch.float64)
    assert abs(float(initial._inverse_normal(p)) - z) < 1e-6


def test_logarithms():
    x = torch.logspace(-300, 0, 1000, dtype=torch.float64)
    torch.testing.assert_close(initial._log(x), x.log(), rtol=1e-14, atol=1e-14)


def test_constants():
    out = torch.empty(3, 2)
    fill(out, "w", ones, 0, (3, 2), (0, 0))
    assert (out == 1).all()
    fill(out, "w", zeros, 0, (3, 2), (0, 0))
    assert (out == 0).all()
