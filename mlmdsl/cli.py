"""The command line: `mlmdsl check | plan | verify | validate | run | generate | import | export | probe | fmt`.

    exit status   0 ok   1 the spec is wrong, or a plan is not kept   2 usage   3 no plan fits   4 the run failed

Only `verify`, `run`, `generate`, `import`, `export` and `probe` load torch; everything before them is planning and starts in a
fraction of a second.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mlmdsl.arguments import parser
from mlmdsl.diagnostics import Diagnostic, MlmError, UsageError

if TYPE_CHECKING:
    from mlmdsl.compile import Compilation, Pass
    from mlmdsl.grammar.spec import Cluster
    from mlmdsl.planner.plan import Plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Problems of the user's are rendered, never raised."""
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "check": _check,
        "plan": _plan,
        "verify": _verify,
        "validate": _validate,
        "run": _run,
        "generate": _generate,
        "import": _import,
        "export": _export,
        "probe": _probe,
        "fmt": _fmt,
    }
    options = parser(commands).parse_args(arguments)
    try:
        return int(options.command(options))
    except MlmError as problem:
        _show(problem.diagnostics, problem.sources, getattr(options, "format", "text"))
        return problem.exit_status
    except BrokenPipeError:  # `mlmdsl plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


# ---- commands -------------------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> int:
    done = _compile(options, "graph")
    assert done.graph is not None
    if options.format != "text" or done.diagnostics:
        _show(done.diagnostics, done.sources, options.format)
    if options.format == "text":
        print(f"{options.spec}: ok ({done.graph.model}, {done.graph.parameters:,} parameters)")
    return 0


def _plan(options: argparse.Namespace) -> int:
    until: Pass = options.emit or "plan"
    done = _compile(options, until)
    _show(done.diagnostics, done.sources, "text")
    if until != "plan":
        print(_emitted(done, until), end="")
        return 0
    assert done.plan is not None
    plan = replace(done.plan, spec=_relative(options.spec, Path(options.output).parent if options.output else Path()))
    if options.output:
        Path(options.output).write_text(plan.saved().to_json(), encoding="utf-8")
    from mlmdsl.explained import explain

    explained = explain(done, options.why, options.what_if, options.within)
    if options.json or options.emit == "plan":
        print(explained.to_json(plan), end="")
        return 0
    from mlmdsl.report.terminal import render_plan

    look: Any = {"color": _color(sys.stdout), "width": _width()}
    print("\n\n".join([render_plan(plan, **look), *explained.render(plan, **look)]))
    return 0


def _run(options: argparse.Namespace) -> int:
    done = _compile_to_run(options)
    plan, program, spec = done.plan, done.program, done.spec
    assert plan is not None and program is not None and spec is not None
    _show(done.diagnostics, done.sources, "text")
    if options.procs is None and plan.cluster.nodes == 1:
        _check_gpus(spec.cluster)
    from mlmdsl.report.terminal import render_summary

    out = _out(options, plan.model.name)
    print(f"{render_summary(plan, color=_color(sys.stdout))}\neverything goes to {out}", flush=True)
    _make_room(out, program.files, resuming=options.resume is not None)
    program.write(out)
    if plan.cluster.nodes > 1:
        raise _several_nodes(plan, out)
    from mlmdsl.runtime.launch import launch

    return launch(out / "program.py", plan.plan.world_size, _program_arguments(options, out), out / "logs")


def _compile_to_run(options: argparse.Namespace) -> Compilation:
    """From a spec, or from a saved plan and the spec it names."""
    if not options.spec.endswith(".json"):
        return _compile(options, "program")
    if options.set or options.pin or options.procs or options.here:
        raise _usage("a saved plan is run as it is: --set, --pin, --procs and --here belong to `mlmdsl plan`")
    from mlmdsl.compile import compile_spec
    from mlmdsl.planner.plan import load_plan

    plan = load_plan(_read(options.spec), options.spec)
    path = str(Path(options.spec).parent / plan.spec)
    return compile_spec(_read(path), path=path, overrides=plan.overrides, folder=plan.folder, plan=plan)


def _verify(options: argparse.Namespace) -> int:
    """The program beside the plan, or the one that the plan and its spec make."""
    from mlmdsl.compile import compile_spec
    from mlmdsl.planner.plan import load_plan
    from mlmdsl.planner.promise import compare

    path = Path(options.plan) / "plan.json" if Path(options.plan).is_dir() else Path(options.plan)
    plan = load_plan(_read(str(path)), str(path))
    if not 0 <= options.rank < plan.plan.world_size:
        raise _usage(f"--rank {options.rank}: the plan has ranks 0 to {plan.plan.world_size - 1:,}")
    if not plan.flops:
        raise _usage(f"{path} does not say how much each rank computes", "make it again: mlmdsl plan SPEC -o PLAN")
    spec = str(path.parent / plan.spec)
    done = compile_spec(_read(spec), path=spec, overrides=plan.overrides, folder=plan.folder, plan=plan)
    assert done.program is not None and done.spec is not None
    from mlmdsl.runtime.verify import measure

    with tempfile.TemporaryDirectory(prefix="mlmdsl-") as folder:
        done.program.write(Path(folder))
        beside = path.parent / "program.py"
        program = beside if beside.exists() else Path(folder) / "program.py"
        verdict = compare(plan, options.rank, measure(program, options.rank, done.spec.cluster.pools[0].device.kind))
    if options.json:
        from mlmdsl.serialization import to_json

        print(to_json(verdict))
    else:
        from mlmdsl.report.verdict import render_verdict

        print(render_verdict(verdict))
    return int(not verdict.agrees)


