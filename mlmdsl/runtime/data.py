"""Training text as batches of token ids that every plan sees alike.

The documents are tokenised once into a packed token file (a flat array of uint16, or uint32 where the vocabulary needs it)
in a cache folder, each document followed by the tokenizer's end-of-text token (bytes: id 0). The file's name is a hash of
what it was made from (paths, sizes, modification times, tokenizer), so a changed corpus makes another file. Whichever local
process comes first writes it, under a lock, and renames it into place; the others wait. Nodes with discs of their own each
make the same file.

What a row holds is the objective's business (objectives.py). The last `validation` share of the stream, or of the records, is
held out. The rest of a stream is cut into windows of `sequence` tokens; where a target is the token after, neighbouring windows
share one. Sample i of a run is window (or record) i mod W of epoch i div W, under a permutation that depends on seed and epoch
alone: no state, nothing to restore on resume, the same batches under every plan. The last window of a split may be short: its
missing targets are -100 and do not count.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mlmdsl.diagnostics import Diagnostic, RunError
from mlmdsl.runtime import tokenizer as tokenizers
from mlmdsl.runtime.config import Training
from mlmdsl.runtime.objectives import Form, Row
from mlmdsl.runtime.packed import FIRST, LEARNT, Packed, prepare

Split = Literal["train", "validation"]
_SALT = {"train": 0, "validation": 1}  # validation draws other numbers


class TokenDataset:
    """One split of the data. `windows` samples an epoch; `batches` of validation (0 where nothing is held out)."""

    def __init__(self, training: Training, split: Split, cache: Path):
        """Tokenises where no process has yet, in `cache`. Raises RunError MLM0700 to MLM0716."""
        self.training = training
        self.split: Split = split
        text = tokenizers.load(training.tokenizer)
        self.packed = prepare(training, text, cache)
        self.form = Form(training, text)
        self._check_vocabulary(self.packed)
        if training.data.records:
            self._records()
        else:
            self._stream()

    def _stream(self) -> None:
        packed, form = self.packed, self.form
        held_out = round(packed.count * self.training.data.validation)
        cut = packed.count - held_out
        self.tokens = packed.tokens[:cut] if self.split == "train" else packed.tokens[cut:]
        self.windows = max(0, -(-(len(self.tokens) - form.shared) // (form.window - form.shared)))
        if cut < form.window:
            after = " and the token after it" if form.shared else ""
            self._too_little(
                f"{cut:,} tokens", held_out, f"{packed.count:,}", f"one sequence of {form.window - form.shared:,}{after}"
            )

    def _records(self) -> None:
        held_out = round((len(self._starts) - 1) * self.training.data.validation)
        cut = len(self._starts) - 1 - held_out
        self.first, self.windows = (0, cut) if self.split == "train" else (cut, held_out)
        if not cut:
            self._too_little("0 records", held_out, f"{held_out:,}", "one")

    @cached_property
    def _starts(self) -> np.ndarray:
        """The first run of each record; one entry more at the end."""
        return np.append(np.flatnonzero(self.packed.bounds[:, 1] & FIRST), self.packed.runs)

    def _too_little(self, what: str, held_out: int, whole: str, wanted: str) -> None:
        message = f"{what} to train on ({held_out:,} of {whole} held out) are fewer than {wanted}"
        raise RunError([Diagnostic("MLM0705", message, help="give more text, or a shorter seq_len")])

    @property
    def batches(self) -> int:
        """Validation batches to take: `validation_batches`, or fewer where the held-out share is smaller."""
        return min(self.training.validation_batches, -(-self.windows // self.training.batch))

    def batch(self, step: int, low: int, high: int) -> dict[str, torch.Tensor]:
        """Rows low to high of global batch `step` (from 0): the model's inputs and the targets, int64 [high - low, length].

        Training goes round the samples for ever, in another order each epoch. Validation takes them in order, once: the targets
        of rows past the end are all -100."""
        first = step * self.training.batch
        return self.form.batch([self._row(first + i) for i in range(low, high)])

    def _row(self, number: int) -> Row:
        """The row of one sample of the run."""
        sample = number
        if self.split == "train":
            epoch, position = divmod(number, self.windows)
            sample = permuted(position, self.windows, self.training.seed, epoch)
        counts = None
        if self.training.data.records:
            ids, counts = self._record(sample)
        else:
            step = self.form.window - self.form.shared
            ids = self.tokens[sample * step : sample * step + self.form.window]
        return self.form.row(ids, counts, number, _SALT[self.split])

    def _record(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """Its tokens, and which of them are learnt; none past the end."""
        if sample >= self.windows:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool)
        low, high = self._starts[self.first + sample], self._starts[self.first + sample + 1]
        bounds = self.packed.bounds
        start, stop = bounds[low, 0], bounds[high, 0] if high < len(bounds) else self.packed.count
        lengths = np.diff(np.append(bounds[low:high, 0], stop))
        return self.packed.tokens[start:stop], np.repeat((bounds[low:high, 1] & LEARNT) > 0, lengths)

    def _check_vocabulary(self, packed: Packed) -> None:
        vocab, largest = self.training.vocab, max(packed.max_id, *self.form.special, 0)
        if vocab and largest >= vocab:
            what = "the text holds" if largest == packed.max_id else "the objective needs"
            needed = max(packed.vocab, largest + 1)
            message = (
                f"{what} token {largest:,}, but the model's vocabulary ends at {vocab - 1:,}: "
                f"the tokenizer ({self.training.tokenizer.kind}) has {packed.vocab:,} tokens"
            )
            raise RunError([Diagnostic("MLM0706", message, help=f"give the model's Embedding vocab = {needed} or more")])


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
