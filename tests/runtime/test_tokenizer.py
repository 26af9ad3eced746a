"""Bytes and tokenizer.json: there and back, token by token, and what is said of files that are no tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from mlmdsl.diagnostics import RunError
from mlmdsl.runtime import config
from mlmdsl.runtime.tokenizer import ByteTokenizer, TextTokenizer, load

SAMPLE = "Ein Sätzchen, naïve 日本語 🙂 and some plain words.\n  def f(x): return x"


def streamed(tokenizer: TextTokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream()
    return "".join(map(stream.push, ids)) + stream.close()


@pytest.fixture
def bpe(tmp_path: Path) -> Path:
    """A byte-level BPE of 300 tokens and one special one."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<stop>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([SAMPLE] * 3, trainer)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def hf(path: Path) -> TextTokenizer:
    return load(config.Tokenizer("hf", str(path)))


@given(st.text())
def test_bytes_there_and_back(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == streamed(tokenizer, ids) == text
    assert tokenizer.encode_batch([text])[0].tolist() == ids


@given(st.lists(st.integers(0, 300)))
def test_bytes_decode_anything(ids: list[int]) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(ids) == streamed(tokenizer, ids)


def test_a_character_is_held_back_until_it_is_whole() -> None:
    stream = ByteTokenizer().stream()
    assert [stream.push(byte) for byte in "é!".encode()] == ["", "é", "!"]
    stream.push(0xE2)
    assert stream.close() == "\ufffd"


def test_hf_there_and_back(bpe: Path) -> None:
    tokenizer = hf(bpe)
    ids = tokenizer.encode(SAMPLE)
    assert max(ids) < tokenizer.vocab == 300
    assert tokenizer.decode(ids) == streamed(tokenizer, ids) == SAMPLE
    assert [a.tolist() for a in tokenizer.encode_batch([SAMPLE, ""])] == [ids, []]


def test_hf_end_of_text_by_its_usual_name(bpe: Path) -> None:
    assert hf(bpe).end_of_text == 0


@pytest.mark.parametrize("token", ["<stop>", {"content": "<stop>"}])
def test_hf_end_of_text_named_beside(bpe: Path, token: object) -> None:
    bpe.with_name("tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    assert hf(bpe).end_of_text == 1


def test_identity_follows_content(bpe: Path) -> None:
    before = hf(bpe).identity
    assert hf(bpe).identity == before
    bpe.write_text(bpe.read_text().replace("<stop>", "<halt>"))
    assert hf(bpe).identity != before


@pytest.mark.parametrize(
    ("content", "code"),
    [(None, "MLM0710"), ("{}", "MLM0710"), ("no json", "MLM0710"), ("\x00", "MLM0710"), ("no end", "MLM0711")],
)
def test_what_is_no_tokenizer(bpe: Path, content: str | None, code: str) -> None:
    if content is None:
        bpe.unlink()
    elif content == "no end":
        bpe.write_text(bpe.read_text().replace("<|endoftext|>", "<unusual>"))
    else:
        bpe.write_text(content)
    with pytest.raises(RunError) as caught:
        hf(bpe)
    assert caught.value.diagnostics[0].code == code
    assert caught.value.diagnostics[0].help
