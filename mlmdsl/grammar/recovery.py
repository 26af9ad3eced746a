"""What stands in for a statement that could not be read, so that one mistake does not make others: the names that it defines,
with broken values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from lark import Token

_VALUES = frozenset({"NUMBER", "QUANTITY", "STRING", "NAME"})


def placeholders(statement: Sequence[Token]) -> Iterator[list[Token]]:
    """Statements to feed instead of `statement`, each up to and with its newline; none where it defines nothing."""
    if len(statement) < 2:
        return
    first, second = statement[:2]
    if first.type in ("CONST", "PARAM") and second.type == "NAME":
        yield _assignment(second, first)
    elif first.type == "INPUT" and second.type == "NAME":
        yield _assignment(second)
    elif first.type in ("BLOCK", "IMPORT"):  # a name that calls and attributes do not complain about
        name = next((t for before, t in itertools.pairwise(statement) if before.type in ("BLOCK", "AS")), None)
        if name is not None and name.type == "NAME":
            yield _assignment(name, _like("CONST", "const", first))
    elif first.type == "OUTPUT":
        yield [first, *_broken(first)]
    elif first.type in ("REPEAT", "IF"):
        for name in _assigned(statement):
            yield _assignment(name)
    elif first.type == "NAME" and second.type in ("EQUAL", "COMMA", "DOT"):
        names = _target(statement)
        yield [*names, _like("EQUAL", "=", first), *_broken(first)]
    elif first.type == "NAME" and second.type in _VALUES:
        yield _assignment(first)


def _target(statement: Sequence[Token]) -> list[Token]:
    """`a, b` or `a.b` before the `=`."""
    end = next((i for i, t in enumerate(statement) if t.type == "EQUAL"), 1)
    return list(statement[:end])


def _assigned(statement: Sequence[Token]) -> Iterator[Token]:
    """Names before `=` that stand outside parentheses."""
    depth = 0
    for token, after in itertools.pairwise(statement):
        depth += (token.type in ("LPAR", "LSQB")) - (token.type in ("RPAR", "RSQB"))
        if token.type == "NAME" and after.type == "EQUAL" and depth <= 0:
            yield token


def _assignment(name: Token, *before: Token) -> list[Token]:
    return [*before, name, _like("EQUAL", "=", name), *_broken(name)]


def _broken(token: Token) -> list[Token]:
    return [_like("BROKEN", "", token), _like("_NL", "\n", token)]


def _like(kind: str, text: str, token: Token) -> Token:
    return Token.new_borrow_pos(kind, text, token)
