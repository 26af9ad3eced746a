"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Callable

Said = Callable[[float], str]  # a number as one of these says it


def gib(value: float) -> str:
    """Bytes in GiB, or in MiB below one: "61.2 GiB"."""
    return f"{value / 2**30:,.1f} GiB" if value >= 2**30 else f"{value / 2**20:,.0f} MiB"


def size(value: float) -> str:
    """Bytes with the binary unit that fits: "32 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"


def seconds(value: float) -> str:
    """A duration with three digits: "14.3 s", "213 ms", "5 us"."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= factor:
            return f"{value / factor:,.3g} {unit}" if value / factor < 1000 else f"{value / factor:,.0f} {unit}"
    return "0 s" if value == 0 else f"{value / 1e-9:.3g} ns"


def days(value: float) -> str:
    """Days, or hours, minutes and seconds where they say more."""
    for factor, unit in ((1, "days"), (24, "hours"), (24 * 60, "minutes")):
        if value * factor >= 2:
            return f"{value * factor:,.1f} {unit}"
    return f"{value * 86400:.0f} seconds"


def rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:,.4g} GB/s"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def amount(value: float) -> str:
    """Money or energy: cents only where they matter."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.2f}"
