"""A rank's weights, gradients and optimizer state, and how gradients are added up over the axes.

Two ways to hold weights over the replicas (the ranks of data and context), one interface:

    Replicated (ZeRO 0)   every rank all of them. Gradients are views of one flat float32 buffer, so that a step needs one
                          all_reduce over the replicas, and one over tensor for the part in front (partial gradients). In bf16
                          the weights that compute are bfloat16, with float32 masters and gradients.
    Sharded (ZeRO 1 to 3) FSDP2: float32 shards, cast to bf16 for computing where asked; gradients reduce-scattered
                          in float32. Of experts that the expert axis shares out weights and gradients stay whole; masters and
                          optimizer state are cut over the ranks that have the same ones (as ZeRO 1, whatever is asked for).

`Held.master` is this rank's float32 part, which the optimizer steps and checkpoints store. A weight that several stages hold
(tied embeddings) has one Held on each; all start alike, their gradients are summed over the holders, so they stay alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from mlmdsl.runtime import initial
from mlmdsl.runtime.config import Parallel, Training, even_dim
from mlmdsl.runtime.mesh import Mesh
from mlmdsl.runtime.optimizer import Optimizer
from mlmdsl.runtime.parallel import (
    StageClass,
    WeightInfo,
    local_part,
    on_meta,
    over_copies,
    place,
    public_name,
    sharded_units,
    weights_of,
    wrap_sharded,
)


@dataclass(frozen=True)
class Outline:
    """What every stage holds, known to all ranks: virtual stages by weight, in order."""

    holders: Mapping[str, tuple[int, ...]]

    @property
    def tied(self) -> dict[str, tuple[int, ...]]:
        return {name: stages for name, stages in sorted(self.holders.items()) if len(stages) > 1}


def outline(make: StageClass, parallel: Parallel, mesh: Mesh) -> Outline:
    """Makes every stage once on the meta device and lets it go: cheaper than asking the other ranks, and works without them."""
    holders: dict[str, tuple[int, ...]] = {}
    for stage in range(len(parallel.stages)):
        for path in weights_of(on_meta(make, stage, mesh)):
            holders[public_name(path)] = (*holders.get(public_name(path), ()), stage)
    return Outline(holders)


@dataclass
class Held:
    """One weight of one local stage."""

    name: str
    stage: int
    info: WeightInfo
    parameter: nn.Parameter  # what the module computes with
    master: Tensor  # float32, this rank's part


class State(ABC):
    """All weights of this rank's stages (virtual stage -> module on the meta device, made real here)."""

    sharded: bool

    def __init__(self, stages: Mapping[int, nn.Module], plan: Outline, parallel: Parallel, training: Training, mesh: Mesh):
        self.plan, self.parallel, self.training, self.mesh = plan, parallel, training, mesh
        self.held = [held for stage, module in stages.items() for held in self._made_real(stage, module)]
        self.held.sort(key=lambda held: (_place_in_flat(held.info), held.stage, held.name))
        settings = [(h.info.decay, h.info.balance) for h in self.held]
        self.optimizer = Optimizer(training.optimizer, [h.master for h in self.held], settings)
        self.groups = self._tied_groups()

    # ---- weights ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def _made_real(self, stage: int, module: nn.Module) -> Iterator[Held]:
        """Allocates what this rank owns of the stage's weights."""

    @abstractmethod
    def publish(self) -> None:
        """Lets the modules compute with the masters' values."""

    def initialise(self) -> None:
        """Gives the weights the values that a run begins with. One that goes on from a checkpoint is spared them."""
        for held in self.held:
            self._fill(held)
        self.publish()

    def _fill(self, held: Held) -> None:
        where = place(held.info, self.mesh, sharded=self.sharded)
        assert tuple(held.master.shape) == where.shape, (held.name, held.master.shape, where)
        initial.fill(held.master, held.name, held.info.init, self.training.seed, held.info.shape, where.offsets)

    def _tied_groups(self) -> dict[str, dist.ProcessGroup | None]:
        """For each tied weight held here the ranks of this pipeline that hold it; None where they are one.

        Every rank makes every group: with use_local_synchronization torch 2.13 names a group after the number of groups that
        the process has, which differs between ranks that are in several, and they wait for each other for ever."""
        here = {held.name for held in self.held}
        made: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
        for stages in self.plan.tied.values():
            ranks = self._pipeline_ranks(stages)
            if ranks not in made:
                made[ranks] = self._group_of(ranks) if len(ranks) > 1 else None
        return {name: made[self._pipeline_ranks(stages)] for name, stages in self.plan.tied.items() if name in here}

    def _pipeline_ranks(self, stages: Sequence[int]) -> tuple[int, ...]:
        return tuple(sorted({self.parallel.pipeline_rank(stage) for stage in stages}))

    def _group_of(self, pipeline_ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """The group of these ranks of this rank's own pipeline, out of those that all pipelines make."""
        mine = None
        stages = (chain.from_iterable(self.parallel.grid[rank]) for rank in pipeline_ranks)
        for ranks in zip(*stages, strict=True):
            group = dist.new_group(list(ranks))
            if dist.get_rank() in ranks:
                mine = group
        return mine

    # ---- gradients --------------------------------------------------------------------------------------------------

    @abstractmethod
    def before_step(self) -> None:
        """Forgets gradients."""

    @abstractmethod
    def before_micro_batch(self, *, last: bool) -> None:
        """To be called before each micro-batch of a loop of our own (torch's pipeline schedules see to it themselves)."""

    @abstractmethod
    def _sum_partial(self) -> None:
        """Over the tensor axis, where each rank's gradient is a part."""

    @abstractmethod
    def _sum_replicas(self) -> None:
        """Over the replicas."""

    @property
    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """Float32, in the order of `held`: of this rank's part of each weight, whole after `synchronise`."""

    @torch.no_grad()
    def synchronise(self) -> None:
        """Adds gradients up over every axis, once per step."""
        self._sum_replicas()
        self._sum_partial()
        self._sum_tied()

    def _sum_tied(self) -> None:
        gradients = self.gradients if self.groups else []
        for name, group in self.groups.items():
            first, *others = (gradients[i] for i, held in enumerate(self.held) if held.name == name)
            for other in others:
                first.add_(other)
            if group is not None:
                dist.all_reduce(first, group=group)
            for other in others:
                other.copy_(first)

    @torch.no_grad()
    def square_norm(self) -> float:
        """This rank's share of the squared norm of all gradients: over the world the shares add up, each element once. What is
        counted to balance a weight is left out."""
        if not self.held:
            return 0.0
        squares = torch.stack(torch._foreach_norm(self.gradients)).double().square().cpu()
        return float((squares * torch.tensor(self._shares, dtype=torch.float64)).sum())

    @cached_property
    def _shares(self) -> list[float]:
        """Of each weight's squared norm, what this rank counts."""
        return [(not held.info.balance) / self._copies(held) for held in self.held]

    def _copies(self, held: Held) -> int:
        """How many ranks (or stages of one rank) have the same elements."""
        tensor = 1 if held.info.shard is not None else self.mesh.tensor.size
        alike = self.mesh.copies if held.info.expert else self.mesh.replicas
        cut_over = 1 if not self._is_cut(held.info) else alike.size if held.info.expert else self.mesh.shards.size
        replicas = alike.size // cut_over
        return tensor * replicas * len(self.plan.holders[held.name])

    def _is_cut(self, info: WeightInfo) -> bool:
        """Whether ranks that would hold the same share it out."""
        return self.sharded and (over_copies(info, self.mesh) or not info.expert)

    @torch.no_grad()
    def scale_gradients(self, factor: float) -> None:
        if self.held:
            torch._foreach_mul_(self.gradients, factor)

    def step(self, learning_rate: float) -> None:
        self.optimizer.step(self.gradients, learning_rate)
        self.publish()

    # ---- the whole --------------------------------------------------------------------------------------------------

    def whole(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Parts in the order of `held` as DTensors on (tensor, replicas) or (tensor, replicate, shards), by name; a tied weight
        from its first holder."""
        return {
            held.name: self._as_global(held, tensor)
            for held, tensor in zip(self.held, tensors, strict=True)
            if held.stage == self.plan.holders[held.name][0]
        }

    def stored(self, *, all_holders: bool, weights_only: bool = False) -> dict[str, Tensor]:
        """What a checkpoint holds: weights by name, optimizer state as optim.exp_avg.<name>. Saving leaves out second
        holders."""
        found: dict[str, Tensor] = {}
        for held, moments in zip(self.held, self.optimizer.moments, strict=True):
            if all_holders or held.stage == self.plan.holders[held.name][0]:
                found[held.name] = self._as_global(held, held.master)
                if not weights_only:
                    found |= {f"optim.{m}.{held.name}": self._as_global(held, moment) for m, moment in moments.items()}
        return found

    def loaded(self, step: int) -> None:
        """After `stored` tensors have been filled from a checkpoint of `step`."""
        self._copy_to_twins()
        self.optimizer.set_step(step)
        self.publish()

    @torch.no_grad()
    def _copy_to_twins(self) -> None:
        """`stored` has room for one of the copies that this rank's stages may hold of a tied weight: the last."""
        last = {held.name: i for i, held in enumerate(self.held)}
        for i, held in enumerate(self.held):
            source = last[held.name]
            if source != i:
                held.master.copy_(self.held[source].master)
                for moment, tensor in self.optimizer.moments[i].items():
                    tensor.copy_(self.optimizer.moments[source][moment])

    def _as_global(self, held: Held, part: Tensor) -> Tensor:
        if self.mesh.devices is None:
            return part.detach()
        over_tensor = Replicate() if held.info.shard is None else Shard(held.info.shard)
        cut = self._is_cut(held.info)
        local = place(held.info, self.mesh, sharded=False).shape
        placements = (over_tensor, Shard(even_dim(local, self.mesh.shards.size)) if cut else Replicate())
        mesh = self.mesh.devices["tensor", "replicas"]
        if self.mesh.hybrid is not None:
            placements = (placements[0], Replicate(), placements[1])
            mesh = self.mesh.hybrid["tensor", "replicate", "shards"]
        if held.info.expert:
            assert self.mesh.sharers is not None
            placements = (over_tensor, Shard(1) if cut else Replicate(), Shard(0))
            mesh = self.mesh.sharers["tensor", "copies", "expert"]
        shape = torch.Size(held.info.shape)
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(part.detach(), mesh, placements, run_check=False, shape=shape, stride=strides)


def _place_in_flat(info: WeightInfo) -> int:
    """Partial gradients lie together, and those of experts that are shared out, at the end."""
    return (2 if info.partial else 3) if info.expert else (1 if info.partial else 0)


class Flat:
    """Weights that are whole on this rank, and their gradients in one float32 buffer: in front those that all replicas add up,
    then those of experts."""

    def __init__(self, held: Sequence[Held], mesh: Mesh):
        self.held, self.mesh = held, mesh
        sizes = [h.parameter.numel() for h in held]
        bounds = [sum(n for n, h in zip(sizes, held, strict=True) if _place_in_flat(h.info) < end) for end in range(5)]
        self.buffer = torch.zeros(sum(sizes), device=mesh.device)
        self.common, self.partial, self.experts = (
            self.buffer[low:high] for low, high in ((0, bounds[2]), (bounds[1], bounds[3]), (bounds[2], bounds[4]))
        )
        self.gradients = [part.view(h.parameter.shape) for part, h in zip(self.buffer.split(sizes), held, strict=True)]
        for h, gradient in zip(held, self.gradients, strict=True):
            h.parameter.register_post_accumulate_grad_hook(_adding_to(gradient))
            if h.parameter.dtype == torch.float32:
                h.parameter.grad = gradient  # the backward pass adds to it in place

    @torch.no_grad()
    def publish(self) -> None:
        pairs = [(h.parameter, h.master) for h in self.held if h.parameter.dtype != torch.float32]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])

    def sum_replicas(self) -> None:
        if self.common.numel() and self.mesh.replicas.size > 1:
            dist.all_reduce(self.common, group=self.mesh.group("replicas"))
        if self.experts.numel() and self.mesh.copies.size > 1:
            dist.all_reduce(self.experts, group=self.mesh.group("copies"))


