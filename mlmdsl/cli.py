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
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mlmdsl import __version__
from mlmdsl.diagnostics import Diagnostic, MlmError, UsageError

if TYPE_CHECKING:
    from mlmdsl.compile import Compilation, Pass
    from mlmdsl.grammar.spec import Cluster
    from mlmdsl.planner.plan import Plan

FORMATS = ("text", "json", "sarif")
PASSES = ("syntax", "spec", "graph", "plan", "program")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Problems of the user's are rendered, never raised."""
    options = _parser().parse_args(arguments)
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
    plan = done.plan.model_copy(
        update={"spec": _relative(options.spec, Path(options.output).parent if options.output else Path())}
    )
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

    out = Path(options.out or Path("runs") / f"{plan.model.name}-{datetime.now():%Y%m%d-%H%M%S}")
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
        print(verdict.model_dump_json(indent=1))
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
        print(found.model_dump_json(indent=1))
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
    out = Path(options.out or Path("runs") / f"{folder.resolve().name}-{datetime.now():%Y%m%d-%H%M%S}")
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


def _bytes(text: str) -> int:
    """`5 GB`, `500MiB`."""
    from mlmdsl.units import quantity

    number = text.rstrip("BGKMTi ")
    try:
        found = quantity(float(number), text[len(number) :].strip())
    except ValueError:
        found = None
    if found is None or found.dimension != "bytes" or found.value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 5GB, or 500MiB")
    return int(found.value)


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


# ---- the parser -----------------------------------------------------------------------------------------------------

_TOP = """\
describe a transformer and a cluster; preview the partitioning; train

  mlmdsl check gpt.mlm                        every mistake of the text, in one go
  mlmdsl plan gpt.mlm                         how it would be split over the cluster, and why
  mlmdsl plan gpt.mlm --pin tensor=4          the same with your own choice of a degree
  mlmdsl verify gpt.plan.json --rank 3        one rank's step, without devices, beside what the plan says
  mlmdsl validate runs.csv                    measured runs beside their predictions
  mlmdsl run gpt.mlm --out runs/gpt           train; runs/gpt/program.py is the program, readable
  mlmdsl run gpt.mlm --out runs/gpt --resume  go on from the last whole checkpoint
  mlmdsl generate runs/gpt --prompt "Once"    sample from what was trained
  mlmdsl import DIR --out runs/llama          a checkpoint of transformers, to train on or sample from
  mlmdsl export runs/gpt --out DIR            what was trained, for transformers to load
"""

_STATUS = "exit status: 0 ok, 1 the spec is wrong, 2 usage, 3 no plan fits, 4 the run failed"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "mlmdsl", description=_TOP, epilog=_STATUS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"mlmdsl {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_check(commands)
    _add_plan(commands)
    _add_verify(commands)
    _add_validate(commands)
    _add_run(commands)
    _add_generate(commands)
    _add_import(commands)
    _add_export(commands)
    _add_probe(commands)
    _add_fmt(commands)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], help: str, text: str
) -> argparse.ArgumentParser:
    """One sub-command; its description teaches by example."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=text, epilog=_STATUS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(command=run)
    return parser


def _add_spec(parser: argparse.ArgumentParser, what: str = "the .mlm file") -> None:
    parser.add_argument("spec", metavar="SPEC", help=what)
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="override a param or setting: gpt2.d=1024"
    )
    parser.add_argument("--pin", action="append", default=[], metavar="NAME=VALUE", help="fix a plan variable: tensor=4")
    machine = parser.add_mutually_exclusive_group()
    machine.add_argument("--procs", type=int, metavar="N", help="take one node with N processes for the cluster")
    machine.add_argument("--here", action="store_true", help="take this machine's GPUs for the cluster, where it has some")


_CHECK = """\
Read the spec and report every mistake in it: syntax, names, units, shapes, divisibility, contradictions.

  mlmdsl check gpt.mlm
  mlmdsl check gpt.mlm --format sarif > gpt.sarif
