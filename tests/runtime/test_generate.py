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


# ---- objectives ------------------------------------------------------------------------------------------------------

TWO_SIDED = """
import torch
from mlmdsl.runtime.config import AdamW, Data, Objective, Tokenizer, Training

TRAINING = Training(
    Data("pairs", ("x",)), Tokenizer("bytes"), sequence=6, batch=1, steps=1, optimizer=AdamW(1e-3),
    objective=Objective("KIND", target=5), inputs=("decoder_tokens", "tokens", "valid"),
)
READ = []


class Encoder(torch.nn.Module):
    def forward(self, tokens, valid):
        READ.append((tokens[0].tolist(), valid[0].tolist()))
        return tokens


class Stage(torch.nn.Module):
    "Tells the source backwards."

    def __init__(self, index, mesh):
        super().__init__()
        self.step = torch.nn.Parameter(torch.zeros(()))
        self.encoder = torch.nn.ModuleDict({"0": Encoder()})

    def forward(self, decoder_tokens, tokens, valid):
        memory = self.encoder["0"](tokens, valid)
        told = [*memory[0, :-1].flip(0).tolist(), 0][: decoder_tokens.size(1)]
        assert decoder_tokens[0].tolist() == [0, *told][: len(told)]
        return torch.nn.functional.one_hot(torch.tensor([told]), 400).float()
"""


def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, prompt: str, **settings: object) -> tuple[str, object]:
    """What is printed, and what the program's encoder has read."""
    path, stream, loaded = tmp_path / "program.py", io.StringIO(), []
    path.write_text(program)
    monkeypatch.setattr(module.checkpoints, "load_weights", lambda model, _: loaded.append(model))
    tokens = settings.pop("tokens", 20)
    assert generate(path, tmp_path, prompt, tokens, None, None, None, 0, tmp_path, stream) == 0  # type: ignore[arg-type]
    return stream.getvalue(), type(loaded[0]).forward.__globals__.get("READ")


def test_an_encoder_reads_the_prompt_once_and_a_decoder_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = TWO_SIDED.replace("KIND", "seq2seq")
    assert told(tmp_path, monkeypatch, program, "abc") == ("cba\n", [([97, 98, 99, 0], [1] * 4)])
    assert told(tmp_path, monkeypatch, program, "abcdefgh")[0] == "edcba\n"  # a source cut to its length, a target to its
    assert told(tmp_path, monkeypatch, program, "abc", tokens=2)[0] == "cb\n"
    assert told(tmp_path, monkeypatch, program, "")[0] == "\n"


def test_missing_spans_are_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = TWO_SIDED.replace("KIND", "span_corruption")
    assert told(tmp_path, monkeypatch, program, "a<extra_id_1>b<extra_id_0>") == (
        "<extra_id_0>b<extra_id_1>a\n",
        [([97, 258, 98, 257, 0], [1] * 5)],
    )


def test_an_assistant_answers_and_ends_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says what has been said after the same two bytes before."""
    whole = "User: hello?\nAssistant: well\0\nUser"
    program = PROGRAM.replace("sequence=4", 'sequence=64, objective=Objective("chat")').replace(
        "import AdamW,", "import AdamW, Objective,"
    )
    following = f"""
    def forward(self, tokens):
        whole = {whole!r}
        shown = bytes(tokens[0].tolist()).decode()
        assert whole.startswith(shown), shown
        return torch.nn.functional.one_hot(torch.tensor([[ord(whole[len(shown)])]]), 260).float() * 100
"""
    program = program[: program.index("    def forward")] + following
    assert told(tmp_path, monkeypatch, program, "hello?")[0] == "well\n"


def test_a_turn_ends_where_the_template_ends_it(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Made
    from tokenizers.models import WordLevel

    from mlmdsl.runtime import tokenizer
    from mlmdsl.runtime.config import AdamW, Data, Objective, Tokenizer, Training
    from mlmdsl.runtime.prompt import prompt_of

    made = Made(WordLevel({"<|endoftext|>": 0, "<|turn|>": 1, "?": 2}, unk_token="?"))
    made.add_special_tokens(["<|endoftext|>", "<|turn|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|turn|>{% endfor %}")
    settings = Tokenizer("hf", str(tmp_path / "tokenizer.json"))
    training = Training(Data("conversations", ("x",)), settings, 8, 1, 1, AdamW(1e-3), objective=Objective("chat"))
    found = prompt_of(torch.nn.Identity(), training, tokenizer.load(settings), "?", torch.device("cpu"))
    assert (found.ids, found.stop, found.shown) == ([2, 1], {0, 1}, "")


def test_a_model_of_masked_tokens_goes_on_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = TWO_SIDED.replace("KIND", "masked_token")
    with pytest.raises(RunError) as caught:
        told(tmp_path, monkeypatch, program, "abc")
    assert caught.value.diagnostics[0].code == "MLM0732"
