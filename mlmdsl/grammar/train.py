"""The `train` item: data, tokenizer, objective, batch, optimizer, schedule, precision."""

from __future__ import annotations

import os
from typing import Any

from mlmdsl.grammar.evaluate import POISON, CallValue, Poison
from mlmdsl.grammar.settings import Settings
from mlmdsl.grammar.spec import Data, LearningRateSchedule, Objective, Optimizer, Tokenizer, Train
from mlmdsl.runtime.config import span_lengths
from mlmdsl.units import Quantity

_TEXTS = ("text", "jsonl", "parquet", "python", "python_source")
_RECORDS = {"seq2seq": "pairs", "chat": "conversations"}  # what each of these objectives reads
_OBJECTIVES = ("next_token", "masked_token", "span_corruption", "seq2seq", "chat")
_MODULES = ("python", "python_source")
_TEXT_FIELDS = {  # of each kind of data: its own setting, where it stands in `Data`, its default
    "jsonl": (("field", "field", "text"),),
    "parquet": (("column", "field", "text"),),
    "pairs": (("source", "source", "source"), ("target", "target", "target")),
    "conversations": (("field", "field", "messages"),),
}


def read_train(settings: Settings, folder: str) -> Train | None:
    """`folder`: where the spec lies; data paths are relative to it."""
    data = _data(settings, folder)
    tokenizer = _tokenizer(settings, folder)
    seq_len = settings.quantity("seq_len", "tokens", required=True)
    objective = _objective(settings, int(seq_len or 0))
    if data is not None:
        _check_kind(settings, data, objective)
    documents: Any = settings.word("documents", ("joined", "separate"), "joined")
    batch = _batch(settings, seq_len)
    steps = _steps(settings, seq_len, batch)
    optimizer = _optimizer(settings)
    schedule = _schedule(settings)
    precision: Any = settings.word("precision", ("fp32", "bf16"), "bf16")
    seed = settings.integer("seed", 0, least=0)
    every = {key: _step_count(settings, key) for key in ("validate_every", "checkpoint_every")}
    batches = settings.integer("validation_batches", 8)
    if not settings.finish():
        return None
    assert seq_len is not None and batch is not None and steps is not None and optimizer is not None
    return Train(
        data=data or Data(kind="text", paths=(os.path.join(folder, "corpus/*.txt"),)),
        tokenizer=tokenizer,
        objective=objective,
        documents=documents,
        seq_len=int(seq_len),
        batch=batch,
        steps=steps,
        optimizer=optimizer,
        schedule=schedule or LearningRateSchedule(kind="constant"),
        precision=precision,
        seed=seed or 0,
        validate_every=every["validate_every"],
        validation_batches=batches or 8,
        checkpoint_every=every["checkpoint_every"],
        spans=dict(settings.spans),
    )


def _objective(settings: Settings, seq_len: int) -> Objective:
    call = settings.call("objective", _OBJECTIVES, example="next_token()")
    if call is None:
        return Objective(kind="next_token")
    inner = settings.of_call(call)
    kind: Any = call.name
    found: dict[str, Any] = {}
    if kind == "masked_token":
        found["probability"] = inner.number("probability", 0.15, above=True, most=1.0, example="0.15")
    if kind == "span_corruption":
        found["density"] = inner.number("density", 0.15, above=True, most=0.5, example="0.15")
        found["mean_length"] = inner.number("mean_length", 3.0, least=1.0, example="3")
    if kind in ("span_corruption", "seq2seq"):
        target = inner.quantity("target_len", "tokens")
        found["target"] = _whole(inner, "target_len", target) if target else None
    if inner.finish() and kind == "span_corruption" and seq_len:
        found["target"] = _span_target(inner, found, seq_len)
    settings.failed |= inner.failed
    if kind == "seq2seq" and found["target"] is None:
        found["target"] = seq_len or None
    return Objective(kind=kind, **{key: value for key, value in found.items() if value is not None})


