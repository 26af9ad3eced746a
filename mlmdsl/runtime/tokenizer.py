"""Text to token ids and back: single bytes, or a Hugging Face tokenizer.json.

    bytes   the 256 byte values; id 0 (NUL, which text does not contain) ends a document; 256 is the mask, 257 to 356 are
            sentinels of spans
    hf      any tokenizer.json, through `tokenizers`; the end-of-text token is looked up beside it and in it

`load(settings)` raises RunError MLM0710 (no file, not a tokenizer) or MLM0711 (no end-of-text token).
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
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


MASKS, PADS = ("[MASK]", "<mask>", "<|mask|>"), ("<pad>", "[PAD]", "<|pad|>")
SENTINELS = 100


class TextTokenizer(Protocol):
    """`identity` names what the ids mean: two tokenizers with the same identity give the same ids. `vocab` counts the ids that
    text has; `pad` fills rows and starts a decoder; `mask` is None and `sentinels` are none where the tokenizer lacks them;
    `special` are tokens that stand for no text; `begin` and `end` spell what a chat template, in jinja2, calls bos_token and
    eos_token, the end being `end_of_text`."""

    vocab: int
    end_of_text: int
    pad: int
    mask: int | None
    sentinels: Sequence[int]
    special: frozenset[int]
    begin: str
    end: str
    template: str | None

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
    special = frozenset({0})
    begin, end = "", "\0"
    pad = 0
    mask: int | None = 256
    sentinels: Sequence[int] = range(257, 257 + SENTINELS)
    template: str | None = None
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
    pad: int = field(init=False)
    mask: int | None = field(init=False)
    sentinels: Sequence[int] = field(init=False)
    special: frozenset[int] = field(init=False)
    begin: str = field(init=False)
    end: str = field(init=False)
    template: str | None = field(init=False)

    def __post_init__(self) -> None:
        self.identity = f"hf:{hashlib.sha256(self.path.read_bytes()).hexdigest()}:{self.end_of_text}"
        ids = self.tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab = max(ids, default=-1) + 1  # ids may have gaps: what counts is the largest
        pad = self._first(PADS)
        self.pad = self.end_of_text if pad is None else pad
        self.mask = self._first(MASKS)
        found = (self.tokenizer.token_to_id(f"<extra_id_{i}>") for i in range(SENTINELS))
        self.sentinels = list(takewhile(lambda token: token is not None, found))
        added = self.tokenizer.get_added_tokens_decoder()
        self.special = frozenset({self.end_of_text, *(token for token, content in added.items() if content.special)})
        self.begin = next(iter(_named_beside(self.path, "bos_token")), "")
        self.end = self.tokenizer.id_to_token(self.end_of_text) or ""
        self.template = _template_beside(self.path)

    def _first(self, names: Sequence[str]) -> int | None:
        return next((found for name in names if (found := self.tokenizer.token_to_id(name)) is not None), None)

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
    for name in (*_named_beside(path, "eos_token"), *END_OF_TEXT):
        found = tokenizer.token_to_id(name)
        if found is not None:
            return found
    special = sorted(token.content for token in tokenizer.get_added_tokens_decoder().values())
    raise _error(
        "MLM0711",
        f"{path} has no end-of-text token that is known by name; its added tokens are {', '.join(special[:8]) or 'none'}",
        f'name one in {path.with_name("tokenizer_config.json")}: {{"eos_token": "..."}}',
    )


def _named_beside(path: Path, role: str) -> list[str]:
    """`role`, say eos_token, of tokenizer_config.json or special_tokens_map.json in the same folder."""
    names: list[str] = []
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            settings: Any = json.loads(path.with_name(file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        token = settings.get(role) if isinstance(settings, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        names += [token] if isinstance(token, str) else []
    return names


def _template_beside(path: Path) -> str | None:
    """chat_template.jinja, or `chat_template` of tokenizer_config.json: one, or the default of several."""
    try:
        return path.with_name("chat_template.jinja").read_text(encoding="utf-8")
    except OSError:
        pass
    try:
        found: Any = json.loads(path.with_name("tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(found, list):
        found = next((item.get("template") for item in found if item.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _error(code: str, message: str, help: str) -> RunError:
    return RunError([Diagnostic(code, message, help=help)])
