"""lark's tree to the dataclasses of syntax.py: one method per rule of mlm.lark, spans from the first to the last token."""

# lark's types are not complete
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import re
from typing import Any

from lark import Token, Transformer, v_args
from lark.tree import Meta

from mlmdsl.diagnostics import Span
from mlmdsl.grammar import syntax as s
from mlmdsl.grammar.tokens import token_span

_QUANTITY = re.compile(
    r"(?P<number>[0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)[ \t]*(?P<unit>.*?)(?:[ \t]+per[ \t]+(?P<per>[A-Za-z]+))?$"
)
_ESCAPES = {"n": "\n", "t": "\t", '"': '"', "\\": "\\"}


_MOST_DIGITS = 300  # of an integer; a longer one is infinite, which the evaluator refuses


def number(text: str) -> int | float:
    """`50_257` is an int, `3e-4` and `1.0` are floats."""
    digits = text.replace("_", "")
    return int(digits) if digits.isdigit() and len(digits) <= _MOST_DIGITS else float(digits)


def unescape(literal: str) -> str:
    """The text of a string literal: \\n, \\t, \\" and \\\\ are escapes, any other backslash stands for itself."""
    return re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[0]), literal[1:-1])


def _present(children: list[Any]) -> tuple[Any, ...]:
    return tuple(c for c in children if c is not None)