def _validate(options: argparse.Namespace) -> int:
    from mlmdsl.validation.judge import validate
    from mlmdsl.validation.runs import Problem

    try:
        found = validate(_read(options.runs))
    except Problem as problem:
        raise _usage(f"{options.runs}: {problem}") from None
    if options.json:
        from mlmdsl.serialization import to_json

        print(to_json(found))
    else:
        from mlmdsl.report.validated import render_validation

        print(render_validation(found))
    return 0


def _check_gpus(cluster: Cluster) -> None:
    """Whether this machine has what the plan is for; with --procs a user has chosen to run on what there is."""
    device = cluster.pools[0].device
    if device.kind == "cpu":
        return
    from mlmdsl.runtime.launch import gpus

    found = gpus()
    if found < cluster.world_size:
        here = f"{found} GPU{'s' * (found != 1)}" if found else "no GPU"
        help = "take the GPUs of this machine with --here, or train on N processes of its CPU with --procs N"
        raise _usage(f"the plan is for {cluster.world_size} x {device.name}, and this machine has {here}", help, "MLM0752")


def _several_nodes(plan: Plan, out: Path) -> UsageError:
    cluster = plan.cluster
    start = f"torchrun --nnodes {cluster.nodes} --nproc-per-node {cluster.devices_per_node}"
    start = f"{start} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
    if cluster.pools:  # a rendezvous would number the nodes by their names
        start = f"torchrun {cluster.torchrun}"
    command = f"{start} {out / 'program.py'} --out {out}"
    message = f"the plan is for {cluster.nodes:,} nodes, and `mlmdsl run` starts the processes of one machine"
    help = f"the program is written: on every node start {command}, in a folder that all nodes share; or plan for this machine"
    return _usage(message, help + " with --here", "MLM0753")


def _program_arguments(options: argparse.Namespace, out: Path) -> list[str]:
    """What `program.py` is started with."""
    arguments = ["--out", str(out)]
    if options.steps is not None:
        arguments += ["--steps", str(options.steps)]
    if options.resume is not None:
        arguments += ["--resume", *([options.resume] if options.resume else [])]
    return arguments + (["--profile"] if options.profile else [])


def _generate(options: argparse.Namespace) -> int:
    from mlmdsl.codegen.emit import emit
    from mlmdsl.compile import ALONE, compile_spec
    from mlmdsl.planner.plan import load_plan
    from mlmdsl.planner.search import single_device

    run = Path(options.run) if options.run else _newest_run()
    if not (run / "plan.json").exists():
        raise _usage(f"{run} is no run: it has no plan.json", "name the folder that `mlmdsl run --out` wrote")
    path = str(run / "spec.mlm")
    plan = load_plan(_read(str(run / "plan.json")), str(run / "plan.json"))
    done = compile_spec(_read(path), path=path, overrides=(*plan.overrides, ALONE), folder=plan.folder, until="graph")
    assert done.spec is not None and done.graph is not None
    from mlmdsl.runtime.generate import generate

    with tempfile.TemporaryDirectory(prefix="mlmdsl-") as folder:
        emit(done.spec, done.graph, single_device(done.spec, done.graph)).write(Path(folder))
        return generate(
            Path(folder) / "program.py",
            run,
            prompt=options.prompt,
            tokens=options.tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            checkpoint=Path(options.checkpoint) if options.checkpoint else None,
        )


def _import(options: argparse.Namespace) -> int:
    from mlmdsl.huggingface.importing import import_checkpoint

    if options.procs < 1:
        raise _usage(f"--procs {options.procs}: there must be one process at least")
    if options.set and options.spec is None:
        raise _usage("--set belongs to a SPEC: without one, the spec is written from config.json")
    folder = Path(options.folder)
    out = _out(options, folder.resolve().name)
    spec = (options.spec, _read(options.spec)) if options.spec else None
    done = import_checkpoint(folder, out, spec, options.set, options.procs)
    _show(done.warnings, {}, "text")
    print(f"{done.model}  {done.parameters:,} parameters from {done.tensors:,} weights ({done.family}), in {out}")
    print(f"sample from it:  mlmdsl generate {out} --prompt TEXT")
    print(f"train on it:     mlmdsl run {options.spec or out / 'spec.mlm'} --out {out} --resume")
    return 0


def _export(options: argparse.Namespace) -> int:
    from mlmdsl.huggingface.exporting import export_checkpoint

    done = export_checkpoint(Path(options.run), Path(options.out), options.dtype, options.shard_size, options.family)
    files = f"{done.files} file{'s' * (done.files != 1)}"
    print(f"{done.checkpoint}: {done.parameters:,} parameters as {done.family} in {done.out} ({files} of safetensors)")
    return 0


