"""Measured runs beside their predictions, drawn for a terminal: `mlmdsl validate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mlmdsl import words
from mlmdsl.validation.judge import Errors, LeftOut, Row, Validation

_NAME = 44  # columns of a source's name


def render_validation(found: Validation) -> str:
    return "\n".join(_lines(found))


def _lines(found: Validation) -> Iterator[str]:
    yield f"{'run':<18}{'measured':>10}{'predicted':>11}{'error':>9}   {'measured':>10}{'predicted':>11}{'error':>9}"
    yield from map(_row, found.rows)
    summary = found.summary
    yield ""
    yield f"{summary.predicted:,} of {summary.runs:,} runs predicted"
    yield from _table("step time", summary.step_time, summary.step_time_by_source)
    yield from _table("peak memory", summary.peak_memory, summary.peak_memory_by_source)
    if summary.leave_one_source_out:
        yield from _left_out(summary.leave_one_source_out)


def _row(row: Row) -> str:
    if row.reason:
        return f"{row.id:<18}not predicted: {row.reason}"
    times = _pair(row.measured_step_time_s, row.predicted_step_time_s, row.time_error, words.seconds)
    memory = _pair(row.measured_peak_memory_bytes, row.predicted_peak_memory_bytes, row.memory_error, words.gib)
    return f"{row.id:<18}{times}   {memory}"


def _pair(measured: float | None, predicted: float | None, error: float | None, said: words.Said) -> str:
    shown = "" if error is None else f"{100 * error:+.1f} %"
    return f"{'-' if measured is None else said(measured):>10}{'-' if predicted is None else said(predicted):>11}{shown:>9}"


def _table(title: str, whole: Errors | None, by_source: Mapping[str, Errors]) -> Iterator[str]:
    if whole is None:
        return
    yield ""
    heads = "".join(f"{head:>9}" for head in ("median", "mean", "90th", "worst", "lowest", "bias"))
    yield f"{title + ', error':<{_NAME}}{'runs':>5}{heads}"
    for name, errors in (*by_source.items(), ("all", whole)):
        yield f"{_short(name):<{_NAME}}{errors.runs:>5,}{_errors(errors)}  worst {errors.worst_id}"


def _errors(e: Errors) -> str:
    unsigned = "".join(f"{100 * each:>7.1f} %" for each in (e.median, e.mean, e.percentile_90))
    return unsigned + "".join(f"{100 * each:>+7.1f} %" for each in (e.worst, e.lowest, e.bias))


def _left_out(found: LeftOut) -> Iterator[str]:
    yield ""
    yield "step time, one source left out: factors on kernels and collectives fitted to the others; mean error"
    for name, error in found.by_source.items():
        kernels, collectives = found.factors[name]
        yield f"{_short(name):<{_NAME}}{100 * error:>14.1f} %   kernels x {kernels:.2f}, collectives x {collectives:.2f}"
    ratio = f"{found.left_out / found.in_sample:.2f} times {100 * found.in_sample:.1f} %, of a fit to all;"
    yield f"{'all, each left out in turn':<{_NAME}}{100 * found.left_out:>14.1f} %   {ratio}"
    yield f"{'':<{_NAME + 19}}the model itself has no such factors"


def _short(name: str) -> str:
    """Of a source; a part of it stands below it."""
    for part in (", one node", ", many nodes"):
        if name.endswith(part):
            return f"  {part[2:]}"
    return name if len(name) < _NAME else f"{name[: _NAME - 4]}..."
