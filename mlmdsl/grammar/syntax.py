"""The typed syntax tree: what the text says, with a span on every node, before anything is resolved.

Immutable; one class per rule of `mlm.lark`. `Node.span` never takes part in equality, so that
`parse(format(tree)) == tree` can be asked.
"""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from mlmdsl.diagnostics import Span
from mlmdsl.frozen import frozen


@frozen
class Node:
    span: Span = field(compare=False, repr=False, kw_only=True)


# ---- expressions ----------------------------------------------------------------------------------------------------


@frozen
class Number(Node):
    """`50_257`, `3e-4`: an int where the text has neither point nor exponent."""

    value: int | float


@frozen
class QuantityLiteral(Node):
    """`80 GiB`, `200 Gb/s per gpu`: `number` as written, `unit` with single spaces ("GB/s", "Mi tok"), `per` gpu/node/None."""

    number: int | float
    unit: str
    per: str | None = None


@frozen
class String(Node):
    value: str


@frozen
class Bool(Node):
    value: bool


@frozen
class NoneLiteral(Node):
    """`none`."""


@frozen
class Broken(Node):
    """A value that could not be read; reported already."""


@frozen
class Name(Node):
    name: str


@frozen
class Attribute(Node):
    """`tok.weight`, `device.memory`."""

    value: Expr
    name: str
    name_span: Span = field(compare=False, repr=False, kw_only=True)


@frozen
class Argument(Node):
    """One argument of a call; `name` is None for a positional one."""

    value: Expr
    name: str | None = None
    name_span: Span | None = field(default=None, compare=False, repr=False, kw_only=True)


@frozen
class Call(Node):
    function: Expr
    arguments: tuple[Argument, ...]


@frozen
class Unary(Node):
    """`-x`, `not x`."""

    operator: Literal["-", "not"]
    operand: Expr


@frozen
class Binary(Node):
    """Arithmetic `+ - * / // % **`, comparison `== != < <= > >= in`, logic `and or`."""

    operator: str
    left: Expr
    right: Expr


@frozen
class Sequence(Node):
    """`(a, b)` (kind "tuple"), `[a, b]` ("list"), `{a, b}` ("set")."""

    kind: Literal["tuple", "list", "set"]
    items: tuple[Expr, ...]


Expr = Number | QuantityLiteral | String | Bool | NoneLiteral | Broken | Name | Attribute | Call | Unary | Binary | Sequence


# ---- the model language ---------------------------------------------------------------------------------------------


@frozen
class TypeExpr(Node):
    """`[B, S, d]` (base None: a float tensor), `int[B, S]`, `int`, `quantity`, `weight`. `dims` is None for a scalar."""

    base: str | None
    dims: tuple[Expr, ...] | None


@frozen
class Formal(Node):
    """`x: [B, S, d]`, `heads: int`, `ff = 4`."""

    name: str
    type: TypeExpr | None
    default: Expr | None


@frozen
class Const(Node):
    name: str
    value: Expr
    name_span: Span = field(compare=False, repr=False, kw_only=True)


@frozen
class Param(Node):
    """A constant that `--set` may override."""

    name: str
    type: TypeExpr | None
    value: Expr
    name_span: Span = field(compare=False, repr=False, kw_only=True)


@frozen
class Input(Node):
    name: str
    type: TypeExpr
    name_span: Span = field(compare=False, repr=False, kw_only=True)


@frozen
class Assign(Node):
    """`h = expr`, `q, k = expr`."""

    names: tuple[str, ...]
    value: Expr
    name_spans: tuple[Span, ...] = field(compare=False, repr=False, kw_only=True)


@frozen
class Repeat(Node):
    count: Expr
    name: str | None
    body: tuple[Statement, ...]


@frozen
class If(Node):
    """Decided when the graph is built: the condition is no tensor."""

    condition: Expr
    then: tuple[Statement, ...]
    otherwise: tuple[Statement, ...]


@frozen
class Output(Node):
    values: tuple[Expr, ...]


@frozen
class Expect(Node):
    condition: Expr


Statement = Const | Param | Input | Assign | Repeat | If | Output | Expect


# ---- items ----------------------------------------------------------------------------------------------------------


@frozen
class Import(Node):
    path: str
    name: str | None
    path_span: Span = field(compare=False, repr=False, kw_only=True)


@frozen
class Block(Node):
    name: str
    formals: tuple[Formal, ...]
    body: tuple[Statement, ...]
    name_span: Span = field(compare=False, repr=False, kw_only=True)


@frozen
class Model(Node):
    name: str
    base: str | None
    formals: tuple[Formal, ...]
    body: tuple[Statement, ...]
    name_span: Span = field(compare=False, repr=False, kw_only=True)


@frozen
class Setting(Node):
    """`nodes = 4`; the key may be dotted."""

    key: str
    value: Expr
    key_span: Span = field(compare=False, repr=False, kw_only=True)


@frozen
class SubConfig(Node):
    """`pool fast { ... }` inside a cluster."""

    kind: str
    name: str | None
    settings: tuple[ConfigStatement, ...]
    kind_span: Span = field(compare=False, repr=False, kw_only=True)


ConfigStatement = Setting | SubConfig | Const | Param


@frozen
class Config(Node):
    """A `cluster` or `train` item. `base` is the dotted name after `from`, or None."""

    kind: Literal["cluster", "train"]
    name: str | None
    base: str | None
    settings: tuple[ConfigStatement, ...]
    name_span: Span | None = field(compare=False, repr=False, kw_only=True)


@frozen
class Minimize(Node):
    objective: str
    objective_span: Span = field(compare=False, repr=False, kw_only=True)


@frozen
class Pin(Node):
    variable: str
    value: Expr
    variable_span: Span = field(compare=False, repr=False, kw_only=True)


@frozen
class Rule(Node):
    """`require`, `prefer`, `avoid`, `forbid`, each over one boolean expression."""

    form: Literal["require", "prefer", "avoid", "forbid"]
    condition: Expr


PlanStatement = Minimize | Pin | Rule


@frozen
class PlanBlock(Node):
    name: str | None
    base: str | None
    statements: tuple[PlanStatement, ...]


Item = Import | Const | Param | Block | Model | Config | PlanBlock


@frozen
class File(Node):
    """One source file. `source` is its text, for rendering diagnostics."""

    path: str
    source: str = field(compare=False, repr=False)
    items: tuple[Item, ...]
