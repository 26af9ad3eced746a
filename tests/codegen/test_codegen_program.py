"""Whole programs: golden files, form, and the plan's transitions in them."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mlmdsl.codegen.emit import emit
from mlmdsl.codegen.text import WIDTH
from mlmdsl.diagnostics import Diagnostics
from mlmdsl.grammar.constraints import ORDERS
from mlmdsl.grammar.resolve import resolve
from mlmdsl.grammar.spec import Spec
from mlmdsl.graph.graph import Graph
from mlmdsl.planner.plan import PlanVariables, RegionLayout
from tests.codegen.layouts import layout
from tests.codegen.samples import SETTINGS, TINY_GPT, TINY_LLAMA, UNPLEASANT, graph_of, plan, spec, two_stacks

COLLECTIVES = {"all_gather", "gather", "all_reduce", "copy_to", "all_reduce_both", "reduce_scatter", "split", "all_to_all"}

MODELS: dict[str, Callable[[], Graph]] = {
    "tiny_gpt": lambda: graph_of(TINY_GPT),
    "tiny_llama": lambda: graph_of(TINY_LLAMA),
    "two_stacks": two_stacks,
    "unpleasant": lambda: graph_of(UNPLEASANT),  # names that mean something in Python, torch or the program
}

PLANS: dict[str, tuple[str, PlanVariables]] = {
    "gpt_single": ("tiny_gpt", PlanVariables(stages=(4,))),
    "gpt_tensor2": ("tiny_gpt", PlanVariables(tensor=2, stages=(4,))),
    "gpt_tensor2_sequence": ("tiny_gpt", PlanVariables(tensor=2, sequence_parallel=True, stages=(4,))),
    "gpt_tensor2_pipeline2_data2": (
        "tiny_gpt",
        PlanVariables(
            tensor=2, sequence_parallel=True, pipeline=2, data=2, zero=1, micro_batch=2, stages=(1, 3), recompute="selective"
        ),
    ),
    "llama_single": ("tiny_llama", PlanVariables(stages=(5,))),
    "llama_tensor2_sequence": ("tiny_llama", PlanVariables(tensor=2, sequence_parallel=True, stages=(5,), recompute="full")),
    "llama_interleaved": (
        "tiny_llama",
        PlanVariables(pipeline=2, interleave=2, schedule="interleaved_1f1b", data=2, zero=3, stages=(1, 2, 1, 1)),
    ),
    "two_stacks_pipeline4": ("two_stacks", PlanVariables(pipeline=4, stages=(2, 2, 3, 3))),
    "unpleasant_names": ("unpleasant", PlanVariables(pipeline=2, stages=(3, 4))),
    "two_stacks_tensor2": ("two_stacks", PlanVariables(tensor=2, pipeline=2, stages=(7, 3))),
}


def made(name: str) -> tuple[str, Graph, tuple[RegionLayout, ...]]:
    model, variables = PLANS[name]
    graph = MODELS[model]()
    layouts = layout(graph, variables.tensor, variables.sequence_parallel) if variables.tensor > 1 else ()
    return emit(spec(), graph, plan(graph, variables, layouts)).text, graph, layouts


@pytest.mark.parametrize("name", PLANS)
def test_programs(name: str, golden: Callable[[str, str], None]):
    golden(f"programs/{name}.py", made(name)[0])


@pytest.mark.parametrize("name", PLANS)
def test_the_same_plan_gives_the_same_bytes(name: str):
    assert made(name)[0] == made(name)[0]


def test_programs_are_formatted_and_lint_clean(tmp_path: Path):
    for name in PLANS:
        text = made(name)[0]
        assert max(map(len, text.splitlines())) <= WIDTH
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    ruff = [sys.executable, "-m", "ruff"]
    flags = ["--isolated", "--line-length", str(WIDTH), "--target-version", "py311"]
    rules = [
        "--select",
        "E,F,I,UP,B,SIM,RUF",
        "--ignore",
        "RUF001,RUF002,RUF003",
        "--config",
        'lint.isort.known-first-party = ["mlmdsl"]',
    ]
    for arguments in (["check", *flags, *rules, "."], ["format", "--check", *flags, "."]):
        done = subprocess.run([*ruff, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", PLANS)
def test_every_planned_transition_is_one_call(name: str):
    """Folded: once per region that lists it, whatever the number of passes."""
    text, _, layouts = made(name)
    planned = Counter((t.forward, t.backward, t.dim) for region in layouts for t in region.transitions)
    assert sum(planned.values()) == len(calls(text))
    assert Counter(call.func.id for call in calls(text)) == Counter(function(*key) for key in planned.elements())  # type: ignore[attr-defined]


def calls(text: str) -> list[ast.Call]:
    nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    return [node for node in nodes if isinstance(node.func, ast.Name) and node.func.id in COLLECTIVES]


def function(forward: str | None, backward: str | None, dim: int | None) -> str:
    names = {
        (None, "all_reduce"): "copy_to",
        ("all_gather", "split"): "gather",
        ("all_reduce", "all_reduce"): "all_reduce_both",
    }
    return names.get((forward, backward), forward or "")


@pytest.mark.parametrize("name", PLANS)
def test_collectives_stand_on_lines_of_their_own_with_bytes(name: str):
    text = made(name)[0]
    lines = text.splitlines()
    for call in calls(text):
        line = lines[call.lineno - 1]
        code, _, comment = line.partition("  # ")
        comment = comment or lines[call.lineno - 2]
        assert "KiB" in comment and code.strip().count("(") == 1


@pytest.mark.parametrize("name", [n for n, (_, v) in PLANS.items() if v.tensor == 1])
def test_one_rank_on_the_tensor_axis_leaves_no_trace_of_it(name: str):
    tree = ast.parse(made(name)[0])
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not {"tp", "Axis"} & names and "tp" not in attributes


def test_the_order_of_ranks_stands_in_the_program():
    graph = graph_of(TINY_GPT)
    usual = PlanVariables(pipeline=2, data=4, context=1, stages=(2, 2), micro_batch=2)
    texts = [emit(spec(), graph, plan(graph, replace(usual, order=order))).text for order in ORDERS]
    assert "Ranks: torch.arange(8).view(2, 4, 1, 1): pipeline, data, context, tensor." in texts[0]
    assert "Ranks: torch.arange(8).view(4, 2, 1, 1): data, pipeline, context, tensor." in texts[1]
    assert "order=" not in texts[0] and 'order="data_pipeline_context_tensor"' in texts[1]


def test_nothing_is_imported_in_vain():
    """Every imported name is used: ruff's F401 says so above; here that a plain program needs little."""
    tree = ast.parse(made("gpt_single")[0])
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert "all_gather" not in imported and "recomputed" not in imported and "rotary" not in imported


