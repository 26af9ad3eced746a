"""The legal transitions between placements on one axis: what is called forward, its dual backward, and the bytes that move.

    source      target      forward         backward
    Shard(d)    BROADCAST   all_gather      reduce_scatter
    Shard(d)    REPLICATE   all_gather      split
    REPLICATE   BROADCAST   -               all_reduce       (Megatron's f, arXiv:1909.08053)
    PARTIAL     REPLICATE   all_reduce      -                (Megatron's g)
    PARTIAL     BROADCAST   all_reduce      all_reduce
    PARTIAL     Shard(d)    reduce_scatter  all_gather
    REPLICATE   Shard(d)    split           all_gather
    Shard(a)    Shard(b)    all_to_all      all_to_all

Everything else has no meaning: a BROADCAST value, say, cannot be used where its gradient has to be whole.
"""

from __future__ import annotations

from mlmdsl.frozen import frozen
from mlmdsl.graph.placement import Placement
from mlmdsl.planner.plan import CollectiveKind


@frozen
class Step:
    """One row of the table; `dim` is what is gathered, scattered or split, `target_dim` an all_to_all's second dim."""

    forward: CollectiveKind | None
    backward: CollectiveKind | None
    dim: int | None = None
    target_dim: int | None = None

    def side_bytes(self, whole_bytes: int, axis_size: int) -> int:
        """The larger side of the call on one rank: the whole value, but for an all_to_all, both sides of which are slices."""
        return whole_bytes if self.target_dim is None else whole_bytes // axis_size


_TABLE: dict[tuple[str, str], tuple[CollectiveKind | None, CollectiveKind | None]] = {
    ("shard", "broadcast"): ("all_gather", "reduce_scatter"),
    ("shard", "replicate"): ("all_gather", "split"),
    ("replicate", "broadcast"): (None, "all_reduce"),
    ("partial", "replicate"): ("all_reduce", None),
    ("partial", "broadcast"): ("all_reduce", "all_reduce"),
    ("partial", "shard"): ("reduce_scatter", "all_gather"),
    ("replicate", "shard"): ("split", "all_gather"),
    ("shard", "shard"): ("all_to_all", "all_to_all"),
}


def transition(source: Placement, target: Placement, *, integer: bool = False) -> Step | None:
    """The row for `source` to `target` (which differ); None where there is none. Integers have no gradient."""
    row = _TABLE.get((source.kind, target.kind))
    if row is None:
        return None
    forward, backward = row if not integer else (row[0], None)
    if source.is_shard and target.is_shard:
        return Step(forward, backward, source.dim, target.dim)
    dim = source.dim if source.is_shard else target.dim if target.is_shard else None
    return Step(forward, backward, dim)
