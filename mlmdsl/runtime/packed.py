"""The packed token file: the documents tokenised once, a flat array of uint16, or uint32 where the vocabulary needs it.

Documents each end in the tokenizer's end-of-text token. Records (pairs, conversations) are runs of tokens that are to be learnt
or not: where each run starts stands in a second file, `.runs`, int64 [runs, 2]: its place, and 1 where a record begins with it
plus 2 where it is learnt.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, NoReturn

import numpy as np

from mlmdsl.diagnostics import Diagnostic, RunError
from mlmdsl.runtime.config import Data, Training
from mlmdsl.runtime.documents import Piece, pieces, sources
from mlmdsl.runtime.records import Run, records
from mlmdsl.runtime.tokenizer import TextTokenizer

FORMAT = 1  # of the token file: another number, another file
ENDS_BYTES = 1 << 20  # how much of either end of a token file its checksum covers
BATCH_CHARACTERS = 1 << 22  # text handed to the tokenizer at once
FIRST, LEARNT = 1, 2  # of a run


@dataclass(frozen=True)
class Packed:
    """A token file and what stands in the .json beside it."""

    path: Path
    dtype: str
    count: int
    max_id: int
    vocab: int  # of the tokenizer
    checksum: int
    runs: int = 0  # of records

    @cached_property
    def tokens(self) -> np.ndarray:
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.count,))

    @cached_property
    def bounds(self) -> np.ndarray:
        """[runs, 2]"""
        return np.fromfile(self.path.with_suffix(".runs"), dtype=np.int64).reshape(self.runs, 2)


def prepare(training: Training, tokenizer: TextTokenizer, cache: Path) -> Packed:
    """The token file of this data and tokenizer, made now where it is missing or damaged."""
    path = cache / f"{_key(training.data, tokenizer)}.tokens"
    if found := _opened(path):
        return found
    with _writable(cache), _locked(path.with_suffix(".lock")):
        return _opened(path) or _made(path, training.data, tokenizer)


def _key(data: Data, tokenizer: TextTokenizer) -> str:
    """Names the stream by all that it is made from."""
    files: list[tuple[str, int, int]] = []
    for path in sources(data):
        try:
            stat = path.stat()
        except OSError as error:
            _fail("MLM0708", f"{path}: {error.strerror or error}")
        files.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns))
    text = json.dumps([FORMAT, data.kind, data.field, files, tokenizer.identity])
    if data.records:
        text += json.dumps([data.source, data.target, tokenizer.template])
    return hashlib.sha256(text.encode("utf-8", errors="surrogateescape")).hexdigest()[:32]


def _opened(path: Path) -> Packed | None:
    """The finished file, or None where there is none or where it is not what its description says."""
    try:
        described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        packed = Packed(path, **described)
        sound = path.stat().st_size == packed.count * np.dtype(packed.dtype).itemsize and _checksum(path) == packed.checksum
        sound = sound and (not packed.runs or path.with_suffix(".runs").stat().st_size == 16 * packed.runs)
    except (OSError, ValueError, TypeError):
        return None
    return packed if sound else None


def _made(path: Path, data: Data, tokenizer: TextTokenizer) -> Packed:
    """Writes runs, tokens, then description, each under a name of its own until it is whole."""
    host = socket.gethostname()
    for stale in path.parent.glob(f"{path.stem}.{host}.*.part"):  # of a process that died: the lock is ours now
        stale.unlink(missing_ok=True)
    part = path.with_name(f"{path.stem}.{host}.{os.getpid()}.part")
    dtype = "uint16" if tokenizer.vocab <= 1 << 16 else "uint32"
    try:
        with part.open("wb") as file:
            bounds: list[tuple[int, int]] = []
            if data.records:
                count, largest = _write_runs(file, records(data, tokenizer), bounds, tokenizer, dtype)
            else:
                count, largest = _write_tokens(file, data, tokenizer, dtype)
            file.flush()
            os.fsync(file.fileno())
        if data.records:
            runs = path.with_suffix(".runs.part")
            np.array(bounds, dtype=np.int64).tofile(runs)
            runs.replace(path.with_suffix(".runs"))
        packed = Packed(path, dtype, count, largest, tokenizer.vocab, _checksum(part), len(bounds))
        part.replace(path)
        part.write_text(json.dumps({k: v for k, v in asdict(packed).items() if k != "path"}), encoding="utf-8")
        part.replace(path.with_suffix(".json"))
    finally:
        part.unlink(missing_ok=True)
    return packed


def _write_runs(
    file: IO[bytes],
    found: Iterator[list[Run]],
    bounds: list[tuple[int, int]],
    tokenizer: TextTokenizer,
    dtype: str,
) -> tuple[int, int]:
    """Count of tokens and the largest id; `bounds` is filled."""
    count = largest = 0
    for record in found:
        encoded = tokenizer.encode_batch([text for text, _ in record])
        for index, (ids, (_, learnt)) in enumerate(zip(encoded, record, strict=True)):
            bounds.append((count, FIRST * (index == 0) + LEARNT * learnt))
            file.write(ids.astype(dtype).tobytes())
            count += len(ids)
            largest = max(largest, int(ids.max(initial=0)))
    return count, max(largest, tokenizer.end_of_text)


def _write_tokens(file: IO[bytes], data: Data, tokenizer: TextTokenizer, dtype: str) -> tuple[int, int]:
    """Count of tokens and the largest id."""
    count = largest = characters = 0
    end = np.array([tokenizer.end_of_text], dtype=dtype)
    for batch in _text_batches(data):
        texts = [text for text, _ in batch]
        characters += sum(map(len, texts))
        for ids, (_, last) in zip(tokenizer.encode_batch(texts), batch, strict=True):
            written = np.concatenate([ids.astype(dtype), end]) if last else ids.astype(dtype)
            file.write(written.tobytes())
            count += len(written)
            largest = max(largest, int(written.max(initial=0)))
    if not characters:
        _fail("MLM0701", f"no text in {', '.join(data.paths)}", "the files are there, but hold nothing to train on")
    return count, largest


def _text_batches(data: Data) -> Iterator[list[Piece]]:
    """Enough text at a time for the tokenizer to use its threads."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces(data):
        batch.append(piece)
        size += len(piece[0]) + 1
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


def _checksum(path: Path) -> int:
    """CRC-32 of the first and last MiB: finds a truncated, overwritten or sparse file at once, whatever its size."""
    with path.open("rb") as file:
        head = file.read(ENDS_BYTES)
        file.seek(max(len(head), path.stat().st_size - ENDS_BYTES))
        return zlib.crc32(file.read(ENDS_BYTES), zlib.crc32(head))


@contextlib.contextmanager
def _writable(cache: Path) -> Iterator[None]:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        _fail(
            "MLM0712",
            f"token files cannot be written in {cache}: {error.strerror or error}",
            "set MLMDSL_CACHE to a folder with room",
        )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for the lock; the kernel frees it when its holder dies. Where a network file system has no locks the work is
    done more than once, and renamed into place whole each time."""
    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fail(code: str, message: str, help: str = "") -> NoReturn:
    raise RunError([Diagnostic(code, message, help=help)])