"""

_PLAN = """\
Choose how to split the model over the cluster, and show the choice: mesh, step time and its parts, memory by stage,
links, cost, the runners-up and what was rejected. Nothing is started, and no GPU is needed.

  mlmdsl plan gpt.mlm
  mlmdsl plan gpt.mlm --pin tensor=4 --pin pipeline=2
  mlmdsl plan gpt.mlm --why tensor=4          what that choice would cost, and why it was not taken
  mlmdsl plan gpt.mlm --what-if               with faster links, more nodes, without each constraint
  mlmdsl plan gpt.mlm --within "30 days"      the cheapest cluster that ends in time: nodes, price, energy, CO2
  mlmdsl plan gpt.mlm --set train.batch="1024 seq" --json
  mlmdsl plan gpt.mlm -o gpt.plan.json && mlmdsl run gpt.plan.json
  mlmdsl plan gpt.mlm --emit program          the program that would run
"""

_VERIFY = """\
Build one rank of the plan's program without its devices and take a step: every collective (kind, group, bytes, count) and the
FLOPs of matrix products are to be those of the plan, the peak of memory within 5 % of the ledger. Exit status 1 where not.

  mlmdsl verify runs/gpt/plan.json --rank 3
  mlmdsl verify llama.plan.json --rank 16383 --json
"""

_VALIDATE = """\
Predict every run of a table of measured ones, a run a row: step time and peak memory, measured and predicted, and the error,
summed up by source. Columns: docs/validate.md. A row that cannot be predicted is listed with its reason.

  mlmdsl validate runs.csv
  mlmdsl validate runs.csv --json
"""

_RUN = """\
Plan, write the program, and train with one process per device. OUT then holds program.py, plan.json, spec.mlm,
metrics.jsonl, checkpoints/ and logs/ (TensorBoard too: tensorboard --logdir OUT).

  mlmdsl run gpt.mlm --out runs/gpt
  mlmdsl run gpt.mlm --out runs/gpt --resume              under any plan: checkpoints do not depend on it
  mlmdsl run gpt.mlm --here --steps 20 --profile
"""

_GENERATE = """\
Sample text from a run's newest whole checkpoint, in this process.

  mlmdsl generate                                         the newest run under runs/
  mlmdsl generate runs/gpt --prompt "Once upon a time" --tokens 200 --temperature 0.8

A run of next_token() goes on from the prompt, one of chat() answers it as the user's message and ends with the turn, an encoder
and decoder tell its target: of seq2seq() the translation, say, of span_corruption() what is missing at <extra_id_0> and so on.
"""

_IMPORT = """\
Make a run of step 0 out of a checkpoint of transformers: a folder with config.json and safetensors, in one file or many. OUT
then holds a spec, the tokenizer and the weights; `generate` samples from it, `run --resume` trains on from it under any plan.

  mlmdsl import ~/models/Llama-3.1-8B --out runs/llama    the spec is written from config.json
  mlmdsl import ~/models/gpt2 gpt.mlm --out runs/gpt      for a spec of your own that computes the same, under its names
  mlmdsl import ~/models/Llama-3.1-70B --procs 8          eight processes share the work
"""

_EXPORT = """\
Write a run's newest whole checkpoint, or the named one, as a folder that transformers' AutoModel classes load.

  mlmdsl export runs/gpt --out exported
  mlmdsl export runs/gpt/checkpoints/step-00000400 --out exported --dtype bf16 --shard-size 2GB
"""

_PROBE = """\
Measure this machine, all its ranks at once: matrix products, attention, memory, the optimizer and launches, and collectives
over the links. What comes out is a file with a device and a cluster that specs import; planning with it is planning for this
machine.

  mlmdsl probe                                            every GPU, or one rank on each core, into machine.mlm
  mlmdsl probe --ranks 4 --out four.mlm --force
