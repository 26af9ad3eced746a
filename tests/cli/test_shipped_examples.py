"""The examples train, each for a few steps, and give output of the right kind; their data is what make_data.py makes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mlmdsl.cli import main
from mlmdsl.compile import compile_spec
from mlmdsl.runtime import mesh
from mlmdsl.runtime.data import TokenDataset
from mlmdsl.runtime.train import Trainer
from tests.parity.ranks import run_ranks

EXAMPLES = Path(__file__).resolve().parents[2] / "specs" / "examples"
SMALLER = {
    "text": ("text.d=32", "text.layers=1", "train.seq_len=32 tok", "train.batch=8 seq"),
    "code": ("code.d=32", "code.layers=1", "train.seq_len=32 tok", "train.batch=8 seq", 'train.data=python_source("json")'),
    "chat": ("chat.d=32", "chat.layers=1"),
    "translate": ("translate.d=32", "translate.layers=1"),
}


def trained(rank: int, name: str, out: Path) -> list[float]:
    """Losses of a few steps of a smaller model; the run lies in `out`."""
    torch.set_num_threads(1)
    path = EXAMPLES / f"{name}.mlm"
    overrides = (*SMALLER[name], "train.stop=6 steps", "train.schedule=constant()")
    done = compile_spec(path.read_text(encoding="utf-8"), path=str(path), overrides=overrides)
    assert done.program is not None
    done.program.write(out)
    names: dict[str, Any] = {"__name__": "program"}
    exec(compile(done.program.text, "program.py", "exec"), names)
    data = [TokenDataset(names["TRAINING"], split, out / "cache") for split in ("train", "validation")]
    grid = mesh.single(torch.device("cpu"))
    trainer = Trainer(names["Stage"], names["loss"], names["PARALLEL"], names["TRAINING"], grid, *data)
    losses = [trainer.step().loss for _ in range(6)]
    held_out = trainer.validate()
    trainer.save(out)
    return [*losses, held_out or 0.0]


@pytest.mark.parametrize(("name", "prompt"), [("text", "The "), ("code", "def "), ("chat", "Hello!"), ("translate", "a cat")])
def test_an_example_learns_and_generates(name: str, prompt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ((first, *losses, held_out),) = run_ranks(trained, 1, name, tmp_path)
    assert losses[-1] < first - 0.1 and abs(held_out - losses[-1]) < 0.5
    assert main(["generate", str(tmp_path), "--prompt", prompt, "--tokens", "5"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(prompt) == (name in ("text", "code")) and said.endswith("\n")


def test_the_data_is_what_the_script_makes() -> None:
    spec = importlib.util.spec_from_file_location("make_data", EXAMPLES / "make_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, content in module.files().items():
        found = (EXAMPLES / "data" / name).read_text(encoding="utf-8")
        assert json.loads(found) == json.loads(content) if name.endswith("tokenizer.json") else found == content, name