class Shared:
    """Experts that ranks share out, under ZeRO: what computes is whole; the ranks that have the same ones reduce-scatter their
    gradients, step a part each and gather it, one weight at a time. A weight that cannot be cut evenly is summed and whole."""

    def __init__(self, held: Sequence[Held], mesh: Mesh):
        self.flat, self.mesh = Flat(held, mesh), mesh
        whole = zip(held, self.flat.gradients, strict=True)
        self.gradients = [torch.zeros_like(h.master) if over_copies(h.info, mesh) else gradient for h, gradient in whole]

    @torch.no_grad()
    def publish(self) -> None:
        for held in self.flat.held:
            if not over_copies(held.info, self.mesh):
                held.parameter.copy_(held.master)
                continue
            part = held.master.to(held.parameter.dtype)
            parts = part.new_empty(self.mesh.copies.size, *part.shape)
            dist.all_gather_into_tensor(parts.flatten(0, 1), part, group=self.mesh.group("copies"))
            _by_copy(held.parameter, self.mesh).copy_(parts)

    def sum_replicas(self) -> None:
        if self.mesh.copies.size == 1:
            return
        for held, whole, part in zip(self.flat.held, self.flat.gradients, self.gradients, strict=True):
            if over_copies(held.info, self.mesh):
                parts = _by_copy(whole, self.mesh).flatten(0, 1)
                dist.reduce_scatter_tensor(part, parts, group=self.mesh.group("copies"))
            else:
                dist.all_reduce(whole, group=self.mesh.group("copies"))


