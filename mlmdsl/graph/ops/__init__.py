"""The catalogue of primitive operations: one declaration each, joined from the families."""

from __future__ import annotations

from collections.abc import Mapping

from mlmdsl.graph.ops import (
    attention,
    balance,
    distances,
    elementwise,
    embedding,
    experts,
    linear,
    loss,
    norm,
    selection,
    structure,
)
from mlmdsl.graph.ops.base import Op

_FAMILIES = (structure, embedding, linear, norm, elementwise, selection, attention, distances, experts, balance, loss)
CATALOGUE: Mapping[str, Op] = {op.name: op for family in _FAMILIES for op in family.OPS}

__all__ = ["CATALOGUE", "Op"]
