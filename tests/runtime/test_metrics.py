"""metrics.jsonl, TensorBoard scalars and the progress line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from mlmdsl.runtime.config import AdamW, Data, Tokenizer, Training
from mlmdsl.runtime.metrics import Metrics, predicted, progress_text

TRAINING = Training(
    data=Data("text", ("x",)),
    tokenizer=Tokenizer("bytes"),
    sequence=100,
    batch=8,
    steps=6,
    optimizer=AdamW(1e-3),
    flops_per_token=1e6,
    peak_flops_per_second=1e9,
)
KEYS = ["step", "loss", "grad_norm", "learning_rate", "tokens", "step_time_s", "tokens_per_s", "mfu", "peak_memory_bytes"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def metrics(out: Path, stream: io.StringIO | None = None, **settings: Any) -> Metrics:
    ticks = iter(range(1000))
    return Metrics(out, TRAINING, 4, stream=stream or io.StringIO(), clock=lambda: float(next(ticks)), **settings)


def record(to: Metrics, step: int, **changes: Any) -> None:
    values: dict[str, Any] = dict(loss=3.0, grad_norm=1.0, learning_rate=1e-3, tokens=800 * step, step_time_s=0.5)
    to.step(step, **(values | {"peak_memory_bytes": 2**30} | changes))


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_line_has_the_promised_keys(tmp_path: Path) -> None:
    to = metrics(tmp_path)
    record(to, 1)
    record(to, 2, validation_loss=2.5, loss=float("nan"))
    first, second = lines(tmp_path)  # flushed: nothing has been closed
    assert list(first) == KEYS
    assert first["tokens_per_s"] == 1600 and first["mfu"] == pytest.approx(1600e6 / 4e9)
    assert list(second) == [*KEYS, "validation_loss"] and second["loss"] is None


def test_summary_is_the_last_line(tmp_path: Path) -> None:
    stream = io.StringIO()
    to = metrics(tmp_path, stream, predicted={"step_time_s": 0.4, "peak_memory_bytes": [2**29, 2**28]})
    for step, seconds in enumerate((9.0, 7.0, 0.5, 0.4, 0.6), 1):  # the first two are warm-up
        record(to, step, step_time_s=seconds)
    to.summary([2**30, 2**29])
    found = lines(tmp_path)[-1]["summary"]
    assert found["measured_step_time_s"] == 0.5 and found["predicted_step_time_s"] == 0.4
    assert found["measured_peak_memory_bytes"] == 2**30 and found["predicted_peak_memory_bytes"] == 2**29
    assert found["measured_peak_memory_bytes_by_stage"] == [2**30, 2**29]
    assert stream.getvalue().splitlines()[-3:] == [
        "                predicted     measured",
        "step time        400.0 ms     500.0 ms  off by -20 %",
        "peak memory     512.0 MiB  1,024.0 MiB  off by -50 %",
    ]


def test_summary_without_a_plan_or_a_step(tmp_path: Path) -> None:
    metrics(tmp_path).summary()
    assert lines(tmp_path)[-1]["summary"]["measured_step_time_s"] is None


def test_resume_drops_later_lines_and_appends(tmp_path: Path) -> None:
    to = metrics(tmp_path)
    for step in range(1, 6):
        record(to, step)
    to.summary()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # a crash cut it short
    to = metrics(tmp_path, resumed=3)
    record(to, 4, loss=2.0)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 3.0), (2, 3.0), (3, 3.0), (4, 2.0)]


def test_a_new_run_keeps_nothing(tmp_path: Path) -> None:
    record(metrics(tmp_path), 1)
    to = metrics(tmp_path)
    record(to, 1, loss=1.0)
    assert [line["loss"] for line in lines(tmp_path)] == [1.0]


def test_tensorboard_reads_the_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    to = metrics(tmp_path)
    record(to, 1)
    record(to, 2, loss=2.0, validation_loss=2.5)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()  # the writer is still open: flushed at each step
    assert set(events.Tags()["scalars"]) == {*KEYS, "validation_loss"} - {"step"}
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 3.0), (2, 2.0)]
    to.close()


def test_piped_output_is_plain_lines_now_and_then(tmp_path: Path) -> None:
    stream = io.StringIO()
    to = metrics(tmp_path, stream)
    for step in range(1, 7):
        record(to, step, **({"validation_loss": 2.5} if step == 2 else {}))
    to.close()
    assert stream.getvalue().splitlines() == [
        "4 processes on cpu; MFU: matrix products (causal attention half) over 4 x 1 GFLOP/s peak in fp32",
        "step 1/6  loss 3.0000  1,600 tok/s  MFU 40.0 %  1.00 GiB  0:02 left",
        "step 2/6  loss 3.0000  validation 2.5000  1,600 tok/s  MFU 40.0 %  1.00 GiB  0:02 left",
        "step 6/6  loss 3.0000  1,600 tok/s  MFU 40.0 %  1.00 GiB",
    ]


def test_a_terminal_shows_one_line_that_rewrites_itself(tmp_path: Path) -> None:
    stream = Terminal()
    to = metrics(tmp_path, stream)
    for step in range(1, 4):
        record(to, step, **({"validation_loss": 2.5} if step == 2 else {}))
    to.close()
    _, first, second, *_ = stream.getvalue().split("\r")
    assert first.endswith("0:02 left\x1b[K") and len(first) < 83
    assert second.startswith("\x1b[Kstep 2/6") and "validation 2.5000" in second  # cleared for the line that stays
    assert stream.getvalue().endswith("\r\n")


def test_progress_fits_80_columns() -> None:
    line = dict(step=12345, loss=11.12345, tokens_per_s=1.2345e6, mfu=0.4567, peak_memory_bytes=78 * 2**30)
    assert progress_text(line, 100_000, 1.23) == (
        "step  12345/100000  loss 11.1235  1,234,500 tok/s  MFU 45.7 %  78.00 GiB  29:56:56 left"
    )


def test_predicted_is_read_from_the_plan_beside_the_program(tmp_path: Path) -> None:
    assert predicted(tmp_path) is None
    (tmp_path / "plan.json").write_text('{"predicted": {"step_time_s": 1.0}}')
    assert predicted(tmp_path) == {"step_time_s": 1.0}
    (tmp_path / "plan.json").write_text("[]")
    assert predicted(tmp_path) is None
