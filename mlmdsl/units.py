"""Quantities: a number with a dimension, normalised once to bytes, bytes/s, FLOP/s, seconds, tokens, ...

Links carry "per gpu" or "per node" until the cluster's shape is known (`per`). Bits and bytes, decimal and binary prefixes are
told apart: "GB" is 1e9 bytes, "GiB" 2**30, "Gb/s" 1e9 bits a second.
"""

from __future__ import annotations

import re
from dataclasses import replace
from difflib import get_close_matches

from mlmdsl.frozen import frozen

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12, **_BINARY}
_TIMES = {
    "ns": 1e-9,
    "us": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "min": 60.0,
    "hour": 3600.0,
    "hours": 3600.0,
    "day": 86400.0,
    "days": 86400.0,
}
_COUNTED = {
    "tok": "tokens",
    "tokens": "tokens",
    "seq": "sequences",
    "sequences": "sequences",
    "step": "steps",
    "steps": "steps",
    "epoch": "epochs",
    "epochs": "epochs",
}

_OTHER_WORDS = {
    "s": ("sec", "secs", "second", "seconds"),
    "min": ("mins", "minute", "minutes"),
    "hours": ("h", "hr", "hrs"),
    "ms": ("msec", "millisecond", "milliseconds"),
    "us": ("usec", "microsecond", "microseconds"),
    "B": ("byte", "bytes"),
    "seq": ("sample", "samples"),
    "steps": ("iteration", "iterations", "iters"),
    "USD/gpu/hour": ("USD/hour", "$/hour"),
}  # how other tools write a unit


def _table() -> dict[str, tuple[str, float]]:
    """Every unit as written -> (dimension, factor)."""
    units: dict[str, tuple[str, float]] = {name: ("seconds", factor) for name, factor in _TIMES.items()}
    for prefix, factor in (_DECIMAL | _BINARY).items():
        units[f"{prefix}B"] = ("bytes", factor)
        units[f"{prefix}B/s"] = ("bytes_per_second", factor)
        units[f"{prefix}b/s"] = units[f"{prefix}bit/s"] = ("bytes_per_second", factor / 8)
        units[f"{prefix}b"] = units[f"{prefix}bit"] = ("bits", factor)
    for prefix, factor in _DECIMAL.items():
        units[f"{prefix}FLOPS"] = ("flops_per_second", factor)
        units[f"{prefix}W"] = ("watts", factor)
    for word, dimension in _COUNTED.items():
        units[word] = (dimension, 1.0)
        units.update({f"{prefix} {word}": (dimension, factor) for prefix, factor in _COUNTS.items() if prefix})
    units["USD/gpu/hour"] = units["USD/device/hour"] = ("usd_per_device_hour", 1.0)
    units["USD/kWh"] = ("usd_per_kwh", 1.0)
    units["kg/kWh"], units["g/kWh"] = ("kg_per_kwh", 1.0), ("kg_per_kwh", 1e-3)
    return units


UNITS = _table()
WORDS = {
    "bytes": "bytes (GiB, GB)",
    "bits": "bits",
    "bytes_per_second": "bandwidth (GB/s, Gb/s)",
    "flops_per_second": "FLOP/s (TFLOPS)",
    "seconds": "time (us, ms, s, min, hours, days)",
    "tokens": "tokens (tok, Ki tok, Mi tok)",
    "sequences": "sequences (seq)",
    "steps": "steps",
    "epochs": "epochs",
    "watts": "watts (W)",
    "usd_per_device_hour": "a price (USD/gpu/hour)",
    "usd_per_kwh": "an energy price (USD/kWh)",
    "kg_per_kwh": "CO2 of energy (kg/kWh, g/kWh)",
    "number": "a plain number",
}


@frozen
class Quantity:
    """`value` in the dimension's base unit; `text` as written, for messages."""

    value: float
    dimension: str
    per: str | None = None
    text: str = ""

    def scaled(self, factor: float) -> Quantity:
        return replace(self, value=self.value * factor, text="")

    def __str__(self) -> str:
        return self.text or f"{self.value:g} {self.dimension.replace('_', ' ')}"


def quantity(number: float, unit: str, per: str | None = None) -> Quantity | None:
    """The quantity, or None for a unit that there is none of."""
    found = UNITS.get(unit)
    if found is None:
        return None
    return Quantity(number * found[1], found[0], per, f"{number:g} {unit}" + (f" per {per}" if per else ""))


def nearest_unit(unit: str) -> str | None:
    """The spelling that was probably meant."""
    squeezed = re.sub(r"\s+", " ", unit)
    other = next((name for name, words in _OTHER_WORDS.items() if squeezed in words), None)
    if other is not None:
        return other
    by_lower = {name.lower(): name for name in sorted(UNITS, reverse=True)}  # bytes before bits
    if squeezed.lower() in by_lower:
        return by_lower[squeezed.lower()]
    found = get_close_matches(squeezed, UNITS, 1, 0.6)
    return found[0] if found else None
