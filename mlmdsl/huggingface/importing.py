"""`mlmdsl import`: a checkpoint of transformers becomes a run of step 0, in a folder of its own.

Everything that can be wrong is found before a value is read: config.json, the spec, names and shapes. The folder is written
under another name and put in place at the end.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import shutil
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlmdsl.codegen.emit import Program, emit
from mlmdsl.compile import ALONE, Compilation, compile_spec
from mlmdsl.diagnostics import Diagnostic, SpecError
from mlmdsl.graph.graph import Graph
from mlmdsl.huggingface.config import CONFIG, Config, Recognised, fail, params_of, read_config, recognised_as
from mlmdsl.huggingface.expressions import literal
from mlmdsl.huggingface.families import common
from mlmdsl.huggingface.files import checked, tensors
from mlmdsl.huggingface.layouts import exchange
from mlmdsl.huggingface.match import Difference, match
from mlmdsl.planner.search import single_device

LONGEST_SEQUENCE = 2048  # of the spec that an import writes: activations of more do not fit everywhere
_WORKER = "from mlmdsl.runtime.exchange import main\n\nmain()\n"


@dataclass(frozen=True)
class Imported:
    out: Path
    model: str
    family: str
    parameters: int
    tensors: int
    warnings: tuple[Diagnostic, ...]


def import_checkpoint(
    folder: Path, out: Path, spec: tuple[str, str] | None, overrides: Sequence[str] = (), procs: int = 1
) -> Imported:
    """Imports `folder` into the new folder `out`. `spec`: path and text of the spec that it is for; None: one is written from
    config.json. Raises RunError, or SpecError where the spec describes another model."""
    config = read_config(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        fail("MLM0812", f"{out} is there already", "name another folder with --out")
    reference = config.graph()
    compiled = _compiled(config, out, spec, overrides)
    assert compiled.graph is not None and compiled.spec is not None
    found = _matched(config, reference, compiled, compiled.graph)
    wanted = exchange(found, compiled.graph)
    theirs = checked(tensors(folder), wanted, config.family.base)
    program = emit(compiled.spec, compiled.graph, single_device(compiled.spec, compiled.graph))
    from mlmdsl.runtime.exchange import Import

    facts = {"weights_only": True, "model_type": config.raw["model_type"]}
    with placed(out) as part:
        _write(part, program, folder)
        _read(Import(str(part), wanted.pieces, wanted.ours, theirs, facts), procs)
    return Imported(out, compiled.graph.model, config.family.name, compiled.graph.parameters, len(theirs), config.warnings)


# ---- the spec -------------------------------------------------------------------------------------------------------


def _compiled(config: Config, out: Path, spec: tuple[str, str] | None, overrides: Sequence[str]) -> Compilation:
    path, text = spec or (str(out / "spec.mlm"), spec_text(config))
    return compile_spec(text, path=path, overrides=(*overrides, ALONE), until="graph")


def spec_text(config: Config) -> str:
    """The family's model with the checkpoint's sizes, ready to be trained on."""
    text = config.family.with_params(config.params)
    sequence = min(config.sequence, LONGEST_SEQUENCE)
    text = re.sub(r"(?<=^  seq_len = )\S+(?= tok$)", str(sequence), text, flags=re.M)
    precision = "bf16" if config.dtype in ("bfloat16", "float16") else "fp32"
    return re.sub(r"(?<=^  precision = )\w+$", precision, text, flags=re.M)


def _matched(config: Config, reference: Graph, compiled: Compilation, graph: Graph) -> Recognised:
    """The checkpoint's model and the spec's, found to be the same."""
    params = config.params
    try:
        if any(name not in params for name in config.family.model):  # how a model is trained stands in no config.json
            params = {**params, **params_of(config.family, params, match(reference, graph, loosely=True), graph)}
            reference = config.family.graph(params)
        return Recognised(config.family, params, reference, match(reference, graph))
    except Difference as difference:
        node = difference.node
        problem = Diagnostic(
            "MLM0810",
            f"the spec's model is not the one that the checkpoint's {CONFIG} describes: {difference.message}",
            span=node.span if node else None,
            label="another one in the checkpoint",
            help=f"{_other_params(config, graph)}leave SPEC out, and one that fits is written",
        )
        raise SpecError([problem], compiled.sources) from None


def _other_params(config: Config, graph: Graph) -> str:
    """What would have to change, where the two are of one family."""
    found = recognised_as(config.family, graph)
    if isinstance(found, Difference):
        return ""
    other = [f"{name} = {literal(value)}" for name, value in sorted(config.params.items()) if found.params.get(name) != value]
    return f"the checkpoint has {', '.join(other)}; "


# ---- the folder -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def placed(out: Path) -> Generator[Path]:
    """A folder beside `out` that takes its place at the end, or is gone."""
    part = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        if out.exists():
            out.rmdir()
        part.rename(out)
    except OSError as error:
        fail("MLM0812", f"{out} cannot be written: {error.strerror or error}")
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(part: Path, program: Program, folder: Path) -> None:
    """What a run's folder has, and what belongs to the checkpoint beside its weights."""
    program.write(part)
    for name in (CONFIG, *common().files):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, part / name)


def _read(job: object, procs: int) -> None:
    """In this process, or on several that share the work."""
    from mlmdsl.runtime.exchange import Import, read
    from mlmdsl.runtime.launch import launch

    assert isinstance(job, Import)
    if procs == 1:
        read(job)
        return
    with tempfile.TemporaryDirectory(prefix="mlmdsl-import-") as temporary:
        worker, described = Path(temporary) / "worker.py", Path(temporary) / "job.pickle"
        worker.write_text(_WORKER, encoding="utf-8")
        described.write_bytes(pickle.dumps(job))
        launch(worker, procs, [str(described)], Path(temporary) / "logs")