def _probe(options: argparse.Namespace) -> int:
    from mlmdsl.probing import probe

    out = Path(options.out)
    if out.exists() and not options.force:
        raise _usage(f"{out} is there already", "name another file with --out, or overwrite it with --force")
    if options.ranks is not None and options.ranks < 1:
        raise _usage(f"--ranks {options.ranks}: there must be one at least")
    text, lines = probe(options.ranks, measured=_read(options.measured) if options.measured else None)
    out.write_text(text, encoding="utf-8")
    print("\n".join(lines))
    print(f'written to {out}; in a spec:  import "{out.name}" as here   and   cluster mine from here.machine {{ }}')
    return 0


def _fmt(options: argparse.Namespace) -> int:
    changed = [name for name in options.specs if _format_one(name, options.check)]
    return int(bool(changed) and options.check)


def _format_one(name: str, check: bool) -> bool:
    """Rewrites `name` in the canonical form, or only says so; whether it differed."""
    from mlmdsl.diagnostics import Diagnostics
    from mlmdsl.grammar.format import format_file
    from mlmdsl.grammar.parser import parse

    found, text = Diagnostics(), _read(name)
    tree = parse(text, name, found)
    found.raise_if_errors()
    formatted = format_file(tree)
    if formatted == text:
        return False
    if check:
        print(f"{name}: would be reformatted")
    else:
        Path(name).write_text(formatted, encoding="utf-8")
        print(f"{name}: reformatted")
    return True


# ---- what they share ------------------------------------------------------------------------------------------------


def _compile(options: argparse.Namespace, until: Pass) -> Compilation:
    with _uncollected():
        from mlmdsl.compile import compile_spec

        overrides = [*_machine(options), *options.set]
        return compile_spec(_read(options.spec), path=options.spec, overrides=overrides, pins=options.pin, until=until)


@contextmanager
def _uncollected() -> Generator[None]:
    """Modules and what a compiler makes are no garbage: a fifth of a short command's time would go to looking."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


def _machine(options: argparse.Namespace) -> list[str]:
    """The overrides that --procs and --here stand for."""
    if options.procs is not None:
        if options.procs < 1:
            raise _usage(f"--procs {options.procs}: there must be one process at least")
        return ["cluster.nodes=1", f"cluster.devices_per_node={options.procs}"]
    if not options.here:
        return []
    from mlmdsl.local import local_gpus

    return local_gpus()


def _read(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise _usage(f"{name} is not UTF-8 text (byte {problem.start})") from None
    except OSError as problem:
        raise _usage(f"cannot read {name}: {problem.strerror}") from None


def _usage(message: str, help: str = "", code: str = "MLM0750") -> UsageError:
    return UsageError([Diagnostic(code, message, help=help)])


def _show(diagnostics: Sequence[Diagnostic], sources: Mapping[str, str], format: str) -> None:
    """Text goes to standard error; JSON and SARIF are what was asked for, to standard output, an empty list included."""
    from mlmdsl.rendering import render

    stream = sys.stderr if format == "text" else sys.stdout
    text = render(diagnostics, sources, format=format, color=format == "text" and _color(stream))
    if text:
        print(text, file=stream)


def _emitted(done: Compilation, until: Pass) -> str:
    """One pass's value as text: the program as it is, the others as JSON."""
    from mlmdsl.report.emitted import graph_json, spec_json, syntax_json

    if until == "program":
        assert done.program is not None
        return done.program.files["program.py"]
    if until == "syntax":
        assert done.syntax is not None
        return syntax_json(done.syntax)
    assert done.spec is not None and done.graph is not None
    return spec_json(done.spec) if until == "spec" else graph_json(done.graph)


def _relative(spec: str, folder: Path) -> str:
    return os.path.relpath(Path(spec).resolve(), folder.resolve())


def _out(options: argparse.Namespace, name: str) -> Path:
    """The folder that --out names, or a new one of this moment."""
    return Path(options.out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")


def _make_room(out: Path, files: Mapping[str, str], resuming: bool) -> None:
    """A run never overwrites another; a resumed one keeps what it replaces by something else."""
    if not out.exists():
        return
    if not resuming and any(out.iterdir()):
        raise _usage(f"{out} already holds a run", "continue it with --resume, or name another folder with --out")
    for name, text in files.items():
        path = out / name
        if path.exists() and path.read_bytes() != text.encode():
            shutil.copy2(path, _free_name(out, name))


def _free_name(out: Path, name: str) -> Path:
    stem, _, suffix = name.partition(".")
    number = 1
    while (path := out / "before" / f"{stem}.{number}.{suffix}").exists():
        number += 1
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _newest_run() -> Path:
    runs = sorted(Path("runs").glob("*/plan.json"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise _usage("no run to sample from under runs/", "train one first: mlmdsl run SPEC")
    return runs[-1].parent


def _color(stream: TextIO) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def _width() -> int:
    return min(shutil.get_terminal_size((80, 24)).columns, 120) if sys.stdout.isatty() else 80
