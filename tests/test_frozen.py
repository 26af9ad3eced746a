"""`@frozen` beside `@dataclass(frozen=True)`."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import pytest

from mlmdsl.frozen import frozen


def classes(decorate: Callable[[Any], Any]) -> tuple[Any, Any, Any]:
    """A base with a field by name, one that inherits from it, and one without fields to compare."""

    @decorate
    class Node:
        span: int = field(compare=False, repr=False, kw_only=True)

    @decorate
    class Named(Node):
        name: str
        parts: list[int] = field(default_factory=list)
        size: float = 1.5

        @cached_property
        def twice(self) -> float:
            return 2 * self.size

    @decorate
    class Empty(Node):
        """Says nothing."""

    return Node, Named, Empty


BOTH = pytest.mark.parametrize("decorate", [frozen, dataclass(frozen=True)], ids=["frozen", "dataclass"])


@BOTH
def test_made_shown_and_compared(decorate: Callable[[Any], Any]) -> None:
    _, named, empty = classes(decorate)
    one = named("a", span=3)
    assert (one.name, one.parts, one.size, one.span, one.twice) == ("a", [], 1.5, 3, 3.0)
    assert one.parts is not named("a", span=3).parts
    assert one == named("a", [], 1.5, span=4) != named("b", span=3)
    assert one != empty(span=3) == empty(span=4) and one.__eq__(3) is NotImplemented
    assert repr(one).endswith("Named(name='a', parts=[], size=1.5)")
    assert hash(named("a", (), span=3)) == hash(named("a", (), span=4)) and hash(empty(span=1)) == hash(empty(span=2))
    with pytest.raises(TypeError):
        hash(one)


@BOTH
def test_refuses_changes_and_wrong_arguments(decorate: Callable[[Any], Any]) -> None:
    _, named, _ = classes(decorate)
    one = named("a", span=3)
    for change in (lambda: setattr(one, "name", "b"), lambda: setattr(one, "new", 1), lambda: delattr(one, "size")):
        with pytest.raises(FrozenInstanceError):
            change()
    for arguments, keywords in (
        ((), {"span": 1}),
        (("a",), {}),
        (("a", [], 1.0, 2), {"span": 1}),
        (("a",), {"span": 1, "no": 2}),
    ):
        with pytest.raises(TypeError):
            named(*arguments, **keywords)


@BOTH
def test_is_a_dataclass(decorate: Callable[[Any], Any]) -> None:
    node, named, empty = classes(decorate)
    assert [f.name for f in fields(named)] == ["span", "name", "parts", "size"]
    assert asdict(named("a", [1], span=3)) == {"span": 3, "name": "a", "parts": [1], "size": 1.5}
    assert replace(named("a", span=3), name="b") == named("b", span=3)
    assert isinstance(empty(span=1), node) and named.__match_args__ == ("name", "parts", "size")


@frozen
class Value:
    x: int
    y: int = 2

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Value) and self.x == other.x

    def __hash__(self) -> int:
        return self.x


def test_own_methods_stay_and_instances_are_pickled() -> None:
    assert Value(1, 2) == Value(1, 3) and hash(Value(7)) == 7
    again = pickle.loads(pickle.dumps(Value(5, 6)))
    assert (again.x, again.y) == (5, 6)


def test_init_is_written_for_the_first_instance() -> None:
    _, named, _ = classes(frozen)
    before = named.__init__
    named("a", span=1)
    assert named.__init__ is not before and named.__init__.__code__.co_varnames[:5] == ("self", "name", "parts", "size", "span")
