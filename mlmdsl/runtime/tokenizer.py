"""Text to token ids and back: single bytes, or a Hugging Face tokenizer.json.

    bytes   the 256 byte values; id 0 (NUL, which text does not contain) ends a document
    hf      any tokenizer.json, through `tokenizers`; the end-of-text token is looked up beside it and in it

`load(settings)` raises RunError MLM0710 (no file, not a tokenizer) or MLM0711 (no end-of-text token).
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mlmdsl.diagnostics import Diagnostic, RunError
from mlmdsl.runtime import config

if TYPE_CHECKING:
    import tokenizers

Ids = np.ndarray  # one dim, unsigned integers

END_OF_TEXT = (  # as the well-known tokenizers spell it, the most specific first
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<|im_end|>",
    "[EOS]",
    "[SEP]",
)


class TextTokenizer(Protocol):
    """`identity` names what the ids mean: two tokenizers with the same identity give the same ids."""

    vocab: int
    end_of_text: int

    @property
    def identity(self) -> str: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[Ids]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def stream(self) -> Stream: ...


@dataclass
class Stream:
    """Decodes token by token: `push` gives the text that is certain by now, `close` the rest.

    A character may be spread over several tokens; it is held back until it is whole."""

    push: Callable[[int], str]
    close: Callable[[], str]


class ByteTokenizer:
    """UTF-8 bytes as tokens. Bytes that are not UTF-8 decode to U+FFFD."""

    vocab = 256
    end_of_text = 0
    identity = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def stream(self) -> Stream:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return Stream(
            push=lambda token: decoder.decode(bytes([token]) if token < 256 else b""),
            close=lambda: decoder.decode(b"", final=True),
        )


@dataclass
class HuggingFaceTokenizer:
    """A tokenizer.json. No tokens are added on encoding: documents are separated by `end_of_text` alone."""

    path: Path
    tokenizer: tokenizers.Tokenizer
    end_of_text: int
    vocab: int = field(init=False)
    identity: str = field(init=False)

    def __post_init__(self) -> None:
        self.identity = f"hf:{hashlib.sha256(self.path.read_bytes()).hexdigest()}:{self.end_of_text}"
        ids = self.tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab = max(ids, default=-1) + 1  # ids may have gaps: what counts is the largest

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> Stream:
        window = _Window(self)
        return Stream(push=window.push, close=window.close)


@dataclass
class _Window:
    """Decodes the tokens since the last certain text again with each new one, and gives what has been added.

    Decoders look at neighbours (a leading space, bytes of one character), so tokens cannot be decoded one by one."""

    tokenizer: HuggingFaceTokenizer
    context: list[int] = field(default_factory=list)  # already shown, kept as the left neighbour
    pending: list[int] = field(default_factory=list)

    def push(self, token: int) -> str:
        self.pending.append(token)
        text = self._text()
        if text.endswith("\ufffd") and len(self.pending) < 16:  # a character not yet whole
            return ""
        self.context, self.pending = self.pending[-8:], []
        return text

    def close(self) -> str:
        return self._text() if self.pending else ""

    def _text(self) -> str:
        known = self.tokenizer.decode(self.context)
        return self.tokenizer.decode(self.context + self.pending)[len(known) :]


def load(settings: config.Tokenizer) -> TextTokenizer:
    """The tokenizer that the settings name."""
    if settings.kind == "bytes":
        return ByteTokenizer()
    assert settings.kind == "hf" and settings.path is not None, settings
    return _load_hugging_face(Path(settings.path))


def _load_hugging_face(path: Path) -> HuggingFaceTokenizer:
    import tokenizers  # 0.1 s: only where it is asked for

    if not path.is_file():
        raise _error("MLM0710", f"{path}: no such tokenizer file", 'write hf("path/to/tokenizer.json"), relative to the spec')
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every kind of bad file
        raise _error("MLM0710", f"{path} is no tokenizer.json: {error}", "save it with `tokenizer.save(...)`") from None
    return HuggingFaceTokenizer(path, tokenizer, _end_of_text(path, tokenizer))


def _end_of_text(path: Path, tokenizer: tokenizers.Tokenizer) -> int:
    """What the files beside it name, then the usual spellings among its tokens."""
    for name in (*_named_beside(path), *END_OF_TEXT):
        found = tokenizer.token_to_id(name)
        if found is not None:
            return found
    special = sorted(token.content for token in tokenizer.get_added_tokens_decoder().values())
    raise _error(
        "MLM0711",
        f"{path} has no end-of-text token that is known by name; its added tokens are {', '.join(special[:8]) or 'none'}",
        f'name one in {path.with_name("tokenizer_config.json")}: {{"eos_token": "..."}}',
    )


def _named_beside(path: Path) -> list[str]:
    """`eos_token` of tokenizer_config.json or special_tokens_map.json in the same folder."""
    names: list[str] = []
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            settings: Any = json.loads(path.with_name(file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        token = settings.get("eos_token") if isinstance(settings, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        names += [token] if isinstance(token, str) else []
    return names


def _error(code: str, message: str, help: str) -> RunError:
    return RunError([Diagnostic(code, message, help=help)])
