"""Training text as batches of token ids that every plan sees alike.

The documents are tokenised once into a packed token file (a flat array of uint16, or uint32 where the vocabulary needs it)
in a cache folder, each document followed by the tokenizer's end-of-text token (bytes: id 0). The file's name is a hash of
what it was made from (paths, sizes, modification times, tokenizer), so a changed corpus makes another file. Whichever local
process comes first writes it, under a lock, and renames it into place; the others wait. Nodes with discs of their own each
make the same file.

The last `validation` share of the stream is held out. The rest is cut into windows of `sequence` tokens; a target is the
token after, so neighbouring windows share one. Sample i of a run is window i mod W of epoch i div W, under a permutation
that depends on seed and epoch alone: no state, nothing to restore on resume, the same batches under every plan. The last
window of a split may be short: its missing targets are -100 and do not count.
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
from typing import IO, Literal, NoReturn

import numpy as np
import torch

from mlmdsl.diagnostics import Diagnostic, RunError
from mlmdsl.runtime import tokenizer as tokenizers
from mlmdsl.runtime.config import Data, Training
from mlmdsl.runtime.documents import Piece, pieces, sources

IGNORE = -100  # a target that does not count
FORMAT = 1  # of the token file: another number, another file
ENDS_BYTES = 1 << 20  # how much of either end of a token file its checksum covers
BATCH_CHARACTERS = 1 << 22  # text handed to the tokenizer at once

Split = Literal["train", "validation"]


class TokenDataset:
    """One split of the token stream. `windows` samples an epoch; `batches` of validation (0 where nothing is held out)."""

    def __init__(self, training: Training, split: Split, cache: Path):
        """Tokenises where no process has yet, in `cache`. Raises RunError MLM0700 to MLM0712."""
        self.training = training
        self.split: Split = split
        packed = prepare(training, cache)
        self._check_vocabulary(packed)
        held_out = round(packed.count * training.data.validation)
        cut = packed.count - held_out
        self.tokens = packed.tokens[:cut] if split == "train" else packed.tokens[cut:]
        self.windows = max(0, -(-(len(self.tokens) - 1) // training.sequence))
        if cut <= training.sequence:
            _fail(
                "MLM0705",
                f"{cut:,} tokens to train on ({held_out:,} of {packed.count:,} held out) are fewer than one sequence of "
                f"{training.sequence:,} and the token after it",
                "give more text, or a shorter seq_len",
            )

    @property
    def batches(self) -> int:
        """Validation batches to take: `validation_batches`, or fewer where the held-out share is smaller."""
        return min(self.training.validation_batches, -(-self.windows // self.training.batch))

    def batch(self, step: int, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows low to high of global batch `step` (from 0): tokens and targets, int64 [high - low, sequence].

        Training goes round the windows for ever, in another order each epoch. Validation takes them in order, once: rows
        past the end are all -100."""
        first = step * self.training.batch
        rows = [self._row(first + i) for i in range(low, high)]
        length = self.training.sequence
        tokens = np.zeros((high - low, length), dtype=np.int64)
        targets = np.full((high - low, length), IGNORE, dtype=np.int64)
        for row, window in enumerate(rows):
            tokens[row, : len(window[:-1])] = window[:-1]
            targets[row, : len(window[1:])] = window[1:]
        return torch.from_numpy(tokens), torch.from_numpy(targets)

    def _row(self, sample: int) -> np.ndarray:
        """The tokens of one sample and the one after them."""
        if self.split == "train":
            epoch, position = divmod(sample, self.windows)
            sample = permuted(position, self.windows, self.training.seed, epoch)
        start = sample * self.training.sequence
        return self.tokens[start : start + self.training.sequence + 1]

    def _check_vocabulary(self, packed: Packed) -> None:
        vocab = self.training.vocab
        if vocab and packed.max_id >= vocab:
            _fail(
                "MLM0706",
                f"the text holds token {packed.max_id:,}, but the model's vocabulary ends at {vocab - 1:,}: "
                f"the tokenizer ({self.training.tokenizer.kind}) has {packed.vocab:,} tokens",
                f"give the model's Embedding vocab = {packed.vocab} or more",
            )


# ---- order ----------------------------------------------------------------------------------------------------------


def permuted(position: int, size: int, seed: int, epoch: int) -> int:
    """Where `position` of range(size) goes in the permutation that (seed, epoch) name.

    A Feistel network of four rounds over the next power of four, walked until the value falls inside (Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002): O(1), no table, and ours, so that no library's update reorders a run."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = [_mixed(_mixed(_mixed(seed) + epoch) + turn) for turn in range(4)]
    while True:
        position = _feistel(position, half, keys)
        if position < size:
            return position


def _feistel(value: int, half: int, keys: list[int]) -> int:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return left << half | right


def _mixed(value: int) -> int:
    """splitmix64's output function (Steele, Lea, Flood, OOPSLA 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31


# ---- the packed token file ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """A token file and what stands in the .json beside it."""

    path: Path
    dtype: str
    count: int
    max_id: int
    vocab: int  # of the tokenizer
    checksum: int

    @cached_property
    def tokens(self) -> np.ndarray:
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.count,))


def prepare(training: Training, cache: Path) -> Packed:
    """The token file of this data and tokenizer, made now where it is missing or damaged."""
    tokenizer = tokenizers.load(training.tokenizer)
    path = cache / f"{_key(training.data, tokenizer.identity)}.tokens"
    if found := _opened(path):
        return found
    with _writable(cache), _locked(path.with_suffix(".lock")):
        return _opened(path) or _made(path, training.data, tokenizer)


def _key(data: Data, tokenizer: str) -> str:
    """Names the stream by all that it is made from."""
    files: list[tuple[str, int, int]] = []
    for path in sources(data):
        try:
            stat = path.stat()
        except OSError as error:
            _fail("MLM0708", f"{path}: {error.strerror or error}")
        files.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns))
    text = json.dumps([FORMAT, data.kind, data.field, files, tokenizer])
    return hashlib.sha256(text.encode("utf-8", errors="surrogateescape")).hexdigest()[:32]


def _opened(path: Path) -> Packed | None:
    """The finished file, or None where there is none or where it is not what its description says."""
    try:
        described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        packed = Packed(path, **described)
        sound = path.stat().st_size == packed.count * np.dtype(packed.dtype).itemsize and _checksum(path) == packed.checksum
    except (OSError, ValueError, TypeError):
        return None
    return packed if sound else None


def _made(path: Path, data: Data, tokenizer: tokenizers.TextTokenizer) -> Packed:
    """Writes tokens, then description, each under a name of its own until it is whole."""
    host = socket.gethostname()
    for stale in path.parent.glob(f"{path.stem}.{host}.*.part"):  # of a process that died: the lock is ours now
        stale.unlink(missing_ok=True)
    part = path.with_name(f"{path.stem}.{host}.{os.getpid()}.part")
    dtype = "uint16" if tokenizer.vocab <= 1 << 16 else "uint32"
    try:
        with part.open("wb") as file:
            count, largest = _write_tokens(file, data, tokenizer, dtype)
            file.flush()
            os.fsync(file.fileno())
        packed = Packed(path, dtype, count, largest, tokenizer.vocab, _checksum(part))
        part.replace(path)
        part.write_text(json.dumps({k: v for k, v in asdict(packed).items() if k != "path"}), encoding="utf-8")
        part.replace(path.with_suffix(".json"))
    finally:
        part.unlink(missing_ok=True)
    return packed


def _write_tokens(file: IO[bytes], data: Data, tokenizer: tokenizers.TextTokenizer, dtype: str) -> tuple[int, int]:
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