@v_args(meta=True)
class ToSyntax(Transformer[Token, Any]):
    def __init__(self, path: str, source: str):
        super().__init__()
        self._path, self._source = path, source

    def _span(self, meta: Meta) -> Span:
        if meta.empty:
            return Span(self._path, 1, 1, 1, 1)
        return Span(self._path, meta.line, meta.column, meta.end_line, meta.end_column)

    def _of(self, token: Token) -> Span:
        return token_span(token, self._path)

    # ---- items

    def start(self, meta: Meta, children: list[Any]) -> s.File:
        return s.File(self._path, self._source, tuple(c for c in children if isinstance(c, s.Item)), span=self._span(meta))

    def import_(self, meta: Meta, children: list[Any]) -> s.Import:
        path, name = children
        return s.Import(unescape(path), name and str(name), path_span=self._of(path), span=self._span(meta))

    def const(self, meta: Meta, children: list[Any]) -> s.Const:
        name, value = children
        return s.Const(str(name), value, name_span=self._of(name), span=self._span(meta))

    def param(self, meta: Meta, children: list[Any]) -> s.Param:
        name, kind, value = children
        return s.Param(str(name), kind, value, name_span=self._of(name), span=self._span(meta))

    def block(self, meta: Meta, children: list[Any]) -> s.Block:
        name, formals, body = children
        return s.Block(str(name), formals or (), body, name_span=self._of(name), span=self._span(meta))

    def model(self, meta: Meta, children: list[Any]) -> s.Model:
        name, base, formals, body = children
        return s.Model(str(name), base and base[0], formals or (), body, name_span=self._of(name), span=self._span(meta))

    def cluster(self, meta: Meta, children: list[Any]) -> s.Config:
        return self._config("cluster", meta, children)

    def train(self, meta: Meta, children: list[Any]) -> s.Config:
        return self._config("train", meta, children)

    def _config(self, kind: Any, meta: Meta, children: list[Any]) -> s.Config:
        name, base, settings = children
        where = self._of(name) if name else None
        return s.Config(kind, name and str(name), base and base[0], settings, name_span=where, span=self._span(meta))

    def plan(self, meta: Meta, children: list[Any]) -> s.PlanBlock:
        name, base, rules = children
        return s.PlanBlock(name and str(name), base and base[0], rules, span=self._span(meta))

    def formals(self, meta: Meta, children: list[Any]) -> tuple[s.Formal, ...]:
        return _present(children)

    def formal(self, meta: Meta, children: list[Any]) -> s.Formal:
        name, kind, default = children
        return s.Formal(str(name), kind, default, span=self._span(meta))

    def tensor_type(self, meta: Meta, children: list[Any]) -> s.TypeExpr:
        return s.TypeExpr(str(children[0]), children[1], span=self._span(meta))

    def scalar_type(self, meta: Meta, children: list[Any]) -> s.TypeExpr:
        return s.TypeExpr(str(children[0]), None, span=self._span(meta))

    def float_type(self, meta: Meta, children: list[Any]) -> s.TypeExpr:
        return s.TypeExpr(None, children[0], span=self._span(meta))

    def dims(self, meta: Meta, children: list[Any]) -> tuple[s.Expr, ...]:
        return _present(children)

    def dotted(self, meta: Meta, children: list[Any]) -> tuple[str, Span]:
        return ".".join(map(str, children)), self._span(meta)

    # ---- statements

    def _statements(self, meta: Meta, children: list[Any]) -> tuple[Any, ...]:
        return tuple(c for c in children if isinstance(c, s.Node))

    body = config = rules = _statements

    def input(self, meta: Meta, children: list[Any]) -> s.Input:
        name, kind = children
        return s.Input(str(name), kind, name_span=self._of(name), span=self._span(meta))

    def assign(self, meta: Meta, children: list[Any]) -> s.Assign:
        *names, value = children
        spans = tuple(self._of(n) for n in names)
        return s.Assign(tuple(map(str, names)), value, name_spans=spans, span=self._span(meta))

    def repeat(self, meta: Meta, children: list[Any]) -> s.Repeat:
        count, name, body = children
        return s.Repeat(count, name and str(name), body, span=self._span(meta))

    def if_(self, meta: Meta, children: list[Any]) -> s.If:
        condition, then, otherwise = children
        rest = (otherwise,) if isinstance(otherwise, s.If) else otherwise or ()
        return s.If(condition, then, rest, span=self._span(meta))

    def output(self, meta: Meta, children: list[Any]) -> s.Output:
        return s.Output(_present(children), span=self._span(meta))

    def expect(self, meta: Meta, children: list[Any]) -> s.Expect:
        return s.Expect(children[0], span=self._span(meta))

    def setting(self, meta: Meta, children: list[Any]) -> s.Setting:
        (key, where), value = children
        return s.Setting(key, value, key_span=where, span=self._span(meta))

    def pool(self, meta: Meta, children: list[Any]) -> s.SubConfig:
        name, settings = children
        span = self._span(meta)
        word = Span(span.file, span.line, span.column, span.line, span.column + len("pool"))
        return s.SubConfig("pool", name and str(name), settings, kind_span=word, span=span)

    def minimize(self, meta: Meta, children: list[Any]) -> s.Minimize:
        return s.Minimize(str(children[0]), objective_span=self._of(children[0]), span=self._span(meta))

    def pin(self, meta: Meta, children: list[Any]) -> s.Pin:
        (variable, where), value = children
        return s.Pin(variable, value, variable_span=where, span=self._span(meta))

    def schedule(self, meta: Meta, children: list[Any]) -> s.String:
        return s.String(str(children[0]), span=self._span(meta))

    def require(self, meta: Meta, children: list[Any]) -> s.Rule:
        form: Any = str(children[0])
        return s.Rule(form, children[1], span=self._span(meta))

    # ---- expressions

    def binary(self, meta: Meta, children: list[Any]) -> s.Binary:
        left, operator, right = children
        return s.Binary(str(operator), left, right, span=self._span(meta))

    def _word(self, operator: str, meta: Meta, children: list[Any]) -> s.Binary:
        return s.Binary(operator, *children, span=self._span(meta))

    def binary_or(self, meta: Meta, children: list[Any]) -> s.Binary:
        return self._word("or", meta, children)

    def binary_and(self, meta: Meta, children: list[Any]) -> s.Binary:
        return self._word("and", meta, children)

    def binary_in(self, meta: Meta, children: list[Any]) -> s.Binary:
        return self._word("in", meta, children)

    def negation(self, meta: Meta, children: list[Any]) -> s.Unary:
        return s.Unary("not", children[0], span=self._span(meta))

    def minus(self, meta: Meta, children: list[Any]) -> s.Unary:
        return s.Unary("-", children[1], span=self._span(meta))

    def call(self, meta: Meta, children: list[Any]) -> s.Call:
        function, arguments = children
        return s.Call(function, arguments or (), span=self._span(meta))

    def arguments(self, meta: Meta, children: list[Any]) -> tuple[s.Argument, ...]:
        return _present(children)

    def keyword(self, meta: Meta, children: list[Any]) -> s.Argument:
        return s.Argument(children[1], str(children[0]), name_span=self._of(children[0]), span=self._span(meta))

    def positional(self, meta: Meta, children: list[Any]) -> s.Argument:
        return s.Argument(children[0], span=self._span(meta))

    def attribute(self, meta: Meta, children: list[Any]) -> s.Attribute:
        value, name = children
        return s.Attribute(value, str(name), name_span=self._of(name), span=self._span(meta))

    def number(self, meta: Meta, children: list[Any]) -> s.Number:
        return s.Number(number(children[0]), span=self._span(meta))

    def quantity(self, meta: Meta, children: list[Any]) -> s.QuantityLiteral:
        found = _QUANTITY.match(children[0])
        assert found is not None
        unit = " ".join(found["unit"].split())
        return s.QuantityLiteral(number(found["number"]), unit, found["per"], span=self._span(meta))

    def string(self, meta: Meta, children: list[Any]) -> s.String:
        return s.String(unescape(children[0]), span=self._span(meta))

    def true(self, meta: Meta, children: list[Any]) -> s.Bool:
        return s.Bool(True, span=self._span(meta))

    def false(self, meta: Meta, children: list[Any]) -> s.Bool:
        return s.Bool(False, span=self._span(meta))

    def none(self, meta: Meta, children: list[Any]) -> s.NoneLiteral:
        return s.NoneLiteral(span=self._span(meta))

    def broken(self, meta: Meta, children: list[Any]) -> s.Broken:
        return s.Broken(span=self._span(meta))

    def name(self, meta: Meta, children: list[Any]) -> s.Name:
        return s.Name(str(children[0]), span=self._span(meta))

    def parenthesised(self, meta: Meta, children: list[Any]) -> Any:
        return children[0]

    def tuple_(self, meta: Meta, children: list[Any]) -> s.Sequence:
        return s.Sequence("tuple", _present(children), span=self._span(meta))

    def list_(self, meta: Meta, children: list[Any]) -> s.Sequence:
        return s.Sequence("list", _present(children), span=self._span(meta))

    def set_(self, meta: Meta, children: list[Any]) -> s.Sequence:
        return s.Sequence("set", _present(children), span=self._span(meta))
