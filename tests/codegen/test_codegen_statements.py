"""Inlining, names by live range, comments: on hand-made steps."""

from __future__ import annotations

from mlmdsl.codegen.statements import Kind, Step, fill, returning, write

SCOPE = (("block", "Block"), ("block.attn", "Attention"))


def step(kind: Kind, template: str, inputs: str, result: str, name: str = "", **more: object) -> Step:
    keys = tuple((value, "") for value in inputs.split())
    return Step(kind, keys, ((result, ""),), template, hints=(name,), **more)  # type: ignore[arg-type]


def body(*steps: Step, result: str, given: str = "h") -> list[str]:
    names = {(name, ""): name for name in given.split()}
    return [line.strip() for line in write([*steps, returning(((result, ""),))], names).lines]


def test_slots_are_filled_with_as_few_parentheses_as_needed():
    assert fill("f(_0_, k=_1_) + _1_.size(0)", ["a + b", "c * d"]) == "f(a + b, k=c * d) + (c * d).size(0)"
    assert fill("_0_ + _1_", ["a", "b + c"]) == "a + (b + c)"
    assert fill("_10_ - _1_", [*"abcdefghij", "k"]) == "k - b"


def test_elementwise_work_is_written_around_what_it_uses():
    assert body(
        step("heavy", "linear(_0_)", "h", "a"),
        step("light", "gelu(_0_)", "a", "b"),
        step("heavy", "linear(_0_)", "b", "c"),
        step("light", "_0_ + _1_", "h c", "d", "h"),
        result="d",
    ) == ["x = gelu(linear(h))", "h = h + linear(x)", "return h"]


def test_siblings_share_a_line():
    assert body(
        step("heavy", "gate(_0_)", "h", "a"),
        step("light", "silu(_0_)", "a", "b"),
        step("heavy", "up(_0_)", "h", "c"),
        step("light", "_0_ * _1_", "b c", "d"),
        result="d",
    ) == ["return silu(gate(h)) * up(h)"]


def test_what_is_used_twice_or_repeated_in_a_template_is_a_statement():
    assert body(
        step("heavy", "f(_0_)", "h", "a"),
        step("light", "_0_ * sigmoid(_0_)", "a", "b"),
        result="b",
    ) == ["x = f(h)", "return x * sigmoid(x)"]


def test_reshapes_stand_behind_their_source():
    assert body(
        step("heavy", "query(_0_)", "h", "a", "query"),
        step("heavy", "key(_0_)", "h", "b", "key"),
        step("reshape", "_0_.view(4)", "a", "q", "q"),
        step("reshape", "_0_.view(4)", "b", "k"),
        step("heavy", "attend(_0_, _1_)", "q k", "o"),
        result="o",
    ) == ["q = query(h).view(4)", "key = key(h).view(4)", "return attend(q, key)"]


def test_a_name_is_free_again_when_its_value_is_dead():
    assert body(
        step("heavy", "f(_0_)", "h", "a", "h"),
        step("heavy", "g(_0_, _1_)", "h a", "b", "h"),
        step("heavy", "k(_0_, _1_)", "a b", "c", "h"),
        result="c",
    ) == ["h2 = f(h)", "h = g(h, h2)", "h = k(h2, h)", "return h"]


def test_names_of_python_are_left_alone():
    assert body(step("heavy", "f(_0_)", "h", "a", "lambda"), step("heavy", "g(_0_)", "a", "b", "input"), result="b") == [
        "lambda_ = f(h)",
        "input_ = g(lambda_)",
        "return input_",
    ]


def test_collectives_keep_their_line_and_stand_behind_their_source():
    assert body(
        step("heavy", "embed(_0_)", "h", "a"),
        step("heavy", "position(_0_)", "h", "b"),
        step("collective", "reduce(_0_)", "a", "c", comment="32 KiB", shape="[S/tp]"),
        step("light", "_0_ + _1_", "c b", "d"),
        result="d",
    ) == ["x = embed(h)", "x = reduce(x)  # [S/tp], 32 KiB", "return x + position(h)"]


def test_a_collective_on_a_value_that_lives_on_gets_its_own_name():
    assert body(
        step("collective", "gather(_0_)", "h", "g"),
        step("heavy", "f(_0_)", "g", "a"),
        step("light", "_0_ + _1_", "h a", "b", "h"),
        result="b",
    ) == ["x = gather(h)", "h = h + f(x)", "return h"]


def test_passages_and_shapes_are_said_where_they_change():
    assert body(
        step("heavy", "norm(_0_)", "h", "a", shape="[B, 64]", scope=SCOPE[:1]),
        step("heavy", "query(_0_)", "a", "q", "q", shape="[B, 32]", scope=SCOPE),
        step("heavy", "key(_0_)", "a", "k", "k", shape="[B, 32]", scope=SCOPE),
        step("heavy", "attend(_0_, _1_)", "q k", "o", "o", shape="[B, 64]", scope=SCOPE),
        result="o",
    ) == [
        "x = norm(h)  # [B, 64]",
        "# attn: Attention",
        "q = query(x)  # [B, 32]",
        "k = key(x)",
        "o = attend(q, k)  # [B, 64]",
        "return o",
    ]


def test_conditions_are_grouped():
    lines = write(
        [
            step("heavy", "f(_0_)", "h", "a", "h", condition="self.first"),
            step("heavy", "g(_0_)", "a", "b", "h", condition="self.first"),
            step("heavy", "g(_0_)", "b", "c", "h"),
            returning((("c", ""),)),
        ],
        {("h", ""): "h"},
    ).lines
    assert [line[8:] for line in lines] == ["if self.first:", "    h = f(h)", "    h = g(h)", "h = g(h)", "return h"]
