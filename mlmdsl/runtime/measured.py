"""What `verify` measures of one rank's step; nothing here needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Heard:
    """Calls of a step that are alike: `bytes` of the larger side, `ranks` of the group."""

    kind: str
    ranks: tuple[int, ...]
    bytes: int
    count: int


@dataclass(frozen=True)
class Measured:
    """Of one rank's step. flops: matrix products and attention; parts: live bytes at the peak by what they are."""

    collectives: tuple[Heard, ...]
    flops: float
    peak_bytes: int
    moment: str
    parts: Mapping[str, int]
