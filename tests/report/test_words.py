"""Numbers as people read them."""

from __future__ import annotations

import pytest

from mlmdsl import words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (words.size(12), "12 B"),
        (words.size(32 * 1024), "32 KiB"),
        (words.size(3 * 2**29), "1.5 GiB"),
        (words.size(2**41), "2 TiB"),
        (words.gib(2**20), "1 MiB"),
        (words.gib(61.25 * 2**30), "61.2 GiB"),
        (words.seconds(0), "0 s"),
        (words.seconds(14.34), "14.3 s"),
        (words.seconds(0.2131), "213 ms"),
        (words.seconds(5e-6), "5 us"),
        (words.seconds(4e-9), "4 ns"),
        (words.seconds(12_345), "12,345 s"),
        (words.days(3), "3.0 days"),
        (words.days(0.5), "12.0 hours"),
        (words.days(0.01), "14.4 minutes"),
        (words.days(0.001), "86 seconds"),
        (words.rate(50e9), "50 GB/s"),
        (words.percent(0.0512), "5.1 %"),
        (words.percent(0.4), "40 %"),
        (words.amount(1234.5), "1,234"),
        (words.amount(0.5), "0.50"),
    ],
)
def test_numbers(text: str, expected: str):
    assert text == expected
