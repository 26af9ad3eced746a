"""Attention as programs call it. B sequences, S queries, T keys, H heads (K for keys and values), D and E head dims.

Three ways, by what is asked for:

    causal or nothing       torch's scaled_dot_product_attention, which skips what lies above the diagonal
    a window, a bias,       the same with an explicit mask: nothing of size [B, H, S, T] is kept (except for a bias and
    padding                 padding together), but every score is computed
    soft-capping            `blockwise_attention`: matrix products and a softmax over blocks of queries, taken again in the
                            backward pass; also for a bias with a gradient on a CPU, where torch would keep all scores

Over the context axis a rank has two chunks of the queries, each of which is attention over the slice of keys that it may see.
Documents that are kept apart are slices, too: one call each, with no mask that a single document would not have.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils.weak import WeakTensorKeyDictionary

from mlmdsl.runtime.config import QUERY_BLOCK
from mlmdsl.runtime.mesh import Axis


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    documents: Tensor | None = None,
    cp: Axis | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """q [B, S, H, D], k [B, T, K, D] and v [B, T, K, E] with K a divisor of H -> [B, S, H, E].

    `scale` defaults to D ** -0.5. `softcap` makes the scaled scores softcap * tanh(scores / softcap) (arXiv:2408.00118). `bias`
    [H, S, T], the first two of which may be 1, is added to them. Query i sees key j where j <= i if `causal`, and where
    |i - j| < window. Of `valid` [B, T] keys of 0 are padding, which nothing sees, except that with `causal` or a window a query
    sees itself in any case. Each row has to have a key that is none. `documents` [B, T] numbers documents: neighbours with the
    same number are one, and nothing is seen but its own; padding is a document of its own, and `valid` is not looked at.

    Over the context axis `cp`, q and the rows of a bias are this rank's part of the sequence, k, v and the integers whole."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    settings: dict[str, Any] = {"causal": causal, "scale": scale, "window": window, "softcap": softcap}
    if documents is not None and not documents.is_meta:
        return _by_document(q, k, v, bias, _runs(documents), _chunks(k.size(2), cp), settings)
    if cp is None or cp.size == 1 or not (causal or window is not None):
        return _attend(q, k, v, bias, valid, 0, **settings).transpose(1, 2)
    size = q.size(2) // 2
    parts: list[Tensor] = []
    for half, index in enumerate((cp.rank, 2 * cp.size - 1 - cp.rank)):
        keys = seen_keys(range(index * size, (index + 1) * size), k.size(2), causal, window)
        mine, seen = slice(half * size, (half + 1) * size), slice(keys.start, keys.stop)
        of_bias = None if bias is None else _of(bias, mine, seen)
        offset = index * size - keys.start
        of_valid = None if valid is None else valid[:, seen]
        parts.append(_attend(q[:, :, mine], k[:, :, seen], v[:, :, seen], of_bias, of_valid, offset, **settings))
    return torch.cat(parts, 2).transpose(1, 2)


def _chunks(length: int, cp: Axis | None) -> list[range]:
    """The positions that this rank has."""
    if cp is None or cp.size == 1:
        return [range(length)]
    size = length // (2 * cp.size)
    return [range(index * size, (index + 1) * size) for index in (cp.rank, 2 * cp.size - 1 - cp.rank)]


_RUNS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # all layers ask for the same


def _runs(documents: Tensor) -> list[list[range]]:
    """The positions of each document, by row."""
    if documents not in _RUNS:
        found: list[list[range]] = []
        for row in documents.cpu():
            ends: list[int] = row.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()
            found.append([range(low, high) for low, high in zip([0, *ends], ends, strict=False)])
        _RUNS[documents] = found
    return _RUNS[documents]


