"""Constraints that no plan can meet, found before any search and shown where they were written.

Only what the text itself fixes is judged here: pins, rules over them, the model's and the batch's sizes. What depends on
times and memory is the search's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from math import gcd, prod
from typing import Any, cast

from mlmdsl.diagnostics import Diagnostics, Label
from mlmdsl.frozen import frozen
from mlmdsl.grammar import syntax as s
from mlmdsl.grammar.constraints import ORDERS, RECOMPUTE, SCHEDULES, VARIABLES, WORDS, ZEROS, Order, RuleEvaluator
from mlmdsl.grammar.evaluate import POISON
from mlmdsl.grammar.spec import Pin, Rule, Spec
from mlmdsl.graph.graph import Graph, Node
from mlmdsl.graph.walk import nodes_below
from mlmdsl.planner.mesh import shares_out
from mlmdsl.planner.schedule import V_SHAPED, cannot_run, executable, recomputes, virtual_stages, zeros
from mlmdsl.planner.stages import begins_anew

_MESH = ("tensor", "context", "pipeline", "data")


def check(spec: Spec, graph: Graph, diagnostics: Diagnostics) -> None:
    """Reports MLM04xx for every pin and rule that contradicts the model, the batch, the cluster or another constraint."""
    checker = _Checker(spec, graph, diagnostics)
    for step in _CHECKS:
        step(checker)


@frozen
class _Checker:
    spec: Spec
    graph: Graph
    diagnostics: Diagnostics

    @cached_property
    def pins(self) -> Mapping[str, Pin]:
        return {pin.variable: pin for pin in self.spec.plan.pins}

    def pinned(self, name: str, default: int = 1) -> int:
        value = self.pins[name].value if name in self.pins else default
        assert isinstance(value, int)
        return value

    def report(self, code: str, message: str, pin: Pin | Rule, help: str, secondary: Iterable[Label] = (), **more: Any) -> None:
        label = more.pop("label", "pinned here" if isinstance(pin, Pin) else "asked for here")
        self.diagnostics.report(code, message, pin.span, label=label, secondary=tuple(secondary), help=help, **more)

    def setting(self, name: str, text: str) -> tuple[Label, ...]:
        """Where a setting of `train` was written."""
        span = self.spec.train.spans.get(name)
        return (Label(span, text),) if span else ()

    def others(self, *names: str) -> tuple[Label, ...]:
        return tuple(Label(self.pins[name].span, f"{name} is pinned here") for name in names if name in self.pins)


# ---- the model ------------------------------------------------------------------------------------------------------


def _heads(c: _Checker) -> None:
    n = c.pinned("tensor")
    for node in c.graph.nodes.values():
        if node.op != "attend" or n == 1:
            continue
        sizes = {"kv_heads": _size(c.graph, node, 1), "heads": _size(c.graph, node, 0)}
        if sizes["kv_heads"] == 1:  # serves every rank whole
            del sizes["kv_heads"]
        for name in sizes:
            if sizes[name] % n:
                least = max(d for d in range(1, n + 1) if all(size % d == 0 for size in sizes.values()))
                where = (Label(node.span, f"{name} has to be a multiple of tensor"),) if node.span else ()
                c.report(
                    "MLM0412",
                    f"tensor = {n} cannot split {name} = {sizes[name]}",
                    c.pins["tensor"],
                    f"pin tensor = {least}, or less",
                    where,
                )
                return


def _size(graph: Graph, node: Node, index: int) -> int:
    size = graph.nodes[node.inputs[index]].type.shape[2]
    assert isinstance(size, int)
    return size


def _vocabulary(c: _Checker) -> None:
    n = c.pinned("tensor")
    for node in c.graph.nodes.values():
        if node.op == "embedding" and n > 1:
            vocab = c.graph.weights[node.weights[0]].shape[0]
            if vocab % n:
                more = -(-vocab // n) * n
                message = f"tensor = {n} cannot split the vocabulary of {vocab:_}"
                where = (Label(node.span, "embedded here"),) if node.span else ()
                help = f"vocab = {more:_} would be split; as it is, table and head are cut or held another way"
                c.report("MLM0413", message, c.pins["tensor"], help, where, severity="warning")
                return


def _layers(c: _Checker) -> None:
    pipeline, interleave, layers = c.pinned("pipeline"), c.pinned("interleave"), c.graph.layers
    if pipeline * interleave > max(layers, 1):
        pin = c.pins.get("pipeline") or c.pins["interleave"]
        stages = f"{pipeline} stages" if interleave == 1 else f"{pipeline} x {interleave} virtual stages"
        c.report("MLM0414", f"{layers} layers cannot fill {stages}", pin, f"{layers} is the most; a stage has a layer at least")


def _stages(c: _Checker) -> None:
    if "stages" not in c.pins:
        return
    pin = c.pins["stages"]
    assert isinstance(pin.value, tuple)
    held = sum(map(int, pin.value))
    if held != c.graph.layers:
        help = f"they have to add up to {c.graph.layers}"
        c.report("MLM0417", f"the stages hold {held} layers, the model has {c.graph.layers}", pin, help)
    count = c.pinned("pipeline", len(pin.value) // c.pinned("interleave")) * c.pinned("interleave")
    if count != len(pin.value):
        help = "there is one number for each virtual stage: pipeline x interleave of them"
        c.report("MLM0417", f"{len(pin.value)} stages are given for {count}", pin, help, c.others("pipeline", "interleave"))


# ---- the cluster and the batch --------------------------------------------------------------------------------------


def _world(c: _Checker) -> None:
    named = [name for name in _MESH if name in c.pins]
    product, world = prod(c.pinned(name) for name in named), c.spec.cluster.world_size
    whole = product == world if len(named) == len(_MESH) else world % product == 0
    if named and not whole:
        shown = " x ".join(f"{name} {c.pinned(name)}" for name in named)
        secondary = (*c.others(*named[1:]), Label(c.spec.cluster.span, f"{world} devices"))
        help = f"the degrees have to multiply to {world}"
        c.report("MLM0415", f"{shown} does not fit {world} devices", c.pins[named[0]], help, secondary)


def _batch(c: _Checker) -> None:
    each = c.pinned("data") * c.pinned("micro_batch")
    if c.spec.train.batch % each:
        pin = c.pins.get("micro_batch") or c.pins["data"]
        message = (
            f"a batch of {c.spec.train.batch} cannot be split into {c.pinned('data')} x {c.pinned('micro_batch')} sequences"
        )
        labels = (*c.others(*(n for n in ("data",) if c.pins.get(n) is not pin)), *c.setting("batch", "the batch"))
        c.report("MLM0416", message, pin, "data x micro_batch has to divide the batch", labels)


def _micro_batches(c: _Checker) -> None:
    """torch's schedules: 1f1b needs a micro-batch for every stage, the interleaved one whole rounds of them."""
    pipeline = c.pinned("pipeline")
    schedule = c.pins["schedule"].value if "schedule" in c.pins else None
    if schedule is None or pipeline == 1 or not {"data", "micro_batch"} <= set(c.pins):
        return
    count = c.spec.train.batch // (c.pinned("data") * c.pinned("micro_batch"))
    name: Any = schedule
    if not executable(name, pipeline, count):
        message = cannot_run(name, pipeline, count)
        help = f"give it a multiple of {pipeline}: a smaller data or micro_batch, or a larger batch"
        c.report(
            "MLM0419",
            message,
            c.pins["schedule"],
            help,
            (*c.others("pipeline", "data", "micro_batch"), *c.setting("batch", "the batch")),
        )


