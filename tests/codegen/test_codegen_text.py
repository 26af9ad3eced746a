"""Literals, comments and layout."""

from __future__ import annotations

import ast

from hypothesis import given
from hypothesis import strategies as st

from mlmdsl.codegen.text import WIDTH, Call, commented, lay_out, literal, number, plain, wrap


@given(
    st.text()
    | st.tuples(st.text())
    | st.tuples(st.text(), st.integers())
    | st.tuples(st.floats(allow_nan=False), st.booleans())
)
def test_literals_evaluate_to_their_value(value: object):
    text = literal(value)
    assert len(text.splitlines()) == 1
    if "inf" not in text:
        assert ast.literal_eval(text) == value


@given(st.text())
def test_plain_text_cannot_leave_a_comment_or_docstring(text: str):
    safe = plain(text)
    assert len(ast.parse(f"# {safe}\nx = 1").body) == 1
    tree = ast.parse(f'"""{safe}"""')
    assert len(tree.body) == 1 and ast.get_docstring(tree, clean=False) == safe


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers())
def test_numbers_are_exact(value: float):
    assert ast.literal_eval(number(value)) == value


def test_numbers_are_short():
    assert [number(x) for x in (3e-4, 0.02, 989e12, 1e-8, 0.0, 1, 855588864.0)] == [
        "3e-4",
        "0.02",
        "9.89e14",
        "1e-8",
        "0.0",
        "1",
        "855588864.0",
    ]


def test_long_calls_are_exploded():
    short = Call("f", (("", "1"), ("key", "2")))
    assert lay_out("x = ", short, 1) == ["    x = f(1, key=2)"]
    long = Call("Scope", tuple((f"name{i}", short) for i in range(8)))
    lines = lay_out("x = ", long, 1)
    assert lines[0] == "    x = Scope(" and lines[1] == "        name0=f(1, key=2)," and lines[-1] == "    )"
    ast.parse("\n".join(lines).replace("    x", "x", 1))


def test_comments_move_above_long_lines():
    assert commented("x = 1", ("[B, S]", "32 KiB"), 1) == ["    x = 1  # [B, S], 32 KiB"]
    assert commented("x = 1", ("", "note " * 30), 1)[-1] == "    x = 1"
    assert all(len(line) <= WIDTH for line in commented("x = 1", ("[B, S]", "note " * 60), 2))


@given(st.text(), st.integers(5, 40))
def test_wrapped_lines_fit(text: str, width: int):
    lines = wrap(text, width)
    assert all(len(line) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_long_tuples_are_written_as_runs():
    stages = (1, *(2,) * 62, 1)
    assert literal(stages) == "(1, *(2,) * 62, 1)" and eval(literal(stages)) == stages
    assert eval(literal((3,) * 20)) == (3,) * 20
    assert literal((1, 1, 2)) == "(1, 1, 2)"
