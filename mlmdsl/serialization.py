"""Dataclasses as JSON and back, by pydantic.

Values that the compiler made are trusted; what is read from a file is checked here, field by field. To import pydantic takes
a good part of what it takes to plan: import this module where JSON is written or read, not at the head of another.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

_Class = TypeVar("_Class")


class Mismatch(ValueError):
    """A text that is not JSON of the class asked for: the path of the first field that does not fit, and why."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}")


def to_json(value: object) -> str:
    return _adapter(type(value)).dump_json(value, indent=1).decode()


def to_plain(value: object) -> Any:
    """What `json.dumps` can write."""
    return _adapter(type(value)).dump_python(value, mode="json")


def from_json(cls: type[_Class], text: str) -> _Class:
    """Raises Mismatch. Keys that the class has no field for are refused where its `__pydantic_config__` says so."""
    try:
        return _adapter(cls).validate_json(text)
    except ValidationError as problem:
        first = problem.errors()[0]
        why = "Extra inputs are not permitted" if first["type"] == "unexpected_keyword_argument" else first["msg"]
        raise Mismatch(".".join(map(str, first["loc"])) or "the text", why) from None


@cache
def _adapter(cls: type[_Class]) -> TypeAdapter[_Class]:
    return TypeAdapter(cls)