"""

_FMT = """\
Rewrite specs in the one canonical layout; comments stay.

  mlmdsl fmt specs/*.mlm
  mlmdsl fmt --check specs/*.mlm
"""


def _add_check(commands: Any) -> None:
    parser = _command(commands, "check", _check, "report every mistake of a spec", _CHECK)
    _add_spec(parser)
    parser.add_argument("--format", choices=FORMATS, default="text", help="how to print the diagnostics")


def _add_plan(commands: Any) -> None:
    parser = _command(commands, "plan", _plan, "preview the partitioning", _PLAN)
    _add_spec(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--why", action="append", default=[], metavar="NAME=VALUE", help="the best plan with this choice beside the chosen one"
    )
    parser.add_argument("--what-if", action="store_true", help="the best plan with faster links, more nodes, no constraints")
    parser.add_argument("--within", metavar="TIME", help='the cheapest cluster that ends in time: "30 days"')
    parser.add_argument("--emit", choices=PASSES, help="stop after this pass and print what it made")
    parser.add_argument("-o", "--output", metavar="FILE", help="save the plan, for `mlmdsl run FILE`")


def _add_verify(commands: Any) -> None:
    parser = _command(commands, "verify", _verify, "hold a plan's program to the plan", _VERIFY)
    parser.add_argument("plan", metavar="PLAN", help="a saved plan (.json), or the folder of a run")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="which rank of the plan's world (default 0)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _add_validate(commands: Any) -> None:
    parser = _command(commands, "validate", _validate, "hold predictions to measured runs", _VALIDATE)
    parser.add_argument("runs", metavar="CSV", help="a table of measured runs")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _add_run(commands: Any) -> None:
    parser = _command(commands, "run", _run, "train", _RUN)
    _add_spec(parser, "the .mlm file, or a saved plan (.json)")
    parser.add_argument("--out", metavar="DIR", help="where everything goes (default runs/<model>-<time>)")
    parser.add_argument("--steps", type=int, metavar="N", help="stop after N steps in all")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
        help="go on from OUT's newest whole checkpoint, or from the one named",
    )
    parser.add_argument("--profile", action="store_true", help="write traces of a few steps for TensorBoard's profiler page")


def _add_generate(commands: Any) -> None:
    parser = _command(commands, "generate", _generate, "sample text from a run", _GENERATE)
    parser.add_argument("run", metavar="RUN", nargs="?", help="the run's folder (default: the newest under runs/)")
    parser.add_argument("--prompt", default="", help="text to go on from, message to answer, or source of an encoder")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="how many tokens to sample")
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token (default: 0.8, behind an encoder 0)")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample among the likeliest that make up probability P")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", metavar="DIR", help="another than the newest whole one")


def _add_import(commands: Any) -> None:
    parser = _command(commands, "import", _import, "read a checkpoint of transformers", _IMPORT)
    parser.add_argument("folder", metavar="DIR", help="the checkpoint's folder: config.json and *.safetensors")
    parser.add_argument("spec", metavar="SPEC", nargs="?", help="the .mlm file it is for (default: one is written)")
    parser.add_argument("--out", metavar="RUN", help="a new folder (default runs/<DIR>-<time>)")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a param or setting of SPEC")
    parser.add_argument("--procs", type=int, default=1, metavar="N", help="share the work among N processes")


def _add_export(commands: Any) -> None:
    parser = _command(commands, "export", _export, "write a checkpoint for transformers", _EXPORT)
    parser.add_argument("run", metavar="RUN", help="the run's folder, or one of its checkpoints")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of the weights (default: the spec's precision)")
    parser.add_argument("--shard-size", type=_bytes, default="5GB", metavar="SIZE", help="most of one file (default 5GB)")
    parser.add_argument("--family", metavar="NAME", help="the family to write it as, where several fit")


def _add_fmt(commands: Any) -> None:
    parser = _command(commands, "fmt", _fmt, "rewrite specs in the canonical layout", _FMT)
    parser.add_argument("specs", metavar="SPEC", nargs="+")
    parser.add_argument("--check", action="store_true", help="only say which files differ; exit status 1 if any does")


def _add_probe(commands: Any) -> None:
    parser = _command(commands, "probe", _probe, "measure this machine's kernels, links and memory", _PROBE)
    parser.add_argument("--out", default="machine.mlm", metavar="FILE", help="what to write (default machine.mlm)")
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks at once (default: the GPUs, or the cores)")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.add_argument("--measured", metavar="JSON", help="what torchrun -m mlmdsl.runtime.probe measured on several nodes")
