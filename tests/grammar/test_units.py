"""Units as written to quantities in base units."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmdsl.units import UNITS, WORDS, Quantity, nearest_unit, quantity

WRITTEN = [
    (80, "GiB", "bytes", 80 * 2**30),
    (80, "GB", "bytes", 80e9),
    (1.5, "KiB", "bytes", 1536),
    (1, "MB", "bytes", 1e6),
    (1, "TiB", "bytes", 2**40),
    (300, "GB/s", "bytes_per_second", 300e9),
    (200, "Gb/s", "bytes_per_second", 25e9),
    (200, "Gbit/s", "bytes_per_second", 25e9),
    (8, "GiB/s", "bytes_per_second", 8 * 2**30),
    (16, "Gb", "bits", 16e9),
    (312, "TFLOPS", "flops_per_second", 312e12),
    (1, "PFLOPS", "flops_per_second", 1e15),
    (5, "ns", "seconds", 5e-9),
    (5, "us", "seconds", 5e-6),
    (5, "ms", "seconds", 5e-3),
    (2, "min", "seconds", 120),
    (1, "hour", "seconds", 3600),
    (2, "days", "seconds", 172_800),
    (1024, "tok", "tokens", 1024),
    (4, "Mi tok", "tokens", 4 * 2**20),
    (15, "T tok", "tokens", 15e12),
    (2, "B tokens", "tokens", 2e9),
    (512, "seq", "sequences", 512),
    (4, "Ki sequences", "sequences", 4096),
    (10, "K steps", "steps", 10_000),
    (3, "epochs", "epochs", 3),
    (700, "W", "watts", 700),
    (1.2, "kW", "watts", 1200),
    (2.5, "USD/gpu/hour", "usd_per_device_hour", 2.5),
    (2.5, "USD/device/hour", "usd_per_device_hour", 2.5),
    (0.12, "USD/kWh", "usd_per_kwh", 0.12),
    (0.4, "kg/kWh", "kg_per_kwh", 0.4),
    (370, "g/kWh", "kg_per_kwh", 0.37),
]


@pytest.mark.parametrize(("number", "unit", "dimension", "value"), WRITTEN)
def test_a_unit_is_normalised(number: float, unit: str, dimension: str, value: float) -> None:
    found = quantity(number, unit)
    assert found is not None
    assert (found.dimension, found.per) == (dimension, None)
    assert found.value == pytest.approx(value, rel=1e-12)
    assert str(found) == f"{number:g} {unit}"


def test_the_table_shows_every_dimension() -> None:
    assert {dimension for _, _, dimension, _ in WRITTEN} == {dimension for dimension, _ in UNITS.values()}
    assert set(WORDS) == {dimension for dimension, _ in UNITS.values()} | {"number"}


@pytest.mark.parametrize("unit", ["", "gib", "GiB/s/s", "K", "B tok tok", "mB", "FLOP", "hrs", "USD", "%"])
def test_other_words_are_no_units(unit: str) -> None:
    assert quantity(1, unit) is None


@pytest.mark.parametrize("per", ["gpu", "node"])
def test_what_a_link_is_per_is_kept(per: str) -> None:
    found = quantity(400, "Gb/s", per)
    assert found == Quantity(50e9, "bytes_per_second", per, f"400 Gb/s per {per}")
    assert str(found) == f"400 Gb/s per {per}"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("gib", "GiB"),
        ("GIB", "GiB"),
        ("gb", "GB"),
        ("tflops", "TFLOPS"),
        ("TFLOP", "TFLOPS"),
        ("gb/s", "GB/s"),
        ("sqe", "seq"),
        ("token", "tokens"),
        ("sec", "s"),
        ("minutes", "min"),
        ("samples", "seq"),
        ("USD/hour", "USD/gpu/hour"),
        ("usd/GPU/hour", "USD/gpu/hour"),
        ("mi  tok", "Mi tok"),
        ("hrs", "hours"),
        ("parsec", None),
        ("xyzzy", None),
    ],
)
def test_the_unit_that_was_meant(written: str, meant: str | None) -> None:
    assert nearest_unit(written) == meant


@given(st.sampled_from(sorted(UNITS)), st.floats(1e-6, 1e6), st.floats(0.01, 100))
def test_scaling_is_a_product(unit: str, number: float, factor: float) -> None:
    found = quantity(number, unit)
    assert found is not None
    scaled = found.scaled(factor)
    assert scaled.value == pytest.approx(number * UNITS[unit][1] * factor)
    assert (scaled.dimension, scaled.per, scaled.text) == (found.dimension, found.per, "")
    assert str(scaled).endswith(found.dimension.replace("_", " "))


@given(st.sampled_from(sorted(UNITS)))
def test_a_unit_is_nearest_to_itself(unit: str) -> None:
    near = nearest_unit(unit)
    assert near is not None and near.lower() == unit.lower()
