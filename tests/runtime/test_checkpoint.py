"""Checkpoints: any plan reads any plan's, exactly; damage is noticed; nothing is overwritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mlmdsl.diagnostics import RunError
from mlmdsl.runtime import checkpoint
from mlmdsl.runtime.config import Parallel
from mlmdsl.runtime.initial import normal
from mlmdsl.runtime.mesh import single
from mlmdsl.runtime.optimizer import MOMENTS
from mlmdsl.runtime.parallel import Scope, weight
from mlmdsl.runtime.train import Trainer
from tests.parity.curve import collected, make_trainer, training
from tests.parity.ranks import run_ranks
from tests.runtime.handwritten import program

PLANS = {
    "one": Parallel(stages=(4,), micro_batch=4),
    "tensor": Parallel(tensor=2, stages=(4,), micro_batch=8),
    "data, ZeRO 1": Parallel(data=2, zero=1, stages=(4,), micro_batch=4),
    "data, ZeRO 2": Parallel(data=2, zero=2, stages=(4,), micro_batch=2),
    "data, ZeRO 3": Parallel(data=3, zero=3, stages=(4,), micro_batch=1),
    "data, ZeRO 3, copied": Parallel(data=4, zero=3, replicate=2, stages=(4,), micro_batch=2),
    "pipeline": Parallel(pipeline=2, stages=(1, 3), micro_batch=4),
    "all": Parallel(pipeline=2, data=2, tensor=2, zero=3, stages=(3, 1), micro_batch=2),
    "interleaved": Parallel(pipeline=2, interleave=2, schedule="interleaved_1f1b", stages=(1, 1, 1, 1), micro_batch=4),
}


def text(name: str) -> str:
    return program(repr(PLANS[name]), repr(training(batch=6 if PLANS[name].data == 3 else 8)))


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Weights and moments by name, on rank 0."""
    state = trainer.state
    found = collected(trainer, [held.master for held in state.held])
    for moment in MOMENTS:
        parts = collected(trainer, [moments[moment] for moments in state.optimizer.moments])
        found |= {f"{moment}.{name}": tensor for name, tensor in parts.items()}
    return found


def saved(rank: int, name: str, out: Path) -> dict[str, Tensor]:
    trainer = make_trainer(text(name))
    for _ in range(2):
        trainer.step()
    trainer.save(out)
    return everything(trainer)


def loaded(rank: int, name: str, out: Path) -> tuple[int, int, dict[str, Tensor], bool]:
    trainer = make_trainer(text(name))
    trainer.load(checkpoint.newest_whole(out))
    alike = all(torch.equal(held.parameter.data, held.master) for held in trainer.state.held if not trainer.state.sharded)
    return trainer.done, trainer.tokens, everything(trainer), alike


@pytest.mark.parametrize(
    ("writer", "readers"),
    [
        ("all", ("one", "tensor", "data, ZeRO 3", "interleaved")),
        ("data, ZeRO 2", ("data, ZeRO 3", "data, ZeRO 3, copied", "one")),
        ("data, ZeRO 3, copied", ("data, ZeRO 2", "one")),
        ("data, ZeRO 3", ("all", "pipeline")),
        ("interleaved", ("data, ZeRO 1", "data, ZeRO 2", "one")),
        ("one", ("all", "tensor")),
    ],
)
def test_any_plan_reads_any_plans(tmp_path: Path, writer: str, readers: tuple[str, ...]):
    expected = run_ranks(saved, PLANS[writer].world_size, writer, tmp_path)[0]
    for reader in readers:
        answers = run_ranks(loaded, PLANS[reader].world_size, reader, tmp_path)
        done, tokens, found, _ = answers[0]
        assert done == 2 and tokens > 0 and found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), (writer, reader)
        assert all(alike for *_, alike in answers)


def continued(rank: int, name: str, out: Path) -> tuple[list[float], list[float]]:
    """Losses of steps 3 and 4 after going on, and of a run that was not interrupted."""
    whole = make_trainer(text(name))
    expected = [whole.step() for _ in range(4)][2:]
    trainer = make_trainer(text(name))
    trainer.load(checkpoint.newest_whole(out))
    found = [trainer.step() for _ in range(2)]
    assert [r.tokens for r in found] == [r.tokens for r in expected]
    return [r.loss for r in found], [r.loss for r in expected]