def _by_document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    runs: list[list[range]],
    chunks: list[range],
    settings: dict[str, Any],
) -> Tensor:
    """[B, S, H, E]: row by row, chunk by chunk of this rank's queries, document by document.

    The keys of a chunk's documents follow one another, so that what is cut apart is joined in the backward pass at once."""
    causal, window = settings["causal"], settings["window"]
    sides = 1 if causal else 2
    within = None if window is None else min(k.size(2), sides * (window - 1) + max(map(len, chunks)))
    parts: list[Tensor] = []
    for number, row in enumerate(zip(q.split(1), k.split(1), v.split(1), strict=True)):
        before = 0
        for chunk, mine in zip(chunks, row[0].split([len(chunk) for chunk in chunks], 2), strict=True):
            pieces = [range(max(d.start, chunk.start), min(d.stop, chunk.stop)) for d in runs[number]]
            pairs = [(p, _own_keys(p, d, causal, window)) for p, d in zip(pieces, runs[number], strict=True) if p]
            cut = slice(pairs[0][1].start, pairs[-1][1].stop)
            sizes = [len(keys) for _, keys in pairs]
            queries = mine.split([len(p) for p, _ in pairs], 2)
            taken = zip(pairs, queries, *(x[:, :, cut].split(sizes, 2) for x in row[1:]), strict=True)
            for (places, keys), query, key, value in taken:
                rows, seen = slice(before, before + len(places)), slice(keys.start, keys.stop)
                of_bias = None if bias is None else _of(bias, rows, seen)
                offset = places.start - keys.start
                part = _attend(query, key, value, of_bias, None, offset, within=within, **settings)
                parts.append(part.transpose(1, 2)[0])
                before += len(places)
    return torch.cat(parts).unflatten(0, (q.size(0), -1))


def _own_keys(queries: range, document: range, causal: bool, window: int | None) -> range:
    """The keys of their document that any of these queries sees."""
    seen = seen_keys(queries, document.stop, causal, window)
    return range(max(seen.start, document.start), seen.stop)


def _of(bias: Tensor, rows: slice, keys: slice) -> Tensor:
    """The bias of these rows and keys."""
    return bias[:, rows if bias.size(1) > 1 else slice(None), keys if bias.size(2) > 1 else slice(None)]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    offset: int,
    *,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    within: int | None = None,
) -> Tensor:
    """[B, H, S, D] and so on; the first query stands at the position of key number `offset`. `within`: the mask of a window is
    a part of that of so many positions, which serves every call."""
    if window is not None and window >= max(offset + q.size(2), k.size(2)):
        window = None
    if softcap is not None or (bias is not None and _lacks_kernel(bias)):
        scale = q.size(-1) ** -0.5 if scale is None else scale
        return BLOCKWISE(q, k, v, bias, valid, offset, causal, scale, window, softcap)
    if window is None and bias is None and valid is None:
        shared = q.size(1) != k.size(1)
        if not causal or not offset:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=shared)
        last = _last_rows(q.size(2), k.size(2), q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=last, scale=scale, enable_gqa=shared)
    if within is not None and window is not None and bias is None:
        whole = _window_mask(range(within), range(within), causal, window, q.dtype, q.device)
        mask = whole[offset : offset + q.size(2), : k.size(2)]
    else:
        mask = _mask(q, k, bias, valid, offset, causal, window)
    if q.size(1) != k.size(1):  # the kernels that take a mask want a key for every head
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _lacks_kernel(bias: Tensor) -> bool:
    """Whether no kernel of torch gives the bias its gradient."""
    return bias.requires_grad and bias.device.type == "cpu"


def _last_rows(count: int, length: int, device: torch.device) -> Any:
    """The causal mask of the last `count` of `length` positions. On a GPU torch takes flash attention for its CausalBias."""
    if device.type == "cuda":
        return causal_lower_right(count, length)
    return visible(range(length - count, length), range(length), True, None, device)


def _mask(
    q: Tensor, k: Tensor, bias: Tensor | None, valid: Tensor | None, offset: int, causal: bool, window: int | None
) -> Tensor:
    """What is added to the scores [.., S, T]; of padding alone, which keys are seen."""
    rows, keys = range(offset, offset + q.size(2)), range(k.size(2))
    if bias is None:
        if valid is not None:
            return seen(valid, rows, keys, causal, window)
        return _window_mask(rows, keys, causal, window, q.dtype, q.device)
    mask = bias[None]
    if valid is not None:
        mask = mask.masked_fill(~seen(valid, rows, keys, causal, window), -torch.inf)
    elif causal or window is not None:
        mask = mask.masked_fill(~visible(rows, keys, causal, window, q.device), -torch.inf)
    if mask.dtype != q.dtype:  # softmax does not see a row's shift, rounding does
        mask = (mask - mask.detach().amax(-1, keepdim=True)).to(q.dtype)
    return mask


