"""One training step of one rank of a program, without its devices: what it says to other ranks, multiplies and keeps.

The process group is torch's fake one, in which every collective returns at once, and tensors are hollow, with sizes and no
memory: a rank of any world runs on a laptop. They lie on torch's CPU device, whose backward pass runs in this thread, where a
TorchDispatchMode sees every operation. What a program asks of values is answered as if all of them were ones.

Memory is counted by storage, from the operation that makes it to its last reference. FLOPs are those of matrix products,
2 M N K, and of attention over the pairs of query and key that its kernel computes, twice as many backward (as the planner
counts).
"""

from __future__ import annotations

import runpy
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mlmdsl.runtime import attend, collectives, experts, hollow, parallel, pipeline, state, train
from mlmdsl.runtime import mesh as meshes
from mlmdsl.runtime.config import Parallel, Training
from mlmdsl.runtime.measured import Heard, Measured
from mlmdsl.runtime.mesh import Mesh
from mlmdsl.runtime.parallel import StageClass
from mlmdsl.runtime.pipeline import Batch
from mlmdsl.runtime.state import State
from mlmdsl.runtime.train import Trainer

# operation: kind, which argument is the larger side, which one names the group
_FUNCTIONAL = {
    "all_gather_into_tensor": ("all_gather", 0, 2),
    "reduce_scatter_tensor": ("reduce_scatter", 0, 3),
    "all_reduce": ("all_reduce", 0, 2),
    "all_to_all_single": ("all_to_all", 0, 3),
}
_PLAIN = {
    "_allgather_base_": ("all_gather", 0, 2),
    "_reduce_scatter_base_": ("reduce_scatter", 1, 2),
    "allreduce_": ("all_reduce", 0, 1),
    "send": ("send", 0, 1),
    "recv_": ("recv", 0, 1),
}
_SILENT = {"wait_tensor"}
_COMPOSED = {
    torch.ops.mlmdsl.blockwise_attention: attend.forward_by_blocks,
    torch.ops.mlmdsl.blockwise_attention_backward: attend.backward_by_blocks,
}
_PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}

Said = tuple[str, str, int]  # kind, name of the group, bytes of the larger side


def measure(program: Path, rank: int, kind: str) -> Measured:
    """Builds rank `rank` of the program and takes two steps, of which the second counts: the first makes what stays. `kind` of
    the devices that it is for: "cuda", "rocm" or "cpu"."""
    names = runpy.run_path(str(program), run_name="program")
    plan: Parallel = names["PARALLEL"]
    with ExitStack() as stack:
        if plan.world_size > 1:
            stack.enter_context(_fake_group(rank, plan.world_size))
        grid = meshes.create(plan, torch.device("cpu"))
        recorder = stack.enter_context(Recorder())
        stack.enter_context(_watched(recorder, kind))
        training: Training = names["TRAINING"]
        stage, loss = _telling(names["Stage"], recorder), recorder.during("loss", names["loss"])
        trainer = _Rehearsal(stage, loss, plan, training, grid, _Rows(training))
        trainer.step()
        recorder.begin(trainer.state)
        trainer.step()
        return Measured(_collectives(recorder.said), recorder.flops, recorder.peak, recorder.moment, recorder.parts)


