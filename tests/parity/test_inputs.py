"""Models with several inputs, some of another length: plans give the curve of one process."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from typing import Any

import pytest

from mlmdsl.compile import compile_spec
from mlmdsl.planner.plan import PlanVariables
from tests.parity.curve import Curve, compare, train_curve
from tests.parity.lattice import TOLERANCE
from tests.parity.models import SETTINGS

SEGMENTED = """
model segmented {
  param d = 32
  param layers = 2
  input tokens: int[B, S]
  input segments: int[B, S]
  tok = Embedding(tokens, vocab = 64, dim = d)
  h = tok + Embedding(segments, vocab = 2, dim = d) + Position(tokens, max = 16, dim = d)
  repeat layers as blocks { h = LayerNorm(h + Attention(h, heads = 4)) }
  output Linear(h, weight = tok.weight)
}
"""
TWO_SIDED = """
block Decoder(x: [B, T, d], memory: [B, S, d], valid: int[B, S]) {
  h = x + Attention(LayerNorm(x), heads = 4, causal = true)
  output h + CrossAttention(LayerNorm(h), memory, heads = 4, valid = valid)
}

model two_sided {
  param d = 32
  param layers = 2
  input tokens: int[B, S]
  input valid: int[B, S]
  input decoder_tokens: int[B, T]
  tok = Embedding(tokens, vocab = 64, dim = d)
  h = tok
  repeat layers as encoder { h = h + Attention(LayerNorm(h), heads = 4, valid = valid) }
  memory = LayerNorm(h)
  y = Embedding(decoder_tokens, weight = tok.weight)
  repeat layers as decoder { y = Decoder(y, memory, valid) }
  output Linear(LayerNorm(y), weight = tok.weight)
}
"""
MODELS = {
    "segmented": (SEGMENTED, "masked_token()"),
    "two_sided": (TWO_SIDED, "span_corruption(target_len = 8 tok)"),
}
PLANS = (
    ("segmented", dict(pipeline=2, micro_batch=2, stages=(1, 1))),
    ("segmented", dict(tensor=2, sequence_parallel=True, data=2, zero=3, micro_batch=2, stages=(2,))),
    ("two_sided", dict(pipeline=2, micro_batch=2, stages=(2, 2))),
    ("two_sided", dict(pipeline=2, tensor=2, data=2, zero=1, micro_batch=1, stages=(3, 1))),
    ("two_sided", dict(tensor=2, sequence_parallel=True, recompute="full", micro_batch=4, stages=(4,))),
    ("segmented", dict(context=2, micro_batch=4, stages=(2,))),
    ("two_sided", dict(context=2, tensor=2, sequence_parallel=True, pipeline=2, micro_batch=2, stages=(2, 2))),
)


def curve(name: str, variables: PlanVariables) -> Curve:
    model, objective = MODELS[name]
    text = model + SETTINGS.replace("next_token()", objective)
    pins = [
        f"{key}={'[' + ', '.join(map(str, value)) + ']' if isinstance(value, tuple) else str(value).lower()}"
        for key, value in asdict(variables).items()
        if key not in ("replicate", "expert")
    ]
    overrides = [f"cluster.devices_per_node={variables.world_size}"]
    done = compile_spec(text, path=f"/specs/{name}.mlm", overrides=overrides, pins=pins)
    assert done.program is not None
    return train_curve(done.program.text, variables.world_size)


@cache
def one_process(name: str) -> Curve:
    return curve(name, PlanVariables(stages=(4 if name == "two_sided" else 2,), micro_batch=8))


@pytest.mark.parametrize(("name", "variables"), PLANS)
def test_plans_feed_every_input(name: str, variables: dict[str, Any]) -> None:
    found = compare(one_process(name), curve(name, PlanVariables(**variables)))
    assert found.largest < TOLERANCE, found
