"""What a layer keeps from its forward pass for its backward pass, and what it computes again.

"selective" keeps what is dear (arXiv:2205.05198, section 5): results of matrix products, of attention and of collectives that
add up or exchange. Two things are not kept that would be as large as the whole sequence on every rank. Gathered copies are
gathered again from the slices. Partial sums on their way to the collective that adds them up are neither kept nor computed
again: nobody looks at their values once the sum is there, and what the backward pass needs to know of them is their shape.

torch's own selective checkpointing decides operation by operation when each has run, before it is known where its result goes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial as bound
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from mlmdsl.runtime import attend


def _packets(namespace: Any, names: str) -> frozenset[Any]:
    return frozenset(packet for name in names.split() if (packet := getattr(namespace, name, None)) is not None)


_PRODUCTS = _packets(torch.ops.aten, "mm addmm bmm baddbmm linear matmul _grouped_mm")
_ATTENTION = _packets(
    torch.ops.aten,
    "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention",
) | {attend.BLOCKWISE}
_SUMS = _packets(torch.ops._c10d_functional, "reduce_scatter_tensor all_reduce")
_MOVED = _SUMS | _packets(torch.ops._c10d_functional, "all_to_all_single")
_WAITS = _packets(torch.ops._c10d_functional, "wait_tensor")
_KEPT = _PRODUCTS | _ATTENTION | _MOVED
# What may stand between a partial sum and its collective: linear, and saves nothing
_PASSING = _packets(torch.ops.aten, "cat clone _to_copy add")

Slot = tuple[Any, int]  # an operation, and which of its calls


def recomputed(module: Callable[..., Any], how: str) -> Callable[..., Any]:
    """`module` with what its backward pass needs kept ("none"), recomputed but for the dear part ("selective"), or recomputed
    from its arguments ("full")."""
    if how == "none":
        return module
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if how == "selective":
        settings["context_fn"] = _contexts
    return bound(checkpoint, module, **settings)


def recomputed_blocks(blocks: nn.ModuleDict, ways: Sequence[str]) -> Iterator[Callable[..., Any]]:
    """The stage's layers of a repeat, by their numbers in it; `ways`: how each of the repeat's layers is recomputed, from its
    first."""
    for number, block in blocks.items():
        yield recomputed(block, ways[int(number)])


def _contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    kept: dict[Slot, Any] = {}
    return _Keep(kept), _Again(kept)


def _place(x: Tensor) -> int:
    """The storage's address, of tensors on the meta device, too."""
    return x.untyped_storage()._cdata


class _Keep(TorchDispatchMode):
    """The forward pass: `kept` holds results by operation and number of its call."""

    def __init__(self, kept: dict[Slot, Any]) -> None:
        super().__init__()
        self.kept = kept
        self.calls: dict[Any, int] = defaultdict(int)
        self.origins: dict[int, tuple[Slot, ...]] = {}  # by storage: the products that it is made of and of nothing else

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = getattr(func, "overloadpacket", None)
        if packet in _SUMS:
            for slot in self.origins.get(_place(args[0]), ()):
                self.kept[slot] = tree_map_only(Tensor, _shape_only, self.kept[slot])
        made = self._origins(packet, args, out)
        if packet in _KEPT:
            slot = (packet, self.calls[packet])
            self.calls[packet] += 1
            self.kept[slot] = tree_map_only(Tensor, Tensor.detach, out)
            made = (slot,) if packet in _PRODUCTS else ()
        self._note(args, out, made)
        return out

    def _origins(self, packet: Any, args: Any, out: Any) -> tuple[Slot, ...]:
        """Of a result that only passes products on."""
        given = [self.origins.get(_place(x), ()) for x in tree_leaves(args) if isinstance(x, Tensor) and x.numel()]
        passing = packet in _PASSING and given and all(given)
        return tuple(dict.fromkeys(slot for slots in given for slot in slots)) if passing else ()

    def _note(self, args: Any, out: Any, made: tuple[Slot, ...]) -> None:
        """New storages; a view stays what it was. Addresses are used again, so that what is unknown is said, too."""
        given = {_place(x) for x in tree_leaves(args) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (place := _place(x)) not in given:
                self.origins[place] = made


class _Again(TorchDispatchMode):
    """The forward pass again: what was kept is given instead of computed, once."""

    def __init__(self, kept: dict[Slot, Any]) -> None:
        super().__init__()
        self.kept = kept
        self.calls: dict[Any, int] = defaultdict(int)
        self.arrived: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = getattr(func, "overloadpacket", None)
        if packet in _KEPT:
            slot = (packet, self.calls[packet])
            self.calls[packet] += 1
            out = self.kept.pop(slot)
            self.arrived |= {_place(x) for x in tree_leaves(out) if packet in _MOVED}
            return out
        if packet in _WAITS and (place := _place(args[0])) in self.arrived:
            self.arrived.discard(place)  # once it is free, a copy that is gathered again may have its address
            return args[0]
        return func(*args, **(kwargs or {}))


def _shape_only(x: Tensor) -> Tensor:
    """As large, without memory of its own."""
    return x.new_zeros(()).expand(x.shape)
