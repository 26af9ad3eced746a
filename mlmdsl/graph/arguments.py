"""Matching the arguments of a call with what a block or a primitive operation takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlmdsl.diagnostics import Label, Span
from mlmdsl.grammar import syntax as s
from mlmdsl.grammar.evaluate import POISON, Evaluator, did_you_mean, kind_of
from mlmdsl.graph.calls import REQUIRED, Argument, Signature
from mlmdsl.graph.values import Symbol, TensorValue, WeightRef
from mlmdsl.units import Quantity


@dataclass
class Given:
    """The arguments of one call; after `bind`, `spans` has them by the formals' names too."""

    name: str
    positional: tuple[Any, ...]
    keywords: Mapping[str, Any]
    spans: dict[str | int, Span]
    span: Span
    names: Mapping[str, Span] = field(default_factory=dict[str, Span])  # where arguments are named

    def bind(self, names: Sequence[str], body: Evaluator) -> dict[str, Any] | None:
        """Values by name; None where arguments are too many, unknown or doubled (reported)."""
        sound = True
        bound: dict[str, Any] = {}
        for index, value in enumerate(self.positional):
            if index >= len(names):
                count = f"{len(names)} argument{'s' * (len(names) != 1)}"
                body.poison("MLM0252", f"`{self.name}` takes {count}", self.spans.get(index, self.span), label="one too many")
                sound = False
                break
            bound[names[index]] = value
            self.spans[names[index]] = self.spans.get(index, self.span)
        for key, value in self.keywords.items():
            if key not in names:
                help = did_you_mean(key, names) or f"it takes {', '.join(names)}"
                body.poison("MLM0251", f"`{self.name}` has no argument `{key}`", self.names.get(key, self.span), help=help)
                sound = False
            elif key in bound:
                body.poison("MLM0205", f"`{key}` is given twice", self.names.get(key, self.span), help="keep one of the two")
                sound = False
            else:
                bound[key] = value
        return bound if sound else None


def bind_tensors(
    body: Evaluator, given: Given, signature: Signature
) -> tuple[tuple[TensorValue, ...] | None, dict[str, Any] | None]:
    """The tensors and the other arguments of a primitive; None for either where something is wrong (reported)."""
    names = [*signature.tensors, *signature.optional, *(a.name for a in signature.arguments)]
    bound = given.bind(names, body)
    if bound is None:
        return None, None
    present = [name for name in signature.optional if bound.get(name) is not None]
    tensors = [_tensor(body, given, bound, name) for name in (*signature.tensors, *present)]
    others = {a.name: _argument(body, given, bound, a) for a in signature.arguments}
    if POISON in tensors or any(value is POISON for value in others.values()):
        return None, None
    return tuple(tensors), others | {name: name in present for name in signature.noted}


def _tensor(body: Evaluator, given: Given, bound: Mapping[str, Any], name: str) -> Any:
    if name not in bound:
        return body.poison("MLM0253", f"`{given.name}` needs `{name}`", given.span)
    value = bound[name]
    if value is POISON or isinstance(value, TensorValue):
        return value
    where = given.spans.get(name, given.span)
    return body.poison("MLM0256", f"`{name}` of `{given.name}` is a tensor, not {describe(value)}", where)


def _argument(body: Evaluator, given: Given, bound: Mapping[str, Any], argument: Argument) -> Any:
    if argument.name not in bound:
        if argument.default is not REQUIRED:
            return argument.default
        help = f"write {given.name}(..., {argument.name} = ...)"
        return body.poison("MLM0253", f"`{given.name}` needs `{argument.name}`", given.span, help=help)
    value = bound[argument.name]
    if value is POISON or (value is None and argument.default is None):
        return value
    where = given.spans.get(argument.name, given.span)
    found = _as_kind(argument.kind, value)
    if found is not POISON:
        return found
    return body.poison(
        "MLM0257", f"`{argument.name}` of `{given.name}` is {_WANTED[argument.kind]}, not {describe(value)}", where
    )


_WANTED = {
    "int": "a positive integer",
    "float": "a number",
    "optional float": "a number",
    "optional int": "an integer of 1 or more",
    "bool": "true or false",
    "weight": "a weight, such as `tok.weight`",
    "string": "a string",
    "quantity": "a quantity",
}


