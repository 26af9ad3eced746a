"""Whole runs through `main`: files left behind, going on, stopping early, refusals, a rank that dies."""

from __future__ import annotations

import json
import os
import random
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mlmdsl.diagnostics import RunError
from mlmdsl.runtime import checkpoint
from mlmdsl.runtime.config import AdamW, Data, Parallel, Schedule, Tokenizer, Training
from mlmdsl.runtime.train import Trainer
from tests.parity.curve import make_trainer, training
from tests.parity.ranks import RankFailed, run_ranks
from tests.runtime.handwritten import program

WORDS = "the cat sat on a mat and saw one more hat by my red door "


@pytest.fixture(autouse=True)
def _process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What `main` changes in its process is put back."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("MLMDSL_CACHE", str(tmp_path / "cache"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    draw = random.Random(0)
    words = WORDS.split()
    text = " ".join(draw.choice(words) for _ in range(1500))
    path = tmp_path / "corpus.txt"
    path.write_text("".join(chr(ord(c) - 64) if c.islower() else " " for c in text))  # ids below 64
    return path


def written(folder: Path, corpus: Path, parallel: Parallel, **changes: Any) -> Path:
    settings = Training(
        data=Data("text", (str(corpus),)),
        tokenizer=Tokenizer("bytes"),
        sequence=16,
        batch=8,
        steps=6,
        optimizer=AdamW(lr=0.01),
        schedule=Schedule("linear", warmup=1),
        **{"validate_every": 3, "checkpoint_every": 2, "validation_batches": 2, "vocab": 64, **changes},
    )
    folder.mkdir(exist_ok=True)
    path = folder / "program.py"
    path.write_text(program(repr(parallel), repr(settings)))
    return path


