"""Which part of a weight in a file of safetensors is which part of one of ours. Plain values, no torch.

Both are taken apart into elementary axes: theirs [3d, in] as (3, d, in), say. A piece is a box of theirs, whose axes in another
order are a box of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod


@dataclass(frozen=True)
class Tensor:
    """One in a file: `offset` of its first byte, `dtype` as safetensors writes it (F32, BF16, F16)."""

    path: str
    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """theirs' elementary axes have the sizes `theirs_axes`; the box begins at `start` and has the sizes `box`. Axis j of ours
    is axis `order[j]` of theirs; ours' whole sizes on them are `ours_axes`, and the box begins at `ours_start` there. `dims[j]`
    is the dim of ours that axis j belongs to."""

    ours: str
    theirs: str
    theirs_axes: tuple[int, ...]
    start: tuple[int, ...]
    box: tuple[int, ...]
    order: tuple[int, ...]
    ours_axes: tuple[int, ...]
    ours_start: tuple[int, ...]
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.box)

    @property
    def outer(self) -> int:
        """theirs' outermost axis on which the box is longer than one."""
        return next((axis for axis, size in enumerate(self.box) if size > 1), 0)

    def ours_box(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Offsets and sizes in the dims of ours."""
        offsets, sizes = [0] * (max(self.dims, default=-1) + 1), [1] * (max(self.dims, default=-1) + 1)
        for axis, dim in enumerate(self.dims):
            offsets[dim] = offsets[dim] * self.ours_axes[axis] + self.ours_start[axis]
            sizes[dim] *= self.box[self.order[axis]]
        return tuple(offsets), tuple(sizes)

    def cut(self, most: int) -> Iterator[Piece]:
        """Pieces of at most `most` elements, cut along theirs' outermost axis so that each is read in one go; whole where the
        parts would not be boxes of ours."""
        axis = self.outer
        place = self.order.index(axis)
        first = all(self.ours_axes[j] == 1 for j in range(place) if self.dims[j] == self.dims[place])
        inner = self.elements // max(1, self.box[axis])
        rows = max(1, most // max(1, inner)) if first else self.box[axis]
        for low in range(0, self.box[axis], rows):
            yield self._narrowed(axis, place, low, min(rows, self.box[axis] - low))

    def _narrowed(self, axis: int, place: int, low: int, rows: int) -> Piece:
        start, box, ours_start = list(self.start), list(self.box), list(self.ours_start)
        start[axis] += low
        ours_start[place] += low
        box[axis] = rows
        return replace(self, start=tuple(start), box=tuple(box), ours_start=tuple(ours_start))
