"""Weights from files of safetensors into a checkpoint, and back. Nothing here holds more than a few blocks at a time.

Reading, every rank takes its share of the blocks that the weights are cut into, reads each when its turn to be written comes,
and torch.distributed.checkpoint writes it at once. Writing is the work of one process: tensor by tensor, from the stored parts
that overlap it. Files are read with reads, not mapped: pages that are mapped count as memory.
"""

from __future__ import annotations

import datetime
import json
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader, Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from mlmdsl.diagnostics import Diagnostic, RunError
from mlmdsl.runtime import checkpoint
from mlmdsl.runtime.pieces import Piece, Tensor

BLOCK_ELEMENTS = 1 << 21  # of one read: 8 MiB in float32
KEPT_BYTES = 1 << 26  # of stored parts that a writer keeps at hand
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """`out`: the run's folder. `ours`: shapes by name."""

    out: str
    pieces: tuple[Piece, ...]
    ours: Mapping[str, tuple[int, ...]]
    theirs: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def read(job: Import) -> Path:
    """Writes the checkpoint of step 0; every rank calls it. Raises RunError."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    blocks = [block for piece in job.pieces for block in piece.cut(BLOCK_ELEMENTS)]
    planner = Streamed(job, shared(blocks, rank, world))
    return checkpoint.save(Path(job.out), 0, {}, job.facts, planner)


def shared(blocks: Sequence[Piece], rank: int, world: int) -> list[Piece]:
    """This rank's blocks: as many elements on each, as far as whole blocks allow."""
    total, mine, before = sum(block.elements for block in blocks), [], 0
    for block in blocks:
        if before * world // max(1, total) == rank:
            mine.append(block)
        before += block.elements
    return mine


class Streamed(SavePlanner):
    """Saves blocks that are read from their files when they are written."""

    def __init__(self, job: Import, blocks: Sequence[Piece]):
        self.job = job
        self.blocks = {(block.ours, block.ours_box()[0]): block for block in blocks}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """There is no state: it is in the files."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan([self._item(block) for block in self.blocks.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        assert write_item.index.offset is not None
        block = self.blocks[write_item.index.fqn, tuple(write_item.index.offset)]
        return block_of(block, self.job.theirs[block.theirs]).to(torch.float32)

    def _item(self, block: Piece) -> WriteItem:
        offsets, sizes = (torch.Size(numbers) for numbers in block.ours_box())
        size = torch.Size(self.job.ours[block.ours])
        data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), TensorProperties(dtype=torch.float32), size)
        return WriteItem(MetadataIndex(block.ours, offsets), WriteItemType.SHARD, tensor_data=data)


def block_of(piece: Piece, tensor: Tensor) -> torch.Tensor:
    """The box of ours that `piece` is, in the file's dtype: one read, from the first row of the outermost axis to the last."""
    axis, dtype = piece.outer, DTYPES[tensor.dtype]
    inner = prod(piece.theirs_axes[axis + 1 :])
    first = 0
    for size, place in zip(piece.theirs_axes[: axis + 1], piece.start[: axis + 1], strict=True):
        first = first * size + place
    rows = piece.box[axis] if piece.box else 1
    buffer = bytearray(rows * inner * dtype.itemsize)
    with open(tensor.path, "rb", buffering=0) as file:
        file.seek(tensor.offset + first * inner * dtype.itemsize)
        _fill(file, buffer, tensor.path)
    values = torch.frombuffer(buffer, dtype=dtype).view(rows, *piece.theirs_axes[axis + 1 :])
    for later in range(axis + 1, len(piece.box)):
        values = values.narrow(later - axis, piece.start[later], piece.box[later])
    return values.reshape(piece.box).permute(piece.order).reshape(piece.ours_box()[1])


def _fill(file: BinaryIO, buffer: bytearray, path: str) -> None:
    view = memoryview(buffer)
    while view:
        got = file.readinto(view)  # type: ignore[attr-defined]
        if not got:
            raise RunError([Diagnostic("MLM0805", f"{path} is damaged: it ended while it was read")])
        view = view[got:]


