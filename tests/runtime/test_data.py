"""Batches depend on the global sample index alone; the token file is made once; bad data is named, never a traceback."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlmdsl.diagnostics import RunError
from mlmdsl.runtime import documents
from mlmdsl.runtime import packed as packed_module
from mlmdsl.runtime import tokenizer as tokenizers
from mlmdsl.runtime.config import AdamW, Data, Tokenizer, Training
from mlmdsl.runtime.data import TokenDataset, permuted
from mlmdsl.runtime.functions import IGNORE
from mlmdsl.runtime.packed import Packed


def training(data: Data, **settings: object) -> Training:
    defaults: dict[str, object] = dict(sequence=4, batch=2, steps=1, optimizer=AdamW(1e-3), tokenizer=Tokenizer("bytes"))
    return Training(data=data, **{**defaults, **settings})  # type: ignore[arg-type]


def prepare(settings: Training, cache: Path) -> Packed:
    return packed_module.prepare(settings, tokenizers.load(settings.tokenizer), cache)


def text(folder: Path, *contents: str, validation: float = 0.0) -> Data:
    for index, content in enumerate(contents):
        (folder / f"{index}.txt").write_bytes(content.encode())
    return Data("text", (str(folder / "*.txt"),), validation=validation)


def stream(data: Data, cache: Path) -> bytes:
    return bytes(prepare(training(data), cache).tokens.tolist())


def failure(data: Data, cache: Path, **settings: object) -> str:
    with pytest.raises(RunError) as caught:
        TokenDataset(training(data, **settings), "train", cache)
    (diagnostic,) = caught.value.diagnostics
    return f"{diagnostic.code}: {diagnostic.message}"


# ---- order ----------------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 300), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_every_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert sorted(permuted(i, size, seed, epoch) for i in range(size)) == list(range(size))


def test_order_is_fixed_for_ever() -> None:
    """A run that is resumed after an update of this package must see the batches that it would have seen."""
    assert [permuted(i, 10, 0, 0) for i in range(10)] == FIRST_EPOCH
    assert [permuted(i, 10, 0, 1) for i in range(10)] != FIRST_EPOCH
    assert [permuted(i, 10, 1, 0) for i in range(10)] != FIRST_EPOCH


FIRST_EPOCH = [7, 2, 5, 4, 0, 8, 3, 9, 1, 6]


def test_any_division_into_ranks_sees_the_same_batch(tmp_path: Path) -> None:
    dataset = TokenDataset(training(text(tmp_path, "abcdefghijklmnopqrstuvwxyz" * 9), batch=8), "train", tmp_path / "c")
    whole = dataset.batch(5, 0, 8)
    for ranks in (2, 4, 8):
        rows = 8 // ranks
        parts = [dataset.batch(5, r * rows, (r + 1) * rows) for r in range(ranks)]
        for name in ("tokens", "targets"):
            assert torch.equal(torch.cat([p[name] for p in parts]), whole[name])


def test_an_epoch_covers_every_target_once(tmp_path: Path) -> None:
    content = "abcdefghijklmnopqrst" + "u" * 3
    dataset = TokenDataset(training(text(tmp_path, content), batch=1), "train", tmp_path / "c")
    assert dataset.windows == 6  # 24 tokens with the end-of-text: 23 targets
    rows = [tuple(dataset.batch(i, 0, 1).values()) for i in range(dataset.windows)]
    targets = torch.cat([y[0][y[0] != IGNORE] for _, y in rows])
    assert sorted(targets.tolist()) == sorted((content[1:] + "\0").encode())
    short = [(x[0].tolist(), y[0].tolist()) for x, y in rows if (y == IGNORE).any()]
    assert short == [([*b"uuu", 0], [*b"uu", 0, IGNORE])]


def test_targets_are_the_next_tokens(tmp_path: Path) -> None:
    dataset = TokenDataset(training(text(tmp_path, "0123456789" * 5), batch=4), "train", tmp_path / "c")
    tokens, targets = dataset.batch(0, 0, 4).values()
    assert tokens.dtype == targets.dtype == torch.int64
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


# ---- validation -----------------------------------------------------------------------------------------------------


def test_validation_is_the_end_of_the_stream_in_order(tmp_path: Path) -> None:
    content = "t" * 80 + "abcdefghijklmnopqrs"
    settings = training(text(tmp_path, content, validation=0.2), batch=2)
    train, held = TokenDataset(settings, "train", tmp_path / "c"), TokenDataset(settings, "validation", tmp_path / "c")
    assert bytes(train.tokens.tolist()) == b"t" * 80
    assert held.batches == 3  # 20 tokens: 5 windows
    rows = [tuple(held.batch(k, 0, 2).values()) for k in range(held.batches)]
    assert bytes(rows[0][0][0].tolist()) == b"abcd"
    seen = torch.cat([y[y != IGNORE] for _, y in rows])
    assert bytes(seen.tolist()) == b"bcdefghijklmnopqrs\0"
    assert (rows[2][1][1] == IGNORE).all()  # past the end


def test_nothing_held_out(tmp_path: Path) -> None:
    assert TokenDataset(training(text(tmp_path, "abcdefgh")), "validation", tmp_path / "c").batches == 0


# ---- kinds of data --------------------------------------------------------------------------------------------------


def test_text_files_are_documents_sorted_by_path(tmp_path: Path) -> None:
    data = text(tmp_path, "one", "zwei: ä")
    twice = Data("text", (*data.paths, str(tmp_path / "0.txt")))
    assert stream(twice, tmp_path / "c") == "one\0zwei: ä\0".encode()


def test_a_large_text_file_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = "äöü\nßé\n" * 7 + "one long line without an end äöü"
    monkeypatch.setattr(documents, "PIECE_BYTES", 5)
    data = text(tmp_path, content)
    assert len(list(documents.pieces(data))) > 5
    assert stream(data, tmp_path / "c") == content.encode() + b"\0"


def test_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "first"}\n\n{"body": "sec\\nond", "text": 3}\n')
    assert stream(Data("jsonl", (str(tmp_path / "a.jsonl"),), field="body"), tmp_path / "c") == b"first\0sec\nond\0"


def test_parquet(tmp_path: Path) -> None:
    table = pa.table({"text": ["first", None, "second"], "n": [1, 2, 3]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    assert stream(Data("parquet", (str(tmp_path / "*.parquet"),)), tmp_path / "c") == b"first\0second\0"


def test_python_literals_without_running_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package_of_text"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('run')")
    (package / "inner.py").write_text('raise SystemExit("a")\nx = {"key": "b" "c", 1: f"no {x}"}\ny = ["d", " "]\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert stream(Data("python", ("package_of_text.inner",)), tmp_path / "c") == b"a\0bc\0d\0"


def test_the_text_that_every_cpython_carries(tmp_path: Path) -> None:
    packed = prepare(training(Data("python", ("pydoc_data.topics",))), tmp_path)
    assert packed.count > 400_000 and packed.dtype == "uint16"


# ---- the token file -------------------------------------------------------------------------------------------------


def test_made_once_and_again_when_the_text_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = text(tmp_path, "first text")
    made = prepare(training(data), tmp_path / "c")
    monkeypatch.setattr(packed_module, "_made", lambda *_: pytest.fail("made twice"))
    assert prepare(training(data), tmp_path / "c").path == made.path
    monkeypatch.undo()
    (tmp_path / "0.txt").write_text("another text")
    assert stream(data, tmp_path / "c") == b"another text\0"
    assert made.path.exists()  # a run that has it open goes on


@pytest.mark.parametrize("damage", ["truncate", "flip", "describe", "lose"])
def test_a_damaged_token_file_is_made_again(tmp_path: Path, damage: str) -> None:
    data = text(tmp_path, "some text")
    path = prepare(training(data), tmp_path / "c").path
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[:-2])
    elif damage == "flip":
        path.write_bytes(content[:4] + b"\xff" + content[5:])
    elif damage == "describe":
        path.with_suffix(".json").write_text('{"count": ')
    else:
        path.unlink()
    assert stream(data, tmp_path / "c") == b"some text\0"


def test_leftovers_of_a_process_that_died_are_cleared(tmp_path: Path) -> None:
    data = text(tmp_path, "some text")
    path = prepare(training(data), tmp_path / "c").path
    path.unlink()
    part = path.with_name(f"{path.stem}.{packed_module.socket.gethostname()}.1.part")
    part.write_bytes(b"half")
    prepare(training(data), tmp_path / "c")
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".lock", ".tokens"]


def _prepare_in_child(data: Data, cache: Path) -> None:
    assert prepare(training(data), cache).count == 500_001


def test_processes_that_come_at_once_wait_for_one(tmp_path: Path) -> None:
    data = text(tmp_path, "x" * 500_000)
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_prepare_in_child, args=(data, tmp_path / "c")) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert len(list((tmp_path / "c").glob("*.tokens"))) == 1


# ---- what is wrong with the data ------------------------------------------------------------------------------------


def test_no_file_matches(tmp_path: Path) -> None:
    pattern = str(tmp_path / "*.txt")
    assert failure(Data("text", (pattern,)), tmp_path / "c") == f"MLM0700: no file matches {pattern}"


def test_empty_data(tmp_path: Path) -> None:
    assert failure(text(tmp_path, "", ""), tmp_path / "c").startswith("MLM0701: no text in ")
    assert not list((tmp_path / "c").glob("*.part"))


def test_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    data = Data("text", (str(path),))
    path.write_bytes("ää".encode() + b"\xe4 b")
    assert failure(data, tmp_path / "c") == f"MLM0702: {path}: byte 4: 0xe4 is not UTF-8"
    path.write_bytes(b"a\n" * 9 + b"\xe2\x82x")
    monkeypatch.setattr(documents, "PIECE_BYTES", 4)
    assert failure(data, tmp_path / "c") == f"MLM0702: {path}: byte 18: 0xe2 is not UTF-8"
    path.write_bytes(b"cut short \xe2\x82")
    assert failure(data, tmp_path / "c") == f"MLM0702: {path}: byte 10: 0xe2 is not UTF-8"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "a"', "MLM0703: {path}:2: not valid JSON: Expecting ',' delimiter: line 1 column 13 (char 12)"),
        (b'["a"]', "MLM0703: {path}:2: the line is a list, not an object"),
        (b'{"body": "a"}', 'MLM0704: {path}:2: no field "text"'),
        (b'{"text": 1}', 'MLM0709: {path}:2: field "text" is a number, not text'),
        (b'{"text": "\xe4"}', "MLM0702: {path}:2: byte 11 of the line, 0xe4, is not UTF-8"),
        (b"[" * 100_000, "MLM0703: {path}:2: not valid JSON: "),
    ],
)
def test_bad_json_lines(tmp_path: Path, line: bytes, expected: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line)
    assert failure(Data("jsonl", (str(path),)), tmp_path / "c").startswith(expected.format(path=path))


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a\ud800b"}))
    assert stream(Data("jsonl", (str(tmp_path / "a.jsonl"),)), tmp_path / "c") == b"a?b\0"


def test_bad_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1]}), path)
    assert failure(Data("parquet", (str(path),)), tmp_path / "c") == f'MLM0704: {path}: no column "text"'
    assert (
        failure(Data("parquet", (str(path),), field="n"), tmp_path / "c") == f'MLM0709: {path}: column "n" is int64, not text'
    )
    path.write_bytes(b"not parquet")
    assert failure(Data("parquet", (str(path),)), tmp_path / "c").startswith(f"MLM0708: {path} cannot be read as parquet")


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("no_such_module", 'no Python module "no_such_module" is installed'),
        ("json.no_such", 'no Python module "json.no_such" is installed'),
        ("ast.inner", '"ast" is no package: it has no module "inner"'),
        ("math", 'module "math" has no Python source to read text from'),
    ],
)
def test_no_such_module(tmp_path: Path, module: str, expected: str) -> None:
    found = failure(Data("python", (module,)), tmp_path / "c")
    assert found == f"MLM0707: {expected}" or (module == "math" and found.startswith("MLM0707"))


def test_shorter_than_one_sequence(tmp_path: Path) -> None:
    expected = "MLM0705: 4 tokens to train on (0 of 4 held out) are fewer than one sequence of 4 and the token after it"
    assert failure(text(tmp_path, "abc"), tmp_path / "c") == expected


def test_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    data = text(tmp_path, "a sentence with z")
    assert failure(data, tmp_path / "c", vocab=122).startswith("MLM0706: the text holds token 122, but the model's")
    TokenDataset(training(data, vocab=123), "train", tmp_path / "c")


def test_cache_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert failure(text(tmp_path, "abc"), tmp_path / "file").startswith("MLM0712: token files cannot be written in")
