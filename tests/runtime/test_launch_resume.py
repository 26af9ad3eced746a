"""kill -9 of one rank: a clear end, no orphans, and `--resume` gives the losses that an uninterrupted run gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import torch.nn.functional as F
from torch import nn
from mlmdsl.runtime import AdamW, Data, Parallel, Scope, Tokenizer, Training, cross_entropy, main, normal, weight

PARALLEL = Parallel(data=2, stages=(0,), micro_batch=2)
TRAINING = Training(Data("text", ({text!r},)), Tokenizer("bytes"), sequence=8, batch=4, steps={steps},
                    optimizer=AdamW(1e-2), checkpoint_every=10)

class Stage(nn.Module):
    def __init__(self, index, mesh):
        super().__init__()
        self.tok, self.head = (Scope(weight=weight((256, 8), normal(0.02))) for _ in range(2))

    def forward(self, tokens):
        return F.linear(F.embedding(tokens, self.tok.weight), self.head.weight)

def loss(logits, targets, mesh):
    return cross_entropy(logits, targets)

if __name__ == "__main__":
    main(Stage, loss, PARALLEL, TRAINING)
"""

DRIVER = """
import sys
from pathlib import Path
from mlmdsl.diagnostics import MlmError
from mlmdsl.runtime.launch import launch
folder = Path(sys.argv[1])
try:
    sys.exit(launch(folder / "program.py", 2, ["--out", str(folder), *sys.argv[2:]], folder / "logs"))
except MlmError as error:
    for item in error.diagnostics:
        print(item.code, item.message, item.help)
    sys.exit(error.exit_status)
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"MLMDSL_CACHE": str(folder.parent / "cache")}
    command = [sys.executable, "-c", DRIVER, str(folder), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "step" in line}


def folder_with_program(tmp_path: Path, name: str, steps: int) -> Path:
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy. " * 20)
    folder = tmp_path / name
    folder.mkdir()
    (folder / "program.py").write_text(PROGRAM.format(text=str(tmp_path / "text.txt"), steps=steps))
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks through /proc")
def test_killed_and_resumed(tmp_path: Path) -> None:
    folder = folder_with_program(tmp_path, "killed", steps=100_000)
    launcher = start(folder)
    try:
        end = time.monotonic() + 60
        while not (folder / "checkpoints" / "step-00000020").exists() and time.monotonic() < end:
            time.sleep(0.01)
        ranks = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
        os.kill(ranks[1], signal.SIGKILL)
        output, _ = launcher.communicate(timeout=30)
    finally:
        launcher.kill()
    assert launcher.returncode == 4
    message = output.splitlines()[-1]
    assert message.startswith(f"MLM0720 rank 1 (pid {ranks[1]}) was killed by SIGKILL")
    assert "the last whole checkpoint is" in message and "--resume" in message
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)

    last = max(losses(folder))
    resumed = start(folder, "--resume", "--steps", str(last + 5))
    whole = start(folder_with_program(tmp_path, "whole", steps=100_000), "--steps", str(last + 5))
    assert (
        (resumed.communicate(timeout=120) and resumed.returncode) == (whole.communicate(timeout=120) and whole.returncode) == 0
    )
    assert losses(folder) == losses(tmp_path / "whole")
    assert len(losses(folder)) == last + 5
