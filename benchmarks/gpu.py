"""Predicted against measured: step time and peak memory of one device, after `mlmdsl probe`, over sizes, micro-batches,
sequences and recomputation.

    python benchmarks/gpu.py [--steps 6] [--out FILE]

With a GPU 14 runs from 124M to 3B parameters in bf16; without one a few small ones in fp32, which show that the script works
and say nothing of GPUs. Each run is a process of its own, so that its peak memory is its own. Programs run eagerly: the runtime
compiles none.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mlmdsl.compile import compile_spec
from mlmdsl.diagnostics import MlmError
from mlmdsl.probing import probe

ROOT = Path(__file__).resolve().parents[1]
SPEC = """
import "machine.mlm" as here

block GPTBlock(x: [B, S, d], heads: int) {
  h = x + Attention(LayerNorm(x), heads = heads, causal = true)
  output h + MLP(LayerNorm(h), hidden = 4 * d)
}
model gpt {
  param d = 768
  param layers = 12
  param heads = 12
  input tokens: int[B, S]
  tok = Embedding(tokens, vocab = 50304, dim = d)
  h = tok + Position(tokens, max = 4096, dim = d)
  repeat layers as blocks { h = GPTBlock(h, heads = heads) }
  output Linear(LayerNorm(h), weight = tok.weight)
}
cluster mine from here.machine {
  nodes = 1
  devices_per_node = 1
}
train {
  data = text("unused.txt")
  tokenizer = bytes()
  seq_len = 1024 tok
  batch = 8 seq
  stop = 100 steps
  optimizer = adamw(lr = 1e-4)
  precision = bf16
}
"""


@dataclass(frozen=True)
class Case:
    layers: int
    width: int
    heads: int
    sequence: int
    batch: int
    micro_batch: int
    recompute: str

    @property
    def name(self) -> str:
        batch = f"{self.batch} x {self.sequence} by {self.micro_batch}"
        return f"{self.layers} layers of {self.width}, {batch}, recompute {self.recompute}"

    def settings(self, precision: str) -> list[str]:
        model = [f"gpt.layers={self.layers}", f"gpt.d={self.width}", f"gpt.heads={self.heads}"]
        return [*model, f"train.seq_len={self.sequence} tok", f"train.batch={self.batch} seq", f"train.precision={precision}"]


GPU = [
    *(Case(12, 768, 12, 1024, 32, micro, "none") for micro in (4, 8, 16)),
    *(Case(12, 768, 12, 1024, 32, 16, recompute) for recompute in ("selective", "full")),
    Case(12, 768, 12, 4096, 8, 4, "none"),
    *(Case(24, 1024, 16, 1024, 16, micro, "none") for micro in (4, 8)),
    Case(24, 1024, 16, 1024, 16, 8, "full"),
    Case(36, 1280, 20, 1024, 16, 4, "none"),
    Case(36, 1280, 20, 2048, 8, 4, "full"),
    Case(48, 1600, 25, 1024, 8, 2, "none"),
    Case(48, 1600, 25, 1024, 8, 4, "full"),
    Case(32, 2560, 32, 1024, 8, 2, "full"),
]
CPU = [Case(2, 128, 4, 128, 4, micro, recompute) for micro, recompute in ((1, "none"), (4, "none"), (4, "full"))]


@dataclass(frozen=True)
class Row:
    name: str
    predicted: tuple[float, float]  # seconds, bytes
    measured: tuple[float, float]

    @property
    def errors(self) -> tuple[float, float]:
        return self.predicted[0] / self.measured[0] - 1, self.predicted[1] / self.measured[1] - 1


def row_of(case: Case, folder: Path, precision: str, steps: int) -> Row | str:
    """Or why there is none."""
    pins = (f"micro_batch={case.micro_batch}", f"recompute={case.recompute}")
    try:
        done = compile_spec(SPEC, path=str(folder / "spec.mlm"), overrides=case.settings(precision), pins=pins)
    except MlmError as problem:
        return f"not planned: {problem.diagnostics[0].message}"
    assert done.plan is not None and done.program is not None
    out = folder / "program"
    done.program.write(out)
    command = [sys.executable, __file__, "--worker", str(out / "program.py"), "--steps", str(steps)]
    told = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if told.returncode:
        return f"failed: {(told.stderr.strip().splitlines() or ['without a word'])[-1]}"
    seconds, memory = json.loads(told.stdout.splitlines()[-1])
    predicted = done.plan.predicted
    return Row(case.name, (predicted.step_time_s, float(max(predicted.peak_memory_bytes))), (seconds, memory))


def train(program: Path, steps: int) -> None:
    """Prints the median step's seconds, and the peak memory in bytes."""
    import torch

    from mlmdsl.runtime import mesh as meshes
    from mlmdsl.runtime.train import Trainer, peak_memory_bytes

    names: dict[str, Any] = {"__name__": "program"}
    exec(compile(program.read_text(encoding="utf-8"), str(program), "exec"), names)
    training = names["TRAINING"]

    class Tokens:
        @property
        def batches(self) -> int:
            return 1

        def batch(self, step: int, low: int, high: int) -> dict[str, torch.Tensor]:
            rows = torch.randint(0, 256, (high - low, training.sequence + 1), generator=torch.Generator().manual_seed(step))
            return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mesh = meshes.create(names["PARALLEL"], device)
    trainer = Trainer(names["Stage"], names["loss"], names["PARALLEL"], training, mesh, Tokens())
    seconds: list[float] = []
    for _ in range(steps + 2):  # the first two warm up
        started = time.perf_counter()
        trainer.step()
        seconds.append(time.perf_counter() - started)
    print(json.dumps([median(seconds[2:]), peak_memory_bytes(device)]))


def table(rows: Sequence[Row], reasons: Sequence[str]) -> str:
    """As Markdown, with the medians of the absolute errors and what has no row."""
    lines = ["| run | predicted ms | measured ms | error | predicted MiB | measured MiB | error |", "|" + " --- |" * 7]
    for row in rows:
        (seconds, memory), (taken, held), (late, large) = row.predicted, row.measured, row.errors
        times = f"{1e3 * seconds:.1f} | {1e3 * taken:.1f} | {late:+.1%}"
        lines.append(f"| {row.name} | {times} | {memory / 2**20:,.0f} | {held / 2**20:,.0f} | {large:+.1%} |")
    if rows:
        for index, what in enumerate(("step time", "peak memory")):
            errors = [abs(row.errors[index]) for row in rows]
            lines += ["", f"{what}: median error {median(errors):.1%}, worst {max(errors):.1%} of {len(rows)} runs"]
    return "\n".join([*lines, *(f"\n{reason}" for reason in reasons)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, help="write the table there too")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        return train(options.worker, options.steps)
    from mlmdsl.runtime.launch import gpus

    cases, precision = (GPU, "bf16") if gpus() else (CPU, "fp32")
    with tempfile.TemporaryDirectory(prefix="mlmdsl-gpu-") as name:
        folder = Path(name)
        text, lines = probe(1)
        print("\n".join(lines), flush=True)
        (folder / "machine.mlm").write_text(text, encoding="utf-8")
        found = [(case, row_of(case, folder, precision, options.steps)) for case in cases]
    reasons = [f"{case.name}: {row}" for case, row in found if isinstance(row, str)]
    page = table([row for _, row in found if isinstance(row, Row)], reasons)
    note = "" if gpus() else "No GPU here: these runs are of the CPU, and say nothing of one.\n\n"
    print(note + page)
    if options.out:
        options.out.write_text(note + page, encoding="utf-8")


if __name__ == "__main__":
    main()
