"""Efficiency curves from a table of measured kernels: the parameters that compute.py reads.

A row is (kind, a, b, c, d, milliseconds): `matmul_bf16` (or `_fp32`, `_tf32`, `_fp16`, `_fp8`) of a tokens from b to c;
`sdpa_causal_fwd` and `sdpa_causal_fwdbwd` of batch a, heads b, sequence c, head dim d; `copy` and `add` (any suffix) of a
elements; `adamw_fused_fp32` of a elements, 28 bytes each; `launch_us`, one small kernel from the host.

What is minimised is the mean of |log(predicted / measured)|, each row at most a half, so that a few rows that something else
disturbed do not bend the curve; parameters that the rows say nothing of stay near where they start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import exp, inf, log
from statistics import median

from mlmdsl.grammar.spec import Device
from mlmdsl.graph.ops.base import Work
from mlmdsl.planner.compute import AttentionCurve, Curves, Kernels, MatmulCurve, MemoryCurve

_MOST = 0.5  # of a row's error
_STEADY = 2e-4  # seconds: copies that take longer are bound by memory and not by a cache
_HELD = 0.002  # what a parameter's change by a factor of e costs
_FILL = 12e-6  # seconds: no kernel takes longer to begin and end

# Where the search for products, attention and its backward pass begins
_START = (MatmulCurve(0.7, 50, 1e6, 1e-6), AttentionCurve(0.6, 100, 30, 8e3, 5e-6), AttentionCurve(0.5, 100, 30, 8e3, 10e-6))
_CPU_START = (MatmulCurve(0.9, 16, 1, 2e-6), AttentionCurve(0.5, 16, 8, 1, 5e-6), AttentionCurve(0.5, 16, 8, 1, 10e-6))

Row = tuple[str, int, int, int, int, float]


@dataclass(frozen=True)
class Fit:
    """The curves, the median error of each kind's rows, and the host's seconds per launch (None where not measured)."""

    curves: Curves
    errors: Mapping[str, float]
    launch_seconds: float | None


def fit(rows: Iterable[Row], device: Device, precision: str, origin: str) -> Fit:
    """The curves of a device in the precision of its matrix products. Raises ValueError where it has none, no attention or no
    copies."""
    table: dict[str, list[Row]] = {}
    for row in rows:
        table.setdefault(row[0], []).append(row)
    launch = median(row[5] for row in table["launch_us"]) * 1e-3 if "launch_us" in table else None
    elements = 4 if any(kind.endswith("fp32") for kind in table if kind.startswith("copy")) else 2
    memory = _memory(table, device, elements)
    start = Curves(
        origin,
        True,
        *(_CPU_START if device.kind == "cpu" else _START),
        memory,
    )
    fitter = _Fitter(device, precision, launch or 0.0, elements if device.kind == "cpu" else 2)
    for name in (f"matmul_{precision}", "sdpa_causal_fwd", "sdpa_causal_fwdbwd"):
        if name not in table:
            raise ValueError(f"the table has no rows of {name}")
    start, products = fitter.improve(start, "matmul", table[f"matmul_{precision}"])
    start, forward = fitter.improve(start, "attention_forward", table["sdpa_causal_fwd"])
    start, both = fitter.improve(start, "attention_backward", table["sdpa_causal_fwdbwd"])
    errors = {f"matmul_{precision}": products, "sdpa_causal_fwd": forward, "sdpa_causal_fwdbwd": both}
    return Fit(start, errors, launch)


def _memory(table: Mapping[str, Sequence[Row]], device: Device, elements: int) -> MemoryCurve:
    """Of the largest tensors: the share of the datasheet's bandwidth."""

    def share(kinds: Iterable[str], each: float) -> float:
        found = [row for kind in kinds for row in table.get(kind, ())]
        long = [row for row in found if row[5] * 1e-3 > _STEADY] or sorted(found, key=lambda row: row[1])[-2:]
        if not long:
            raise ValueError("the table has no rows of copies, additions or the optimizer")
        return median(row[1] * each / (row[5] * 1e-3) for row in long) / device.memory_bytes_per_second

    copies, additions = ([kind for kind in table if kind.startswith(name)] for name in ("copy", "add_"))
    moved = median([share(copies, 2 * elements)] + ([share(additions, 3 * elements)] if additions else []))
    return MemoryCurve(moved, share(["adamw_fused_fp32"], 28.0) if "adamw_fused_fp32" in table else moved)


@dataclass(frozen=True)
class _Fitter:
    device: Device
    precision: str
    launch: float
    elements: int

    def improve(self, curves: Curves, part: str, rows: Sequence[Row]) -> tuple[Curves, float]:
        """The curves with this part fitted to the rows, and the median error."""
        before: MatmulCurve | AttentionCurve = getattr(curves, part)
        names = [field.name for field in fields(before)]
        works = [(self._work(row), row[5] * 1e-3) for row in rows]

        def with_values(values: Sequence[float]) -> Curves:
            return replace(curves, **{part: replace(before, **dict(zip(names, map(exp, values), strict=True)))})

        def errors(values: Sequence[float]) -> list[float]:
            kernels = _Fixed(self.device, self.precision, with_values(values))
            return [abs(log(self._seconds(kernels, part, work) / seconds)) for work, seconds in works]

        first = [log(getattr(before, name)) for name in names]
        if self.device.kind == "cpu":  # beyond _MOST the loss is flat: begin where half of the rows take longer
            kernels = _Fixed(self.device, self.precision, with_values(first))
            first[0] += median(log(self._seconds(kernels, part, work) / seconds) for work, seconds in works)

        def loss(values: Sequence[float]) -> float:
            if values[-1] > log(_FILL):
                return inf
            held = sum((value - start) ** 2 for value, start in zip(values, first, strict=True))
            return sum(min(_MOST, error) for error in errors(values)) / len(works) + _HELD * held

        best = descend(loss, first)
        return with_values(best), exp(median(errors(best))) - 1

    def _seconds(self, kernels: Kernels, part: str, work: Work) -> float:
        busy = kernels.forward_busy(work)
        if part == "attention_backward":
            busy += kernels.backward_busy(work)
        return busy + self.launch if self.device.kind == "cpu" else max(busy, self.launch)

    def _work(self, row: Row) -> Work:
        kind, a, b, c, d, _ = row
        if kind.startswith("matmul"):
            flops, moved = 2.0 * a * b * c, float(self.elements * (a * b + b * c + a * c))
            return Work("matmul", flops_forward=flops, bytes_forward=moved, matmul=(a, b, c))
        flops, moved = 2.0 * a * b * c * c * d, 4.0 * self.elements * a * b * c * d
        return Work(
            "attention",
            flops_forward=flops,
            flops_backward=2 * flops,
            bytes_forward=moved,
            bytes_backward=2.5 * moved,
            attention=(a, b, c, c, d),
        )


class _Fixed(Kernels):
    """Kernels with given curves."""

    def __init__(self, device: Device, precision: str, curves: Curves):
        super().__init__(device, precision)
        self.__dict__["curves"] = curves


def descend(
    loss: Callable[[Sequence[float]], float], start: Sequence[float], *, step: float = 0.7, least: float = 0.004
) -> list[float]:
    """Pattern search (Hooke and Jeeves 1961): one coordinate at a time, steps halved where none helps."""
    point, best = list(start), loss(start)
    while step > least:
        improved = False
        for index in range(len(point)):
            for move in (step, -step):
                tried = [*point[:index], point[index] + move, *point[index + 1 :]]
                found = loss(tried)
                if found < best - 1e-9:
                    point, best, improved = tried, found, True
                    break
        if not improved:
            step /= 2
    return point
