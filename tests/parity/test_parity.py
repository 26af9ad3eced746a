"""Plans of every kind give the loss curve and the gradients of one process; one process gives those of plain PyTorch.

A dozen plans that between them have every degree, schedule, ZeRO stage and kind of recomputation. The whole lattice is
`make parity`.
"""

from __future__ import annotations

from itertools import product

import pytest

from mlmdsl.grammar.constraints import ORDERS, ZEROS
from mlmdsl.planner.plan import PlanVariables
from mlmdsl.planner.schedule import V_SHAPED
from tests.parity import reference
from tests.parity.curve import SETTINGS, Synthetic, difference, train_curve
from tests.parity.lattice import TOLERANCE, one_process, run
from tests.parity.models import BATCH, MODELS, SEQUENCE, VOCAB, program_text
from tests.parity.plans import Case, lattice

PLANS = (
    ("gpt", dict(tensor=2, sequence_parallel=True, micro_batch=4, stages=(4,))),
    ("gpt", dict(pipeline=2, micro_batch=2, stages=(3, 1))),
    ("gpt", dict(pipeline=4, schedule="gpipe", micro_batch=4, recompute="full", stages=(1, 2, 1, 1))),
    ("gpt", dict(pipeline=2, interleave=2, schedule="interleaved_1f1b", data=2, zero=1, micro_batch=2, stages=(1, 1, 2, 1))),
    (
        "gpt",
        dict(pipeline=2, tensor=2, sequence_parallel=True, data=2, zero=3, recompute="selective", micro_batch=2, stages=(1, 3)),
    ),
    ("gpt", dict(tensor=2, data=2, zero=2, micro_batch=2, recompute="selective", stages=(4,))),
    ("llama", dict(pipeline=2, data=2, zero=2, micro_batch=1, stages=(3, 1))),
    ("gpt", dict(pipeline=2, micro_batch=2, recompute=("full", "none", "selective", "selective"), stages=(3, 1))),
    ("llama", dict(data=2, zero=3, micro_batch=2, recompute=("full", "none", "selective", "none"), stages=(4,))),
    ("gpt", dict(data=4, zero=3, replicate=2, micro_batch=1, stages=(4,))),
    ("llama", dict(data=4, zero=1, replicate=2, micro_batch=1, recompute="selective", stages=(4,))),
    ("gpt", dict(pipeline=2, data=4, zero=2, replicate=2, micro_batch=1, stages=(1, 3))),
    ("gpt", dict(data=4, zero=3, micro_batch=1, recompute="full", stages=(4,))),
    ("llama", dict(tensor=4, micro_batch=8, recompute="selective", stages=(4,))),
    ("llama", dict(tensor=2, data=2, zero=1, sequence_parallel=True, micro_batch=4, recompute="full", stages=(4,))),
    ("llama", dict(pipeline=2, tensor=2, micro_batch=4, stages=(2, 2))),
    ("llama", dict(pipeline=2, data=2, zero=0, schedule="gpipe", micro_batch=1, stages=(1, 3))),
    ("llama", dict(pipeline=4, data=2, zero=1, micro_batch=1, stages=(2, 1, 1, 1))),
    ("llama", dict(data=2, zero=3, micro_batch=2, recompute="selective", stages=(4,))),
    ("gpt", dict(pipeline=2, interleave=2, schedule="zb_v", tensor=2, data=2, zero=1, micro_batch=1, stages=(1, 1, 1, 1))),
    ("llama", dict(pipeline=2, interleave=2, schedule="dualpipe_v", data=2, micro_batch=1, stages=(1, 1, 1, 1))),
)
INSIDE = (  # the stages of a pipeline lie inside ranks of data
    ("gpt", dict(pipeline=2, data=2, tensor=2, zero=1, sequence_parallel=True, micro_batch=2, stages=(1, 3))),
    ("gpt", dict(pipeline=2, data=2, tensor=2, zero=3, micro_batch=2, recompute="selective", stages=(3, 1))),
    ("llama", dict(pipeline=2, data=2, zero=0, micro_batch=2, stages=(2, 2))),
    ("llama", dict(pipeline=2, data=4, zero=3, replicate=2, micro_batch=1, stages=(3, 1))),
    ("llama", dict(pipeline=2, data=2, context=2, zero=3, micro_batch=1, stages=(1, 3))),
    ("gpt", dict(pipeline=2, data=2, context=2, zero=1, replicate=2, micro_batch=1, stages=(2, 2))),
    ("gpt", dict(pipeline=2, interleave=2, schedule="zb_v", data=2, zero=1, micro_batch=1, stages=(1, 1, 1, 1))),
)
CASES = tuple(Case(model, PlanVariables(**variables)) for model, variables in PLANS)
CASES += tuple(Case(model, PlanVariables(**variables, order=ORDERS[1])) for model, variables in INSIDE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_plan_is_one_process(case: Case):
    holds, line = run(case)
    assert holds, line


@pytest.mark.parametrize("model", MODELS)
def test_one_process_is_plain_pytorch(model: str):
    curve = train_curve(program_text(model, PlanVariables(stages=(4,), micro_batch=2)), 1)
    data = Synthetic(BATCH, SEQUENCE, VOCAB)
    settings = reference.Settings(
        peak=SETTINGS.lr,
        warmup=2,
        min_lr=0.01,
        steps=8,
        betas=SETTINGS.betas,
        eps=SETTINGS.eps,
        decay=SETTINGS.weight_decay,
        clip=SETTINGS.clip or 0.0,
    )
    batches = [(b["tokens"], b["targets"]) for b in (data.batch(step, 0, BATCH) for step in range(6))]
    losses, norms, gradients = reference.curve(reference.MODELS[model], curve.beginning, batches, 4, settings)
    assert curve.losses == pytest.approx(losses, rel=TOLERANCE)
    assert curve.norms == pytest.approx(norms, rel=TOLERANCE)
    least = 1e-3 * max(float(g.norm()) for g in gradients.values())
    assert gradients.keys() == curve.gradients.keys()
    for name, gradient in gradients.items():
        assert difference(gradient, curve.gradients[name], least) < TOLERANCE, name


def test_the_comparison_can_fail():
    """A learning rate that differs by one part in a thousand shows."""
    text = program_text("gpt", PlanVariables(stages=(4,), micro_batch=8))
    changed = train_curve(text.replace("warmup=2", "warmup=3"), 1)
    from tests.parity.curve import compare

    assert compare(one_process("gpt", 4), changed).largest > 10 * TOLERANCE


def test_the_lattice_covers_what_it_says():
    for model in MODELS:
        cases = list(lattice(model))
        legal = [case.variables for case in cases if not case.illegal]
        meshes = {(v.tensor, v.pipeline, v.data) for v in legal}
        assert len(meshes) == 17 and len({case.name for case in cases}) == len(cases)
        assert {(v.zero, v.recompute, v.schedule) for v in legal} >= {
            (zero, recompute, schedule)
            for zero in ZEROS
            for recompute in ("none", "selective", "full")
            for schedule in ("gpipe", "1f1b", "interleaved_1f1b")
        }
        assert {(v.zero, v.recompute, v.schedule) for v in legal} >= set(product((0, 1), ("none",), V_SHAPED))
        assert {len(set(v.stages)) > 1 for v in legal if v.pipeline > 1} == {True, False}
        assert {v.sequence_parallel for v in legal if v.tensor > 1} == {True, False}
        assert {(v.order, v.zero) for v in legal if v.pipeline > 1 < v.data} == set(product(ORDERS, ZEROS))
