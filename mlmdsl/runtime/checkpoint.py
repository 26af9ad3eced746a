"""Checkpoints that any plan can read, that cannot be half there, and that notice a flipped bit.

    OUT/checkpoints/step-00000100/   torch.distributed.checkpoint's files, and manifest.json with the SHA-256 of each
    OUT/checkpoints/latest           a symbolic link to the newest

State is global: keys are the model's own names (optimizer state: optim.exp_avg.<name>), values whole tensors of which each rank
writes and reads its part; so a checkpoint does not depend on the plan. A checkpoint is written under another name, its manifest
last, and renamed into place: torch's format has no checksums (a flipped bit loads silently), and a directory that is written
over and then cut off is lost. One that stands where a new one is to go is moved aside, not deleted.

    RunError MLM0743   there is no whole checkpoint
             MLM0744   a checkpoint is damaged
             MLM0745   a checkpoint is of another model
             MLM0746   a checkpoint cannot be written
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter, SavePlanner

from mlmdsl.diagnostics import Diagnostic, RunError
from mlmdsl.runtime.parallel import public_name

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class FileFacts:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What makes a checkpoint whole. `facts`: of the run, for resuming."""

    step: int
    files: dict[str, FileFacts]
    facts: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


def read_manifest(folder: Path) -> Manifest:
    """Raises OSError or ValueError."""
    try:
        raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return Manifest(**{**raw, "files": {name: FileFacts(**facts) for name, facts in raw["files"].items()}})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is not a manifest") from error


# ---- finding --------------------------------------------------------------------------------------------------------


def latest(out: Path) -> Path | None:
    """The newest checkpoint of a run whose files are all there in full. Contents are checked when it is read."""
    return next((folder for folder in newest_first(out) if not _incomplete(folder)), None)


def newest_first(out: Path) -> list[Path]:
    """All published checkpoints of a run; or `out` itself where it is a checkpoint."""
    if (out / MANIFEST).exists():
        return [out]
    return sorted((f for f in (out / "checkpoints").glob("step-*") if f.name[5:].isdigit()), reverse=True)


def newest_whole(out: Path) -> Path:
    """The checkpoint to go on from, the same on every rank; damaged ones are passed over with a message.

    `out`: a run's folder, or a checkpoint. The ranks share the work of checking. Raises RunError."""
    candidates = newest_first(out)
    for folder in _agreed(candidates):
        problem = damage(folder, _rank(), _world())
        problems = [p for p in _everyones(problem) if p]
        if not problems:
            return folder
        if folder == out:
            _fail("MLM0744", f"the checkpoint {folder} is damaged: {problems[0]}", "resume from another one")
        if _rank() == 0:
            print(f"the checkpoint {folder} is damaged ({problems[0]}): trying an older one", file=sys.stderr)
    _fail("MLM0743", f"{out} has no whole checkpoint to go on from", "start again without --resume")


def damage(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint, None if nothing. Checks one in `shares` of the files' contents."""
    if problem := _incomplete(folder):
        return problem
    files = sorted(read_manifest(folder).files.items())
    for name, facts in files[share::shares]:
        try:
            if _sha256(folder / name) != facts.sha256:
                return f"{name} does not have the contents that were written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
    return None


def _incomplete(folder: Path) -> str | None:
    try:
        manifest = read_manifest(folder)
        if manifest.format != FORMAT:
            return f"it has format {manifest.format}, this version of the runtime reads {FORMAT}"
        for name, facts in manifest.files.items():
            if (size := (folder / name).stat().st_size) != facts.bytes:
                return f"{name} has {size:,} bytes instead of {facts.bytes:,}"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror or error}"
    except ValueError as error:
        return str(error)
    return None


# ---- writing --------------------------------------------------------------------------------------------------------