def _span_target(inner: Settings, found: dict[str, Any], seq_len: int) -> int | None:
    """As long as the spans of a full row make it, rounded up to a multiple of 8 for the tensor axis."""
    length, _, least = span_lengths(seq_len, found["density"], found["mean_length"])
    if not length:
        inner.problem("MLM0312", f"`seq_len` = {seq_len} has no room for spans", help="4 tok is the least")
        return None
    if found["target"] is not None and found["target"] < least:
        message = f"`target_len` = {found['target']} does not hold the spans of a row, {least} tokens"
        inner.problem("MLM0312", message, "target_len", help=f"target_len = {least} tok, or leave it out")
    return found["target"] or -(-least // 8) * 8


def _check_kind(settings: Settings, data: Data, objective: Objective) -> None:
    wanted = _RECORDS.get(objective.kind)
    if data.kind != wanted if wanted else data.kind in _RECORDS.values():
        message = f"{objective.kind}() reads {wanted or 'text'}, not {data.kind}"
        example = f'{wanted}("{wanted}.jsonl")' if wanted else 'text("corpus/*.txt")'
        settings.problem("MLM0316", message, "data", help=f"write data = {example}")


def _data(settings: Settings, folder: str) -> Data | None:
    call = settings.call("data", (*_TEXTS, *_RECORDS.values()), required=True, example='text("corpus/*.txt")')
    if call is None:
        return None
    kind: Any = call.name
    inner = settings.of_call(CallValue(call.name, (), call.keywords, call.span, call.spans, call.names))
    fields = {key: inner.text(name, default, example=f'"{default}"') for name, key, default in _TEXT_FIELDS.get(kind, ())}
    validation = inner.number("validation", 0.05, most=0.5, example="0.05")
    paths = tuple(p for p in call.positional if isinstance(p, str))
    if POISON in call.positional:
        inner.failed = True
    elif len(paths) < len(call.positional) or not paths:
        inner.problem("MLM0311", f"{inner.what} takes one or more strings first", help=f'write {kind}("corpus/*.txt")')
    if not inner.finish():
        settings.failed = True
        return None
    assert validation is not None
    found = paths if kind in _MODULES else tuple(os.path.join(folder, p) for p in paths)
    return Data(kind=kind, paths=found, validation=validation, **fields)


def _tokenizer(settings: Settings, folder: str) -> Tokenizer:
    call = settings.call("tokenizer", ("bytes", "hf"), example="bytes()")
    if call is None or call.name == "bytes":
        if call is not None:
            settings.failed |= not settings.of_call(call).finish()
        return Tokenizer(kind="bytes", vocab=256)
    inner = settings.of_call(call, ("path",))
    path = inner.text("path", required=True, example='"tokenizer.json"')
    settings.failed |= not inner.finish()
    return Tokenizer(kind="hf", path=os.path.join(folder, path or ""))


def _batch(settings: Settings, seq_len: float | None) -> int | None:
    """Sequences, from `512 seq` or `4 Mi tok`."""
    value = settings.values.get("batch")
    if isinstance(value, Quantity) and value.dimension == "tokens":
        settings.allowed.add("batch")
        if seq_len is None:
            return None
        if value.value % seq_len or value.value < seq_len:
            least = max(1, round(value.value / seq_len))
            message = f"batch = {value} is no multiple of seq_len = {seq_len:g}"
            settings.problem("MLM0401", message, "batch", help=f"{least} seq would be {least * int(seq_len):,} tokens")
            return None
        return int(value.value / seq_len)
    found = settings.quantity("batch", "sequences", required=True)
    return None if found is None else _whole(settings, "batch", found)


def _whole(settings: Settings, key: str, value: float) -> int | None:
    if value != int(value):
        settings.problem("MLM0312", f"`{key}` = {value:g} is no whole number", key)
        return None
    return int(value)


def _steps(settings: Settings, seq_len: float | None, batch: int | None) -> int | None:
    value = settings.values.get("stop")
    if isinstance(value, Quantity) and value.dimension == "tokens":
        settings.allowed.add("stop")
        return max(1, round(value.value / (seq_len * batch))) if seq_len and batch else None
    return _step_count(settings, "stop", required=True)


def _step_count(settings: Settings, key: str, *, required: bool = False) -> int | None:
    found = settings.quantity(key, "steps", required=required)
    return None if found is None else _whole(settings, key, found)


def _optimizer(settings: Settings) -> Optimizer | None:
    call = settings.call("optimizer", ("adamw",), required=True, example="adamw(lr = 3e-4)")
    if call is None:
        return None
    inner = settings.of_call(call)
    lr = inner.number("lr", required=True, above=True, example="3e-4")
    betas = _betas(inner)
    eps = inner.number("eps", 1e-8, above=True, example="1e-8")
    decay = inner.number("weight_decay", 0.1)
    clip = inner.number("clip", None, above=True, example="1.0") if inner.values.get("clip", 1.0) is not None else None
    inner.allowed.add("clip")
    if not inner.finish():
        settings.failed = True
        return None
    assert lr is not None and eps is not None and decay is not None
    clipped = clip if "clip" in inner.values else 1.0
    return Optimizer(kind="adamw", lr=lr, betas=betas, eps=eps, weight_decay=decay, clip=clipped)


def _betas(inner: Settings) -> tuple[float, float]:
    inner.allowed.add("betas")
    value = inner.values.get("betas", (0.9, 0.95))
    match value:
        case (int() | float() as first, int() | float() as second) if 0 <= first < 1 and 0 <= second < 1:
            return float(first), float(second)
        case Poison():
            inner.failed = True
            return 0.9, 0.95
        case _:
            inner.problem("MLM0311", "`betas` is a pair of numbers from 0 up to 1", "betas", help="write betas = (0.9, 0.95)")
            return 0.9, 0.95


def _schedule(settings: Settings) -> LearningRateSchedule | None:
    call = settings.call("schedule", ("constant", "linear", "cosine"), example="cosine(warmup = 500 steps)")
    if call is None:
        return None
    inner = settings.of_call(call)
    warmup = _step_count(inner, "warmup")
    min_lr = inner.number("min_lr", 0.0)
    if not inner.finish():
        settings.failed = True
        return None
    kind: Any = call.name
    return LearningRateSchedule(kind=kind, warmup_steps=warmup or 0, min_lr=min_lr or 0.0)
