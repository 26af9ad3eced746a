"""The compiler on one page: a line per pass, a verification between passes, a stop at any of them.

text ──parse──▶ Syntax ──resolve──▶ Spec ──build──▶ Graph ──search──▶ Plan ──emit──▶ Program
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from mlmdsl.diagnostics import Diagnostic, Diagnostics, PlanError
from mlmdsl.frozen import frozen
from mlmdsl.grammar.parser import parse
from mlmdsl.grammar.resolve import resolve
from mlmdsl.grammar.spec import Spec
from mlmdsl.grammar.syntax import File
from mlmdsl.graph.build import build
from mlmdsl.graph.graph import Graph
from mlmdsl.graph.verify import verify
from mlmdsl.planner.check import check
from mlmdsl.planner.plan import Plan, verify_spec
from mlmdsl.planner.search import search
from mlmdsl.planner.verify_layout import verify_layout

if TYPE_CHECKING:
    from mlmdsl.codegen.emit import Program

Pass = Literal["syntax", "spec", "graph", "plan", "program"]


ALONE = "train.documents=joined"  # an override: the model as it is for sequences that are one document each


@frozen
class Compilation:
    """What the passes up to `until` made; the later fields are None. `sources` holds the text of every file read, for
    rendering diagnostics."""

    diagnostics: tuple[Diagnostic, ...]
    sources: dict[str, str]
    syntax: File | None = None
    spec: Spec | None = None
    graph: Graph | None = None
    plan: Plan | None = None
    program: Program | None = None


def compile_spec(
    text: str,
    *,
    path: str = "spec.mlm",
    overrides: Sequence[str] = (),
    pins: Sequence[str] = (),
    folder: str | None = None,
    until: Pass = "program",
    plan: Plan | None = None,
) -> Compilation:
    """Compile `text`, which stands in the file `path` (its imports are relative to it), up to the pass `until`.

    overrides: "gpt2.d=1024"; pins: "tensor=4"; folder: where relative paths of data start (default: beside `path`). A given
    `plan`, a saved one, is taken instead of a search. Raises SpecError with every problem of the text, PlanError where no plan
    fits or the given one was made from another text.
    """
    found = Diagnostics()
    if until == "syntax":
        syntax = parse(text, path, found)
        found.raise_if_errors()
        return Compilation(tuple(found.items), {path: text}, syntax)
    resolved = resolve(path, text, found, overrides=overrides, pins=pins, folder=folder)
    graph = build(resolved.model, found, resolved.spec.train if resolved.spec else None) if resolved.model else None
    spec = resolved.spec
    if spec and graph and not found.errors:
        check(spec, graph, found)
    found.raise_if_errors()
    assert spec is not None and graph is not None, "a pass failed without a diagnostic"
    verify(graph)
    done = Compilation(tuple(found.items), dict(resolved.sources), None, spec, graph)
    if until in ("spec", "graph"):
        return done
    try:
        if plan is not None:
            verify_spec(plan, spec)
        chosen = plan or search(spec, graph)
    except PlanError as problem:
        raise PlanError(problem.diagnostics, found.sources) from None
    verify_layout(graph, chosen)
    made = Compilation(done.diagnostics, done.sources, None, spec, graph, chosen)
    if until == "plan":
        return made
    from mlmdsl.codegen.emit import emit  # a fifth of what there is to import

    return replace(made, program=emit(spec, graph, chosen))
