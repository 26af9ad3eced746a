"""Experts shared out over the expert axis: as one process, and their checkpoints those of any plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mlmdsl.planner.plan import PlanVariables
from mlmdsl.runtime import checkpoint
from tests.parity.curve import collected, make_trainer
from tests.parity.families import EXPERT_FAMILIES, EXPERT_PLANS, largest_difference
from tests.parity.lattice import TOLERANCE
from tests.parity.models import program_text
from tests.parity.ranks import run_ranks

CASES = [(EXPERT_FAMILIES[i % 3], variables) for i, variables in enumerate(EXPERT_PLANS)]
CASES += [("limited", EXPERT_PLANS[1]), ("limited", EXPERT_PLANS[3])]
ONE = PlanVariables(micro_batch=4, stages=(2,))


@pytest.mark.parametrize(("family", "variables"), CASES, ids=lambda value: getattr(value, "described", value))
def test_shared_experts_keep_parity(family: str, variables: PlanVariables) -> None:
    assert largest_difference(family, variables) < TOLERANCE


@pytest.mark.parametrize("variables", [EXPERT_PLANS[2], EXPERT_PLANS[3]], ids=lambda value: value.described)
def test_counts_and_auxiliary_losses_are_those_of_one_process(variables: PlanVariables) -> None:
    one, other = (run_ranks(_counted, v.world_size, program_text("limited", v)) for v in (ONE, variables))
    (wanted,) = one
    assert wanted.keys() == {"auxiliary_loss", "routed_tokens", "dropped_tokens", "padded_tokens"}
    assert all(found == pytest.approx(wanted, rel=1e-6) for found in other)


def _counted(rank: int, text: str) -> Mapping[str, float]:
    return make_trainer(text).step().balance


def _saved(rank: int, text: str, out: Path) -> dict[str, Tensor]:
    trainer = make_trainer(text)
    trainer.step()
    trainer.save(out)
    return collected(trainer, [held.master for held in trainer.state.held])


def _loaded(rank: int, text: str, out: Path) -> dict[str, Tensor]:
    trainer = make_trainer(text)
    trainer.load(checkpoint.newest_whole(out))
    return collected(trainer, [held.master for held in trainer.state.held])


@pytest.mark.parametrize(("writer", "reader"), [(EXPERT_PLANS[2], ONE), (ONE, EXPERT_PLANS[8])], ids=["written", "read"])
def test_checkpoints_do_not_know_the_axis(tmp_path: Path, writer: PlanVariables, reader: PlanVariables) -> None:
    texts = [program_text("deepseek_v3", variables) for variables in (writer, reader)]
    expected = run_ranks(_saved, writer.world_size, texts[0], tmp_path)[0]
    found = run_ranks(_loaded, reader.world_size, texts[1], tmp_path)[0]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_expert_lies_on_one_rank_of_the_axis() -> None:
    """Half of the experts on each of two ranks, and of their optimizer's state."""
    shares = run_ranks(_expert_elements, 2, program_text("mixtral", EXPERT_PLANS[0]))
    whole = run_ranks(_expert_elements, 1, program_text("mixtral", ONE))[0]
    assert shares == [whole // 2] * 2


def _expert_elements(rank: int, text: str) -> int:
    held = make_trainer(text).state.held
    return sum(h.master.numel() for h in held if len(h.info.shape) == 3)
