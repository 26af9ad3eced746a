"""What emitted programs import. Names are looked up on first use: reading a program's settings does not import torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlmdsl.runtime.attend import attention
    from mlmdsl.runtime.balance import Tally, add_loss, limit, load
    from mlmdsl.runtime.collectives import (
        all_gather,
        all_reduce,
        all_reduce_both,
        all_to_all,
        copy_to,
        gather,
        reduce_scatter,
        split,
    )
    from mlmdsl.runtime.config import AdamW, Data, Objective, Parallel, Schedule, Tokenizer, Training
    from mlmdsl.runtime.distances import alibi, relative_positions
    from mlmdsl.runtime.experts import balanced_top_k, combine, dispatch, grouped_linear, route, top_k
    from mlmdsl.runtime.functions import (
        concat,
        cross_entropy,
        positions,
        rotary,
        vocab_parallel_cross_entropy,
        vocab_parallel_embedding,
    )
    from mlmdsl.runtime.initial import Init, normal, ones, zeros
    from mlmdsl.runtime.mesh import Axis, Mesh
    from mlmdsl.runtime.parallel import Scope, weight
    from mlmdsl.runtime.recompute import recomputed, recomputed_blocks
    from mlmdsl.runtime.train import main

_HOMES = {
    "attend": "attention",
    "collectives": "all_gather all_reduce all_reduce_both all_to_all copy_to gather reduce_scatter split",
    "config": "AdamW Data Objective Parallel Schedule Tokenizer Training",
    "balance": "Tally add_loss limit load",
    "distances": "alibi relative_positions",
    "functions": "concat cross_entropy positions rotary vocab_parallel_cross_entropy vocab_parallel_embedding",
    "experts": "balanced_top_k combine dispatch grouped_linear route top_k",
    "initial": "Init normal ones zeros",
    "mesh": "Axis Mesh",
    "parallel": "Scope weight",
    "recompute": "recomputed recomputed_blocks",
    "train": "main",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "AdamW",
    "Axis",
    "Data",
    "Init",
    "Mesh",
    "Objective",
    "Parallel",
    "Schedule",
    "Scope",
    "Tally",
    "Tokenizer",
    "Training",
    "add_loss",
    "alibi",
    "all_gather",
    "all_reduce",
    "all_reduce_both",
    "all_to_all",
    "attention",
    "balanced_top_k",
    "combine",
    "concat",
    "copy_to",
    "cross_entropy",
    "dispatch",
    "gather",
    "grouped_linear",
    "limit",
    "load",
    "main",
    "normal",
    "ones",
    "positions",
    "recomputed",
    "recomputed_blocks",
    "reduce_scatter",
    "relative_positions",
    "rotary",
    "route",
    "split",
    "top_k",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_embedding",
    "weight",
    "zeros",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
