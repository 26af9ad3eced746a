"""The typed syntax tree: what the text says, with a span on every node, before anything is resolved.

Immutable; one class per rule of `mlm.lark`. `Node.span` never takes part in equality, so that
`parse(format(tree)) == tree` can be asked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mlmdsl.diagnostics import Span


@dataclass(frozen=True)
class Node:
    span: Span = field(compare=False, repr=False, kw_only=True)


# ---- expressions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number(Node):
    """`50_257`, `3e-4`: an int where the text has neither point nor exponent."""

    value: int | float


@dataclass(frozen=True)
class QuantityLiteral(Node):
    """`80 GiB`, `200 Gb/s per gpu`: `number` as written, `unit` with single spaces ("GB/s", "Mi tok"), `per` gpu/node/None."""

    number: int | float
    unit: str
    per: str | None = None


@dataclass(frozen=True)
class String(Node):
    value: str


@dataclass(frozen=True)
class Bool(Node):
    value: bool


@dataclass(frozen=True)
class NoneLiteral(Node):
    """`none`."""


@dataclass(frozen=True)
class Broken(Node):
    """A value that could not be read; reported already."""


@dataclass(frozen=True)
class Name(Node):
    name: str


@dataclass(frozen=True)
class Attribute(Node):
    """`tok.weight`, `device.memory`."""

    value: Expr
    name: str
    name_span: Span = field(compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Argument(Node):
    """One argument of a call; `name` is None for a positional one."""

    value: Expr
    name: str | None = None
    name_span: Span | None = field(default=None, compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Call(Node):
    function: Expr
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Unary(Node):
    """`-x`, `not x`."""

    operator: Literal["-", "not"]
    operand: Expr


@dataclass(frozen=True)
class Binary(Node):
    """Arithmetic `+ - * / // % **`, comparison `== != < <= > >= in`, logic `and or`."""

    operator: str
    left: Expr
    right: Expr


@dataclass(frozen=True)
class Sequence(Node):
    """`(a, b)` (kind "tuple"), `[a, b]` ("list"), `{a, b}` ("set")."""

    kind: Literal["tuple", "list", "set"]
    items: tuple[Expr, ...]


Expr = Number | QuantityLiteral | String | Bool | NoneLiteral | Broken | Name | Attribute | Call | Unary | Binary | Sequence


# ---- the model language ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TypeExpr(Node):
    """`[B, S, d]` (base None: a float tensor), `int[B, S]`, `int`, `quantity`, `weight`. `dims` is None for a scalar."""

    base: str | None
    dims: tuple[Expr, ...] | None


@dataclass(frozen=True)
class Formal(Node):
    """`x: [B, S, d]`, `heads: int`, `ff = 4`."""

    name: str
    type: TypeExpr | None
    default: Expr | None


@dataclass(frozen=True)
class Const(Node):
    name: str
    value: Expr
    name_span: Span = field(compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Param(Node):
    """A constant that `--set` may override."""

    name: str
    type: TypeExpr | None
    value: Expr
    name_span: Span = field(compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Input(Node):
    name: str
    type: TypeExpr
    name_span: Span = field(compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Assign(Node):
    """`h = expr`, `q, k = expr`."""

    names: tuple[str, ...]
    value: Expr
    name_spans: tuple[Span, ...] = field(compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Repeat(Node):
    count: Expr
    name: str | None
    body: tuple[Statement, ...]


@dataclass(frozen=True)
class If(Node):
    """Decided when the graph is built: the condition is no tensor."""

    condition: Expr
    then: tuple[Statement, ...]
    otherwise: tuple[Statement, ...]


@dataclass(frozen=True)
class Output(Node):
    values: tuple[Expr, ...]


@dataclass(frozen=True)
class Expect(Node):
    condition: Expr


Statement = Const | Param | Input | Assign | Repeat | If | Output | Expect


# ---- items ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import(Node):
    path: str
    name: str | None
    path_span: Span = field(compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Block(Node):
    name: str
    formals: tuple[Formal, ...]
    body: tuple[Statement, ...]
    name_span: Span = field(compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Model(Node):
    name: str
    base: str | None
    formals: tuple[Formal, ...]
    body: tuple[Statement, ...]
    name_span: Span = field(compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Setting(Node):
    """`nodes = 4`; the key may be dotted."""

    key: str
    value: Expr
    key_span: Span = field(compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class SubConfig(Node):
    """`pool fast { ... }` inside a cluster."""

    kind: str
    name: str | None
    settings: tuple[ConfigStatement, ...]
    kind_span: Span = field(compare=False, repr=False, kw_only=True)


ConfigStatement = Setting | SubConfig | Const | Param


@dataclass(frozen=True)
class Config(Node):
    """A `cluster` or `train` item. `base` is the dotted name after `from`, or None."""

    kind: Literal["cluster", "train"]
    name: str | None
    base: str | None
    settings: tuple[ConfigStatement, ...]
    name_span: Span | None = field(compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Minimize(Node):
    objective: str
    objective_span: Span = field(compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Pin(Node):
    variable: str
    value: Expr
    variable_span: Span = field(compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Rule(Node):
    """`require`, `prefer`, `avoid`, `forbid`, each over one boolean expression."""

    form: Literal["require", "prefer", "avoid", "forbid"]
    condition: Expr


PlanStatement = Minimize | Pin | Rule


@dataclass(frozen=True)
class PlanBlock(Node):
    name: str | None
    base: str | None
    statements: tuple[PlanStatement, ...]


Item = Import | Const | Param | Block | Model | Config | PlanBlock


@dataclass(frozen=True)
class File(Node):
    """One source file. `source` is its text, for rendering diagnostics."""

    path: str
    source: str = field(compare=False, repr=False)
    items: tuple[Item, ...]
