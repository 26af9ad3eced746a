"""A plan's promise beside what its program does, drawn for a terminal: `mlmdsl verify`."""

from __future__ import annotations

from collections.abc import Iterator

from mlmdsl import words
from mlmdsl.planner.promise import TOLERANCE, Verdict


def render_verdict(verdict: Verdict) -> str:
    return "\n".join(_lines(verdict))


def _lines(v: Verdict) -> Iterator[str]:
    yield f"rank {v.rank:,} of {v.world_size:,}, pipeline stage {v.stage}, one step"
    yield ""
    yield f"{'collective':<15}{'axis':<10}{'ranks':>7}{'bytes':>16}{'planned':>9}{'found':>9}"
    for row in v.collectives:
        size = f"{row.bytes:,}"
        counts = f"{row.planned:>9,}{row.found:>9,}"
        yield f"{row.kind:<15}{row.axis:<10}{len(row.ranks):>7,}{size:>16}{counts}  {_said(row.agrees)}"
    if not v.collectives:
        yield "none"
    yield ""
    yield f"{'matrix FLOPs':<20}planned {v.planned_flops:.6e}   found {v.found_flops:.6e}   {_said(v.flops_agree)}"
    peaks = f"planned {words.gib(v.planned_peak_bytes)}   found {words.gib(v.found_peak_bytes)}"
    yield f"{'peak of tensors':<20}{peaks}   {v.memory_error:+.1%}, {_said(v.memory_agrees)} (within {TOLERANCE:.0%})"
    yield f"{'  planned':<20}{_parts(v.planned_parts)}"
    yield f"{'  found':<20}{_parts(v.found_parts)}"
    yield f"{'  moment':<20}{v.moment}"
    yield ""
    yield "the program keeps the plan" if v.agrees else "the program and the plan differ"


def _said(agrees: bool) -> str:
    return "agrees" if agrees else "DIFFERS"


def _parts(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {words.size(size)}" for name, size in parts.items() if size)
