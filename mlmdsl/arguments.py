"""The words of the command line, and what each of them says about itself."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from mlmdsl import __version__

FORMATS = ("text", "json", "sarif")
PASSES = ("syntax", "spec", "graph", "plan", "program")

Run = Callable[[argparse.Namespace], int]  # what a command does; its exit status

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


def parser(run: Mapping[str, Run]) -> argparse.ArgumentParser:
    """`run`: what each command does."""
    made = argparse.ArgumentParser(
        "mlmdsl", description=_TOP, epilog=_STATUS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--version", action="version", version=f"mlmdsl {__version__}")
    commands = made.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_check(commands, run)
    _add_plan(commands, run)
    _add_verify(commands, run)
    _add_validate(commands, run)
    _add_run(commands, run)
    _add_generate(commands, run)
    _add_import(commands, run)
    _add_export(commands, run)
    _add_probe(commands, run)
    _add_fmt(commands, run)
    return made


def _command(commands: Any, name: str, run: Mapping[str, Run], help: str, text: str) -> argparse.ArgumentParser:
    """One sub-command; its description teaches by example."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=text, epilog=_STATUS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(command=run[name])
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


def _add_check(commands: Any, run: Mapping[str, Run]) -> None:
    parser = _command(commands, "check", run, "report every mistake of a spec", _CHECK)
    _add_spec(parser)
    parser.add_argument("--format", choices=FORMATS, default="text", help="how to print the diagnostics")


def _add_plan(commands: Any, run: Mapping[str, Run]) -> None:
    parser = _command(commands, "plan", run, "preview the partitioning", _PLAN)
    _add_spec(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--why", action="append", default=[], metavar="NAME=VALUE", help="the best plan with this choice beside the chosen one"
    )
    parser.add_argument("--what-if", action="store_true", help="the best plan with faster links, more nodes, no constraints")
    parser.add_argument("--within", metavar="TIME", help='the cheapest cluster that ends in time: "30 days"')
    parser.add_argument("--emit", choices=PASSES, help="stop after this pass and print what it made")
    parser.add_argument("-o", "--output", metavar="FILE", help="save the plan, for `mlmdsl run FILE`")


def _add_verify(commands: Any, run: Mapping[str, Run]) -> None:
    parser = _command(commands, "verify", run, "hold a plan's program to the plan", _VERIFY)
    parser.add_argument("plan", metavar="PLAN", help="a saved plan (.json), or the folder of a run")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="which rank of the plan's world (default 0)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _add_validate(commands: Any, run: Mapping[str, Run]) -> None:
    parser = _command(commands, "validate", run, "hold predictions to measured runs", _VALIDATE)
    parser.add_argument("runs", metavar="CSV", help="a table of measured runs")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _add_run(commands: Any, run: Mapping[str, Run]) -> None:
    parser = _command(commands, "run", run, "train", _RUN)
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


def _add_generate(commands: Any, run: Mapping[str, Run]) -> None:
    parser = _command(commands, "generate", run, "sample text from a run", _GENERATE)
    parser.add_argument("run", metavar="RUN", nargs="?", help="the run's folder (default: the newest under runs/)")
    parser.add_argument("--prompt", default="", help="text to go on from, message to answer, or source of an encoder")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="how many tokens to sample")
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token (default: 0.8, behind an encoder 0)")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample among the likeliest that make up probability P")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", metavar="DIR", help="another than the newest whole one")


def _add_import(commands: Any, run: Mapping[str, Run]) -> None:
    parser = _command(commands, "import", run, "read a checkpoint of transformers", _IMPORT)
    parser.add_argument("folder", metavar="DIR", help="the checkpoint's folder: config.json and *.safetensors")
    parser.add_argument("spec", metavar="SPEC", nargs="?", help="the .mlm file it is for (default: one is written)")
    parser.add_argument("--out", metavar="RUN", help="a new folder (default runs/<DIR>-<time>)")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a param or setting of SPEC")
    parser.add_argument("--procs", type=int, default=1, metavar="N", help="share the work among N processes")


def _add_export(commands: Any, run: Mapping[str, Run]) -> None:
    parser = _command(commands, "export", run, "write a checkpoint for transformers", _EXPORT)
    parser.add_argument("run", metavar="RUN", help="the run's folder, or one of its checkpoints")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of the weights (default: the spec's precision)")
    parser.add_argument("--shard-size", type=_bytes, default="5GB", metavar="SIZE", help="most of one file (default 5GB)")
    parser.add_argument("--family", metavar="NAME", help="the family to write it as, where several fit")


def _add_fmt(commands: Any, run: Mapping[str, Run]) -> None:
    parser = _command(commands, "fmt", run, "rewrite specs in the canonical layout", _FMT)
    parser.add_argument("specs", metavar="SPEC", nargs="+")
    parser.add_argument("--check", action="store_true", help="only say which files differ; exit status 1 if any does")


def _add_probe(commands: Any, run: Mapping[str, Run]) -> None:
    parser = _command(commands, "probe", run, "measure this machine's kernels, links and memory", _PROBE)
    parser.add_argument("--out", default="machine.mlm", metavar="FILE", help="what to write (default machine.mlm)")
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks at once (default: the GPUs, or the cores)")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.add_argument("--measured", metavar="JSON", help="what torchrun -m mlmdsl.runtime.probe measured on several nodes")


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
