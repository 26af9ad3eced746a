"""The catalogue of primitive operations: one declaration each, joined from the families."""

from __future__ import annotations

from collections.abc import Mapping

from mlmdsl.graph.ops import attention, distances, elementwise, embedding, linear, loss, norm, structure
from mlmdsl.graph.ops.base import Op

CATALOGUE: Mapping[str, Op] = {
    op.name: op for family in (structure, embedding, linear, norm, elementwise, attention, distances, loss) for op in family.OPS
}

__all__ = ["CATALOGUE", "Op"]
