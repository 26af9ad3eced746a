"""Sampling: greedy, cut tails, seeds, the sliding window, and what is printed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlmdsl.diagnostics import RunError, UsageError
from mlmdsl.runtime import generate as module
from mlmdsl.runtime.generate import Sampling, draw, generate, sample

PROGRAM = """
import torch
from mlmdsl.runtime.config import AdamW, Data, Tokenizer, Training

TRAINING = Training(Data("text", ("x",)), Tokenizer("bytes"), sequence=4, batch=1, steps=1, optimizer=AdamW(1e-3))


class Stage(torch.nn.Module):
    def __init__(self, index, mesh):
        super().__init__()
        self.step = torch.nn.Parameter(torch.zeros(()))

    def forward(self, tokens):
        assert tokens.shape[1] <= 4
        return torch.nn.functional.one_hot((tokens + int(self.step)) % 256, 260).float()
"""


def drawn(logits: list[float], **settings: object) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(**settings)  # type: ignore[arg-type]
    return [draw(torch.tensor(logits), sampling, generator) for _ in range(200)]


def test_temperature_0_takes_the_likeliest() -> None:
    assert set(drawn([0.0, 2.0, 1.9], temperature=0)) == {1}


def test_top_k_and_top_p_cut_the_tail() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert set(drawn(logits, temperature=1.0)) == {0, 1, 2, 3}
    assert set(drawn(logits, temperature=1.0, top_k=2)) == {0, 1}
    assert set(drawn(logits, temperature=1.0, top_p=0.79)) == {0, 1}
    assert set(drawn(logits, temperature=1.0, top_p=0.81)) == {0, 1, 2}
    assert set(drawn(logits, temperature=1.0, top_p=1e-9)) == {0}
    assert set(drawn(logits, temperature=1.0, top_k=3, top_p=0.5)) == {0}


def test_chances_follow_the_logits() -> None:
    share = drawn(torch.tensor([0.8, 0.2]).log().tolist(), temperature=1.0).count(0) / 200
    assert 0.7 < share < 0.9


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=20), st.floats(0, 10), st.integers(1, 30), st.floats(0.01, 1))
def test_any_setting_draws_a_token(logits: list[float], temperature: float, top_k: int, top_p: float) -> None:
    sampling = Sampling(temperature, top_k, top_p)
    assert 0 <= draw(torch.tensor(logits), sampling, torch.Generator().manual_seed(1)) < len(logits)


def test_the_window_slides_and_padding_of_the_vocabulary_is_never_drawn() -> None:
    seen: list[list[int]] = []

    def model(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tokens[0].tolist())
        logits = torch.zeros(1, tokens.shape[1], 8)
        logits[..., 7] = 9.0  # past the tokenizer's vocabulary
        logits[0, -1, len(seen)] = 1.0
        return logits

    tokens = sample(model, [0, 0], 3, 7, Sampling(temperature=0))
    assert [next(tokens) for _ in range(4)] == [1, 2, 3, 4]
    assert seen == [[0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]]


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}],
)
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError) as caught:
        Sampling(**settings)  # type: ignore[arg-type]
    assert caught.value.diagnostics[0].code == "MLM0731"


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: str, tokens: int, step: int) -> str:
    program, stream = tmp_path / "program.py", io.StringIO()
    program.write_text(PROGRAM)

    def load_weights(model: torch.nn.Module, _: Path) -> None:
        torch.nn.init.constant_(model.step, step)  # type: ignore[arg-type]

    monkeypatch.setattr(module.checkpoints, "load_weights", load_weights)
    assert generate(program, tmp_path, prompt, tokens, 0, None, None, 0, tmp_path, stream) == 0
    return stream.getvalue()


def test_the_prompt_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path, monkeypatch, "ab", 5, step=1) == "abcdefg\n"
    assert run(tmp_path, monkeypatch, "", 3, step=65) == "A\ufffd\ufffd\n"  # an empty prompt starts a document
    assert run(tmp_path, monkeypatch, "ab", 0, step=1) == "ab\n"


def test_it_ends_at_the_end_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path, monkeypatch, "\xff", 5, step=256 - 0xBF) == "\xff\n"


def test_nothing_to_sample_from(tmp_path: Path) -> None:
    for checkpoint in (None, tmp_path / "no"):
        with pytest.raises(RunError) as caught:
            generate(tmp_path / "program.py", tmp_path, "", 1, 0, None, None, 0, checkpoint)
        assert caught.value.diagnostics[0].code == "MLM0730"
