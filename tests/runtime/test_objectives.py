"""What each objective makes of text and records: whole rows, token by token; the same under every plan and after a resume."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlmdsl.diagnostics import RunError
from mlmdsl.runtime.config import AdamW, Data, Objective, Tokenizer, Training, span_lengths
from mlmdsl.runtime.data import TokenDataset
from mlmdsl.runtime.functions import IGNORE
from mlmdsl.runtime.objectives import corrupted, draws
from tests.parity.ranks import run_ranks

MASK, FIRST_SENTINEL = 256, 257
INPUTS = {
    "next_token": ("tokens", "valid"),
    "masked_token": ("tokens", "valid", "segments"),
    "span_corruption": ("tokens", "valid", "decoder_tokens"),
    "seq2seq": ("tokens", "valid", "decoder_tokens"),
    "chat": ("tokens", "valid"),
}


def training(data: Data, kind: str, **settings: Any) -> Training:
    sequence = settings.get("sequence", 8)
    target = {"span_corruption": span_lengths(sequence, 0.15, 3.0)[2], "seq2seq": 4}.get(kind)
    defaults: dict[str, Any] = {
        "tokenizer": Tokenizer("bytes"),
        "sequence": sequence,
        "batch": 4,
        "steps": 9,
        "optimizer": AdamW(1e-3),
        "objective": Objective(kind, target=target),
        "inputs": INPUTS[kind],
    }
    return Training(data=data, **{**defaults, **settings})


def text(folder: Path, content: str, validation: float = 0.0) -> Data:
    (folder / "text.txt").write_text(content)
    return Data("text", (str(folder / "*.txt"),), validation=validation)


def records(folder: Path, kind: str, lines: Sequence[object], **settings: Any) -> Data:
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Data(kind, (str(folder / "records.jsonl"),), **{"validation": 0.0, **settings})


def pairs(folder: Path, *found: tuple[str, str], **settings: Any) -> Data:
    lines = [{"source": source, "target": target} for source, target in found]
    return records(folder, "pairs", lines, source="source", target="target", **settings)


def talk(*messages: str) -> dict[str, object]:
    """Turns of the user and the assistant, the user first."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(messages)]}


def of(folder: Path, kind: str) -> Data:
    """Some data for every objective."""
    if kind == "seq2seq":
        return pairs(folder, *((f"{i} source"[: 2 + i % 9], f"{i}") for i in range(20)), validation=0.25)
    if kind == "chat":
        return records(folder, "conversations", [talk(f"q{i}", f"a{i}") for i in range(20)], field="messages", validation=0.25)
    return text(folder, "".join(f"line {i} of a text\n" for i in range(30)), validation=0.25)


def all_rows(dataset: TokenDataset, steps: int = 6) -> list[dict[str, torch.Tensor]]:
    return [dataset.batch(step, 0, 4) for step in range(steps)]


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_pairs_are_a_source_and_a_shifted_target(tmp_path: Path) -> None:
    data = pairs(tmp_path, ("ab", "xyz"), ("abcdefghij", "stuvw"), ("", "z"))
    settings = training(data, "seq2seq", batch=3)
    batch = TokenDataset(settings, "train", tmp_path / "c").batch(0, 0, 3)
    rows = {
        (*map(int, batch["tokens"][i]),): [batch[name][i].tolist() for name in ("valid", "decoder_tokens", "targets")]
        for i in range(3)
    }
    a, s, x = ord("a"), ord("s"), ord("x")
    assert rows == {
        (a, a + 1, 0, 0, 0, 0, 0, 0): [[1] * 3 + [0] * 5, [0, x, x + 1, x + 2], [x, x + 1, x + 2, 0]],
        (*range(a, a + 7), 0): [[1] * 8, [0, s, s + 1, s + 2], [s, s + 1, s + 2, 0]],  # both cut, their ends kept
        (0,) * 8: [[1] + [0] * 7, [0, x + 2, 0, 0], [x + 2, 0, IGNORE, IGNORE]],
    }


