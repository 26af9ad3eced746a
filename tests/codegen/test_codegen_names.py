"""User names in Python's and nn.Module's namespaces."""

from __future__ import annotations

import keyword

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mlmdsl.codegen.names import MODULE_ATTRIBUTES, attribute, attribute_path, class_name, mentions, variable
from mlmdsl.runtime.parallel import public_name

IDENTIFIERS = st.from_regex(r"_{0,3}[a-zA-Z0-9_]{0,6}", fullmatch=True).filter(str.isidentifier) | st.sampled_from(
    sorted(MODULE_ATTRIBUTES)
)
PARTS = IDENTIFIERS | st.integers(0, 200).map(str)  # of a path; numbers are those of a repeat's passes


def test_attributes_of_modules_are_known():
    assert {name for name in dir(nn.Module()) if not name.startswith("_")} <= MODULE_ATTRIBUTES


@given(IDENTIFIERS)
def test_attributes_are_free(name: str):
    written = attribute(name)
    assert written not in MODULE_ATTRIBUTES and not keyword.iskeyword(written)
    assert written.rstrip("_") == name.rstrip("_") and written.isidentifier()
    assert not written.startswith("__") or written.endswith("__")  # no class renames it


@given(st.lists(PARTS, min_size=1, max_size=4))
def test_paths_in_checkpoints_are_those_of_the_spec(parts: list[str]):
    assert public_name(".".join(map(attribute, parts))) == ".".join(parts)


@given(st.lists(PARTS, unique=True, min_size=2, max_size=20))
def test_attributes_stay_distinct(names: list[str]):
    assert len({attribute(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("name", "written"),
    [("h", "h"), ("input", "input_"), ("lambda", "lambda_"), ("F", "F_"), ("tp", "tp_"), ("weight", "weight_"), ("q", "q")],
)
def test_variables_hide_nothing(name: str, written: str):
    assert variable(name) == written


def test_paths_and_classes():
    assert attribute_path("half.weight") == "half_.weight"
    assert class_name("dense_blocks") == "DenseBlocks"
    assert class_name("GPTBlock") == "GPTBlock"
    assert class_name("stage") == "Stage_"
    assert class_name("mesh") == "Mesh_"


def test_mentions():
    assert mentions("x = all_gather(x, tp, dim=1)", "tp")
    assert not mentions("x = self.tp.weight  # over tp", "tp")
    assert not mentions("# over tp", "tp")
