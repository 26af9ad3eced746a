"""Random blocks: refused with a reason, or sharded, emitted and sound Python."""

from __future__ import annotations

import re

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mlmdsl.compile import compile_spec
from mlmdsl.diagnostics import MlmError, SpecError
from mlmdsl.graph.calls import SIGNATURES
from mlmdsl.planner.plan import PlanVariables
from tests.parity.models import SETTINGS, emitted
from tests.random_blocks import LEFT_OUT, blocks

PLANS = (
    PlanVariables(stages=(4,)),
    PlanVariables(tensor=2, stages=(4,)),
    PlanVariables(tensor=2, sequence_parallel=True, stages=(4,)),
    PlanVariables(tensor=2, sequence_parallel=True, pipeline=2, stages=(2, 2)),
)


@given(blocks(), st.sampled_from(PLANS))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_sound_block_becomes_a_program(text: str, variables: PlanVariables) -> None:
    """compile_spec verifies graph and layout on the way."""
    compile(emitted(text, variables), "program.py", "exec")


@given(blocks(careful=False))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_block_is_planned_or_refused_with_its_place(text: str) -> None:
    try:
        compile_spec(text + SETTINGS, path="/specs/model.mlm", until="plan")
    except SpecError as refused:
        for item in refused.diagnostics:
            assert re.fullmatch(r"MLM\d{4}", item.code) and item.message
            assert item.span is not None and item.span.file == "/specs/model.mlm"
    except MlmError as other:  # soundly typed, but nothing to plan for
        raise AssertionError(text) from other


def test_every_operation_comes_up_or_is_left_out_for_a_reason() -> None:
    called: set[str] = set()

    @given(blocks(most=14))
    @settings(max_examples=200, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    def collect(text: str) -> None:
        called.update(re.findall(r"\b(\w+)\(", text))

    collect()
    assert SIGNATURES.keys() - called == LEFT_OUT.keys() - {"Embedding"}  # which the model around the block calls
