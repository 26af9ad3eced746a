"""Sampling text from a checkpoint, in one process, through the program that the compiler emits for one device.

Each new token is one forward pass over the last `seq_len` tokens: past that length the oldest fall out of sight. Behind an
encoder, whose passes are made once, it is one of the decoder over what it has told, at most `target_len` tokens. The text is
printed as it comes; it ends where the objective ends one (prompt.py) or after the asked number of tokens.

    UsageError MLM0731   a sampling setting is out of range
    RunError   MLM0730   the run has no whole checkpoint
               MLM0732   its objective goes on from nothing
"""

from __future__ import annotations

import math
import runpy
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

import torch

from mlmdsl.diagnostics import Diagnostic, RunError, UsageError
from mlmdsl.runtime import checkpoint as checkpoints
from mlmdsl.runtime import mesh, tokenizer
from mlmdsl.runtime.prompt import Logits, Prompt, prompt_of

GREEDY_BELOW = 1e-6  # a temperature that single precision cannot divide by
LIKELY, ANSWERING = 0.8, 0.0  # temperatures where none is asked for: of text that goes on, of a decoder that has a source


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: `temperature` 0 takes the likeliest; `top_k` and `top_p` cut the tail off first (Holtzman et al.,
    "The Curious Case of Neural Text Degeneration", 2020)."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [
            ("--temperature", self.temperature, "0 or more", self.temperature >= 0 and math.isfinite(self.temperature)),
            ("--top-k", self.top_k, "1 or more", self.top_k is None or self.top_k >= 1),
            ("--top-p", self.top_p, "above 0 and at most 1", self.top_p is None or 0 < self.top_p <= 1),
        ]
        found = [Diagnostic("MLM0731", f"{name} {value} must be {range_}") for name, value, range_, ok in wrong if not ok]
        if found:
            raise UsageError(found)


def generate(
    program: Path,
    run: Path,
    prompt: str,
    tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    checkpoint: Path | None,
    stream: TextIO | None = None,
) -> int:
    """Prints the prompt and up to `tokens` tokens after it. `program` is for one device; `run` holds the checkpoints."""
    folder = checkpoint or checkpoints.latest(run)
    if folder is None or not folder.is_dir():
        what = f"{folder} is no checkpoint" if folder else f"{run} has no whole checkpoint yet"
        raise RunError([Diagnostic("MLM0730", what, help="checkpoints are written at the end and at every checkpoint_every")])
    names = runpy.run_path(str(program))
    training = names["TRAINING"]
    if temperature is None:
        temperature = ANSWERING if training.objective.target else LIKELY
    sampling = Sampling(temperature, top_k, top_p, seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device(device):
        model = names["Stage"](0, mesh.single(device)).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant here
        checkpoints.load_weights(model, folder)
    text = tokenizer.load(training.tokenizer)
    given = prompt_of(model, training, text, prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace"), device)
    drawn = sample(given.logits, given.ids, given.window, given.vocab, sampling, device)
    _print(given, islice(drawn, tokens if given.most is None else min(tokens, given.most)), text, stream or sys.stdout)
    return 0


@torch.no_grad()
def sample(
    model: Logits, ids: list[int], sequence: int, vocab: int, sampling: Sampling, device: torch.device | str = "cpu"
) -> Iterator[int]:
    """Tokens after `ids`, without end. Draws on the CPU, so that a seed gives the same text on every device."""
    generator = torch.Generator().manual_seed(sampling.seed)
    while True:
        window = torch.tensor([ids[-sequence:]], device=device)
        logits = model(window)[0, -1, :vocab].float().cpu()
        ids = [*ids[-sequence:], draw(logits, sampling, generator)]
        yield ids[-1]


def draw(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token from logits [vocab]."""
    if sampling.temperature < GREEDY_BELOW:
        return int(logits.argmax())
    ranked, order = logits.sort(descending=True)
    chances = torch.softmax((ranked - ranked[0]) / sampling.temperature, dim=0)
    if sampling.top_k is not None:
        chances[sampling.top_k :] = 0
    if sampling.top_p is not None:
        before = chances.cumsum(0) - chances  # the likeliest always stays
        chances[before >= sampling.top_p * chances.sum()] = 0
    return int(order[torch.multinomial(chances, 1, generator=generator)])


def _print(prompt: Prompt, drawn: Iterator[int], text: tokenizer.TextTokenizer, stream: TextIO) -> None:
    decoder = text.stream()
    stream.write(prompt.shown)
    stream.flush()
    for token in drawn:
        if token in prompt.stop:
            break
        if token in prompt.spelt:
            stream.write(decoder.close() + prompt.spelt[token])
            decoder = text.stream()
        else:
            stream.write(decoder.push(token))
        stream.flush()
    stream.write(decoder.close() + "\n")
    stream.flush()
