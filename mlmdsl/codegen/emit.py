"""Plan -> program: one directory with program.py, plan.json and the spec that it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mlmdsl.codegen.program import program_text
from mlmdsl.codegen.sources import spec_files
from mlmdsl.grammar.spec import Spec, fingerprint
from mlmdsl.graph.graph import Graph
from mlmdsl.planner.plan import Plan


@dataclass(frozen=True)
class Program:
    """Emitted files by their path inside the program's directory."""

    files: Mapping[str, str]

    @property
    def text(self) -> str:
        return self.files["program.py"]

    def write(self, directory: Path) -> None:
        """Writes all files, with the folders that they need."""
        for name, text in self.files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def emit(spec: Spec, graph: Graph, plan: Plan) -> Program:
    """The program that executes `plan`: the same arguments give the same bytes. Where import strings had to be rewritten, the
    saved plan is that of the rewritten text."""
    sources = spec_files(spec)
    moved = list(sources.values()) != list(spec.sources.values())
    sha256 = fingerprint(sources.values(), spec.overrides) if moved else plan.spec_sha256
    saved = replace(plan.saved(), spec="spec.mlm", spec_sha256=sha256, folder=spec.folder)
    return Program({"program.py": program_text(spec, graph, plan), "plan.json": saved.to_json(), **sources})
