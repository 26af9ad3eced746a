"""`mlmdsl validate runs.csv`: every run of a table predicted, and how far off the predictions are, by source.

No constant of the cost model is fitted to such tables. What a fit would change is told all the same: one factor on kernels and
one on collectives, found on all sources but one and tried on that one. If it were no better there than where it was found, the
model's freedom would be spent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import exp, log
from statistics import fmean, median

from mlmdsl.frozen import frozen
from mlmdsl.planner.assemble import predicted
from mlmdsl.planner.fitting import descend
from mlmdsl.validation.footprint import footprint
from mlmdsl.validation.predict import placed
from mlmdsl.validation.runs import Problem, Run, read_runs

_COLLECTIVES = ("tensor", "context", "expert", "pipeline", "data")


@frozen
class Row:
    """One run. None: not measured, or not predicted, for `reason`. collectives_s: of the predicted step, with the pipeline's
    idle time in proportion."""

    id: str
    source: str = ""
    nodes: int = 0
    measured_step_time_s: float | None = None
    predicted_step_time_s: float | None = None
    measured_peak_memory_bytes: int | None = None
    predicted_peak_memory_bytes: int | None = None
    collectives_s: float = 0.0
    reason: str = ""

    @property
    def time_error(self) -> float | None:
        """Of the prediction, as a share of what was measured."""
        return _error(self.predicted_step_time_s, self.measured_step_time_s)

    @property
    def memory_error(self) -> float | None:
        return _error(self.predicted_peak_memory_bytes, self.measured_peak_memory_bytes)


@frozen
class Errors:
    """Shares of what was measured, without their signs but for `worst`, `lowest` and `bias`, the mean."""

    runs: int
    median: float
    mean: float
    percentile_90: float
    worst: float
    worst_id: str
    lowest: float
    bias: float


@frozen
class LeftOut:
    """Mean absolute errors of step times under one factor on kernels and one on collectives: fitted to every source, and to all
    but the one that is predicted. factors: (kernels, collectives), by the source left out."""

    in_sample: float
    left_out: float
    by_source: dict[str, float]
    factors: dict[str, tuple[float, float]]


@frozen
class Summary:
    """`by_source`: a source with runs on one node and on several stands a second and third time, with these alone."""

    runs: int
    predicted: int
    step_time: Errors | None
    step_time_by_source: dict[str, Errors]
    peak_memory: Errors | None
    peak_memory_by_source: dict[str, Errors]
    leave_one_source_out: LeftOut | None


@frozen
class Validation:
    rows: tuple[Row, ...]
    summary: Summary


def validate(text: str) -> Validation:
    """Of a table's text. Raises Problem where it is none."""
    rows = tuple(_row(name, run) for name, run in read_runs(text))
    return Validation(rows=rows, summary=_summary(rows))


def _row(name: str, run: Run | Problem) -> Row:
    if isinstance(run, Problem):
        return Row(id=name, reason=str(run))
    row = Row(
        id=name,
        source=run.source,
        nodes=run.nodes,
        measured_step_time_s=run.step_seconds,
        measured_peak_memory_bytes=None if run.peak_bytes is None else round(run.peak_bytes),
    )
    try:
        place, candidate = placed(run)
    except Problem as problem:
        return replace(row, reason=str(problem))
    parts = predicted(place, candidate).breakdown_s
    total, moved = sum(parts.values()), sum(parts[name] for name in _COLLECTIVES)
    found = {
        "predicted_step_time_s": total,
        "predicted_peak_memory_bytes": footprint(run, place, candidate),
        "collectives_s": total * moved / (total - parts["bubble"]),
    }
    return replace(row, **found)


def _error(found: float | None, measured: float | None) -> float | None:
    return None if found is None or not measured else found / measured - 1


# ---- summed up ------------------------------------------------------------------------------------------------------


def _summary(rows: Sequence[Row]) -> Summary:
    return Summary(
        runs=len(rows),
        predicted=sum(not row.reason for row in rows),
        step_time=_errors(rows, lambda row: row.time_error),
        step_time_by_source=_by_source(rows, lambda row: row.time_error),
        peak_memory=_errors(rows, lambda row: row.memory_error),
        peak_memory_by_source=_by_source(rows, lambda row: row.memory_error),
        leave_one_source_out=left_out(rows),
    )


Judged = Callable[[Row], float | None]


def _errors(rows: Iterable[Row], error: Judged) -> Errors | None:
    found = [(each, row.id) for row in rows if (each := error(row)) is not None]
    if not found:
        return None
    sizes = sorted(abs(each) for each, _ in found)
    worst, worst_id = max(found, key=lambda each: abs(each[0]))
    return Errors(
        runs=len(found),
        median=median(sizes),
        mean=fmean(sizes),
        percentile_90=sizes[round(0.9 * (len(sizes) - 1))],
        worst=worst,
        worst_id=worst_id,
        lowest=min(each for each, _ in found),
        bias=fmean(each for each, _ in found),
    )


def _by_source(rows: Sequence[Row], error: Judged) -> dict[str, Errors]:
    groups: dict[str, list[Row]] = {}
    for source in dict.fromkeys(row.source for row in rows if row.source):
        mine = [row for row in rows if row.source == source and error(row) is not None]
        one, many = [row for row in mine if row.nodes == 1], [row for row in mine if row.nodes > 1]
        groups[source] = mine
        if one and many:
            groups |= {f"{source}, one node": one, f"{source}, many nodes": many}
    each = ((name, _errors(group, error)) for name, group in groups.items())
    return {name: errors for name, errors in each if errors is not None}


# ---- one source left out --------------------------------------------------------------------------------------------

Factors = tuple[float, float]  # on kernels and on collectives


def left_out(rows: Iterable[Row]) -> LeftOut | None:
    """None where there are not several sources."""
    judged = [row for row in rows if row.time_error is not None]
    groups: dict[str, list[Row]] = {}
    for row in judged:
        groups.setdefault(row.source, []).append(row)
    if len(groups) < 2:
        return None
    everywhere = _fitted(judged)
    factors = {name: _fitted([row for row in judged if row.source != name]) for name in groups}
    errors = {name: [_under(row, factors[name]) for row in group] for name, group in groups.items()}
    return LeftOut(
        in_sample=fmean(_under(row, everywhere) for row in judged),
        left_out=fmean(each for group in errors.values() for each in group),
        by_source={name: fmean(group) for name, group in errors.items()},
        factors=factors,
    )


def _under(row: Row, factors: Factors) -> float:
    """Absolute error."""
    assert row.measured_step_time_s is not None
    return abs(_seconds(row, factors) / row.measured_step_time_s - 1)


def _seconds(row: Row, factors: Factors) -> float:
    assert row.predicted_step_time_s is not None
    return factors[0] * (row.predicted_step_time_s - row.collectives_s) + factors[1] * row.collectives_s


def _fitted(rows: Sequence[Row]) -> Factors:
    """Of least mean |log(predicted / measured)|."""

    def loss(logs: Sequence[float]) -> float:
        factors = exp(logs[0]), exp(logs[1])
        return fmean(abs(log(_seconds(row, factors) / (row.measured_step_time_s or 1.0))) for row in rows)

    kernels, collectives = descend(loss, (0.0, 0.0), step=0.2)
    return exp(kernels), exp(collectives)


def errors_by_nodes(rows: Iterable[Row]) -> Mapping[bool, list[float]]:
    """Predicted over measured step times, by whether a run was on several nodes."""
    found: dict[bool, list[float]] = {False: [], True: []}
    for row in rows:
        if row.time_error is not None:
            found[row.nodes > 1].append(1 + row.time_error)
    return found
