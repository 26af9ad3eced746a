"""What a run says of itself while it goes: a progress line, metrics.jsonl, TensorBoard scalars; all flushed at every step.

`Metrics` lives on one rank, rank 0, which is given the loss, norms and times that the trainer has reduced to it. A line of
metrics.jsonl has

    step loss grad_norm learning_rate tokens step_time_s tokens_per_s mfu peak_memory_bytes [validation_loss]
    [auxiliary_loss] [routed_tokens dropped_tokens padded_tokens]

with losses in nats per token (the auxiliary one is what is added to `loss` for what is minimised), `routed_tokens` a token for
each of its experts, of which capacities left out the dropped ones and stayed empty in padded places (which are not computed),
`tokens` all that counted so far, `tokens_per_s` and `peak_memory_bytes` of the whole world and of its fullest rank; a number
that is not finite becomes null. The last line is {"summary": {...}} with predicted and measured step time and peak memory. MFU
counts matrix products only (forward and backward, causal attention half, recomputation not).
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from mlmdsl.runtime.config import Training

WARM_UP_STEPS = 2  # left out of the measured step time: allocations, connections, first-touch pages
PLAIN_SECONDS = 5.0  # between progress lines where they cannot rewrite themselves
REWRITE_SECONDS = 0.1
RECENT_STEPS = 20  # what the time left is judged by

Number = float | int


def predicted(program_dir: Path) -> Mapping[str, Any] | None:
    """What the plan beside the program promises; None where there is no plan."""
    try:
        found = json.loads((program_dir / "plan.json").read_text(encoding="utf-8")).get("predicted")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, dict) else None


class Metrics:
    """`steps` is where this run stops; `resumed` the step of the checkpoint it goes on from: later lines are dropped."""

    def __init__(
        self,
        out: Path,
        training: Training,
        world_size: int,
        *,
        device: str = "cpu",
        steps: int | None = None,
        resumed: int = 0,
        predicted: Mapping[str, Any] | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        from torch.utils.tensorboard import SummaryWriter

        self.training, self.world_size, self.predicted = training, world_size, predicted
        self.step_times: list[float] = []
        self.peak_memory_bytes = 0
        self.last: dict[str, Number | None] = {}
        out.mkdir(parents=True, exist_ok=True)
        path = out / "metrics.jsonl"
        _drop_after(path, resumed)
        self.file = path.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(out / "logs"), purge_step=resumed + 1 if resumed else None)
        self.progress = Progress(stream or sys.stdout, steps or training.steps, clock)
        self.progress.note(_peak_named(training, world_size, device))

    def step(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        learning_rate: float,
        tokens: int,
        step_time_s: float,
        peak_memory_bytes: int,
        validation_loss: float | None = None,
        balance: Mapping[str, float] | None = None,
    ) -> None:
        """Records step `step`, counted from 1; times in seconds; `balance` as `balance.reported` gives it."""
        tokens_per_s = self.training.batch * self.training.sequence / step_time_s
        line: dict[str, Number | None] = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens": tokens,
            "step_time_s": step_time_s,
            "tokens_per_s": tokens_per_s,
            "mfu": self._mfu(tokens_per_s),
            "peak_memory_bytes": peak_memory_bytes,
            **(balance or {}),
        }
        if validation_loss is not None:
            line["validation_loss"] = validation_loss
        self.last |= line
        self.step_times.append(step_time_s)
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak_memory_bytes)
        self._write(line)
        for name, value in line.items():
            if name != "step" and value is not None:
                self.board.add_scalar(name, value, step)
        self.board.flush()
        self.progress.show(line)

    def summary(self, peak_memory_bytes: Sequence[int] = ()) -> dict[str, Any]:
        """The last line, and the table on the terminal. `peak_memory_bytes` by pipeline stage, where the trainer has it."""
        measured = self.step_times[WARM_UP_STEPS:] or self.step_times
        promised = self.predicted or {}
        found: dict[str, Any] = {
            "steps": self.last.get("step"),
            "loss": self.last.get("loss"),
            "validation_loss": self.last.get("validation_loss"),
            "predicted_step_time_s": promised.get("step_time_s"),
            "measured_step_time_s": statistics.median(measured) if measured else None,
            "predicted_peak_memory_bytes": max(promised.get("peak_memory_bytes") or [0]) or None,
            "measured_peak_memory_bytes": max([self.peak_memory_bytes, *peak_memory_bytes]) or None,
            "predicted_peak_memory_bytes_by_stage": promised.get("peak_memory_bytes"),
            "measured_peak_memory_bytes_by_stage": list(peak_memory_bytes) or None,
        }
        self._write({"summary": {name: _finite(value) for name, value in found.items()}})
        for text in _table(found):
            self.progress.note(text)
        return found

    def close(self) -> None:
        self.progress.end()
        self.file.close()
        self.board.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self.file.write(json.dumps({name: _finite(value) for name, value in line.items()}, allow_nan=False) + "\n")
        self.file.flush()

    def _mfu(self, tokens_per_s: float) -> float | None:
        peak = self.training.peak_flops_per_second * self.world_size
        return self.training.flops_per_token * tokens_per_s / peak if peak else None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_after(path: Path, step: int) -> None:
    """Keeps the whole lines up to `step`, in one rename; a run that starts anew keeps none."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if 0 < _step_of(line) <= step]
    part = path.with_suffix(".part")
    part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    part.replace(path)


