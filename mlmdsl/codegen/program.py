"""The text around the modules: docstring, imports, PARALLEL and TRAINING, the loss, the call of `main`."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable
from itertools import chain
from pathlib import PurePath

from mlmdsl import words
from mlmdsl.codegen.layers import AXES, Layer, Passage, Sharded, axes_in
from mlmdsl.codegen.names import PROGRAM_NAMES, variable
from mlmdsl.codegen.stages import StageModule
from mlmdsl.codegen.statements import Key, returning, write
from mlmdsl.codegen.text import INDENT, WIDTH, Call, lay_out, literal, number, packed, plain, wrap
from mlmdsl.grammar.constraints import USUAL
from mlmdsl.grammar.spec import Objective, Spec, Train
from mlmdsl.graph.graph import Graph
from mlmdsl.graph.ops import CATALOGUE
from mlmdsl.graph.placement import REPLICATE
from mlmdsl.planner.plan import Plan, PlanVariables

OWN_NAMES = frozenset(
    {"torch", "F", "nn", "tally", "tp", "cp", "ep", "lo", "hi", "self", "mesh", "index", "block", "values"}
) | {
    "loss",
    "Stage",
    "PARALLEL",
    "TRAINING",
}


def program_text(spec: Spec, graph: Graph, plan: Plan) -> str:
    """program.py."""
    sharded = Sharded(graph, plan.plan, plan.layout, plan.context_layout)
    layers = {index: Layer(sharded, index) for index, region in enumerate(graph.regions) if region.repeated}
    parts = [
        [
            *_literal_lines("PARALLEL", _parallel(plan.plan)),
            "",
            *_literal_lines("TRAINING", _training(spec.train, graph, plan)),
        ],
        *(layer.lines() for layer in layers.values()),
        StageModule(sharded, layers).lines(),
        _loss(sharded),
        ['if __name__ == "__main__":', f"{INDENT}main(Stage, loss, PARALLEL, TRAINING)"],
    ]
    code = "\n\n\n".join("\n".join(part) for part in parts) + "\n"
    return "\n".join([*_docstring(spec, graph, plan), "", *_imports(code, graph), "", code])


# ---- docstring ------------------------------------------------------------------------------------------------------


def _docstring(spec: Spec, graph: Graph, plan: Plan) -> list[str]:
    name, source = plain(plan.model.name), plain(PurePath(spec.path).name)
    lines = [
        f"{name} on {plain(plan.cluster.name)}.",
        "",
        *wrap(f"Plan: {plan.plan.described}."),
        *wrap(f"Written by mlmdsl from {source}; it needs torch and mlmdsl.runtime, and runs with"),
        f"{INDENT}torchrun {_processes(plan)}program.py --out runs/{name}",
        *wrap(_predicted(plan)),
        "",
        *wrap(_shapes(plan, graph)),
        *wrap(_grid(plan.plan)),
    ]
    while not lines[-1]:
        lines.pop()
    return [f'"""{lines[0]}', *lines[1:], '"""']


def _processes(plan: Plan) -> str:
    world, per_node = plan.plan.world_size, max(1, plan.cluster.devices_per_node)
    if plan.cluster.pools and world > 1:
        return f"{plan.cluster.torchrun} "
    nodes = -(-world // per_node)
    return f"--nnodes {nodes} --nproc-per-node {per_node} " if nodes > 1 else f"--nproc-per-node {world} "


def _predicted(plan: Plan) -> str:
    predicted = plan.predicted
    peaks = predicted.peak_memory_bytes
    bounds = dict.fromkeys(words.size(peak) for peak in (min(peaks, default=0), max(peaks, default=0)))
    return (
        f"Predicted: {predicted.step_time_s:.3g} s a step, {predicted.tokens_per_s_per_device:,.0f} tokens/s and"
        f" {predicted.model_tflops_per_device:,.3g} TFLOP/s per device (MFU {100 * predicted.mfu:.1f} % of"
        f" {plan.cluster.peak_flops_per_second / 1e12:,.3g} TFLOP/s, counting matrix products only, causal attention half);"
        f" peak memory {' to '.join(bounds)}."
    )


def _shapes(plan: Plan, graph: Graph) -> str:
    others = "".join(f", {plain(name)} = {length:,}" for name, length in graph.lengths.items())
    degrees = (("tp", plan.plan.tensor, "tensor"), ("cp", plan.plan.context, "context"))
    several = [degree for degree in degrees if degree[1] > 1]
    divided = "".join(f"; n/{short} is a dim divided over the {n} ranks of the {name} axis" for short, n, name in several)
    return f"Shapes: B = {plan.plan.micro_batch} (sequences of a micro-batch), S = {plan.seq_len:,} (tokens){others}{divided}."


def _grid(plan: PlanVariables) -> str:
    if plan.world_size == 1:
        return ""
    axes = plan.order.split("_")
    sizes = ", ".join(str(getattr(plan, axis)) for axis in axes)
    return (
        f"Ranks: torch.arange({plan.world_size}).view({sizes}): {', '.join(axes)}."
        " Collectives over data and pipeline are the runtime's."
    )


# ---- settings -------------------------------------------------------------------------------------------------------


def _literal_lines(name: str, tree: Call) -> list[str]:
    return lay_out(f"{name} = ", tree, 0)


def _parallel(plan: PlanVariables) -> Call:
    several = plan.pipeline > 1
    recompute = literal(plan.recompute) if isinstance(plan.recompute, str) else packed(plan.recompute)
    settings: dict[str, int | str | tuple[int, ...]] = {
        "pipeline": plan.pipeline,
        "data": plan.data,
        **({"context": plan.context} if plan.context > 1 else {}),
        "tensor": plan.tensor,
        **({"expert": plan.expert} if plan.expert > 1 else {}),
        **({"order": plan.order} if plan.order != USUAL else {}),
        **({"interleave": plan.interleave} if plan.interleave > 1 else {}),
        **({"schedule": plan.schedule} if several else {}),
        "stages": plan.stages,
        "zero": plan.zero,
        **({"replicate": plan.replicate} if plan.replicate > 1 else {}),
        "micro_batch": plan.micro_batch,
    }
    last = (("recompute", recompute),) if plan.recompute != "none" else ()
    return Call("Parallel", (*((key, literal(value)) for key, value in settings.items()), *last))


def _training(train: Train, graph: Graph, plan: Plan) -> Call:
    data, tokenizer, optimizer, schedule = train.data, train.tokenizer, train.optimizer, train.schedule
    fields = tuple((k, literal(v)) for k in ("field", "source", "target") if (v := getattr(data, k)) is not None)
    path = (("", literal(tokenizer.path)),) if tokenizer.path is not None else ()
    shape = (("warmup", str(schedule.warmup_steps)), ("min_lr", number(schedule.min_lr))) if schedule.kind != "constant" else ()
    adamw = (
        ("lr", number(optimizer.lr)),
        ("betas", literal(optimizer.betas)),
        ("eps", number(optimizer.eps)),
        ("weight_decay", number(optimizer.weight_decay)),
        ("clip", "None" if optimizer.clip is None else number(optimizer.clip)),
    )
    warmup = (("warmup", str(schedule.warmup_steps)),) if schedule.kind == "constant" and schedule.warmup_steps else ()
    paths = Call("", tuple(("", literal(item)) for item in data.paths)) if len(data.paths) > 1 else literal(data.paths)
    return Call(
        "Training",
        (
            ("data", Call("Data", (("", literal(data.kind)), ("", paths), *fields, ("validation", number(data.validation))))),
            ("tokenizer", Call("Tokenizer", (("", literal(tokenizer.kind)), *path))),
            *_reading(train.objective, graph, plan),
            ("vocab", str(vocabulary(graph))),
            ("sequence", str(train.seq_len)),
            ("batch", str(train.batch)),
            ("steps", str(train.steps)),
            ("optimizer", Call("AdamW", adamw)),
            ("schedule", Call("Schedule", (("", literal(schedule.kind)), *shape, *warmup))),
            ("precision", literal(train.precision)),
            *_optional(train),
            ("flops_per_token", number(plan.model.flops_per_token)),
            ("peak_flops_per_second", number(plan.cluster.peak_flops_per_second)),
        ),
    )


def _reading(objective: Objective, graph: Graph, plan: Plan) -> Iterable[tuple[str, Call | str]]:
    """What is predicted, and from what; nothing where it is the next token from tokens alone."""
    if objective.kind != "next_token":
        defaults, settings = Objective(kind=objective.kind), [field.name for field in dataclasses.fields(Objective)][1:]
        values = ((key, getattr(objective, key)) for key in settings if getattr(objective, key) != getattr(defaults, key))
        shown = tuple((key, number(value) if isinstance(value, float) else str(value)) for key, value in values)
        yield "objective", Call("Objective", (("", literal(objective.kind)), *shown))
    if len(graph.inputs) > 2:
        read = {source for node in graph.nodes.values() for source in node.inputs}
        yield "inputs", literal(tuple(name for name in graph.inputs[:-1] if name in read))
    around = {node.path: node.output for region in plan.context_layout for node in region.nodes}
    if whole := tuple(name for name in graph.inputs if around.get(name) == str(REPLICATE)):
        yield "whole", literal(whole)


def _optional(train: Train) -> Iterable[tuple[str, str]]:
    """Settings that most specs leave alone."""
    settings = {
        "seed": (train.seed, 0),
        "validate_every": (train.validate_every, None),
        "validation_batches": (train.validation_batches, 8),
        "checkpoint_every": (train.checkpoint_every, None),
    }
    return ((key, str(value)) for key, (value, default) in settings.items() if value != default)


def vocabulary(graph: Graph) -> int:
    """Rows of the embedding of the tokens; 0 where there is none."""
    tables = {node.inputs[0]: node for node in reversed(tuple(graph.nodes.values())) if node.op == "embedding"}
    found = next((tables[name] for name in ("tokens", *graph.inputs) if name in tables), None)
    return graph.weights[found.weights[0]].shape[0] if found else 0


# ---- loss -----------------------------------------------------------------------------------------------------------


def _loss(sharded: Sharded) -> list[str]:
    graph, last = sharded.graph, len(sharded.graph.regions) - 1
    output: Key = (graph.output, sharded.placement(graph.output, last))
    names = {output: variable(graph.nodes[graph.output].variable or "logits")}
    values = chain.from_iterable(node.inputs for node in sharded.objective)
    for name in dict.fromkeys(value for value in values if value in graph.inputs):
        names[name, sharded.placement(name, last)] = variable(name)
    passage = Passage(sharded, last, lambda weight: weight.key, "", [], set(names))
    passage.add(sharded.objective)
    result = passage.bring(graph.loss, sharded.placement(graph.loss, last), "")
    body = write([*passage.steps, returning((result,))], names, indent=1)
    return [
        f"def loss({', '.join(names.values())}, mesh: Mesh):",
        f'{INDENT}"""Sum of the losses over the tokens of this rank\'s micro-batch; targets of -100 do not count."""',
        *(f"{INDENT}{axis} = {AXES[axis]}" for axis in axes_in(body.lines)),
        *body.lines,
    ]


# ---- imports --------------------------------------------------------------------------------------------------------


def _imports(code: str, graph: Graph) -> list[str]:
    """What the code uses, as formatters order it."""
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    offered = PROGRAM_NAMES.union(*(CATALOGUE[n.op].imports for n in graph.nodes.values() if n.op in CATALOGUE))
    names = sorted((used & offered) - OWN_NAMES, key=lambda name: (not name[0].isupper(), name))
    torch = [
        *(["import torch"] if "torch" in used else []),
        *(["import torch.nn.functional as F"] if "F" in used else []),
        "from torch import nn",
        "",
    ]
    line = f"from mlmdsl.runtime import {', '.join(names)}"
    several = ["from mlmdsl.runtime import (", *(f"{INDENT}{name}," for name in names), ")"]
    return [*torch, *([line] if len(line) <= WIDTH else several)]
