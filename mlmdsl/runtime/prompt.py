"""What a prompt is to each objective: the tokens that a model goes on from, its logits for the next one, where the text ends.

next_token       the prompt is the beginning of a text, which goes on
chat             the user's message, to which the assistant answers; ends with the turn
seq2seq          a source, of which the decoder tells the target
span_corruption  a text with <extra_id_0>, <extra_id_1>, ... where spans are missing; the decoder tells the spans
masked_token     fills in single tokens and goes nowhere: RunError MLM0732
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mlmdsl.diagnostics import Diagnostic, RunError
from mlmdsl.runtime.config import Training
from mlmdsl.runtime.records import rendered
from mlmdsl.runtime.tokenizer import TextTokenizer

Logits = Callable[[Tensor], Tensor]  # tokens [1, T] -> [1, T, vocab]
_SENTINEL = re.compile(r"<extra_id_(\d+)>")


@dataclass(frozen=True)
class Prompt:
    """`shown` is printed before what is drawn; at most `window` tokens are looked at, at most `most` drawn, none from `vocab`
    on; `spelt`: tokens that are no text, as they are printed."""

    logits: Logits
    ids: list[int]
    window: int
    vocab: int
    stop: frozenset[int]
    shown: str = ""
    most: int | None = None
    spelt: Mapping[int, str] = field(default_factory=dict[int, str])


def prompt_of(model: nn.Module, training: Training, text: TextTokenizer, given: str, device: torch.device) -> Prompt:
    """`model` is the whole of it, in one stage."""
    match training.objective.kind:
        case "masked_token":
            help = "sample from a run whose objective is next_token(), chat(), seq2seq() or span_corruption()"
            message = "masked_token() learns to fill in single tokens: the model does not go on from a prompt"
            raise RunError([Diagnostic("MLM0732", message, help=help)])
        case "seq2seq" | "span_corruption":
            return _told(model, training, text, given, device)
        case "chat":
            return _answered(model, training, text, given)
        case _:
            return _continued(model, training, text, text.encode(given), {text.end_of_text}, given)


def _continued(model: nn.Module, training: Training, text: TextTokenizer, ids: list[int], stop: set[int], shown: str) -> Prompt:
    def logits(tokens: Tensor) -> Tensor:
        given = {"tokens": tokens, "valid": torch.ones_like(tokens)}
        return model(*(given.get(name, tokens) for name in training.inputs))

    return Prompt(logits, ids or [text.end_of_text], training.sequence, text.vocab, frozenset(stop), shown)


def _answered(model: nn.Module, training: Training, text: TextTokenizer, given: str) -> Prompt:
    """The turn ends at the first special token that the template puts after an answer, or at the end of the text."""
    asked = [{"role": "user", "content": given}]
    before, whole = rendered(asked, text, prompt=True), rendered([*asked, {"role": "assistant", "content": "."}], text)
    after = text.encode(whole[len(before) :]) if whole.startswith(before) else []
    ends = next(({token} for token in after if token in text.special), set[int]())
    return _continued(model, training, text, text.encode(before), {text.end_of_text, *ends}, "")


def _told(model: nn.Module, training: Training, text: TextTokenizer, given: str, device: torch.device) -> Prompt:
    """The encoder reads the prompt; a decoder begins with padding, as in training."""
    spans = training.objective.kind == "span_corruption"
    ids = _with_sentinels(text, given) if spans else text.encode(given)
    tokens = torch.tensor([[*ids[: training.sequence - 1], text.end_of_text]], device=device)
    source = {"tokens": tokens, "valid": torch.ones_like(tokens)}
    remember(model)

    def logits(decoded: Tensor) -> Tensor:
        return model(*((source | {"decoder_tokens": decoded})[name] for name in training.inputs))

    target = training.objective.length("decoder_tokens", training.sequence)
    spelt = {token: f"<extra_id_{i}>" for i, token in enumerate(text.sentinels)} if spans else {}
    vocab = max([text.vocab, *(token + 1 for token in spelt)])
    return Prompt(logits, [text.pad], target, vocab, frozenset({text.end_of_text}), most=target, spelt=spelt)


def _with_sentinels(text: TextTokenizer, given: str) -> list[int]:
    ids: list[int] = []
    for index, part in enumerate(_SENTINEL.split(given)):
        known = index % 2 and int(part) < len(text.sentinels)
        ids += [text.sentinels[int(part)]] if known else text.encode(f"<extra_id_{part}>" if index % 2 else part)
    return ids


def remember(model: nn.Module) -> None:
    """The passes of a repeat keep what they last made, and make nothing new of the same: an encoder's, while the decoder goes
    on."""
    for repeat in model.children():
        for block in repeat.values() if isinstance(repeat, nn.ModuleDict) else ():
            block.forward = _remembered(block.forward)


def _remembered(compute: Callable[..., Any]) -> Callable[..., Any]:
    last: list[tuple[tuple[Any, ...], Any]] = []

    def forward(*inputs: Any) -> Any:
        if not last or not all(map(_same, inputs, last[0][0])):
            last[:] = [(inputs, compute(*inputs))]
        return last[0][1]

    return forward


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other))
