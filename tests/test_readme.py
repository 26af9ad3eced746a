"""What the README shows is what the commands print; `pytest --update-golden` puts in what they print now."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from mlmdsl.compile import compile_spec
from mlmdsl.report.terminal import render_plan

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
LLAMA = ROOT / "specs" / "models" / "llama3_405b.mlm"


def block(text: str, after: str, fence: str = "```\n") -> str:
    """The first fenced block after some words."""
    start = text.index(fence, text.index(after)) + len(fence)
    return text[start : text.index("```", start)]


def untimed(text: str) -> str:
    """Without how long the search took."""
    return re.sub(r"candidates in [\d.]+ s,", "candidates,", text)


def test_the_spec_builds_and_its_expectation_holds():
    settings = (ROOT / "specs" / "quickstart.mlm").read_text(encoding="utf-8")
    model = block(README.read_text(encoding="utf-8"), "# mlmdsl")
    text = model + settings[settings.index("cluster laptop") :]
    graph = compile_spec(text, path=str(ROOT / "specs" / "readme.mlm"), until="graph").graph
    assert graph is not None and graph.parameters == 354_823_168


def test_the_plan_is_the_one_that_is_printed(request: pytest.FixtureRequest):
    readme = README.read_text(encoding="utf-8")
    shown = block(readme, "takes less than a second")
    plan = compile_spec(LLAMA.read_text(encoding="utf-8"), path=str(LLAMA), until="plan").plan
    assert plan is not None
    drawn = "\n".join(line.rstrip() for line in render_plan(plan).splitlines()) + "\n"
    if request.config.getoption("--update-golden") and untimed(shown) != untimed(drawn):
        README.write_text(readme.replace(shown, drawn), encoding="utf-8")
        shown = drawn
    assert untimed(shown) == untimed(drawn)


def test_the_program_is_an_excerpt_of_the_emitted_one():
    shown = block(README.read_text(encoding="utf-8"), "A program you can read", "```python\n")
    program = (ROOT / "tests" / "golden" / "programs" / "llama3_405b.py").read_text(encoding="utf-8")
    assert shown.strip() and textwrap.indent(shown, " " * 8) in program


def test_the_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.findall(r"(?:^|`)make (\w+)", README.read_text(encoding="utf-8"), re.M)
    assert {"demo", "test"} <= set(named)
    for target in named:
        assert f"\n{target}: " in makefile, target