def _step_of(line: str) -> int:
    try:
        step = json.loads(line).get("step")
    except (ValueError, AttributeError):
        return 0
    return step if isinstance(step, int) else 0


# ---- the terminal ---------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """One line that rewrites itself on a terminal; elsewhere a line now and then, and always at a validation."""

    stream: TextIO
    steps: int
    clock: Callable[[], float]
    shown_at: float = -math.inf
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    unfinished: bool = False  # a line stands on the terminal without its newline

    def show(self, line: Mapping[str, Any]) -> None:
        self.recent.append(line["step_time_s"])
        rewriting = self.stream.isatty()
        permanent = "validation_loss" in line or line["step"] == self.steps
        if not permanent and self.clock() - self.shown_at < (REWRITE_SECONDS if rewriting else PLAIN_SECONDS):
            return
        self.shown_at = self.clock()
        text = progress_text(line, self.steps, statistics.fmean(self.recent))
        if not rewriting or permanent:
            self.note(text)
            return
        self.stream.write("\r" + text[: _columns(self.stream) - 1] + "\x1b[K")
        self.stream.flush()
        self.unfinished = True

    def note(self, text: str) -> None:
        """A line that stays."""
        if self.unfinished:
            self.stream.write("\r\x1b[K")
            self.unfinished = False
        self.stream.write(text + "\n")
        self.stream.flush()

    def end(self) -> None:
        if self.unfinished:
            self.stream.write("\r\n")
            self.stream.flush()
            self.unfinished = False


def progress_text(line: Mapping[str, Any], steps: int, step_time_s: float) -> str:
    """As short as 80 columns ask for."""
    parts = [
        f"step {line['step']:>{len(str(steps))}}/{steps}",
        f"loss {line['loss']:.4f}",
        f"validation {line['validation_loss']:.4f}" if "validation_loss" in line else "",
        f"{line['tokens_per_s']:,.0f} tok/s",
        f"dropped {line['dropped_tokens'] / line['routed_tokens']:.1%}".replace("%", " %") if "dropped_tokens" in line else "",
        "" if line["mfu"] is None else f"MFU {line['mfu']:.1%}".replace("%", " %"),
        f"{line['peak_memory_bytes'] / 2**30:.2f} GiB",
        f"{_duration((steps - line['step']) * step_time_s)} left" if line["step"] < steps else "",
    ]
    return "  ".join(filter(None, parts))


def _peak_named(training: Training, world_size: int, device: str) -> str:
    start = f"{world_size} {'process' if world_size == 1 else 'processes'} on {device}"
    if not training.peak_flops_per_second:
        return start
    peak = f"{_scaled(training.peak_flops_per_second)}FLOP/s"
    return f"{start}; MFU: matrix products (causal attention half) over {world_size} x {peak} peak in {training.precision}"


def _table(summary: Mapping[str, Any]) -> list[str]:
    """Predicted beside measured, where there is a prediction."""
    rows = [
        ("step time", "step_time_s", 1e3, "ms"),
        ("peak memory", "peak_memory_bytes", 2.0**-20, "MiB"),
    ]
    lines = [f"{'':12} {'predicted':>12} {'measured':>12}"]
    for title, name, factor, unit in rows:
        promised, measured = summary[f"predicted_{name}"], summary[f"measured_{name}"]
        if promised is not None and measured is not None:
            cells = [f"{value * factor:,.1f} {unit}" for value in (promised, measured)]
            lines.append(f"{title:12} {cells[0]:>12} {cells[1]:>12}  off by {promised / measured - 1:+.0%}".replace("%", " %"))
    return lines if len(lines) > 1 else []


def _scaled(value: float) -> str:
    """Three digits and a prefix: 50e9 -> "50 G"."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
