"""`mlmdsl export`: a run's checkpoint becomes a folder that transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

from mlmdsl.compile import ALONE, compile_spec
from mlmdsl.diagnostics import RunError
from mlmdsl.grammar.spec import Spec
from mlmdsl.huggingface.config import CONFIG, config_of, fail, recognise
from mlmdsl.huggingface.families import common
from mlmdsl.huggingface.files import BYTES, INDEX, ONE
from mlmdsl.huggingface.importing import placed
from mlmdsl.huggingface.layouts import Shape, exchange
from mlmdsl.planner.plan import load_plan

DTYPES = {"fp32": ("F32", "float32"), "bf16": ("BF16", "bfloat16")}


@dataclass(frozen=True)
class Exported:
    out: Path
    checkpoint: Path
    family: str
    parameters: int
    files: int


def export_checkpoint(source: Path, out: Path, dtype: str | None, shard_bytes: int, family: str | None) -> Exported:
    """Exports the newest whole checkpoint of the run `source`, or the checkpoint `source`, into the new folder `out`. `dtype`:
    fp32, bf16, or the precision of the spec (None). Raises RunError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        fail("MLM0812", f"{out} is there already", "name another folder with --out")
    run = _run_of(source)
    plan = load_plan((run / "plan.json").read_text(encoding="utf-8"), str(run / "plan.json"))
    path = run / "spec.mlm"
    done = compile_spec(
        path.read_text(encoding="utf-8"), path=str(path), overrides=(*plan.overrides, ALONE), folder=plan.folder, until="graph"
    )
    assert done.graph is not None and done.spec is not None
    homes = _homes(run, done.spec)
    before = _before(homes)
    try:
        found = recognise(done.graph, family, before.get("model_type"))
    except RunError as problem:
        raise RunError(problem.diagnostics, done.sources) from None
    wanted = exchange(found, done.graph)
    stored, written = DTYPES[dtype or done.spec.train.precision]
    files = _files(wanted.theirs, BYTES[stored], shard_bytes)
    from mlmdsl.runtime import checkpoint
    from mlmdsl.runtime.exchange import File, write

    folder = checkpoint.newest_whole(source)
    with placed(out) as part:
        _json(part / CONFIG, config_of(found, done.spec.train.seq_len, written, before))
        _copy(homes, done.spec, part)
        shards = [File(name, tuple(names)) for name, names in files.items()]
        write(part, folder, wanted.pieces, wanted.theirs, shards, stored)
        if len(files) > 1:
            _json(part / INDEX, _index(files, wanted.theirs, BYTES[stored]))
    return Exported(out, folder, found.family.name, done.graph.parameters, len(files))


def _run_of(source: Path) -> Path:
    """The run's folder, of itself or of one of its checkpoints."""
    for folder in (source, source.resolve().parent.parent):
        if (folder / "plan.json").is_file() and (folder / "spec.mlm").is_file():
            return folder
    help = "name the folder that `mlmdsl run --out` or `mlmdsl import --out` wrote, or one of its checkpoints"
    fail("MLM0814", f"{source} is no run: it has no plan.json and spec.mlm", help)


# ---- what stands beside the weights ---------------------------------------------------------------------------------


def _homes(run: Path, spec: Spec) -> list[Path]:
    """Where a tokenizer and its settings may lie: in the run, or beside the tokenizer that the spec names."""
    tokenizer = spec.train.tokenizer.path
    return [run, *([Path(tokenizer).parent] if tokenizer else [])]


def _before(homes: list[Path]) -> Mapping[str, Any]:
    """config.json of the checkpoint that the model came from, if it came from one."""
    for folder in homes:
        try:
            raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(raw, dict):
            return cast(dict[str, Any], raw)
    return {}


def _copy(homes: list[Path], spec: Spec, part: Path) -> None:
    for folder in reversed(homes):
        for name in common().files:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, part / name)
    tokenizer = spec.train.tokenizer.path
    if tokenizer and Path(tokenizer).is_file():
        shutil.copyfile(tokenizer, part / "tokenizer.json")


# ---- files ----------------------------------------------------------------------------------------------------------


def _files(theirs: Mapping[str, Shape], width: int, most: int) -> dict[str, list[str]]:
    """Names of tensors by file, in order, as many in each as `most` bytes hold."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(theirs, key=_by_number):
        bytes_ = prod(theirs[name]) * width
        if shards[-1] and size + bytes_ > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_
    return dict(zip(_names(len(shards)), shards, strict=True))


def _by_number(name: str) -> list[tuple[int, str]]:
    """Layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _names(count: int) -> Iterator[str]:
    if count == 1:
        yield ONE
        return
    for number in range(1, count + 1):
        yield f"model-{number:05d}-of-{count:05d}.safetensors"


def _index(files: Mapping[str, list[str]], theirs: Mapping[str, Shape], width: int) -> dict[str, Any]:
    total = sum(prod(shape) * width for shape in theirs.values())
    return {"metadata": {"total_size": total}, "weight_map": {name: file for file, names in files.items() for name in names}}


def _json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