def test_files_of_a_program(tmp_path: Path):
    graph = graph_of(TINY_GPT)
    sources = {
        "/specs/tiny.mlm": 'import "blocks/gpt.mlm" as a\nimport "../shared/gpt.mlm" as b\n',
        "/specs/blocks/gpt.mlm": 'import "../../shared/gpt.mlm" as c\n',
        "/shared/gpt.mlm": "const n = 1\n",
    }
    program = emit(spec(sources=sources), graph, plan(graph, PlanVariables(stages=(4,))))
    program.write(tmp_path / "deep" / "out")
    written = {str(p.relative_to(tmp_path / "deep" / "out")): p.read_text() for p in tmp_path.rglob("*.*") if p.is_file()}
    assert written == dict(program.files)
    assert written["spec.mlm"] == 'import "blocks/gpt.mlm" as a\nimport "imports/gpt.mlm" as b\n'
    assert written["blocks/gpt.mlm"] == 'import "../imports/gpt.mlm" as c\n'
    assert written["imports/gpt.mlm"] == "const n = 1\n"
    assert '"spec": "spec.mlm"' in written["plan.json"]


def test_the_directory_of_a_program_compiles_again(tmp_path: Path):
    """The copies resolve to the same spec, under the fingerprint that the saved plan has."""
    inside, outside = tmp_path / "specs" / "parts", tmp_path / "shared"
    inside.mkdir(parents=True)
    outside.mkdir()
    block, rest = TINY_GPT.split("model", 1)
    (outside / "gpt.mlm").write_text(block)
    (inside / "laptop.mlm").write_text(SETTINGS)
    text = f'import "../shared/gpt.mlm" as gpt\nimport "parts/laptop.mlm" as laptop\nmodel{rest}'.replace(
        "GPTBlock(h", "gpt.GPTBlock(h"
    )
    text += "cluster laptop from laptop.laptop { nodes = 1 }\ntrain from laptop.train { batch = 32 seq }\n"
    source = resolved(tmp_path / "specs" / "entry.mlm", text)
    graph = graph_of(TINY_GPT)
    program = emit(source, graph, plan(graph, PlanVariables(stages=(4,))))
    program.write(tmp_path / "out")
    again = resolved(tmp_path / "out" / "spec.mlm", program.files["spec.mlm"])
    assert again.sha256 == json.loads(program.files["plan.json"])["spec_sha256"] != source.sha256
    assert set(program.files) == {"program.py", "plan.json", "spec.mlm", "parts/laptop.mlm", "imports/gpt.mlm"}


def resolved(path: Path, text: str) -> Spec:
    found = Diagnostics()
    result = resolve(str(path), text, found).spec
    assert result is not None, found.items
    return result