def _context(c: _Checker) -> None:
    """Every rank has two chunks of the sequence, which the tensor axis may cut once more."""
    n, seq_len = c.pinned("context"), c.spec.train.seq_len
    parallel = "sequence_parallel" in c.pins and c.pins["sequence_parallel"].value is True
    tensor = c.pinned("tensor") if parallel else 1
    if n > 1 and (seq_len % (2 * n) or seq_len // n % tensor):
        labels = (*c.setting("seq_len", "the sequence"), *(c.others("tensor") if tensor > 1 else ()))
        help = "twice context has to divide seq_len" + (", and context x tensor under sequence_parallel" if tensor > 1 else "")
        c.report("MLM0426", f"context = {n} cannot split a sequence of {seq_len}", c.pins["context"], help, labels)


def _experts(c: _Checker) -> None:
    """Every rank of the axis has as many experts of each layer, and the axis is a part of the replicas."""
    n = c.pinned("expert")
    if n == 1:
        return
    stacks = {weight.key: weight.shape[0] for weight in c.graph.weights.values() if weight.expert}
    pin = c.pins["expert"]
    if not stacks:
        c.report("MLM0427", f"expert = {n}, and the model has no experts", pin, "take the pin away")
    elif uneven := next((count for count in stacks.values() if count % n), 0):
        help = f"expert has to divide {gcd(*stacks.values())}"
        c.report("MLM0427", f"expert = {n} cannot share out {uneven} experts", pin, help)
    elif "data" in c.pins and (replicas := c.pinned("data") * c.pinned("context")) % n:
        message = f"expert = {n} cannot be taken out of {replicas} replicas"
        c.report("MLM0427", message, pin, "expert has to divide data * context", c.others("data", "context"))
    elif {"order", "context"} <= c.pins.keys() and not shares_out(cast(Order, c.pins["order"].value), c.pinned("context"), n):
        message = f"expert = {n} takes uneven parts of context = {c.pinned('context')} where stages lie between"
        help = "one of the two has to divide the other, or take the order away"
        c.report("MLM0427", message, pin, help, c.others("context", "order"))


def _sequence(c: _Checker) -> None:
    pin = c.pins.get("sequence_parallel")
    if pin is None or pin.value is not True:
        return
    n, seq_len = c.pinned("tensor"), c.spec.train.seq_len
    if "tensor" in c.pins and n == 1:
        c.report(
            "MLM0418",
            "sequence_parallel splits what tensor ranks share, and tensor is 1",
            pin,
            "take one of the two away",
            c.others("tensor"),
        )
    elif seq_len % n:
        labels = (*c.others("tensor"), *c.setting("seq_len", "the sequence"))
        c.report("MLM0418", f"tensor = {n} cannot split a sequence of {seq_len}", pin, "tensor has to divide seq_len", labels)


def _schedule(c: _Checker) -> None:
    schedule, interleave = c.pins.get("schedule"), c.pins.get("interleave")
    if schedule is None:
        return
    name: Any = schedule.value
    if interleave is not None and not virtual_stages(name, c.pinned("interleave")):
        message = f"schedule = {name} does not go with interleave = {interleave.value}"
        help = "interleaved_1f1b has interleave = 2 or more, zb_v and dualpipe_v have 2, the others 1"
        c.report("MLM0420", message, schedule, help, c.others("interleave"))
    if name in V_SHAPED and (node := begins_anew(c.graph)) is not None:
        message = f"schedule = {name} does not go with a model that begins anew behind its first layers"
        where = (Label(node.span, "made of weights alone"),) if node.span else ()
        help = "it takes backward passes apart, which torch cannot do there: take 1f1b, gpipe or interleaved_1f1b"
        c.report("MLM0420", message, schedule, help, where)
    for other, legal in (("recompute", recomputes(name)), ("zero", zeros(name))):
        pin = c.pins.get(other)
        asked: tuple[Any, ...] = () if pin is None else pin.value if isinstance(pin.value, tuple) else (pin.value,)
        if wrong := [value for value in asked if value not in legal]:
            message = f"schedule = {name} does not go with {other} = {wrong[0]}"
            help = f"it takes backward passes apart: {other} is {' or '.join(map(str, legal))} there"
            c.report("MLM0420", message, schedule, help, c.others(other))


def _recomputed(c: _Checker) -> None:
    pin, layers = c.pins.get("recompute"), c.graph.layers
    if pin is not None and isinstance(pin.value, tuple) and len(pin.value) != layers:
        message = f"recompute lists {len(pin.value)} layers, and the model has {layers}"
        c.report("MLM0428", message, pin, "one word for each layer, or one word for all of them")


def _copies(c: _Checker) -> None:
    n, pin = c.pinned("replicate"), c.pins.get("replicate")
    if pin is None or n == 1:
        return
    help = "it has to divide data, and to leave ZeRO ranks to share out over: pin zero = 3"
    if c.pinned("zero", 3) == 0:
        message = f"replicate = {n} copies sharded weights, and zero = 0 shards none"
        c.report("MLM0424", message, pin, help, c.others("zero"))
    elif "data" in c.pins and c.pinned("data") % n:
        c.report("MLM0424", f"replicate = {n} does not divide data = {c.pinned('data')}", pin, help, c.others("data"))
    elif {"data", "context"} <= c.pins.keys() and c.pinned("data") * c.pinned("context") == n:
        message = f"replicate = {n} leaves one rank to share each copy"
        c.report("MLM0424", message, pin, help, c.others("data", "context"))


# ---- rules ----------------------------------------------------------------------------------------------------------


def _rules(c: _Checker) -> None:
    """A hard rule over pinned variables alone has to hold; rules over one free variable have to leave it a value."""
    hard = [rule for rule in c.spec.plan.rules if rule.form in ("require", "forbid")]
    free: dict[str, list[Rule]] = {}
    for rule in hard:
        names = set(_names(rule.condition))
        if not names <= set(VARIABLES):
            continue
        if names <= set(c.pins):
            if not _holds(rule, {name: c.pins[name].value for name in names}):
                c.report("MLM0422", f"`{rule.text}` contradicts a pin", rule, "change one of the two", c.others(*sorted(names)))
        elif len(names) == 1 and names != {"stages"} and not names & set(c.pins):  # ways to cut are too many to try
            free.setdefault(next(iter(names)), []).append(rule)
    for name, rules in free.items():
        _leaves_a_value(c, name, rules)


def _cost(c: _Checker) -> None:
    """Without a price every plan would cost nothing."""
    if c.spec.cluster.usd_per_device_hour is not None:
        return
    for rule in c.spec.plan.rules:
        if "cost" in _names(rule.condition):
            where = (Label(c.spec.cluster.span, "this cluster has no price"),)
            c.report("MLM0425", "a rule on cost needs a price", rule, "add price = 2.50 USD/gpu/hour to the cluster", where)


def _leaves_a_value(c: _Checker, name: str, rules: list[Rule]) -> None:
    values = _domain(c, name)
    for index, rule in enumerate(rules):
        left = [value for value in values if _holds(rule, {name: value})]
        if not left:
            before = tuple(Label(r.span, "and asked for here") for r in rules[:index])
            c.report("MLM0422", f"`{rule.text}` leaves no value for {name}", rule, "change one of the rules", before)
            return
        values = left


def _domain(c: _Checker, name: str) -> list[Any]:
    words: dict[str, list[Any]] = {
        "schedule": [*SCHEDULES],
        "recompute": [*RECOMPUTE],
        "zero": [*ZEROS],
        "order": [*ORDERS],
    }
    if name in words:
        return words[name]
    if name == "sequence_parallel":
        return [False, True]
    most = {"micro_batch": c.spec.train.batch, "interleave": c.graph.layers}.get(name, c.spec.cluster.world_size)
    whole = c.spec.train.batch if name == "micro_batch" else c.spec.cluster.world_size
    return [n for n in range(1, most + 1) if name == "interleave" or whole % n == 0]


def _holds(rule: Rule, values: Mapping[str, Any]) -> bool:
    found = RuleEvaluator(values, Diagnostics()).value(rule.condition)
    return found is POISON or found is (rule.form == "require")


def _names(expr: s.Node) -> Iterable[str]:
    """Variables and facts of a condition; words that stand for themselves are none."""
    if isinstance(expr, s.Attribute):
        yield f".{expr.name}"
        return
    if isinstance(expr, s.Name) and expr.name not in WORDS:
        yield expr.name
    for part in nodes_below(expr):
        yield from _names(part)


_CHECKS: tuple[Callable[[_Checker], None], ...] = (
    _copies,
    _recomputed,
    _heads,
    _vocabulary,
    _layers,
    _stages,
    _world,
    _batch,
    _micro_batches,
    _sequence,
    _context,
    _experts,
    _schedule,
    _rules,
    _cost,
)