@pytest.mark.parametrize("name", ["one", "tensor", "data, ZeRO 1", "pipeline"])
def test_going_on_is_bit_identical(tmp_path: Path, name: str):
    run_ranks(saved, PLANS[name].world_size, name, tmp_path)
    for found, expected in run_ranks(continued, PLANS[name].world_size, name, tmp_path):
        assert found == expected


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of one process with checkpoints of steps 1 and 2."""
    trainer = make_trainer(text("one"))
    for _ in range(2):
        trainer.step()
        trainer.save(tmp_path)
    return tmp_path


def flip(folder: Path) -> None:
    path = next(folder.glob("__*"))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def shorten(folder: Path) -> None:
    path = next(folder.glob("__*"))
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, Any] = {
    "a flipped bit": (flip, "does not have the contents that were written"),
    "a short file": (shorten, "bytes instead of"),
    "a missing file": (lambda f: next(f.glob("__*")).unlink(), "No such file"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json"),
    "half a manifest": (lambda f: (f / "manifest.json").write_text('{"step": 2, "fil'), ""),
    "another manifest": (lambda f: (f / "manifest.json").write_text('{"step": 2}'), "not a manifest"),
    "a later format": (
        lambda f: (f / "manifest.json").write_text(json.dumps(json.loads((f / "manifest.json").read_text()) | {"format": 9})),
        "format 9",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_noticed_and_passed_over(run: Path, kind: str, capsys: pytest.CaptureFixture[str]):
    harm, words = DAMAGE[kind]
    newest = run / "checkpoints" / "step-00000002"
    assert checkpoint.newest_whole(run) == newest and checkpoint.damage(newest) is None
    harm(newest)
    problem = checkpoint.damage(newest)
    assert problem is not None and words in problem
    assert checkpoint.newest_whole(run).name == "step-00000001"
    assert problem in capsys.readouterr().err


def test_a_damaged_checkpoint_that_was_named_is_refused(run: Path):
    folder = run / "checkpoints" / "step-00000002"
    flip(folder)
    with pytest.raises(RunError, match="MLM0744"):
        checkpoint.newest_whole(folder)
    with pytest.raises(RunError, match="MLM0744"):
        checkpoint.load_weights(make_trainer(text("one")).engine.module, folder)  # type: ignore[attr-defined]
    assert checkpoint.newest_whole(run / "checkpoints" / "step-00000001").name == "step-00000001"


def test_nothing_whole(run: Path):
    for folder in checkpoint.newest_first(run):
        shorten(folder)
    assert checkpoint.latest(run) is None
    with pytest.raises(RunError, match="MLM0743"):
        checkpoint.newest_whole(run)
    with pytest.raises(RunError, match="MLM0743"):
        checkpoint.newest_whole(run / "elsewhere")


def test_latest_is_the_newest_with_all_its_files(run: Path):
    folder = run / "checkpoints"
    assert checkpoint.latest(run) == folder / "step-00000002"
    assert (folder / "latest").resolve() == (folder / "step-00000002").resolve()
    assert checkpoint.newest_whole(folder / "latest") == folder / "latest"
    shorten(folder / "step-00000002")
    assert checkpoint.latest(run) == folder / "step-00000001"
    shutil.copytree(folder / "step-00000001", folder / ".step-00000009.part")
    assert checkpoint.latest(run) == folder / "step-00000001"


def test_what_stands_there_is_moved_aside(run: Path):
    before = (run / "checkpoints" / "step-00000002" / "manifest.json").read_bytes()
    trainer = make_trainer(text("one"))
    trainer.load(checkpoint.newest_whole(run / "checkpoints" / "step-00000001"))
    trainer.step()
    (run / "checkpoints" / ".step-00000002.part").mkdir()
    for i in (1, 2):
        trainer.save(run)
        assert (run / "checkpoints" / f"step-00000002.old-{i}").is_dir()
    assert (run / "checkpoints" / "step-00000002.old-1" / "manifest.json").read_bytes() == before
    assert checkpoint.newest_whole(run).name == "step-00000002"
    assert [f.name for f in checkpoint.newest_first(run)] == ["step-00000002", "step-00000001"]


def shares(rank: int, out: Path) -> str:
    return checkpoint.newest_whole(out).name


def test_ranks_agree_on_what_is_whole(tmp_path: Path):
    run_ranks(saved, 2, "pipeline", tmp_path)
    shutil.copytree(tmp_path / "checkpoints" / "step-00000002", tmp_path / "checkpoints" / "step-00000003")
    flip(tmp_path / "checkpoints" / "step-00000003")
    assert run_ranks(shares, 2, tmp_path) == ["step-00000002"] * 2


# ---- other models, other folders ------------------------------------------------------------------------------------


def test_weights_alone(run: Path):
    trainer = make_trainer(text("one"))
    module = trainer.engine.module  # type: ignore[attr-defined]
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    checkpoint.load_weights(module, checkpoint.newest_whole(run))
    other = make_trainer(text("one"))
    other.load(checkpoint.newest_whole(run))
    for held in other.state.held:
        assert torch.equal(module.get_parameter(held.name), held.master)
    assert any(not torch.equal(before[name], p) for name, p in module.named_parameters())


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Scope(tok=Scope(weight=weight((65, 32), normal(0.1)))), r"tok.weight has shape \(64, 32\) there, \(65, 32\) here"),
        (Scope(head=Scope(weight=weight((64, 32), normal(0.1)))), "head.weight is not in it"),
    ],
)
def test_another_model_is_refused(run: Path, module: Scope, words: str):
    with pytest.raises(RunError, match=f"MLM0745.*{words}"):
        checkpoint.load_weights(module, checkpoint.newest_whole(run))


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("a file stands here")
    with pytest.raises(RunError, match="MLM0746"):
        make_trainer(text("one")).save(tmp_path)


def test_names_are_the_models_own(run: Path):
    from torch.distributed.checkpoint import FileSystemReader

    names = FileSystemReader(checkpoint.newest_whole(run)).read_metadata().state_dict_metadata.keys()
    trainer = make_trainer(text("one"), device=single(torch.device("cpu")).device)
    own = {held.name for held in trainer.state.held}
    assert names == own | {f"optim.{moment}.{name}" for moment in MOMENTS for name in own}