@lru_cache(maxsize=8)
def _window_mask(
    queries: range, keys: range, causal: bool, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The same for all layers, so that it is in memory once: torch keeps it for the backward pass."""
    with torch.inference_mode(False):
        hidden = ~visible(queries, keys, causal, window, device)
        return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)


def visible(queries: range, keys: range, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Which keys the queries at these positions see: bool [queries, keys]."""
    rows = torch.arange(queries.start, queries.stop, device=device)[:, None]
    columns = torch.arange(keys.start, keys.stop, device=device)
    seen = columns <= rows if causal else torch.ones(len(queries), len(keys), dtype=torch.bool, device=device)
    if window is not None:
        seen = seen & (columns > rows - window)
        seen = seen if causal else seen & (columns < rows + window)
    return seen


def seen(valid: Tensor, queries: range, keys: range, causal: bool, window: int | None) -> Tensor:
    """Which of these keys, of which `valid` [B, keys] tells the padding, the queries at these positions see: bool
    [B, 1, queries or 1, keys]."""
    there = valid[:, None, None, :] != 0
    if not causal and window is None:
        return there
    rows = torch.arange(queries.start, queries.stop, device=valid.device)[:, None]
    itself = rows == torch.arange(keys.start, keys.stop, device=valid.device)
    return visible(queries, keys, causal, window, valid.device) & (there | itself)


def seen_keys(queries: range, length: int, causal: bool, window: int | None) -> range:
    """Of `length` keys those that any of the queries at these positions sees."""
    first = 0 if window is None else max(0, queries.start - window + 1)
    last = queries.stop if causal else length if window is None else queries.stop + window - 1
    return range(first, min(length, last))


# ---- blocks of queries ----------------------------------------------------------------------------------------------


class _Block:
    """The scores of a block of queries, of all heads, over the keys that any of them sees.

    Everything is in float32 at least: capped [B, K, G, block, keys] in units of softcap (tanh) or as they are, `weights` their
    softmax. Groups of G = H / K heads share a key."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        bias: Tensor | None,
        valid: Tensor | None,
        settings: tuple[Any, ...],
        rows: range,
        keys: range,
    ):
        offset, causal, scale, window, softcap = settings
        self.rows, self.keys, self.k = rows, keys, k[:, :, keys.start : keys.stop]
        self.q = q.unflatten(1, (k.size(1), -1))[:, :, :, rows.start : rows.stop]
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = self.product(self.q, self.k.mT).to(wide)
        self.capped = None
        if softcap is None:
            scores = scores.mul_(scale)
        else:
            self.capped = scores.mul_(scale / softcap).tanh_()
            scores = self.capped * softcap
        if bias is not None:
            scores += self.of(bias).unflatten(0, (k.size(1), -1) if bias.size(0) > 1 else (1, 1))
        places = range(offset + rows.start, offset + rows.stop)
        if valid is not None:
            scores.masked_fill_(~seen(valid[:, keys.start : keys.stop], places, keys, causal, window)[:, None], -torch.inf)
        elif causal or window is not None:
            scores.masked_fill_(~visible(places, keys, causal, window, q.device), -torch.inf)
        self.weights = scores.softmax(-1)

    @staticmethod
    def product(one: Tensor, other: Tensor) -> Tensor:
        """[B, K, G, m, n] by [B, K, n, p], as one product for the G heads that share the right one."""
        groups = one.size(2)
        return (one.flatten(2, 3) @ other).unflatten(2, (groups, -1))

    def of(self, bias: Tensor) -> Tensor:
        """The bias of these rows and keys."""
        return _of(bias, slice(self.rows.start, self.rows.stop), slice(self.keys.start, self.keys.stop))


def _blocks(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    offset: int,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Iterator[_Block]:
    for rows, keys in blocks_of(q.size(2), k.size(2), offset, causal, window):
        yield _Block(q, k, bias, valid, (offset, causal, scale, window, softcap), rows, keys)


def blocks_of(queries: int, keys: int, offset: int, causal: bool, window: int | None) -> Iterator[tuple[range, range]]:
    """Blocks of queries, and the keys that any of theirs sees."""
    for start in range(0, queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, queries)
        yield range(start, stop), seen_keys(range(offset + start, offset + stop), keys, causal, window)


_SETTINGS = "int offset, bool causal, float scale, int? window, float? softcap"


def _shape(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    """[B, H, S, E], laid out so that [B, S, H * E] is a view of it; on the meta device, what stages hand on."""
    return q.new_empty(q.size(0), q.size(2), q.size(1), v.size(-1)).transpose(1, 2)


def forward_by_blocks(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, valid: Tensor | None, *settings: Any) -> Tensor:
    """q [B, H, S, D], k and v [B, K, T, ..] -> [B, H, S, E]. One operation to autograd and to selective recomputation, so
    that q, k, v and the result are all that stays for the backward pass."""
    y = _shape(q, k, v)
    for block in _blocks(q, k, bias, valid, *settings):
        values = v[:, :, block.keys.start : block.keys.stop]
        part = block.product(block.weights.to(v.dtype), values).flatten(1, 2)
        y[:, :, block.rows.start : block.rows.stop] = part
        del block, part  # before the next one is made
    return y


def backward_by_blocks(
    grad: Tensor, y: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, valid: Tensor | None, *settings: Any
) -> list[Tensor]:
    """Gradients of q, k, v and the bias (empty without one), by blocks as in arXiv:2205.14135, section 3.1 and appendix B.4."""
    _, _, scale, _, softcap = settings
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=wide) for x in (k, v))
    dbias = grad.new_empty(0) if bias is None else torch.zeros_like(bias, dtype=wide)
    for block in _blocks(q, k, bias, valid, *settings):
        rows, keys = slice(block.rows.start, block.rows.stop), slice(block.keys.start, block.keys.stop)
        dy = grad.unflatten(1, (k.size(1), -1))[:, :, :, rows]
        delta = (dy.to(wide) * y.unflatten(1, (k.size(1), -1))[:, :, :, rows]).sum(-1, keepdim=True)
        dv[:, :, keys] += block.weights.to(v.dtype).flatten(2, 3).mT @ dy.flatten(2, 3)
        ds = block.product(dy, v[:, :, keys].mT).to(wide).sub_(delta).mul_(block.weights)
        if bias is not None:
            part = block.of(dbias)
            part += ds.sum(0).flatten(0, 1).sum_to_size(part.shape)
        if softcap is not None:
            assert block.capped is not None
            ds.mul_(block.capped.square_().neg_().add_(1.0))
        narrow = ds.mul_(scale).to(q.dtype)
        dq[:, :, rows] = block.product(narrow, block.k).flatten(1, 2)
        dk[:, :, keys] += narrow.flatten(2, 3).mT @ block.q.flatten(2, 3)
        del block, delta, ds, narrow  # before the next one is made
    return [dq, dk.to(k.dtype), dv.to(v.dtype), dbias if bias is None else dbias.to(bias.dtype)]


_INPUTS = f"Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? valid, {_SETTINGS}"
_forward = torch.library.custom_op(
    "mlmdsl::blockwise_attention", forward_by_blocks, mutates_args=(), schema=f"({_INPUTS}) -> Tensor"
)
_backward = torch.library.custom_op(
    "mlmdsl::blockwise_attention_backward",
    backward_by_blocks,
    mutates_args=(),
    schema=f"(Tensor grad, Tensor y, {_INPUTS}) -> Tensor[]",
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, bias, valid, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, bias, valid, output)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, k, v, bias, valid, y = ctx.saved_tensors
    dq, dk, dv, dbias = torch.ops.mlmdsl.blockwise_attention_backward(grad, y, q, k, v, bias, valid, *ctx.settings)
    return dq, dk, dv, None if bias is None else dbias, None, None, None, None, None, None


_forward.register_fake(_shape)
_forward.register_autograd(_gradients, setup_context=_save)
BLOCKWISE = torch.ops.mlmdsl.blockwise_attention
