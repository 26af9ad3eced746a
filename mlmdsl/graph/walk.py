"""Questions about syntax that the builder asks: names, assignments, calls."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from mlmdsl.diagnostics import Span
from mlmdsl.grammar import syntax as s


def snake(name: str) -> str:
    """LayerNorm -> layer_norm, RMSNorm -> rms_norm, GPTBlock -> gpt_block."""
    last = name.rpartition(".")[2]
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", last).lower()


def dotted(function: s.Expr) -> str | None:
    if isinstance(function, s.Name):
        return function.name
    if isinstance(function, s.Attribute) and isinstance(function.value, s.Name):
        return f"{function.value.name}.{function.name}"
    return None


def assigned_names(body: Iterable[s.Statement]) -> Iterable[str]:
    for statement in body:
        if isinstance(statement, s.Assign):
            yield from statement.names
        elif isinstance(statement, s.Repeat):
            yield from assigned_names(statement.body)
        elif isinstance(statement, s.If):
            yield from assigned_names((*statement.then, *statement.otherwise))


def capitalised(node: s.Node) -> Iterable[s.Call]:
    """Calls that own parameters, in a statement."""
    for part in nodes_in(node):
        if isinstance(part, s.Call):
            name = dotted(part.function)
            if name is not None and name.rpartition(".")[2][:1].isupper():
                yield part


def mentions(expr: s.Node, name: str) -> bool:
    return any(isinstance(part, s.Name) and part.name == name for part in nodes_in(expr))


def nodes_in(node: s.Node) -> Iterator[s.Node]:
    """A node and all below it, outermost first."""
    yield node
    for part in nodes_below(node):
        yield from nodes_in(part)


def nodes_below(node: s.Node) -> Iterator[s.Node]:
    """The nodes that a node is made of."""
    for value in vars(node).values():
        for part in value if isinstance(value, tuple) else (value,):  # pyright: ignore[reportUnknownVariableType]
            if isinstance(part, s.Node):
                yield part


def unused(body: Sequence[s.Statement]) -> Iterator[tuple[str, Span]]:
    """Names that a body assigns and nothing in it mentions, where they are first assigned."""
    parts = [part for statement in body for part in nodes_in(statement)]
    mentioned = {part.name for part in parts if isinstance(part, s.Name)}
    first: dict[str, Span] = {}
    for part in parts:
        if isinstance(part, s.Assign):
            for name, span in zip(part.names, part.name_spans, strict=True):
                first.setdefault(name, span)
    yield from ((name, span) for name, span in first.items() if name not in mentioned)