def _by_copy(x: Tensor, mesh: Mesh) -> Tensor:
    """[E, m, ...] -> [copies, E, m / copies, ...], a view: each copy's part of it."""
    return x.unflatten(1, (mesh.copies.size, -1)).movedim(1, 0)


def _made_whole(
    stage: int, module: nn.Module, path: str, info: WeightInfo, mesh: Mesh, precision: str, *, sharded: bool
) -> Held:
    """Puts a weight of this rank in the module's. One that computes in bf16, or is more than this rank steps, has its master
    beside it."""
    owner_path, _, attribute = path.rpartition(".")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    shape, stepped = (place(info, mesh, sharded=cut).shape for cut in (False, sharded))
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device=mesh.device))
    setattr(module.get_submodule(owner_path), attribute, parameter)
    apart = precision == "bf16" or stepped != shape
    master = torch.empty(stepped, device=mesh.device) if apart else parameter.data
    return Held(public_name(path), stage, info, parameter, master)


def _adding_to(gradient: Tensor):
    """Moves a bfloat16 gradient into its float32 sum as soon as it is there; a float32 one too where the sum has been taken
    away (torch's pipeline stages set the gradients of modules under FSDP2 to None when they are first run)."""

    def hook(parameter: Tensor) -> None:
        if parameter.grad is not gradient:
            gradient.add_(parameter.grad)
            parameter.grad = gradient if parameter.dtype == torch.float32 else None

    return hook


