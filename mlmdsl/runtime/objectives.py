"""What each objective makes of text: rows of model inputs and targets.

    next_token       a window of the stream; the target is the token after
    masked_token     a window; of the tokens drawn with `probability` 80 % become the mask, 10 % any token, 10 % stay; these are
                     the targets (arXiv:1810.04805, section 3.1)
    span_corruption  a window without its spans, a sentinel for each; the target is the spans, each after its sentinel
                     (arXiv:1910.10683, section 3.1.4)
    seq2seq          a source and an end; the target and an end
    chat             a conversation; the targets are the assistant's tokens

Everything drawn depends on seed and global sample index alone, by a generator of our own: every plan sees the same rows, and so
does a run that is resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import torch

from mlmdsl.diagnostics import Diagnostic, RunError
from mlmdsl.runtime.config import Training, span_lengths
from mlmdsl.runtime.functions import IGNORE
from mlmdsl.runtime.tokenizer import TextTokenizer

Row = dict[str, np.ndarray]  # inputs and "targets", one dim, not padded yet


class Form:
    """Makes rows. `window` tokens of the stream are read for one, of which the last `shared` are the next window's too."""

    def __init__(self, training: Training, text: TextTokenizer):
        self.training, self.text, self.objective = training, text, training.objective
        kind, length = self.objective.kind, training.sequence
        self.window, self.shared = length, 0
        if kind == "next_token":
            self.window, self.shared = length + 1, 1
        elif kind == "span_corruption":
            self.window, self.spans, _ = span_lengths(length, self.objective.density, self.objective.mean_length)
        self.special = self._special()

    def _special(self) -> tuple[int, ...]:
        """Ids that rows hold besides those of the text. Raises MLM0713 where the tokenizer lacks one."""
        kind, text = self.objective.kind, self.text
        if kind == "masked_token":
            if text.mask is None:
                _fail("a mask token", "[MASK] or <mask>")
            return (text.mask,)
        if kind == "span_corruption":
            if len(text.sentinels) < self.spans:
                _fail(f"{self.spans} sentinels", f"<extra_id_0> to <extra_id_{self.spans - 1}>")
            return tuple(text.sentinels[: self.spans])
        return ()

    def row(self, ids: np.ndarray, counts: np.ndarray | None, sample: int, salt: int) -> Row:
        """`ids` of one window or record, of which there may be none; `counts`: of a record, which of them are to be learnt."""
        ids = ids.astype(np.int64)
        if not len(ids):
            return dict.fromkeys((*self.objective.fed, "targets"), ids)
        match self.objective.kind:
            case "masked_token":
                return self._masked(ids, draws(self.training.seed, sample, salt, 3 * len(ids)).reshape(3, -1))
            case "span_corruption":
                return self._corrupted(ids, draws(self.training.seed, sample, salt, 2 * len(ids)).reshape(2, -1))
            case "seq2seq":
                assert counts is not None
                return self._paired(ids[~counts], ids[counts])
            case "chat":
                assert counts is not None
                ids, counts = ids[: self.training.sequence + 1], counts[: self.training.sequence + 1]
                return {"tokens": ids[:-1], "targets": np.where(counts[1:], ids[1:], IGNORE)}
            case _:
                return self._next(ids)

    def _next(self, ids: np.ndarray) -> Row:
        """Where documents are kept apart, the end of one does not tell how the next begins."""
        tokens, targets = ids[:-1], ids[1:]
        if "documents" in self.training.inputs:
            targets = np.where(tokens == self.text.end_of_text, IGNORE, targets)
        return {"tokens": tokens, "documents": self._documents(tokens), "targets": targets}

    def _documents(self, ids: np.ndarray) -> np.ndarray:
        """The number of each token's document in its row: an end belongs to the document that it ends."""
        ends = ids == self.text.end_of_text
        return np.cumsum(ends) - ends

    def _masked(self, ids: np.ndarray, drawn: np.ndarray) -> Row:
        chosen = (drawn[0] < self.objective.probability) & (ids != self.text.end_of_text)
        assert self.text.mask is not None
        tokens = np.where(chosen & (drawn[1] < 0.8), self.text.mask, ids)
        other = (drawn[2] * self.text.vocab).astype(np.int64)
        tokens = np.where(chosen & (drawn[1] >= 0.9), other, tokens)
        documents = self._documents(ids)
        segments = np.minimum(documents, 1)
        targets = np.where(chosen, ids, IGNORE)
        return {"tokens": tokens, "segments": segments, "documents": documents, "targets": targets}

    def _corrupted(self, ids: np.ndarray, drawn: np.ndarray) -> Row:
        tokens, target = corrupted(
            ids,
            drawn,
            self.objective.density,
            self.objective.mean_length,
            np.array(self.special, dtype=np.int64),
            self.text.end_of_text,
        )
        return self._shifted(tokens, target)

    def _paired(self, source: np.ndarray, target: np.ndarray) -> Row:
        """Each cut to its length, its end kept."""
        assert self.objective.target is not None
        end = [self.text.end_of_text]
        source = np.concatenate([source[: self.training.sequence - 1], end])
        return self._shifted(source, np.concatenate([target[: self.objective.target - 1], end]))

    def _shifted(self, source: np.ndarray, target: np.ndarray) -> Row:
        """The decoder is given what stands before each target: first the padding (arXiv:1910.10683's start)."""
        return {"tokens": source, "decoder_tokens": np.concatenate([[self.text.pad], target[:-1]]), "targets": target}

    def batch(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Padded to their lengths, int64 [rows, length]: what the model reads, then the targets.

        `valid` is 1 where a token of `tokens` is no padding, and at the first place always, so that each row has a key."""
        made: dict[str, torch.Tensor] = {}
        width = self.training.objective.length
        last = "targets"
        lengths = {name: width(name, self.training.sequence) for name in self.training.inputs}
        lengths[last] = width(self.objective.required[-1], self.training.sequence)
        for name, length in lengths.items():
            fill = {last: IGNORE, "tokens": self.text.pad, "decoder_tokens": self.text.pad, "documents": -1}.get(name, 0)
            padded = np.full((len(rows), length), fill, dtype=np.int64)
            for index, row in enumerate(rows):
                values = np.ones(max(1, len(row["tokens"])), dtype=np.int64) if name == "valid" else row[name]
                padded[index, : len(values)] = values
            made[name] = torch.from_numpy(padded)
        return made


def corrupted(
    ids: np.ndarray, drawn: np.ndarray, density: float, mean_length: float, sentinels: np.ndarray, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """Text with spans replaced by sentinels, and the spans after theirs; both end in `end`. `drawn` [2, len(ids)] in [0, 1).

    As many spans as lengths and density say; text and spans take turns, text first; where they lie is drawn evenly."""
    if len(ids) < 2:
        return np.append(ids, end), np.array([end])[:0]
    noise = min(max(round(len(ids) * density), 1), len(ids) - 1)
    spans = max(1, min(round(noise / mean_length), noise, len(ids) - noise, len(sentinels)))
    cut = _lengths(noise, spans, drawn[0])
    kept = _lengths(len(ids) - noise, spans, drawn[1])
    tokens: list[np.ndarray] = []
    target: list[np.ndarray] = []
    at = 0
    for left, span, sentinel in zip(kept, cut, sentinels, strict=False):
        tokens += [ids[at : at + left], sentinel[None]]
        target += [sentinel[None], ids[at + left : at + left + span]]
        at += left + span
    return np.append(np.concatenate(tokens), end), np.append(np.concatenate(target), end)


def _lengths(total: int, parts: int, drawn: np.ndarray) -> list[int]:
    """`total` as the sum of `parts` numbers from 1 on, every way as likely."""
    cuts = np.sort(np.argsort(drawn[: total - 1], kind="stable")[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]])).astype(int).tolist()


def draws(seed: int, sample: int, salt: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) that (seed, sample, salt) name: splitmix64 (Steele, Lea, Flood, OOPSLA 2014) as a counter."""
    start = _mixed(np.array([seed], dtype=np.uint64)) ^ np.uint64(salt)
    start = _mixed(_mixed(start) + np.uint64(sample))
    numbers = _mixed(start + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(value: np.ndarray) -> np.ndarray:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return value ^ value >> np.uint64(31)


def _fail(what: str, names: str) -> NoReturn:
    message = f"the tokenizer has no {what.removeprefix('a ')}, which the objective needs"
    raise RunError([Diagnostic("MLM0713", message, help=f"add {names} to the tokenizer, or take bytes()")])