def main() -> None:
    """One rank of an import that `launch` has started: the job stands in the file that the first argument names."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=30))
    read(pickle.loads(Path(sys.argv[1]).read_bytes()))
    dist.destroy_process_group()


# ---- writing --------------------------------------------------------------------------------------------------------


class Stored:
    """A checkpoint's weights, read box by box. Parts that were read last are kept, `KEPT_BYTES` of them."""

    def __init__(self, folder: Path):
        self.reader = FileSystemReader(folder)
        self.metadata = self.reader.read_metadata()
        self.reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        self.kept: OrderedDict[tuple[str, int], torch.Tensor] = OrderedDict()
        facts = self.metadata.state_dict_metadata
        self.shapes = {name: tuple(found.size) for name, found in facts.items() if isinstance(found, TensorStorageMetadata)}

    def box(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Part of a weight."""
        facts = self.metadata.state_dict_metadata[name]
        assert isinstance(facts, TensorStorageMetadata)
        found = torch.empty(tuple(sizes), dtype=facts.properties.dtype)
        for index, chunk in enumerate(facts.chunks):
            overlap = [
                (max(low, start), min(low + size, start + length))
                for low, size, start, length in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)
            ]
            if all(low < high for low, high in overlap):
                part = self._part(name, index, chunk)
                target = tuple(slice(low - o, high - o) for (low, high), o in zip(overlap, offsets, strict=True))
                source = tuple(slice(low - o, high - o) for (low, high), o in zip(overlap, chunk.offsets, strict=True))
                found[target] = part[source]
        return found

    def _part(self, name: str, index: int, chunk: ChunkStorageMetadata) -> torch.Tensor:
        key = (name, index)
        if key not in self.kept:
            self.kept[key] = self._read(name, index, chunk)
            while len(self.kept) > 1 and sum(part.nbytes for part in self.kept.values()) > KEPT_BYTES:
                self.kept.popitem(last=False)
        self.kept.move_to_end(key)
        return self.kept[key]

    def _read(self, name: str, index: int, chunk: ChunkStorageMetadata) -> torch.Tensor:
        facts = self.metadata.state_dict_metadata[name]
        assert isinstance(facts, TensorStorageMetadata)
        target = torch.empty(chunk.sizes, dtype=facts.properties.dtype)
        zeros = torch.Size([0] * len(chunk.sizes))
        where = MetadataIndex(name, chunk.offsets, index)
        item = ReadItem(LoadItemType.TENSOR, where, zeros, where, zeros, chunk.sizes)
        self.reader.read_data(LoadPlan([item]), _Into(target)).wait()
        return target


class _Into(DefaultLoadPlanner):
    """Gives a reader one tensor to fill."""

    def __init__(self, target: torch.Tensor):
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return self.target

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """It is filled."""


@dataclass(frozen=True)
class File:
    """A file to be written, its tensors in order."""

    name: str
    tensors: tuple[str, ...]


def write(
    folder: Path,
    source: Path,
    pieces: Sequence[Piece],
    theirs: Mapping[str, tuple[int, ...]],
    files: Sequence[File],
    dtype: str,
) -> None:
    """The weights of the checkpoint `source` as files of safetensors in `folder`. Raises RunError."""
    stored = Stored(source)
    by_name: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_name.setdefault(piece.theirs, []).append(piece)
    for piece in pieces:
        if piece.ours not in stored.shapes:
            raise RunError([Diagnostic("MLM0745", f"the checkpoint {source} is of another model: {piece.ours} is not in it")])
    for file in files:
        with (folder / file.name).open("wb") as stream:
            stream.write(header({name: theirs[name] for name in file.tensors}, dtype))
            for name in file.tensors:
                for block in blocks_of(by_name[name], theirs[name], partial(_taken, stored)):
                    stream.write(memoryview(block.to(DTYPES[dtype]).contiguous().view(-1).view(torch.uint8).numpy()))


def header(tensors: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
    """Of a file of safetensors that holds `tensors` one after the other; padded to eight bytes, so that they are aligned."""
    width, at, entries = DTYPES[dtype].itemsize, 0, dict[str, Any]()
    for name, shape in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at := at + prod(shape) * width]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _taken(stored: Stored, piece: Piece) -> torch.Tensor:
    return stored.box(piece.ours, *piece.ours_box())


def blocks_of(
    pieces: Sequence[Piece], shape: tuple[int, ...], take: Callable[[Piece], torch.Tensor], most: int = BLOCK_ELEMENTS
) -> Iterator[torch.Tensor]:
    """A tensor of theirs, in blocks of `most` elements that follow one another in its file; whole where several of ours are
    woven into it. `take` gives the box of ours that a piece is."""
    if len(pieces) == 1:
        for block in pieces[0].cut(most):
            yield turned(block, take(block))
        return
    whole: torch.Tensor | None = None
    for piece in pieces:
        part = turned(piece, take(piece))
        whole = torch.empty(piece.theirs_axes, dtype=part.dtype) if whole is None else whole
        whole[tuple(slice(low, low + size) for low, size in zip(piece.start, piece.box, strict=True))] = part
    assert whole is not None
    yield whole.view(shape)


def turned(piece: Piece, ours: torch.Tensor) -> torch.Tensor:
    """A box of ours as the box of theirs' elementary axes."""
    sizes = tuple(piece.box[axis] for axis in piece.order)
    back = tuple(piece.order.index(axis) for axis in range(len(piece.order)))
    return ours.reshape(sizes).permute(back)