class Replicated(State):
    sharded = False

    def __init__(self, stages: Mapping[int, nn.Module], plan: Outline, parallel: Parallel, training: Training, mesh: Mesh):
        super().__init__(stages, plan, parallel, training, mesh)
        self.flat = Flat(self.held, mesh)

    def _made_real(self, stage: int, module: nn.Module) -> Iterator[Held]:
        for path, info in weights_of(module).items():
            yield _made_whole(stage, module, path, info, self.mesh, self.training.precision, sharded=False)

    def publish(self) -> None:
        self.flat.publish()

    def before_step(self) -> None:
        self.flat.buffer.zero_()

    def before_micro_batch(self, *, last: bool) -> None:
        """Nothing to prepare."""

    def _sum_partial(self) -> None:
        if self.flat.partial.numel():
            dist.all_reduce(self.flat.partial, group=self.mesh.group("tensor"))

    def _sum_replicas(self) -> None:
        self.flat.sum_replicas()

    @property
    def gradients(self) -> list[Tensor]:
        return self.flat.gradients


class Sharded(State):
    sharded = True

    def __init__(self, stages: Mapping[int, nn.Module], plan: Outline, parallel: Parallel, training: Training, mesh: Mesh):
        super().__init__(stages, plan, parallel, training, mesh)
        self._units = [unit for stage in stages.values() for unit in sharded_units(stage)]
        self.cut = [held for held in self.held if not held.info.expert]
        self.experts = Shared(self.held[len(self.cut) :], mesh)

    def _made_real(self, stage: int, module: nn.Module) -> Iterator[Held]:
        infos = weights_of(module)
        experts = {path: parameter for path, parameter in module.named_parameters() if infos[path].expert}
        wrap_sharded(module, self.parallel, self.mesh.sharing, self.training.precision, set(experts.values()))
        apart = {id(parameter) for parameter in experts.values()}
        device = self.mesh.device
        module._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta and id(x) not in apart else x)
        for path in experts:
            yield _made_whole(stage, module, path, infos[path], self.mesh, self.training.precision, sharded=True)
        for path, parameter in module.named_parameters():
            if path not in experts:
                yield Held(public_name(path), stage, infos[path], parameter, local_part(parameter.data))

    def publish(self) -> None:
        """FSDP2 gathers from the masters themselves; what an evaluation has gathered is let go."""
        self.experts.publish()
        for unit in self._units:
            unit.reshard()

    def before_step(self) -> None:
        self.experts.flat.buffer.zero_()
        for held in self.cut:
            held.parameter.grad = None

    def before_micro_batch(self, *, last: bool) -> None:
        """ZeRO 2 and 3 reduce-scatter after every micro-batch, ZeRO 1 after the last, after which 1 and 2 let go of weights and
        the copies of the shards are added up."""
        for unit in self._units:
            unit.set_is_last_backward(last)
            unit.set_requires_gradient_sync(last or self.parallel.zero > 1, recurse=False)  # sets the next one, too
            unit.set_requires_all_reduce(last, recurse=False)
            unit.set_reshard_after_backward(last or self.parallel.zero == 3, recurse=False)

    def _sum_partial(self) -> None:
        parts = [g for g, held in zip(self.gradients, self.held, strict=True) if held.info.partial]
        if not parts:
            return
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat, group=self.mesh.group("tensor"))
        torch._foreach_copy_(parts, [f.view_as(p) for f, p in zip(flat.split([p.numel() for p in parts]), parts, strict=True)])

    def _sum_replicas(self) -> None:
        """FSDP2 has done it, but for experts."""
        self.experts.sum_replicas()

    @property
    def gradients(self) -> list[Tensor]:
        for held in self.cut:
            if held.parameter.grad is None:  # no part in the loss
                held.parameter.grad = torch.zeros_like(held.parameter)
        return [local_part(h.parameter.grad) for h in self.cut if h.parameter.grad is not None] + self.experts.gradients


def make_state(stages: Mapping[int, nn.Module], plan: Outline, parallel: Parallel, training: Training, mesh: Mesh) -> State:
    """ZeRO needs ranks to divide by: over one replica it is replication."""
    kind = Sharded if parallel.zero and mesh.replicas.size > 1 else Replicated
    return kind(stages, plan, parallel, training, mesh)