def test_only_the_assistants_tokens_are_learnt(tmp_path: Path) -> None:
    data = records(tmp_path, "conversations", [talk("Hi", "Ho", "So", "No")], field="messages")
    batch = TokenDataset(training(data, "chat", batch=1, sequence=64), "train", tmp_path / "c").batch(0, 0, 1)
    whole = b"User: Hi\nAssistant: Ho\0\nUser: So\nAssistant: No\0\n"
    size = len(whole) - 1
    assert bytes(batch["tokens"][0][:size].tolist()) == whole[:-1]
    assert batch["valid"][0].tolist() == [1] * size + [0] * (64 - size)
    told = [chr(t) if t != IGNORE else "." for t in batch["targets"][0].tolist()]
    asked, asked_again = len("User: Hi\nAssistant: ") - 1, len("User: So\nAssistant: ")
    assert "".join(told) == "." * asked + "Ho\0\n" + "." * asked_again + "No\0\n" + "." * (64 - size)


def test_a_conversation_is_written_by_the_tokenizers_template(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Made
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ["<|end|>", "user", "assistant", "hi", "ho", "there", "[UNK]"]
    made = Made(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()  # pyright: ignore
    made.add_special_tokens(["<|end|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    (tmp_path / "chat_template.jinja").write_text(
        "{%- for m in messages %}\n    {{- m['role'] + ' ' + m['content'] + ' ' + eos_token + ' ' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- 'assistant ' }}\n{%- endif %}"
    )
    data = records(tmp_path, "conversations", [talk("hi there", "ho")], field="messages")
    settings = training(data, "chat", batch=1, tokenizer=Tokenizer("hf", str(tmp_path / "tokenizer.json")))
    batch = TokenDataset(settings, "train", tmp_path / "c").batch(0, 0, 1)
    assert batch["tokens"][0].tolist() == [1, 3, 5, 0, 2, 4, 0, 0]  # user hi there <|end|> assistant ho; padding
    assert batch["targets"][0].tolist() == [IGNORE] * 4 + [4, 0, IGNORE, IGNORE]


def test_masked_tokens_are_the_targets(tmp_path: Path) -> None:
    content = "the cat sat on the mat. " * 200
    objective = Objective("masked_token", probability=0.3)
    settings = training(text(tmp_path, content), "masked_token", objective=objective, sequence=100, batch=40)
    batch = TokenDataset(settings, "train", tmp_path / "c").batch(0, 0, 40)
    tokens, targets = batch["tokens"], batch["targets"]
    valid, learnt = batch["valid"].bool(), targets != IGNORE
    assert not (learnt & ~valid).any()
    shown = torch.where(learnt, targets, tokens)
    assert all(bytes(row[keep].tolist()).rstrip(b"\0").decode() in content for row, keep in zip(shown, valid, strict=True))
    chosen = int(learnt.sum())
    assert 0.27 < chosen / int(valid.sum()) < 0.33
    assert 0.76 < int((tokens == MASK)[learnt].sum()) / chosen < 0.84
    assert 0.07 < int((tokens == targets)[learnt].sum()) / chosen < 0.13
    assert not (tokens == MASK)[~learnt].any()


def test_segments_change_after_the_first_end(tmp_path: Path) -> None:
    for name, content in (("a", "abc"), ("b", "defgh")):
        (tmp_path / f"{name}.txt").write_text(content)
    settings = training(Data("text", (str(tmp_path / "*.txt"),), validation=0.0), "masked_token", sequence=10, batch=1)
    batch = TokenDataset(settings, "train", tmp_path / "c").batch(0, 0, 1)
    assert batch["segments"][0].tolist() == [0] * 4 + [1] * 6  # abc, its end, defgh, its end


def test_spans_are_cut_out_and_told(tmp_path: Path) -> None:
    sequence = 40
    window, spans, target = span_lengths(sequence, 0.15, 3.0)
    assert (window, spans, target) == (44, 2, 10)
    content = "".join(chr(33 + i) for i in range(90)) * 5
    batch = TokenDataset(
        training(text(tmp_path, content), "span_corruption", sequence=sequence), "train", tmp_path / "c"
    ).batch(0, 0, 4)
    for tokens, valid, before, targets in zip(*(batch[name] for name in (*INPUTS["span_corruption"], "targets")), strict=True):
        source = [int(t) for t in tokens[valid.bool()]]
        told = [int(t) for t in targets[targets != IGNORE]]
        assert before.tolist()[: len(told)] == [0, *told[:-1]]
        assert source[-1] == told[-1] == 0
        assert (
            [t for t in source if t > MASK] == [t for t in told if t > MASK] == [*range(FIRST_SENTINEL, FIRST_SENTINEL + spans)]
        )
        assert bytes(restored(source, told)).decode() in content + "\0"


def restored(source: list[int], told: list[int]) -> list[int]:
    """The text that source and target were made from."""
    spans: dict[int, list[int]] = {}
    last = -1
    for token in told[:-1]:
        if token > MASK:
            last = token
            spans[last] = []
        else:
            spans[last].append(token)
    return [t for token in source[:-1] for t in (spans[token] if token > MASK else [token])]


@given(st.integers(0, 60), st.integers(0, 10**6), st.floats(0.05, 0.5), st.floats(1.0, 6.0))
def test_corruption_loses_nothing(length: int, seed: int, density: float, mean_length: float) -> None:
    ids = np.arange(1, length + 1)
    drawn = draws(seed, 0, 0, 2 * length).reshape(2, -1)
    source, told = corrupted(ids, drawn, density, mean_length, np.arange(FIRST_SENTINEL, FIRST_SENTINEL + 100), 0)
    assert restored(source.tolist(), told.tolist()) == ids.tolist()


@given(st.integers(4, 300), st.floats(0.05, 0.5), st.floats(1.0, 6.0))
def test_spans_fill_the_row(sequence: int, density: float, mean_length: float) -> None:
    length, spans, target = span_lengths(sequence, density, mean_length)
    ids = np.arange(1, length + 1)
    source, told = corrupted(
        ids, draws(3, 1, 0, 2 * length).reshape(2, -1), density, mean_length, np.arange(1000, 1000 + spans), 0
    )
    assert len(told) == target and len(source) in (sequence, sequence - 1)


# ---- the same rows everywhere ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", INPUTS)
def test_rows_depend_on_the_sample_alone(kind: str, tmp_path: Path) -> None:
    settings = training(of(tmp_path, kind), kind, sequence=24)
    dataset, again = (TokenDataset(settings, "train", tmp_path / "c") for _ in range(2))
    whole = all_rows(dataset)
    for step in (5, 2):  # a run that is resumed begins anywhere
        for rows in (1, 2):
            parts = [again.batch(step, low, low + rows) for low in range(0, 4, rows)]
            for name in (*INPUTS[kind], "targets"):
                assert torch.equal(torch.cat([part[name] for part in parts]), whole[step][name]), name
    assert list(whole[0]) == [*INPUTS[kind], "targets"]
    assert all(x.dtype == torch.int64 for x in whole[0].values())
    other = TokenDataset(training(settings.data, kind, sequence=24, seed=1), "train", tmp_path / "c")
    assert any(not torch.equal(a["targets"], b["targets"]) for a, b in zip(whole, all_rows(other), strict=True))


@pytest.mark.parametrize("kind", INPUTS)
def test_what_is_held_out_is_never_trained_on(kind: str, tmp_path: Path) -> None:
    settings = training(of(tmp_path, kind), kind, sequence=24)
    train, held = (TokenDataset(settings, split, tmp_path / "c") for split in ("train", "validation"))
    assert held.batches == -(-held.windows // 4) > 0
    past = held.batch(-(-held.windows // 4), 0, 4)
    assert bool((past["targets"] == IGNORE).all())
    if settings.data.records:
        assert (train.windows, held.windows) == (15, 5)
        seen = {tuple(row.tolist()) for k in range(5) for row in train.batch(k, 0, 4)["tokens"]}
        assert not seen & {tuple(row.tolist()) for row in held.batch(0, 0, 4)["tokens"]}


def part_of_rank(rank: int, settings: Training, cache: Path) -> dict[str, list[list[int]]]:
    rows = settings.batch // 2
    batch = TokenDataset(settings, "train", cache).batch(3, rank * rows, (rank + 1) * rows)
    return {name: x.tolist() for name, x in batch.items()}


@pytest.mark.parametrize("kind", ("masked_token", "chat"))
def test_ranks_have_the_rows_of_one_process(kind: str, tmp_path: Path) -> None:
    settings = training(of(tmp_path, kind), kind, sequence=24)
    found = run_ranks(part_of_rank, 2, settings, tmp_path / "c")
    whole = TokenDataset(settings, "train", tmp_path / "c").batch(3, 0, 4)
    assert {name: found[0][name] + found[1][name] for name in found[0]} == {name: x.tolist() for name, x in whole.items()}


# ---- bad input -------------------------------------------------------------------------------------------------------


def fails(settings: Training, folder: Path) -> tuple[str, str]:
    with pytest.raises(RunError) as caught:
        TokenDataset(settings, "train", folder / "c")
    (problem,) = caught.value.diagnostics
    return problem.code, problem.message


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ({"text": "a"}, "MLM0714", '"messages" is no list of messages'),
        ({"messages": []}, "MLM0714", "is no list of messages"),
        ({"messages": [{"role": "user"}]}, "MLM0714", "is no list of messages"),
        (talk("only a question"), "MLM0714", "no message is the assistant's"),
        ([1], "MLM0703", "not an object"),
    ],
)
def test_what_is_no_conversation(line: object, code: str, message: str, tmp_path: Path) -> None:
    data = records(tmp_path, "conversations", [talk("a", "b"), line], field="messages")
    found = fails(training(data, "chat"), tmp_path)
    assert found[0] == code and message in found[1] and "records.jsonl:2" in found[1]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no') }}", "the chat template fails: no"),
        ("{% for m in messages %}{{ m.content }}{% endfor", "the chat template fails"),
        ("{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}", "changes what stands before"),
    ],
)
def test_templates_that_fail(template: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlmdsl.runtime.tokenizer import ByteTokenizer

    monkeypatch.setattr(ByteTokenizer, "template", template)
    code, said = fails(training(records(tmp_path, "conversations", [talk("a", "b")], field="messages"), "chat"), tmp_path)
    assert code == "MLM0715" and message in said


def test_a_pair_without_a_field(tmp_path: Path) -> None:
    data = records(tmp_path, "pairs", [{"en": "a", "de": "b"}], source="en", target="fr")
    code, said = fails(training(data, "seq2seq"), tmp_path)
    assert code == "MLM0704" and 'no field "fr"' in said


def test_too_few_records(tmp_path: Path) -> None:
    code, said = fails(training(records(tmp_path, "pairs", [], source="a", target="b"), "seq2seq"), tmp_path)
    assert code == "MLM0705" and "0 records" in said


@pytest.mark.parametrize("kind", ("masked_token", "span_corruption"))
def test_tokenizers_without_the_tokens_that_are_needed(kind: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Made
    from tokenizers.models import WordLevel

    Made(WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    settings = training(text(tmp_path, "a a a"), kind, tokenizer=Tokenizer("hf", str(tmp_path / "tokenizer.json")))
    assert fails(settings, tmp_path)[0] == "MLM0713"


@pytest.mark.parametrize(("kind", "least"), [("masked_token", MASK + 1), ("span_corruption", FIRST_SENTINEL + 1)])
def test_the_vocabulary_has_room_for_what_the_objective_adds(kind: str, least: int, tmp_path: Path) -> None:
    data = text(tmp_path, "some text " * 20)
    code, said = fails(training(data, kind, vocab=least - 1), tmp_path)
    assert code == "MLM0706" and f"the objective needs token {least - 1}" in said
    TokenDataset(training(data, kind, vocab=least), "train", tmp_path / "c")
