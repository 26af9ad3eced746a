"""Spec's model to Graph: block calls are inlined down to primitive operations, the model's repeats stay folded.

Every mistake of the model is found in one run: a wrong expression becomes POISON, and nothing that uses it complains again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from mlmdsl.diagnostics import Diagnostics
from mlmdsl.grammar.evaluate import POISON
from mlmdsl.grammar.library import shipped
from mlmdsl.grammar.spec import ModelSource, Train
from mlmdsl.graph.arguments import describe
from mlmdsl.graph.body import Body
from mlmdsl.graph.graph import Graph, Node, Region
from mlmdsl.graph.objective import add_loss
from mlmdsl.graph.state import State
from mlmdsl.graph.sums import regrouped
from mlmdsl.graph.values import Scope, TensorValue
from mlmdsl.graph.walk import unused


def build(model: ModelSource, diagnostics: Diagnostics, train: Train | None = None) -> Graph | None:
    """The training graph of a model: its nodes, the targets and the loss; None where a mistake was reported. Without `train`
    the objective is next_token."""
    before = len(diagnostics.errors)
    state = State(model, diagnostics)
    body = Body(state, dict(model.values), model.names, Scope("", ""), top=True)
    body.formals(model.model.formals, (), {}, model.model.span)
    body.run(model.model.body)
    _check_uncalled(state)
    output = _output(body, model, diagnostics)
    if output is None or len(diagnostics.errors) > before:
        return None
    loss = add_loss(state, output, train, diagnostics)
    graph = loss and _finished(state, model.model.name, output, *loss)
    if graph is None:
        return None
    body.expectations({"params": graph.parameters, "layers": graph.layers})
    if len(diagnostics.errors) > before:
        return None
    _warn_of_unused(model, diagnostics)
    return graph


def _check_uncalled(state: State) -> None:
    """Blocks of the user's files that no sound call reaches are read for their own mistakes."""
    for key in state.model.blocks:
        if not shipped(key) and key not in state.called:
            source = state.model.blocks[key]
            body = Body(State(state.model, state.diagnostics), dict(source.values), source.blocks, Scope("", ""))
            body.chain = (key,)
            body.unbound(source.block)


def _warn_of_unused(model: ModelSource, diagnostics: Diagnostics) -> None:
    """Of the model and of every block of the user's files."""
    blocks = [model.blocks[key].block for key in model.blocks if not shipped(key)]
    for body in (model.model.body, *(block.body for block in blocks)):
        for name, span in unused(body):
            help = "take the statement away"
            diagnostics.report("MLM0513", f"`{name}` is never used", span, severity="warning", help=help)


def _output(body: Body, model: ModelSource, diagnostics: Diagnostics) -> TensorValue | None:
    """The model's first output; a missing one is reported."""
    if body.outputs is None:
        help = "end the model with `output` and the logits"
        diagnostics.report("MLM0510", f"the model `{model.model.name}` has no output", model.model.name_span, help=help)
        return None
    first = body.outputs[0]
    if isinstance(first, TensorValue):
        return first
    if first is not POISON:
        message = f"the model's output is {describe(first)}, not a tensor"
        diagnostics.report("MLM0511", message, body.output_span, help="output the logits [B, S, vocabulary]")
    return None


def _finished(state: State, name: str, output: TensorValue, loss: Node, lengths: dict[str, int]) -> Graph:
    """The regions without what the loss does not need."""
    state.close_straight()
    regions = tuple(state.regions)
    if state.first_nodes:
        regions = _with_first(regions, state.first_nodes)
    needed = _needed(regions, loss.path)
    kept = tuple(r for r in (_without_dead(region, needed) for region in regions) if r.nodes)
    kept = regrouped(kept, (output.path, loss.path))
    used = {key for region in kept for node in region.nodes for key in node.weights}
    weights = {key: weight for key, weight in state.weights.items() if key in used}
    return Graph(name, kept, weights, tuple(state.inputs), output.path, loss.path, lengths)


def _with_first(regions: tuple[Region, ...], nodes: Sequence[Node]) -> tuple[Region, ...]:
    """The targets stand with the model's inputs, in the straight code at the start."""
    if regions[0].repeated:
        return (Region("", 1, tuple(nodes)), *regions)
    first = regions[0]
    at = 1 + max((i for i, node in enumerate(first.nodes) if node.op == "input"), default=-1)
    return (replace(first, nodes=(*first.nodes[:at], *nodes, *first.nodes[at:])), *regions[1:])


def _needed(regions: Iterable[Region], loss: str) -> set[str]:
    """Paths that the loss depends on, inputs of the model included."""
    uses: dict[str, set[str]] = {}
    for region in regions:
        for node in region.nodes:
            uses[node.path] = set(node.inputs)
        for carried in region.carried:
            uses[carried.entry] = {carried.initial, carried.next}
    needed, open_paths = set[str](), [loss]
    while open_paths:
        path = open_paths.pop()
        if path not in needed:
            needed.add(path)
            open_paths += uses[path]
    return needed | {node.path for region in regions for node in region.nodes if node.op == "input"}


def _without_dead(region: Region, needed: set[str]) -> Region:
    nodes = tuple(node for node in region.nodes if node.path in needed)
    return replace(region, nodes=nodes, carried=tuple(c for c in region.carried if c.entry in needed))