def start(path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    runpy.run_path(str(path), run_name="__main__")


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_records(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    path = written(out, corpus, Parallel(stages=(4,), micro_batch=4))
    (out / "plan.json").write_text(json.dumps({"predicted": {"step_time_s": 0.5, "peak_memory_bytes": [1 << 30]}}))
    start(path, monkeypatch, "--out", str(out))
    *steps, last = lines(out)
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in steps if "validation_loss" in line] == [1, 3, 6]
    assert steps[-1]["loss"] < steps[0]["loss"] and steps[-1]["validation_loss"] < steps[0]["validation_loss"]
    assert steps[-1]["tokens"] == 6 * 8 * 16 and all(line["peak_memory_bytes"] > 0 for line in steps)
    assert last["summary"]["predicted_step_time_s"] == 0.5 and last["summary"]["measured_step_time_s"] > 0
    assert last["summary"]["measured_peak_memory_bytes"] > 1 << 20
    assert [f.name for f in checkpoint.newest_first(out)] == ["step-00000006", "step-00000004", "step-00000002"]


def test_going_on_gives_the_same_numbers(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch):
    one, other = tmp_path / "one", tmp_path / "other"
    parallel = Parallel(stages=(4,), micro_batch=2)
    start(written(one, corpus, parallel), monkeypatch, "--out", str(one))
    path = written(other, corpus, parallel)
    start(path, monkeypatch, "--out", str(other), "--steps", "3")
    assert checkpoint.latest(other) == other / "checkpoints" / "step-00000003"
    start(path, monkeypatch, "--out", str(other), "--resume")
    kept = ("step", "loss", "grad_norm", "learning_rate", "tokens")
    found, expected = ([{k: line.get(k) for k in kept} for line in lines(out)[:-1]] for out in (other, one))
    assert found == expected
    start(path, monkeypatch, "--out", str(other), "--resume", str(other / "checkpoints" / "step-00000002"), "--steps", "4")
    assert [{k: line.get(k) for k in kept} for line in lines(other)[:-1]] == expected[:4]


def test_a_run_does_not_write_over_another(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    path = written(out, corpus, Parallel(stages=(4,), micro_batch=8))
    start(path, monkeypatch, "--out", str(out), "--steps", "1")
    before = lines(out)
    with pytest.raises(RunError, match="MLM0741"):
        start(path, monkeypatch, "--out", str(out))
    assert lines(out) == before
    with pytest.raises(RunError, match="MLM0743"):
        start(path, monkeypatch, "--out", str(tmp_path / "new"), "--resume")


def test_one_process_cannot_be_two(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch):
    path = written(tmp_path / "out", corpus, Parallel(data=2, stages=(4,)))
    with pytest.raises(RunError, match="MLM0740"):
        start(path, monkeypatch, "--out", str(tmp_path / "out"))


# ---- plain torchrun -------------------------------------------------------------------------------------------------


def torchrun(path: Path, ranks: int, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "--local-addr", "localhost", str(path), "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


DYING = """
if __name__ == "__main__":
    import os
    from mlmdsl.runtime.train import Trainer
    ordinary = Trainer.step

    def step(trainer):
        if trainer.done == 2 and trainer.mesh.pipeline.rank == 1:
            os._exit(9)
        return ordinary(trainer)

    Trainer.step = step
"""


def test_a_rank_that_dies_ends_the_run(tmp_path: Path, corpus: Path):
    out = tmp_path / "out"
    path = written(out, corpus, Parallel(pipeline=2, stages=(2, 2), micro_batch=4))
    path.write_text(path.read_text().replace('\n\nif __name__ == "__main__":', DYING + '\n\nif __name__ == "__main__":'))
    started = time.monotonic()
    done = torchrun(path, 2, out)
    assert done.returncode != 0 and time.monotonic() - started < 60
    assert "error[MLM0742]: rank 0 lost another rank" in done.stderr
    assert checkpoint.latest(out) == out / "checkpoints" / "step-00000002"
    assert [line["step"] for line in lines(out)] == [1, 2]


def test_torchrun_says_errors_once_and_plainly(tmp_path: Path, corpus: Path):
    out = tmp_path / "out"
    path = written(out, corpus, Parallel(pipeline=2, data=2, stages=(2, 2), micro_batch=4))
    done = torchrun(path, 2, out)
    assert done.returncode != 0
    assert done.stderr.count("error[MLM0740]: the program is for 4 processes, and was started as 2") == 1


# ---- the step -------------------------------------------------------------------------------------------------------


def clipped(rank: int, parallel: Parallel) -> list[float]:
    trainer = make_trainer(program(repr(parallel), repr(training())))
    reports = [trainer.step() for _ in range(3)]
    trainer.backward()
    before = trainer.state.square_norm()
    trainer.state.scale_gradients(0.5)
    shares = [before, trainer.state.square_norm()]
    assert shares[1] == pytest.approx(before / 4, rel=1e-6)
    return [r.grad_norm for r in reports] + [before]


def test_norms_count_every_element_once():
    """The ranks' shares add up to one process's, tied and replicated weights included."""
    (expected,) = run_ranks(clipped, 1, Parallel(stages=(4,), micro_batch=8))
    for parallel in (
        Parallel(tensor=2, data=2, stages=(4,), micro_batch=4),
        Parallel(pipeline=2, data=2, zero=3, stages=(2, 2), micro_batch=2),
    ):
        found = run_ranks(clipped, parallel.world_size, parallel)
        assert [f[:3] for f in found] == [pytest.approx(expected[:3], rel=1e-5)] * parallel.world_size
        assert sum(f[3] for f in found) == pytest.approx(expected[3], rel=1e-5)


def silent(rank: int) -> None:
    parallel = Parallel(data=2, stages=(4,), micro_batch=4)
    trainer: Trainer = make_trainer(program(repr(parallel), repr(training())))
    tokens, targets = trainer.data.batch(0, 0, 4).values()
    trainer.data = type(
        "Padding", (), {"batch": lambda self, *_: {"tokens": tokens, "targets": torch.full_like(targets, -100)}, "batches": 1}
    )()
    report = trainer.step()
    assert report.loss == 0 and report.grad_norm == 0 and report.tokens == 0
    assert all(held.master.isfinite().all() for held in trainer.state.held)


def test_a_step_without_a_valid_token_is_no_division_by_zero():
    run_ranks(silent, 2)


def loses_a_peer(rank: int) -> None:
    parallel = Parallel(pipeline=2, stages=(2, 2), micro_batch=4)
    trainer = make_trainer(program(repr(parallel), repr(training())))
    trainer.step()
    if rank == 1:
        os._exit(9)
    trainer.step()


def test_a_lost_peer_is_an_error_and_no_hang():
    started = time.monotonic()
    with pytest.raises(RankFailed, match=r"closed by peer|reset by peer|ended with status 9"):
        run_ranks(loses_a_peer, 2)
    assert time.monotonic() - started < 30
