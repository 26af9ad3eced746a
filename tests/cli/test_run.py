"""From a spec to a trained model through the commands: files, losses, resuming, sampling, torchrun."""

from __future__ import annotations

import json
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--set",
    "quickstart.d=32",
    "--set",
    "quickstart.layers=2",
    "--set",
    "train.batch=8 seq",
    "--set",
    "train.stop=4 steps",
)


def run(*arguments: str, cwd: Path, module: str = "mlmdsl") -> str:
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "step" in line]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A spec beside its data, which it names by a relative path."""
    spec = (ROOT / "specs" / "quickstart.mlm").read_text(encoding="utf-8")
    text = spec.replace('python("pydoc_data.topics")', 'text("corpus/*.txt")')
    assert text != spec
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("".join(pydoc_data.topics.topics.values())[:50_000], encoding="utf-8")
    (tmp_path / "small.mlm").write_text(text, encoding="utf-8")
    return tmp_path


def test_a_run_is_complete_and_its_folder_stands_alone(folder: Path):
    """Resumed, sampled from and run by torchrun out of the run's own folder, from another working directory."""
    shown = run(
        "run", "small.mlm", "--procs", "2", "--out", "out", *SMALL, "--set", "train.checkpoint_every=2 steps", cwd=folder
    )
    assert "step time" in shown and "peak memory" in shown and "everything goes to out" in shown
    out, whole = folder / "out", losses(folder / "out")
    assert len(whole) == 4 and {p.name for p in out.iterdir()} >= {"program.py", "plan.json", "spec.mlm", "checkpoints", "logs"}
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    text = run("generate", str(out), "--tokens", "8", "--prompt", "The ", cwd=elsewhere)
    assert text.startswith("The ") and len(text) > 4

    again = folder / "again"
    plan = str(out / "plan.json")
    run("run", plan, "--out", str(again), "--steps", "2", cwd=elsewhere)
    run("run", plan, "--out", str(again), "--resume", cwd=elsewhere)
    assert losses(again) == whole

    torchrun = ("--nproc-per-node", "2", str(out / "program.py"), "--out", str(folder / "plain"))
    run(*torchrun, module="torch.distributed.run", cwd=elsewhere)
    assert losses(folder / "plain") == whole


def test_another_plan_ends_at_the_same_losses(folder: Path):
    """The planner's own choice, and tensor 2 x pipeline 2, resumed from the other's checkpoint in the middle."""
    run("run", "small.mlm", "--out", "chosen", *SMALL, cwd=folder)
    run("run", "small.mlm", "--out", "pinned", *SMALL, "--steps", "2", cwd=folder)
    pins = ("--pin", "tensor=2", "--pin", "pipeline=2")
    run("run", "small.mlm", "--out", "pinned", *SMALL, *pins, "--resume", cwd=folder)
    assert losses(folder / "pinned") == pytest.approx(losses(folder / "chosen"), rel=1e-5)
    assert (folder / "pinned" / "before" / "plan.1.json").exists()
