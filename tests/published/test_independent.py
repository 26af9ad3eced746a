"""FLOPs per token, and parameters, beside transformers' own models. `make published` prints them for every spec."""

from __future__ import annotations

import pytest

from tests.published.independent import row
from tests.published.test_parameters import TABLE

# One of each way to count: fused products, tied heads, windows in every second layer, one key for all heads, experts, attention
# both ways, two stacks
SOME = (
    "gpt2_124m",
    "llama3p2_1b",
    "gemma2_2b",
    "mistral_7b",
    "falcon_7b",
    "mixtral_8x7b",
    "bert_base",
    "t5_base",
)


@pytest.mark.parametrize("name", SOME)
def test_flops_per_token_are_those_of_another_implementation(name: str) -> None:
    found = row(name)
    assert found.parameters == found.other.parameters == TABLE[name].parameters
    assert found.ratio == pytest.approx(1, abs=1e-6)  # rotary angles are a product, too, of a few numbers a token
