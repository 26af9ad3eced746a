"""Biases of attention's scores by the distance of query and key. S positions, H heads."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mlmdsl.runtime.functions import sequence_positions
from mlmdsl.runtime.mesh import Axis


def relative_positions(
    x: Tensor,
    weight: Tensor,
    max_distance: int,
    *,
    bidirectional: bool = False,
    tp: Axis | None = None,
    sequence: bool = False,
    cp: Axis | None = None,
) -> Tensor:
    """T5's bias (arXiv:1910.10683, section 2.1) from a table [buckets, H]: [H, S, S] for x [B, S, ..].

    Of the buckets (of one direction, if there are two) the first half are single distances, the others reach to `max_distance`
    on a logarithmic scale; what is farther is in the last. `sequence`: x is cut along the sequence over `tp`; over `cp` it is
    cut, too, and the rows are those of this rank's queries."""
    queries, keys = _positions(x, tp, sequence, cp)
    distance = keys - queries[:, None]
    count = weight.size(0)
    if bidirectional:
        count //= 2
        bucket, distance = (distance > 0) * count, distance.abs()
    else:
        bucket, distance = torch.zeros_like(distance), (-distance).clamp(min=0)
    exact = count // 2
    share = (distance.clamp(min=1).float() / exact).log() / math.log(max_distance / exact)
    far = (exact + (share * (count - exact)).long()).clamp(max=count - 1)
    bucket = bucket + torch.where(distance < exact, distance, far)
    return F.embedding(bucket, weight).permute(2, 0, 1).contiguous()


def alibi(
    x: Tensor,
    heads: int,
    *,
    bidirectional: bool = False,
    tp: Axis | None = None,
    cut: bool = False,
    sequence: bool = False,
    cp: Axis | None = None,
) -> Tensor:
    """ALiBi's bias (arXiv:2108.12409) in float32: minus a head's slope times the distance. [H, 1, S], the distance from the
    last position, which serves all queries of a causal attention; [H, S, S] if `bidirectional`.

    `cut`: only this rank's heads of `tp`; `sequence`: x is cut along the sequence over `tp`; over `cp` it is cut, too, and the
    rows are those of this rank's queries."""
    slopes = _slopes(heads)
    if tp is not None and cut:
        slopes = slopes.chunk(tp.size)[tp.rank]
    queries, keys = (places.float() for places in _positions(x, tp, sequence, cp))
    distance = (queries[:, None] - keys).abs() if bidirectional else keys.flip(0)[None]
    return -slopes.to(x.device)[:, None, None] * distance


def _slopes(heads: int) -> Tensor:
    """2^(-8 i / n) for i from 1 to n heads. For a count between two powers of two: those of the lower one, then every other of
    the higher one (the authors' code)."""
    power = 2 ** math.ceil(math.log2(heads))
    slopes = 2.0 ** (-8.0 / power * torch.arange(1, power + 1, dtype=torch.float32))
    return slopes if power == heads else torch.cat((slopes[1::2], slopes[::2]))[:heads]


def _positions(x: Tensor, tp: Axis | None, sequence: bool, cp: Axis | None) -> tuple[Tensor, Tensor]:
    """Of this rank's queries, and of all keys."""
    length = x.size(1) * (tp.size if tp is not None and sequence else 1)
    if cp is None:
        places = torch.arange(length, device=x.device)
        return places, places
    return sequence_positions(length, (cp,), x.device), torch.arange(length * cp.size, device=x.device)
