"""Between lexer and parser: a keyword is a name where only a name can stand."""

from __future__ import annotations

from collections.abc import Iterator

from lark import Token
from lark.lark import PostLex

from mlmdsl.diagnostics import Span

KEYWORDS = frozenset(
    "import as const param block model from cluster train plan input output repeat if else expect pool "  # noqa: SIM905
    "minimize pin require prefer avoid forbid in and or not true false none mlm".split()
)


class Tokens(PostLex):
    """lark's hook; `always_accept` keeps the terminal for illegal characters in the lexer."""

    always_accept = ("BAD",)

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        held: Token | None = None
        before = ""
        for token in stream:
            if held is not None:
                held = _softened(held, before, token)
                before = held.type
                yield held
            held = token
        if held is not None:
            yield held


def _softened(token: Token, before: str, after: Token) -> Token:
    """`output = 3`, `x.input`: the word is a name there."""
    if str(token) in KEYWORDS and (before == "DOT" or after.type == "EQUAL"):
        return Token.new_borrow_pos("NAME", str(token), token)
    return token


def token_span(token: Token, path: str) -> Span:
    line, column = token.line or 1, token.column or 1
    return Span(path, line, column, token.end_line or line, token.end_column or column + len(token))