def save(
    out: Path, step: int, state: Mapping[str, Tensor], facts: Mapping[str, Any], planner: SavePlanner | None = None
) -> Path:
    """Writes and publishes a checkpoint; every rank calls it with its part of the state, or with a `planner` that knows it.
    Raises RunError."""
    folder = out / "checkpoints" / f"step-{step:08d}"
    part = folder.with_name(f".{folder.name}.part")
    with _writing(folder):
        if _rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        _barrier()
        writer = FileSystemWriter(part, single_file_per_rank=True, sync_files=True)
        with _alone():
            dcp.save(dict(state), storage_writer=writer, planner=planner, no_dist=_world() == 1)
        written = _everyones({path.name: _facts(path) for path in _own_files(part)})
        if _rank() == 0:
            files = {name: found for files in written for name, found in files.items()}
            _publish(part, folder, Manifest(step, files, dict(facts)))
        _barrier()
    return folder


def _own_files(part: Path) -> list[Path]:
    """What this rank has written there: torch names data files after the rank."""
    return sorted(part.glob(f"__{_rank()}_*")) + ([part / ".metadata"] if _rank() == 0 else [])


def _publish(part: Path, folder: Path, manifest: Manifest) -> None:
    text = json.dumps({**asdict(manifest), "files": {n: asdict(f) for n, f in sorted(manifest.files.items())}}, indent=1)
    with (part / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    _sync(part)
    if folder.exists():
        folder.rename(next(n for i in range(1, 1 << 20) if not (n := folder.with_name(f"{folder.name}.old-{i}")).exists()))
    part.rename(folder)
    _sync(folder.parent)
    link = folder.with_name(".latest.part")
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name, target_is_directory=True)
    link.replace(folder.with_name("latest"))


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, CheckpointException) as error:  # the second is no Exception
        _fail("MLM0746", f"the checkpoint {folder} cannot be written: {_reason(error)}", "older checkpoints are as they were")


def _facts(path: Path) -> FileFacts:
    return FileFacts(path.stat().st_size, _sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Makes names in a folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- reading --------------------------------------------------------------------------------------------------------


def load(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Fills this rank's part of every tensor in `state`, in place. Raises RunError for a checkpoint of another model."""
    reader = FileSystemReader(folder)
    _fits(folder, reader, {name: tuple(tensor.shape) for name, tensor in state.items()})
    try:
        with _alone():
            dcp.load(dict(state), storage_reader=reader, no_dist=_world() == 1)
    except (OSError, CheckpointException) as error:
        _fail("MLM0744", f"the checkpoint {folder} cannot be read: {_reason(error)}")


def load_weights(module: nn.Module, folder: Path) -> None:
    """Fills the weights of a whole model in one process. Raises RunError."""
    if problem := damage(folder):
        _fail("MLM0744", f"the checkpoint {folder} is damaged: {problem}", "take an older one")
    load(folder, {public_name(path): parameter.data for path, parameter in module.named_parameters()})


def _fits(folder: Path, reader: FileSystemReader, wanted: Mapping[str, tuple[int, ...]]) -> None:
    stored = {name: tuple(getattr(facts, "size", ())) for name, facts in reader.read_metadata().state_dict_metadata.items()}
    for name, shape in wanted.items():
        if stored.get(name) != shape:
            found = f"has shape {stored[name]} there, {shape} here" if name in stored else "is not in it"
            _fail(
                "MLM0745", f"the checkpoint {folder} is of another model: {name} {found}", "resume with the spec it came from"
            )


def _reason(error: BaseException) -> str:
    """The first line that says something, of torch's report by rank or of an ordinary error."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# ---- ranks ----------------------------------------------------------------------------------------------------------


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """torch warns a process that has no others, also when it is told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _barrier() -> None:
    if _world() > 1:
        dist.barrier()


def _everyones(value: Any) -> list[Any]:
    """What every rank says."""
    if _world() == 1:
        return [value]
    found: list[Any] = [None] * _world()
    dist.all_gather_object(found, value)
    return found


def _agreed(value: list[Path]) -> list[Path]:
    """What rank 0 says."""
    if _world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _fail(code: str, message: str, help: str = "") -> NoReturn:
    raise RunError([Diagnostic(code, message, help=help)])