def _as_kind(kind: str, value: Any) -> Any:
    """The value in its Python type; POISON where it is of another kind."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if kind in ("int", "optional int"):
        return value if plain and isinstance(value, int) and value >= 1 else POISON
    if kind in ("float", "optional float"):
        return float(value) if plain else POISON
    types = {"bool": bool, "weight": WeightRef, "string": str, "quantity": Quantity}
    return value if isinstance(value, types[kind]) else POISON


def check_scalar(body: Evaluator, formal: s.Formal, value: Any, where: Span) -> Any:
    """A formal such as `heads: int`; its default may be `none`."""
    assert formal.type is not None
    kind = formal.type.base or ""
    if kind not in _WANTED:
        return body.poison(
            "MLM0258",
            f"there is no type `{kind}`",
            formal.type.span,
            help=did_you_mean(kind, _WANTED) or "int, float, bool, string, weight",
        )
    if value is None and (formal.default is None or isinstance(formal.default, s.NoneLiteral)):
        return value
    found = _as_kind(kind, value)
    if found is not POISON:
        return found
    message = f"`{formal.name}` is {_WANTED[kind]}, not {describe(value)}"
    return body.poison(
        "MLM0257", message, where, secondary=(Label(formal.span, "declared here"),) if formal.span != where else ()
    )


def undivided(body: Evaluator, formal: s.Formal, value: Any, given: Given) -> bool:
    """Reports a default such as `head_dim: int = d / heads` where the one does not divide the other."""
    assert formal.type is not None
    ratio = formal.default
    if formal.type.base != "int" or not isinstance(ratio, s.Binary) or ratio.operator != "/" or not isinstance(value, float):
        return False
    left, right = body.value(ratio.left), body.value(ratio.right)
    names = [part.name for part in (ratio.right, ratio.left) if isinstance(part, s.Name)]
    where = next((given.spans[name] for name in names if name in given.spans), given.span)
    message = f"`{formal.name}` of `{given.name}` would be {left} / {right}, which is no integer"
    help = f"{names[0]} has to divide {left}" if names else f"give {formal.name}"
    body.poison("MLM0410", message, where, secondary=(Label(formal.span, "declared here"),), help=help)
    return True


def match_dims(body: Any, formal: s.Formal, value: Any, where: Span) -> Any:
    """A formal such as `x: [B, S, d]`: names not known yet are bound to the tensor's sizes, the others have to agree. A
    tensor whose default is `none` may be `none`."""
    assert formal.type is not None and formal.type.dims is not None
    if value is None and isinstance(formal.default, s.NoneLiteral):
        return value
    declared = (Label(formal.type.span, "declared here"),)
    if not isinstance(value, TensorValue):
        return body.poison("MLM0256", f"`{formal.name}` is a tensor, not {describe(value)}", where, secondary=declared)
    wants_int = formal.type.base == "int"
    if wants_int != (value.type.dtype == "int"):
        wanted = "integers" if wants_int else "floating-point values"
        return body.poison("MLM0502", f"`{formal.name}` holds {wanted}, not {value.type}", where, secondary=declared)
    if len(formal.type.dims) != len(value.type.shape):
        message = f"`{formal.name}` has {len(formal.type.dims)} dims, {value.type} has {len(value.type.shape)}"
        return body.poison("MLM0507", message, where, secondary=declared)
    for dim, size in zip(formal.type.dims, value.type.shape, strict=True):
        actual = Symbol(size) if isinstance(size, str) else size
        if isinstance(dim, s.Name) and dim.name not in body.variables:
            body.variables[dim.name] = actual
            continue
        wanted = body.value(dim)
        if wanted is POISON:
            return POISON
        if wanted != actual:
            shown = wanted.name if isinstance(wanted, Symbol) else wanted
            message = f"`{formal.name}` is {value.type}, but this dim has to be {shown}"
            return body.poison("MLM0501", message, where, secondary=(Label(dim.span, f"{shown} here"),))
    return value


def describe(value: object) -> str:
    if isinstance(value, TensorValue):
        return f"a tensor {value.type}"
    if isinstance(value, WeightRef):
        return "a weight"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return kind_of(value)
