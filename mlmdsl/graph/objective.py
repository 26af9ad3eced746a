"""The end of the training graph: what the objective feeds the model, the targets, and the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mlmdsl.diagnostics import Diagnostics, Label
from mlmdsl.grammar.spec import Train
from mlmdsl.graph.graph import Node, Scalar
from mlmdsl.graph.ops import CATALOGUE
from mlmdsl.graph.ops.base import ShapeProblem
from mlmdsl.graph.state import State
from mlmdsl.graph.tensor import TensorType
from mlmdsl.graph.values import TensorValue
from mlmdsl.runtime import config


def add_loss(
    state: State, output: TensorValue, train: Train | None, diagnostics: Diagnostics
) -> tuple[Node, dict[str, int]] | None:
    """Adds the targets and the cross entropy; with the lengths of symbols that are not seq_len's. None where a mistake was
    reported. Without `train` a model may have any inputs."""
    if train is not None and train.documents == "separate" and not _keep_apart(state, train, diagnostics):
        return None
    inputs = _named(state, train, diagnostics)
    if inputs is None or (train is not None and not _names_fit(state, inputs, train, diagnostics)):
        return None
    lengths = _lengths(inputs, train, diagnostics) if train is not None else {}
    if lengths is None:
        return None
    predicted = _objective(train).required[-1]
    targets = TensorType("int", (inputs.get(predicted) or next(n for n in inputs.values() if n.type.dtype == "int")).type.shape)
    try:
        kind = CATALOGUE["cross_entropy"].infer((output.type, targets), {})
    except ShapeProblem as problem:
        diagnostics.report(problem.code, str(problem), output.span, help=problem.help)
        return None
    state.inputs.append("targets")
    state.first_nodes.append(Node("targets", "input", (), targets, variable="targets"))
    path = "loss" if "loss" not in state.paths else "cross_entropy"
    node = Node(path, "cross_entropy", (output.path, "targets"), kind, span=output.span)
    state.add(node)
    return node, lengths


def _keep_apart(state: State, train: Train, diagnostics: Diagnostics) -> bool:
    """Every attention is given an input that numbers the documents of a row. False where that cannot be (reported)."""
    attends = [node for node in state.paths.values() if node.op == "attend" and not node.attrs["documents"]]
    inputs, span = [state.paths[path] for path in state.inputs], train.spans.get("documents")
    tokens = next((node for node in inputs if node.type.dtype == "int" and len(node.type.shape) == 2), None)
    if tokens is None:  # said elsewhere
        return True
    problem, labels, help = "", (), "write documents = joined"
    if "documents" not in train.objective.feeds.fed:
        problem = f"{train.objective.kind}() has no several documents in a row"
    elif "documents" in state.paths and "documents" not in state.inputs:
        problem, help = "the model calls a value `documents`, as its input would be", "give the value another name"
    for node in () if problem else attends:
        if any(state.paths[source].type.shape[:2] != tokens.type.shape for source in node.inputs[:2]):
            problem = "an attention is not of the row's tokens among themselves"
            labels = (Label(node.span, "here"),) if node.span else ()
            help = "write documents = joined, or attend with documents of your own"
    if problem:
        diagnostics.report("MLM0527", problem, span, label="to be kept apart", secondary=labels, help=help)
        return False
    if "documents" not in state.inputs:
        added = Node("documents", "input", (), tokens.type, variable="documents")
        state.inputs.append("documents")
        state.first_nodes.append(added)
        state.paths["documents"] = added
    told = {n.path: replace(n, inputs=(*n.inputs, "documents"), attributes=_with(n.attrs, documents=True)) for n in attends}
    state.nodes = [told.get(node.path, node) for node in state.nodes]
    state.regions = [replace(r, nodes=tuple(told.get(node.path, node) for node in r.nodes)) for r in state.regions]
    state.paths.update(told)
    return True


def _with(attributes: Mapping[str, Scalar], **more: Scalar) -> tuple[tuple[str, Scalar], ...]:
    return tuple(sorted({**attributes, **more}.items()))


def _objective(train: Train | None) -> config.Objective:
    return train.objective.feeds if train else config.Objective()


def _named(state: State, train: Train | None, diagnostics: Diagnostics) -> dict[str, Node] | None:
    """The model's inputs by the objective's names: a single one may have any. None where there is nothing to predict."""
    inputs = {path: state.paths[path] for path in state.inputs}
    if not any(node.type.dtype == "int" for node in inputs.values()):
        message, help = "the model has no input of integers, whose next ones it could predict", "write input tokens: int[B, S]"
        diagnostics.report("MLM0512", message, state.model.model.name_span, help=help)
        return None
    required = _objective(train).required
    if len(inputs) == 1 and len(required) == 1 and "valid" not in inputs:
        return {required[0]: next(iter(inputs.values()))}
    return inputs


def _names_fit(state: State, inputs: dict[str, Node], train: Train, diagnostics: Diagnostics) -> bool:
    """Every input is one that the objective feeds, and those that it needs are there."""
    feeds, model = train.objective.feeds, state.model.model.name_span
    labels = (Label(train.spans["objective"], "the objective"),) if "objective" in train.spans else ()
    before = len(diagnostics.errors)
    for name, node in inputs.items():
        if name not in feeds.fed:
            message, help = f"{feeds.kind}() feeds no input `{name}`", f"it feeds {', '.join(feeds.fed)}"
            diagnostics.report("MLM0524", message, node.span or model, secondary=labels, help=help)
        elif node.type.dtype != "int" or len(node.type.shape) != 2:
            message, help = f"`{name}` is int[B, length], not {node.type}", f"write input {name}: int[B, S]"
            diagnostics.report("MLM0524", message, node.span or model, help=help)
    if len(diagnostics.errors) > before:
        return False
    for name in feeds.required:
        if name not in inputs:
            message = f"{feeds.kind}() needs a model with an input `{name}`"
            help = f"write input {name}: int[B, {'T' if name == 'decoder_tokens' else 'S'}]"
            diagnostics.report("MLM0525", message, model, secondary=labels, help=help)
    return len(diagnostics.errors) == before


def _lengths(inputs: dict[str, Node], train: Train, diagnostics: Diagnostics) -> dict[str, int] | None:
    """What the symbols of the inputs' lengths stand for, where that is not seq_len. None where one stands for two."""
    found: dict[str, tuple[int, str, Node]] = {}
    for name, node in inputs.items():
        length, dim = train.objective.feeds.length(name, train.seq_len), node.type.shape[-1]
        known, other, before = found.setdefault(str(dim), (length, name, node))
        if known != length or (isinstance(dim, int) and dim != length):
            message = f"`{name}` has {length} tokens" + (f", `{other}` {known}" if known != length else f", not {dim}")
            labels = (Label(before.span, other),) if before.span and before is not node else ()
            help = f"give it a length of its own: input {name}: int[B, T]"
            where = node.span or train.spans["seq_len"]
            diagnostics.report("MLM0526", message, where, secondary=labels, help=help)
            return None
    return {dim: length for dim, (length, _, _) in found.items() if length != train.seq_len and not dim.isdecimal()}
