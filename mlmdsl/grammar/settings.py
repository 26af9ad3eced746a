"""Reading settings with their checks: every key known, every value of its type, each problem reported once and in place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlmdsl.diagnostics import Diagnostics, Span
from mlmdsl.grammar.evaluate import POISON, CallValue, did_you_mean, kind_of, nearest, one_of
from mlmdsl.units import WORDS, Quantity

EXAMPLES = {
    "bytes": "80 GiB",
    "bytes_per_second": "400 Gb/s per gpu",
    "flops_per_second": "312 TFLOPS",
    "seconds": "5 us",
    "tokens": "1024 tok",
    "sequences": "512 seq",
    "steps": "10_000 steps",
    "watts": "700 W",
    "usd_per_device_hour": "2.50 USD/gpu/hour",
    "usd_per_kwh": "0.12 USD/kWh",
    "kg_per_kwh": "0.4 kg/kWh",
}


@dataclass
class Settings:
    """Evaluated settings of one item or call: key -> value, where each stands, what the whole is called."""

    what: str  # "cluster", "adamw(...)"
    values: Mapping[str, Any]
    spans: Mapping[str, Span]
    whole: Span
    diagnostics: Diagnostics
    keys: Mapping[str, Span] = field(default_factory=dict[str, Span])  # where the keys stand
    allowed: set[str] = field(default_factory=set[str])
    missing: dict[str, str] = field(default_factory=dict[str, str])  # required keys that are not given -> an example
    failed: bool = False
    excused: bool = False  # something was given in the wrong way: what is missing may be that

    def problem(self, code: str, message: str, key: str | None = None, **more: Any) -> None:
        self.failed = True
        self.diagnostics.report(code, message, self.spans.get(key, self.whole) if key else self.whole, **more)

    def _take(self, key: str, required: bool, example: str) -> Any:
        """The value; None where it is absent or already wrong."""
        self.allowed.add(key)
        if key not in self.values:
            if required:
                self.missing[key], self.failed = example, True
            return None
        if self.values[key] is POISON:
            self.failed = True
            return None
        return self.values[key]

    def wrong_type(self, key: str, wanted: str, value: object, example: str) -> None:
        self.problem("MLM0311", f"`{key}` is {wanted}, not {kind_of(value)}", key, help=f"write {key} = {example}")

    def integer(
        self, key: str, default: int | None = None, *, least: int = 1, example: str = "4", required: bool = False
    ) -> int | None:
        value = self._take(key, required, example)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            self.wrong_type(key, "an integer", value, example)
        elif value < least:
            self.problem("MLM0312", f"`{key}` = {value} is too small", key, help=f"{least} is the least")
        else:
            return value
        return default

    def number(
        self,
        key: str,
        default: float | None = None,
        *,
        least: float = 0.0,
        most: float = math.inf,
        above: bool = False,
        example: str = "0.1",
        required: bool = False,
    ) -> float | None:
        value = self._take(key, required, example)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.wrong_type(key, "a number", value, example)
        elif not math.isfinite(value) or value < least or value > most or (above and value == least):
            bounds = f"{'more than' if above else 'at least'} {least:g}" + (
                f" and at most {most:g}" if math.isfinite(most) else ""
            )
            self.problem("MLM0312", f"`{key}` = {value:g} is out of range", key, help=f"it is {bounds}")
        else:
            return float(value)
        return default

    def quantity(self, key: str, dimension: str, default: float | None = None, *, required: bool = False) -> float | None:
        found = self.raw_quantity(key, dimension, required=required)
        return default if found is None else found.value

    def raw_quantity(self, key: str, dimension: str, *, required: bool = False) -> Quantity | None:
        """A positive quantity of the dimension, still with its `per`."""
        example = EXAMPLES[dimension]
        value = self._take(key, required, example)
        if value is None:
            return None
        if isinstance(value, int | float) and not isinstance(value, bool):
            self.problem("MLM0305", f"`{key}` has no unit", key, help=f"it is {WORDS[dimension]}: {key} = {example}")
        elif not isinstance(value, Quantity):
            self.wrong_type(key, WORDS[dimension], value, example)
        elif value.dimension != dimension:
            self._wrong_dimension(key, value, dimension)
        elif not math.isfinite(value.value) or value.value <= 0:
            self.problem("MLM0312", f"`{key}` = {value} is out of range", key, help="it is more than 0")
        else:
            return value
        return None

    def _wrong_dimension(self, key: str, value: Quantity, dimension: str) -> None:
        example = EXAMPLES[dimension]
        if value.dimension == "bits" and dimension.startswith("bytes"):
            help = f"a capital B means bytes, a small b bits: {key} = {example}"
            return self.problem("MLM0307", f"`{key}` is given in bits", key, help=help)
        return self.problem(
            "MLM0306", f"`{key}` is {WORDS[dimension]}, not {WORDS[value.dimension]}", key, help=f"write {key} = {example}"
        )

    def text(self, key: str, default: str | None = None, *, required: bool = False, example: str = '"..."') -> str | None:
        value = self._take(key, required, example)
        if value is None:
            return default
        if isinstance(value, str):
            return value
        self.wrong_type(key, "a string", value, example)
        return default

    def word(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> str | None:
        """One of a few words; `self.values` holds them as strings."""
        value = self._take(key, False, allowed[0])
        if value is None:
            return default
        if isinstance(value, str) and value in allowed:
            return value
        shown = value if isinstance(value, str) else kind_of(value)
        help = (did_you_mean(value, allowed) if isinstance(value, str) else "") or one_of(allowed)
        self.problem("MLM0313", f"`{key}` cannot be {shown}", key, help=help)
        return default

    def call(self, key: str, allowed: tuple[str, ...], *, required: bool = False, example: str) -> CallValue | None:
        value = self._take(key, required, example)
        if value is None:
            return None
        if not isinstance(value, CallValue):
            self.wrong_type(key, "a call", value, example)
        elif value.name not in allowed:
            help = did_you_mean(value.name, allowed) or one_of(allowed)
            self.problem("MLM0314", f"`{key}` knows no `{value.name}(...)`", key, help=help)
        else:
            return value
        return None

    def of_call(self, call: CallValue, positional: tuple[str, ...] = ()) -> Settings:
        """A call's arguments as settings; `positional` names the leading ones."""
        values, spans = dict(call.keywords), {k: v for k, v in call.spans.items() if isinstance(k, str)}
        inner = Settings(f"{call.name}(...)", values, spans, call.span, self.diagnostics, dict(call.names))
        for index, value in enumerate(call.positional):
            if index >= len(positional):
                inner.spans = {**spans, str(index): call.spans[index]}
                inner.problem("MLM0210", f"{call.name}(...) takes no argument here", str(index), help=_takes(positional))
                inner.excused = True
            elif positional[index] in values:
                inner.problem("MLM0205", f"`{positional[index]}` is given twice", positional[index], help="keep one of the two")
            else:
                values[positional[index]], spans[positional[index]] = value, call.spans[index]
        return inner

    def finish(self) -> bool:
        """Reports unknown keys, and missing ones unless an unknown one was probably meant; whether all is well."""
        for key in self.values:
            if key not in self.allowed:
                near = nearest(key, self.allowed)
                self.missing.pop(near or "", None)
                help = f"did you mean `{near}`?" if near else one_of(self.allowed, 20)
                self.failed = True
                where = self.keys.get(key, self.spans.get(key, self.whole))
                self.diagnostics.report("MLM0211", f"{self.what} has no setting `{key}`", where, help=help)
        for key, example in self.missing.items() if not self.excused else ():
            self.problem("MLM0310", f"{self.what} needs `{key}`", help=f"write {key} = {example}")
        return not self.failed


def _takes(names: tuple[str, ...]) -> str:
    return f"it takes {', '.join(names)} there" if names else "name it"
