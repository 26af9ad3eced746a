"""Documents kept apart in a row: every plan gives the curve of one process, and a document the losses that it has alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from mlmdsl.compile import compile_spec
from mlmdsl.planner.plan import PlanVariables
from mlmdsl.runtime.config import Objective, Tokenizer
from mlmdsl.runtime.functions import IGNORE
from mlmdsl.runtime.objectives import Form
from mlmdsl.runtime.tokenizer import load
from tests.parity.curve import Curve, compare, make_trainer, train_curve, training
from tests.parity.lattice import TOLERANCE
from tests.parity.models import LLAMA, SETTINGS, emitted, small_model

PLANS = (
    dict(context=2, micro_batch=4, stages=(2,)),
    dict(tensor=2, sequence_parallel=True, context=2, pipeline=2, micro_batch=2, recompute="selective", stages=(1, 1)),
    dict(pipeline=2, data=2, zero=3, micro_batch=1, recompute="full", stages=(1, 1)),
)


def text_of(model: str) -> str:
    return LLAMA if model == "llama" else small_model(model)


@cache
def curve(model: str, variables: PlanVariables) -> Curve:
    return train_curve(
        emitted(text_of(model), variables, f"{model}.layers=2", "train.documents=separate"), variables.world_size
    )


@pytest.mark.parametrize(
    ("model", "plan"), [("llama", 0), ("llama", 1), ("llama", 2), ("mistral", 0), ("bloom", 1), ("gemma2", 0)]
)
def test_plans_keep_documents_apart(model: str, plan: int) -> None:
    one = PlanVariables(micro_batch=8, stages=(2,))
    found = compare(curve(model, one), curve(model, PlanVariables(**PLANS[plan])))
    assert found.largest < TOLERANCE, found


@pytest.mark.parametrize("model", ["llama", "mistral", "bloom"])
def test_a_packed_document_has_the_losses_that_it_has_alone(model: str) -> None:
    """Positions are rotary, or a bias by distance."""
    one = PlanVariables(micro_batch=1, stages=(2,))
    trainer: Any = make_trainer(emitted(text_of(model), one, f"{model}.layers=2", "train.documents=separate"))
    tokens, targets = torch.randint(1, 64, (2, 1, 16), generator=torch.Generator().manual_seed(7))
    documents = torch.tensor([[0] * 5 + [1] * 8 + [2] * 3])

    def loss(tokens: torch.Tensor, documents: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return trainer.engine.loss(trainer.engine.module(tokens, documents), targets, trainer.mesh)

    packed = [loss(tokens, documents, targets.masked_fill(documents != number, IGNORE)) for number in range(3)]
    for number, value in enumerate(packed):
        mine = documents[0] == number
        count = int(mine.sum())
        alone, wanted, own = torch.zeros(1, 16, dtype=torch.int64), torch.full((1, 16), IGNORE), torch.full((1, 16), -1)
        alone[0, :count], wanted[0, :count], own[0, :count] = tokens[0, mine], targets[0, mine], 0
        torch.testing.assert_close(value, loss(alone, own, wanted), rtol=1e-5, atol=1e-5)
    assert abs(float(sum(packed) - loss(tokens, torch.zeros_like(documents), targets))) > 1e-3


def test_rows_number_their_documents() -> None:
    """An end belongs to the document that it ends, and is followed by nothing that could be learnt; padding is on its own."""
    text = load(Tokenizer("bytes"))
    form = Form(training(sequence=8, inputs=("tokens", "documents")), text)
    end = text.end_of_text
    ids = torch.tensor([5, 6, end, 7, 8, end]).numpy()
    made = form.batch([form.row(ids, None, 0, 0)])
    assert made["tokens"][0, :5].tolist() == [5, 6, end, 7, 8]
    assert made["documents"].tolist() == [[0, 0, 0, 1, 1, -1, -1, -1]]
    assert made["targets"].tolist() == [[6, end, IGNORE, 8, end, IGNORE, IGNORE, IGNORE]]
    assert "documents" in Objective("masked_token").fed


def test_joined_documents_leave_no_trace() -> None:
    done = compile_spec(LLAMA + SETTINGS, path="/specs/x.mlm")
    assert done.program is not None and "documents" not in done.program.text
