"""Declarations of weights: nested `Scope`s whose attribute paths are the checkpoint's keys."""

from __future__ import annotations

from collections.abc import Sequence

from mlmdsl.codegen.names import attribute, attribute_path
from mlmdsl.codegen.text import Call, lay_out, literal, number
from mlmdsl.graph.placement import WeightPlacement
from mlmdsl.graph.tensor import Weight

# With the weight's name inside the module, and the axis that shares out experts
Placed = tuple[str, Weight, WeightPlacement, str | None]


def declaration(weight: Weight, placement: WeightPlacement, expert: str | None) -> Call:
    """`weight((64, 64), normal(0.02), tp, shard=0)`; `expert` names the axis that shares out experts."""
    init = f"normal({weight.init.std:.6g})" if weight.init.kind == "normal" else weight.init.kind
    arguments = [("", literal(weight.shape)), ("", init)]
    if placement.dim is not None:
        arguments += [("", "tp"), ("shard", str(placement.dim))]
    elif placement.partial_gradient:
        arguments += [("", "tp"), ("partial", "True")]
    if weight.expert and expert is not None:
        arguments.append(("ep", expert))
    if weight.decay != (len(weight.shape) > 1):
        arguments.append(("decay", str(weight.decay)))
    if weight.balance:
        arguments.append(("balance", number(weight.balance)))
    return Call("weight", tuple(arguments))


def declarations(weights: Sequence[Placed], indent: int) -> list[tuple[str, str]]:
    """Lines that make the weights attributes of `self`, each with the name of its outermost scope."""
    lines: list[tuple[str, str]] = []
    for head, inside in _grouped(weights).items():
        text = lay_out(f"self.{attribute(head)} = ", _tree(inside), indent)
        lines += [(head, line) for line in text]
    return lines


def _tree(weights: Sequence[Placed]) -> Call:
    if weights[0][0] == "":
        assert len(weights) == 1, "a weight has the name of a scope"
        return declaration(*weights[0][1:])
    return Call("Scope", tuple((attribute(name), _tree(inside)) for name, inside in _grouped(weights).items()))


def _grouped(weights: Sequence[Placed]) -> dict[str, list[Placed]]:
    """By the first part of the name, the rest kept."""
    groups: dict[str, list[Placed]] = {}
    for name, weight, placement, expert in weights:
        head, _, rest = name.partition(".")
        groups.setdefault(head, []).append((rest, weight, placement, expert))
    return groups


def skeleton(weights: Sequence[Placed]) -> list[str]:
    """The scopes of the weights, empty still."""
    scopes = dict.fromkeys(
        ".".join(parts[:length]) for name, *_ in weights if (parts := name.split(".")) for length in range(1, len(parts))
    )
    return [f"self.{attribute_path(scope)} = Scope()" for scope in scopes]


def late(weight: Placed) -> list[str]:
    """One weight put into a scope that exists."""
    name, declared, placement, expert = weight
    return lay_out(f"self.{attribute_path(name)} = ", declaration(declared, placement, expert), 0)
