"""Layouts of any kind: read from a file block by block, and written back, they are what permuting the whole gives."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlmdsl.graph.tensor import Init, Weight
from mlmdsl.huggingface.families import Layout
from mlmdsl.huggingface.files import header
from mlmdsl.huggingface.layouts import PART, lowered
from mlmdsl.runtime import exchange
from mlmdsl.runtime.pieces import Piece


@dataclass(frozen=True)
class Example:
    layout: Layout
    shapes: tuple[tuple[int, ...], ...]  # of ours
    outer: tuple[str, ...]  # theirs' axes and
    inner: tuple[str, ...]  # ours
    sizes: dict[str, int]
    most: int  # elements of a block


@st.composite
def examples(draw: st.DrawFn) -> Example:
    names = [f"a{i}" for i in range(draw(st.integers(1, 4)))]
    sizes = {name: draw(st.integers(1, 5)) for name in names}
    parts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    if len(parts) > 1:
        names.append(PART)
    outer, inner = draw(st.permutations(names)), draw(st.permutations(names))
    theirs, ours = draw(_grouped(outer)), draw(_grouped(inner))
    axes = f"{_written(theirs)} -> {_written(ours)}"
    layout = Layout(
        ours=tuple(f"w{i}" for i in range(len(parts))),
        theirs="t",
        axes=axes,
        parts=tuple(parts) if PART in names else (),
        sizes=sizes,
        over={},
        where="true",
    )
    shapes = tuple(tuple(prod({**sizes, PART: n}[axis] for axis in dim) for dim in ours) for n in parts)
    whole = {**sizes, PART: sum(parts)}
    return Example(layout, shapes, tuple(outer), tuple(inner), whole, draw(st.integers(1, 40)))


@st.composite
def _grouped(draw: st.DrawFn, names: list[str]) -> list[list[str]]:
    groups = [[names[0]]]
    for name in names[1:]:
        if draw(st.booleans()):
            groups.append([])
        groups[-1].append(name)
    return groups


def _written(groups: list[list[str]]) -> str:
    return " ".join(f"({' '.join(group)})" for group in groups)


def _expected(example: Example, whole: torch.Tensor) -> list[torch.Tensor]:
    """Ours, from theirs as a whole."""
    split = whole.view([example.sizes[axis] for axis in example.outer])
    turned = split.permute([example.outer.index(axis) for axis in example.inner])
    if PART not in example.inner:
        return [turned.reshape(example.shapes[0])]
    parts = turned.split(list(example.layout.parts), dim=example.inner.index(PART))
    return [part.reshape(shape) for part, shape in zip(parts, example.shapes, strict=True)]


def _pieces(example: Example) -> tuple[list[Piece], tuple[int, ...]]:
    weights = [Weight("", name, shape, Init("zeros")) for name, shape in zip(example.layout.ours, example.shapes, strict=True)]
    found = list(lowered(example.layout, weights, {}))
    return [piece for piece, _, _ in found], found[0][2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@given(examples())
def test_blocks_are_parts_of_the_whole(folder: Path, example: Example) -> None:
    pieces, shape = _pieces(example)
    whole = torch.arange(prod(shape), dtype=torch.float32).view(shape)
    path = folder / "one.safetensors"
    path.write_bytes(exchange.header({"t": shape}, "F32") + whole.numpy().tobytes())
    stored = header(path)["t"]
    expected = dict(zip(example.layout.ours, _expected(example, whole), strict=True))
    found = {name: torch.full(values.shape, -1.0) for name, values in expected.items()}
    for piece in pieces:
        for block in piece.cut(example.most):
            offsets, sizes = block.ours_box()
            place = tuple(slice(low, low + size) for low, size in zip(offsets, sizes, strict=True))
            assert (found[block.ours][place] == -1.0).all(), "a value is read twice"
            found[block.ours][place] = exchange.block_of(block, stored)
    for name, values in expected.items():
        assert torch.equal(found[name], values), name
    blocks = exchange.blocks_of(pieces, shape, lambda piece: _taken(expected, piece), example.most)
    assert torch.equal(torch.cat([block.reshape(-1) for block in blocks]).view(shape), whole)


def _taken(ours: dict[str, torch.Tensor], piece: Piece) -> torch.Tensor:
    offsets, sizes = piece.ours_box()
    return ours[piece.ours][tuple(slice(low, low + size) for low, size in zip(offsets, sizes, strict=True))]


def test_weights_that_names_count_are_stacked() -> None:
    layout = Layout(("experts",), "experts.{e}.w", "out in -> e in out", (), {}, {"e": "count"}, "true")
    found = list(lowered(layout, [Weight("", "experts", (3, 4, 5), Init("zeros"))], {"count": 3}))
    assert [name for _, name, _ in found] == ["experts.0.w", "experts.1.w", "experts.2.w"]
    assert all(shape == (5, 4) for _, _, shape in found)
    ours = torch.arange(60.0).view(3, 4, 5)
    for number, (piece, _, shape) in enumerate(found):
        blocks = list(exchange.blocks_of([piece], shape, lambda piece: _taken({"experts": ours}, piece)))
        assert torch.equal(torch.cat(blocks).view(shape), ours[number].T)