@contextmanager
def _fake_group(rank: int, world_size: int) -> Iterator[None]:
    """The default group; of further groups only those are made that the rank is in."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    make = dist.new_group

    def mine_alone(ranks: Any = None, *arguments: Any, **settings: Any) -> Any:
        if ranks is not None and rank not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        return make(ranks, *arguments, **settings)

    try:
        with (
            mock.patch("torch.distributed.device_mesh.new_group", mine_alone),
            mock.patch.object(dist, "new_group", mine_alone),
        ):
            yield
    finally:
        dist.destroy_process_group()


class _Rows:
    """Rows without values."""

    def __init__(self, training: Training):
        self.training, self.batches = training, 1

    def batch(self, step: int, low: int, high: int) -> Batch:
        training = self.training
        lengths = {name: training.objective.length(name, training.sequence) for name in training.inputs}
        lengths["targets"] = training.objective.length(training.objective.required[-1], training.sequence)
        return {name: torch.zeros(high - low, length, dtype=torch.int64) for name, length in lengths.items()}


class _Rehearsal(Trainer):
    """A trainer whose numbers nobody has."""

    def _summed(self, vector: Tensor) -> list[float]:
        if self.mesh.world_size > 1:
            dist.all_reduce(vector)
        return [1.0] * vector.numel()

    def _counted(self, targets: Tensor) -> int:
        super()._counted(targets)
        return self.training.batch * targets.size(1)


# ---- watching -------------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Counts calls, FLOPs and live bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.results = hollow.Results()
        self.said: Counter[Said] = Counter()
        self.flops = 0.0
        self.live: dict[int, tuple[Any, int]] = {}  # by storage: a weak reference that forgets it, bytes
        self.bytes = self.peak = 0
        self.now = self.moment = "the first step"
        self.of_state: dict[int, str] = {}
        self.parts: dict[str, int] = {}
        self.pairs: Callable[[int, int], float] = lambda queries, keys: float(queries * keys)
        self.attended: dict[int, float] = {}  # FLOPs of an attention, by the storage of its result

    def during(self, moment: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which says that it runs."""

        def called(*arguments: Any, **settings: Any) -> Any:
            self.now = moment
            return function(*arguments, **settings)

        return called

    def begin(self, kept: State) -> None:
        """Forgets the first step, but not what is alive."""
        self.said.clear()
        self.flops = 0.0
        self.of_state = _state_parts(kept)
        self.peak = 0
        self._peaked()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        packet = func.overloadpacket
        if packet is torch.ops.aten._local_scalar_dense:
            return 1.0 if args[0].dtype.is_floating_point else 1
        space, _, name = str(packet).partition(".")
        if space in ("_c10d_functional", "c10d") and name not in _SILENT:
            self._hear(space, name, args)
        if packet in _COMPOSED:
            return self._composed(_COMPOSED[packet], name, args)
        if self.results.is_composite(func):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        out = self.results.of(func, args, kwargs or {})
        self._multiplied(packet, name, args, kwargs or {}, out)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.hold(x)
        if self.bytes > self.peak:
            self._peaked()
        return out

    # ---- collectives and products -----------------------------------------------------------------------------------

    def _hear(self, space: str, name: str, args: Any) -> None:
        kind, larger, group = (_FUNCTIONAL if space == "_c10d_functional" else _PLAIN)[name]
        tensor = args[larger][0] if isinstance(args[larger], list | tuple) else args[larger]
        where = args[group] if isinstance(args[group], str) else dist.ProcessGroup.unbox(args[group]).group_name
        ranks = args[1] if (space, kind) == ("_c10d_functional", "all_gather") else 1
        self.said[kind, where, tensor.numel() * tensor.element_size() * ranks] += 1

    def _multiplied(self, packet: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        if packet in _PRODUCTS:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        elif name.startswith("_scaled_dot_product"):
            if name.endswith("_backward"):
                self.flops += 2 * next(
                    self.attended[p] for x in args if isinstance(x, Tensor) and (p := _place(x)) in self.attended
                )
                return
            q, k, v = args[:3]
            pairs = self.pairs(q.size(2), k.size(2))
            flops = 2.0 * q.size(0) * q.size(1) * pairs * (q.size(3) + v.size(3))
            self.flops += flops
            self.attended[_place(out[0])] = flops

    def _composed(self, body: Callable[..., Any], name: str, args: Any) -> Any:
        """An operation of our own is watched from within, but for its FLOPs, which are those of any attention."""
        before = self.flops
        with self:
            out = body(*args)
        self.flops = before
        q, k, v, *_, offset, causal, _, window, _ = args[2:] if name.endswith("_backward") else args
        ranges = attend.blocks_of(q.size(2), k.size(2), offset, causal, window)
        pairs = sum(len(rows) * len(keys) for rows, keys in ranges)
        passes = 2.0 if name.endswith("_backward") else 1.0
        self.flops += passes * 2.0 * q.size(0) * q.size(1) * pairs * (q.size(3) + v.size(3))
        return out

    # ---- memory -----------------------------------------------------------------------------------------------------

    def hold(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        place = storage._cdata
        if place not in self.live:
            size = storage.nbytes()
            self.live[place] = (weakref.ref(storage, lambda _: self._forget(place)), size)
            self.bytes += size

    def _forget(self, place: int) -> None:
        self.bytes -= self.live.pop(place)[1]
        self.attended.pop(place, None)
        self.of_state.pop(place, None)  # another storage may take its place

    def resized(self, storage: torch.UntypedStorage) -> None:
        """FSDP2 frees and makes again what it has gathered by the size of the storage."""
        if (found := self.live.get(storage._cdata)) is not None:
            self.live[storage._cdata] = (found[0], hollow.size(storage))
            self.bytes += hollow.size(storage) - found[1]
            if self.bytes > self.peak:
                self._peaked()

    def _peaked(self) -> None:
        self.peak, self.moment = self.bytes, self.now
        self.parts = {}
        for place, part in self.of_state.items():
            if place in self.live:
                self.parts[part] = self.parts.get(part, 0) + self.live[place][1]
        self.parts["everything else"] = self.bytes - sum(self.parts.values())


def _place(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _state_parts(kept: State) -> dict[int, str]:
    """The storages that stay from step to step."""
    found: dict[int, str] = {}
    for held, moments, gradient in zip(kept.held, kept.optimizer.moments, kept.gradients, strict=True):
        parameter = parallel.local_part(held.parameter.data)
        found[_place(held.master)] = "master weights"
        found[_place(parameter)] = (
            "weights" if parameter.dtype == held.master.dtype else found.get(_place(parameter), "weights")
        )
        found[_place(gradient)] = "gradients"
        found |= {_place(moment): "optimizer" for moment in moments.values()}
    return found


def _telling(make: StageClass, recorder: Recorder) -> StageClass:
    """Stages whose layers say when they run."""

    def made(index: int, mesh: Mesh) -> nn.Module:
        stage = make(index, mesh)
        for path, layer in stage.named_modules():
            if layer in set(parallel.layers(stage)):
                layer.register_forward_pre_hook(partial(_before, path, recorder))
                layer.register_forward_hook(partial(_after, path, recorder))
        return stage

    return made


def _before(path: str, recorder: Recorder, *_: Any) -> None:
    recorder.now = f"{path} computed again" if torch._C._current_graph_task_id() != -1 else f"forward pass of {path}"


def _after(path: str, recorder: Recorder, _module: nn.Module, _arguments: Any, output: Any) -> None:
    for x in tree_leaves(output):
        if isinstance(x, Tensor) and x.requires_grad:
            x.register_hook(partial(_backward, path, recorder))


def _backward(path: str, recorder: Recorder, _gradient: Tensor) -> None:
    recorder.now = f"backward pass of {path}"


@contextmanager
def _watched(recorder: Recorder, kind: str) -> Iterator[None]:
    """Lets the recorder know what operations do not tell."""
    attending = attend._attend

    def resized(storage: torch.UntypedStorage, size: int) -> Any:
        done = hollow.resize(storage, size)
        recorder.resized(storage)
        return done

    def attended(q: Tensor, k: Tensor, *rest: Any, **settings: Any) -> Tensor:
        _, bias, valid, offset = rest[:4]
        masked = bias is not None or valid is not None or settings["window"] is not None
        recorder.pairs = lambda queries, keys: _pairs(queries, keys, offset, settings["causal"] and not masked)
        return attending(q, k, *rest, **settings)

    changes: list[tuple[Any, str, Any]] = [
        (torch.UntypedStorage, "resize_", resized),
        (torch.UntypedStorage, "size", hollow.size),
        (torch.UntypedStorage, "data_ptr", lambda storage: 0),  # FSDP2 asks whether it knows a storage
        (attend, "_attend", attended),
        (experts, "listed", _evenly),
        (State, "synchronise", recorder.during("sums of gradients", State.synchronise)),
        (State, "step", recorder.during("optimizer step", State.step)),
        (State, "_fill", lambda self, held: None),
        (pipeline, "boundaries", _plainly(pipeline.boundaries)),
        (state, "on_meta", _plainly(parallel.on_meta)),
        (DeviceMesh, "__getitem__", _plainly(DeviceMesh.__getitem__)),  # finds this rank's place by its values
        (train, "on_meta", _plainly(parallel.on_meta)),
    ]
    if kind != "cpu":  # what a GPU does otherwise
        changes += [(collectives, "_summable", Tensor.contiguous), (functional, "rms_norm", _rms_norm)]
        changes += [(attend, "_last_rows", lambda count, length, device: None)]  # flash attention takes no mask there
        changes += [(attend, "_lacks_kernel", lambda bias: False), (functional, "scaled_dot_product_attention", _attention)]
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def _evenly(counts: Tensor, total: int) -> list[int]:
    """Rows of experts, or of ranks, where nobody knows them."""
    share, more = divmod(total, counts.numel())
    return [share + (i < more) for i in range(counts.numel())]


class _FusedRMSNorm(torch.autograd.Function):
    """As large as what the kernel that GPUs have saves and returns: the input, and a number for each row. torch's operation of
    that name is composed of simple ones on any device without such a kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: int) -> Tensor:
        ctx.save_for_backward(x, x.new_empty((*x.shape[:-dims], *(1 for _ in range(dims))), dtype=torch.float32))
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """The weight comes in by an operation of torch's own that keeps nothing: torch 2.11 cannot take a backward pass apart at an
    autograd.Function."""
    normed: Tensor = _FusedRMSNorm.apply(x, len(shape))
    return normed if weight is None else normed.add_(weight)


_ATTENTION = functional.scaled_dot_product_attention


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **settings: Any) -> Tensor:
    """torch's, with the kernel that GPUs have where a mask has a gradient, and where values are not as wide as keys."""
    learned = attn_mask is not None and attn_mask.requires_grad
    if not learned and (q.size(-1) == v.size(-1) or q.size(1) != k.size(1)):
        return _ATTENTION(q, k, v, attn_mask, **settings)
    mask = None if attn_mask is None else attn_mask.expand(*q.shape[:-1], k.size(-2))
    known = {name: value for name, value in settings.items() if name != "enable_gqa"}
    attended: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, **known)[0]
    return attended


def _plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Outside of the modes: what is on the meta device has no fake device besides."""

    def called(*arguments: Any, **settings: Any) -> Any:
        with _disable_current_modes():
            return function(*arguments, **settings)

    return called


def _pairs(queries: int, keys: int, offset: int, causal: bool) -> float:
    """Of query and key, over what the kernel computes: half of a causal square, all under a mask."""
    if causal:
        return queries * offset + queries * queries / 2
    return float(queries * keys)


def _collectives(said: Mapping[Said, int]) -> tuple[Heard, ...]:
    groups = {name: dist.distributed_c10d._resolve_process_group(name) for _, name, _ in said}
    ranks = {name: tuple(dist.get_process_group_ranks(group)) for name, group in groups.items()}
    return tuple(Heard(kind, ranks[name], size, count) for (kind, name, size), count in said.items())
