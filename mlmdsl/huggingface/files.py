"""The safetensors files of a checkpoint: which tensors are where. Only headers are read.

A file is eight bytes with the header's length, the header (JSON: name -> dtype, shape, data_offsets), the values
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, NoReturn, cast

from mlmdsl.diagnostics import Diagnostic, RunError
from mlmdsl.grammar.evaluate import nearest
from mlmdsl.huggingface.config import fail
from mlmdsl.huggingface.layouts import Exchange
from mlmdsl.runtime.pieces import Tensor

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "*.pth", "*.pt", "*.ckpt")
BYTES = {"F32": 4, "BF16": 2, "F16": 2}
OTHERS = {"F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
_LONGEST_HEADER = 100_000_000
_MOST = 10  # diagnostics of one kind


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint in `folder`. Raises RunError: MLM0800, MLM0801, MLM0805."""
    found: dict[str, Tensor] = {}
    for path in _files(folder):
        for name, tensor in header(path).items():
            if name in found:
                fail("MLM0805", f"{name} is in {Path(found[name].path).name} and in {path.name}")
            found[name] = tensor
    return found


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        return _shards(folder)
    if (folder / ONE).is_file():
        return [folder / ONE]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        help = "load it with transformers where you trust it, and save it again: model.save_pretrained(DIR) writes safetensors"
        fail("MLM0801", f"{folder} has its weights as a pickle only ({pickles[0]}), which is a program: it is not read", help)
    fail("MLM0800", f"{folder} is no checkpoint of transformers: it has neither {ONE} nor {INDEX}")


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fail("MLM0805", f"{index} cannot be read: {error or type(error).__name__}")
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        fail("MLM0805", f"{INDEX} names {missing[0]}, which is not there", "fetch the missing files again")
    return [folder / name for name in names]


def header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. Raises RunError MLM0805 where file and header do not agree."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                _damaged(path, f"it has {size:,} bytes, fewer than its header asks for")
            entries = json.loads(file.read(length))
    except OSError as error:
        _damaged(path, error.strerror or str(error))
    except ValueError:
        _damaged(path, "its header is no JSON")
    try:
        return {name: _tensor(path, 8 + length, size, name, entry) for name, entry in entries.items() if name != "__metadata__"}
    except (KeyError, TypeError, AttributeError, ValueError):
        _damaged(path, "its header is not one of safetensors")


def _tensor(path: Path, base: int, size: int, name: str, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape = str(entry["dtype"]), tuple(int(n) for n in cast(Iterable[int], entry["shape"]))
    low, high = (int(n) for n in entry["data_offsets"])
    if base + high > size:
        _damaged(path, f"it ends in the middle of {name}")
    width = (BYTES | OTHERS).get(dtype)
    if width is not None and high - low != prod(shape) * width:
        _damaged(path, f"{name} has {high - low:,} bytes, and {dtype} {list(shape)} needs {prod(shape) * width:,}")
    return Tensor(str(path), base + low, dtype, shape)


def _damaged(path: Path, reason: str) -> NoReturn:
    fail("MLM0805", f"{path} is damaged: {reason}", "fetch the file again")


# ---- against the map ------------------------------------------------------------------------------------------------


def checked(stored: Mapping[str, Tensor], wanted: Exchange, base: str) -> dict[str, Tensor]:
    """The tensor of each name that the map has. Names may lack the part `base`, as in checkpoints of a bare model. Raises
    RunError with everything that is missing (MLM0806), unknown (MLM0807), of another shape (MLM0808) or dtype (MLM0809)."""
    found = {name: stored[alias] for name in wanted.theirs if (alias := _alias(name, base, stored)) is not None}
    used = {_alias(name, base, stored) for name in (*wanted.theirs, *wanted.ignored)}
    missing = [name for name in wanted.theirs if name not in found]
    unknown = sorted(name for name in stored if name not in used)
    problems = [_missing(name, unknown) for name in missing]
    problems += [_unknown(name, missing) for name in unknown]
    problems += [_shape(name, tensor, wanted) for name, tensor in found.items() if tensor.shape != wanted.theirs[name]]
    problems += [_dtype(name, tensor) for name, tensor in found.items() if tensor.dtype not in BYTES]
    if problems:
        more = len(problems) - _MOST
        last = [Diagnostic(problems[-1].code, f"and {more} weights more that do not fit")] if more > 0 else []
        raise RunError([*islice(problems, _MOST), *last])
    return found


def _alias(name: str, base: str, stored: Mapping[str, Tensor]) -> str | None:
    """The name in the files."""
    if name in stored:
        return name
    short = name.removeprefix(base)
    return short if short in stored else None


def _missing(name: str, unknown: list[str]) -> Diagnostic:
    near = nearest(name, unknown)
    help = f"there is a {near}: the checkpoint may be of another version" if near else "fetch the missing files again"
    return Diagnostic("MLM0806", f"the checkpoint has no {name}", help=help)


def _unknown(name: str, missing: list[str]) -> Diagnostic:
    help = "" if missing else "the model has no place for it: it would be lost"
    return Diagnostic("MLM0807", f"the checkpoint has a weight that the family does not know: {name}", help=help)


def _shape(name: str, tensor: Tensor, wanted: Exchange) -> Diagnostic:
    ours = " + ".join(dict.fromkeys(f"{p.ours} {list(wanted.ours[p.ours])}" for p in wanted.pieces if p.theirs == name))
    return Diagnostic(
        "MLM0808",
        f"{name} has shape {list(tensor.shape)} in the checkpoint, and {list(wanted.theirs[name])} by its config.json",
        help=f"in the spec it is {ours}",
    )


def _dtype(name: str, tensor: Tensor) -> Diagnostic:
    help = "save the checkpoint again in float32 or bfloat16"
    return Diagnostic("MLM0809", f"{name} is stored as {tensor.dtype}, which is not read", help=help)
