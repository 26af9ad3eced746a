"""`@frozen`: dataclasses that cannot be changed, at a tenth of what it takes to make them.

`@dataclass(frozen=True)` writes and compiles six methods for each class, for all of them a quarter of the time that it takes to
import the compiler. Only `__init__` has to be written for a class's fields, and here that waits for the first instance; the
other five are common to all. `fields`, `replace` and `asdict` of dataclasses work as ever. (Where there is an order `dataclass`
stays.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, FrozenInstanceError, dataclass, field, fields
from operator import attrgetter
from typing import Any, NoReturn, TypeVar, dataclass_transform

_Class = TypeVar("_Class", bound=type[Any])


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(cls: _Class) -> _Class:
    """A class decorator in place of `@dataclass(frozen=True)`."""
    cls.__doc__ = cls.__doc__ or cls.__name__  # else `dataclass` makes one of the signature
    made = dataclass(init=False, repr=False, eq=False)(cls)
    given: Mapping[str, Any] = made.__dict__
    methods = {"__init__": _first(made), "__repr__": _repr, "__setattr__": _refuse, "__delattr__": _refuse}
    if "__eq__" not in given:
        methods |= dict(zip(("__eq__", "__hash__"), _comparison(made), strict=True))
    for name, method in methods.items():
        if name not in given or (name == "__hash__" and given[name] is None):
            setattr(made, name, method)
    return made


def _first(cls: type[Any]) -> Callable[..., None]:
    """What makes the first instance: it puts the real `__init__` in its own place."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__ = _initializer(cls)
        cls.__init__(self, *args, **kwargs)

    return __init__


def _initializer(cls: type[Any]) -> Callable[..., None]:
    """`def __init__(self, x, y=_y, *, z=MISSING): ...`, compiled."""
    space: dict[str, Any] = {"_set": object.__setattr__, "MISSING": MISSING}
    ordered = [f for f in fields(cls) if not f.kw_only]
    named = [f for f in fields(cls) if f.kw_only]
    formals = ["self", *(_formal(f, space) for f in ordered), *("*" for _ in named[:1]), *(_formal(f, space) for f in named)]
    lines = [f"def __init__({', '.join(formals)}):", " pass"]
    for f in fields(cls):
        if f.default_factory is not MISSING:
            lines.append(f" if {f.name} is MISSING: {f.name} = _{f.name}()")
        lines.append(f" _set(self, {f.name!r}, {f.name})")
    exec("\n".join(lines), space)
    made: Callable[..., None] = space["__init__"]
    made.__qualname__ = f"{cls.__qualname__}.__init__"
    return made


def _formal(field: Field[Any], space: dict[str, Any]) -> str:
    """A field as a parameter; `space` gets its default, or what makes it."""
    if field.default_factory is not MISSING:
        space[f"_{field.name}"] = field.default_factory
        return f"{field.name}=MISSING"
    if field.default is not MISSING:
        space[f"_{field.name}"] = field.default
        return f"{field.name}=_{field.name}"
    return field.name


def _comparison(cls: type[Any]) -> tuple[Callable[[Any, object], bool], Callable[[Any], int]]:
    """`__eq__` and `__hash__` by the fields that are compared."""
    names = [f.name for f in fields(cls) if f.compare]
    values: Callable[[Any], object] = attrgetter(*names) if names else lambda _: None

    def __eq__(self: Any, other: object) -> bool:
        return values(self) == values(other) if other.__class__ is self.__class__ else NotImplemented

    def __hash__(self: Any) -> int:
        return hash(values(self))

    return __eq__, __hash__


def _repr(self: Any) -> str:
    shown = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.repr)
    return f"{self.__class__.__qualname__}({shown})"


def _refuse(self: Any, name: str, *_: object) -> NoReturn:
    raise FrozenInstanceError(f"cannot assign to field {name!r}")
