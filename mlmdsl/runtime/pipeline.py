"""Forward and backward passes of one step: micro-batch by micro-batch in one process, or through a pipeline of stages.

Both engines are given this data rank's rows of the global batch (a tensor for each input that the model reads, by name, and the
"targets") and return the sum of the losses (zero on ranks that do not hold the last stage). `train` leaves gradients of `scale`
times the loss, summed over the rows; the caller chooses scale as 1 / (valid tokens of the whole step), so that micro-batches
and ranks with unequal counts weigh as they should.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining._backward import stage_backward
from torch.distributed.pipelining.schedules import _ComputationType

from mlmdsl.runtime.config import Parallel, Training
from mlmdsl.runtime.mesh import Mesh
from mlmdsl.runtime.parallel import StageClass, on_meta
from mlmdsl.runtime.state import State

LossFunction = Callable[[Any, Tensor, Mesh], Tensor]
Batch = Mapping[str, Tensor]  # inputs by name, and "targets": rows first

_SINGLE = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
_SEVERAL = {  # virtual stages on each rank
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zb_v": ScheduleZBVZeroBubble,
    "dualpipe_v": ScheduleDualPipeV,
}
_ENGINE: Any = (
    torch.autograd.Variable._execution_engine
)  # `torch.autograd.grad` of torch 2.11 asks nodes for what some have not
_SPLITTING = ("zb_v", "dualpipe_v")  # take backward passes apart


class Engine(Protocol):
    def train(self, batch: Batch, scale: float) -> Tensor:
        """Gradients of scale * loss; the unscaled sum of losses."""
        ...

    def evaluate(self, batch: Batch) -> Tensor:
        """The sum of losses, without gradients."""
        ...


def make_engine(
    stages: Mapping[int, nn.Module],
    state: State,
    make: StageClass,
    loss: LossFunction,
    parallel: Parallel,
    training: Training,
    mesh: Mesh,
) -> Engine:
    if parallel.pipeline == 1:
        return Accumulated(stages[0], state, loss, parallel, training, mesh)
    return Pipelined(stages, make, loss, parallel, training, mesh)


class Accumulated:
    """No pipeline: one micro-batch after another."""

    def __init__(self, module: nn.Module, state: State, loss: LossFunction, parallel: Parallel, training: Training, mesh: Mesh):
        self.module, self.state, self.loss, self.mesh, self.micro_batch = module, state, loss, mesh, parallel.micro_batch
        self.names = (*training.inputs, "targets")

    def _split(self, batch: Batch) -> list[tuple[Tensor, ...]]:
        return list(zip(*(batch[name].split(self.micro_batch) for name in self.names), strict=True))

    def train(self, batch: Batch, scale: float) -> Tensor:
        parts = self._split(batch)
        total = torch.zeros((), device=batch["targets"].device)
        for i, (*inputs, expected) in enumerate(parts):
            self.state.before_micro_batch(last=i == len(parts) - 1)
            value = self.loss(self.module(*inputs), expected, self.mesh)
            total += value.detach()
            (value * scale).backward()
        return total

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        total = torch.zeros((), device=batch["targets"].device)
        for *inputs, expected in self._split(batch):
            total += self.loss(self.module(*inputs), expected, self.mesh)
        return total


class Pipelined:
    """torch.distributed.pipelining's schedules over this rank's virtual stages.

    Shapes between stages are found beforehand on the meta device: asking the neighbours (torch's way when it is not told) costs
    messages, and does not work under a fake process group."""

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        make: StageClass,
        loss: LossFunction,
        parallel: Parallel,
        training: Training,
        mesh: Mesh,
    ):
        self.loss, self.mesh = loss, mesh
        self.first, self.last = 0 in stages, len(parallel.stages) - 1 in stages
        self.positional, self.keywords = placed_inputs(next(iter(stages.values())), training)
        self.scale = 0.0
        values = boundaries(make, parallel, training, mesh)
        wrapped = [
            _Stage(
                module,
                index,
                len(parallel.stages),
                mesh.device,
                input_args=values[index],
                output_args=values[index + 1],
                group=mesh.group("pipeline"),
            )
            for index, module in stages.items()
        ]
        for stage in wrapped:
            stage.scatters = parallel.zero == 2
        micro_batches = training.batch // parallel.data // parallel.micro_batch
        held: Any = wrapped if parallel.schedule in _SEVERAL else wrapped[0]
        kind = (_SEVERAL | _SINGLE)[parallel.schedule]
        if parallel.schedule in _SPLITTING:
            for module in stages.values():
                module.register_forward_hook(_own_outputs)
        self.schedule = kind(held, n_microbatches=micro_batches, loss_fn=self._scaled, scale_grads=False)
        if parallel.schedule in _SEVERAL:
            _gather_once(self.schedule.pipeline_order_with_comms)

    def _scaled(self, output: Any, targets: Tensor) -> Tensor:
        return self.loss(output, targets, self.mesh) * self.scale

    def train(self, batch: Batch, scale: float) -> Tensor:
        self.scale = scale
        total = self._run(self.schedule.step, batch)
        return total / scale if scale else total

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        self.scale = 1.0
        return self._run(self.schedule.eval, batch)

    def _run(self, step: Callable[..., Any], batch: Batch) -> Tensor:
        """return_outputs=False: otherwise the last stage keeps the logits of every micro-batch."""
        inputs = (
            tuple(batch[name].contiguous() for name in self.positional) if self.first else ()
        )  # torch 2.11 asks for strides
        keywords = {argument: batch[name] for argument, name in self.keywords.items()}
        losses: list[Tensor] | None = [] if self.last else None
        step(*inputs, target=batch["targets"] if self.last else None, losses=losses, return_outputs=False, **keywords)
        return (
            torch.stack([loss.detach() for loss in losses]).sum() if losses else torch.zeros((), device=batch["targets"].device)
        )


class _Stage(PipelineStage):
    """torch's, mended where stages lie in a V: in an evaluation nothing is handed back between two stages of one rank (torch
    asserts that gradients are there), gradients of weights that were put off are our own work (`_weights_backward`) and are
    added up (torch calls no hooks of theirs), neighbours are not greeted beforehand (torch 2.11 does so in an order that hangs
    on gloo), and gradients of inputs, which have been handed on, are not kept beside the receive buffers. `scatters` (ZeRO 2):
    every backward pass reduce-scatters its gradients, where torch's stages add them up whole and do so once."""

    scatters = False

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[Tensor | None, ...], list[dict[str, Any]] | None]:
        if not self.scatters or not isinstance(self.submod, FSDPModule):
            if backward_type != "weight":
                return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
            _weights_backward(bwd_kwargs["param_groups"])
            self._add_up()
            return (), None
        assert backward_type == "full", "no schedule with ZeRO 2 takes backward passes apart"
        self.submod.set_is_last_backward(False)
        self.submod.set_reshard_after_backward(False)
        self.submod.set_requires_gradient_sync(True)
        self.submod.set_requires_all_reduce(last_backward)
        return stage_backward(bwd_kwargs["stage_output"], bwd_kwargs["output_grads"], bwd_kwargs["input_values"]), None

    def _add_up(self) -> None:
        """Gradients of weights that this pass has made, to their sums."""
        for parameter in self.submod.parameters():
            if parameter.grad is not None:
                for hook in (parameter._post_accumulate_grad_hooks or {}).values():
                    hook(parameter)

    def get_local_bwd_output(self, mb_index: int) -> tuple[Tensor | None, ...]:
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **keywords: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, *arguments, **keywords)
        for value in self.backward_state.get(bwd_chunk_id, ((),))[0]:
            if isinstance(value, Tensor):
                value.grad = None

    def _get_init_p2p_neighbors_ops(self) -> list[Any]:
        return []


def _weights_backward(groups: Iterable[dict[str, Any]]) -> None:
    """Gradients of weights that were put off, from what came to the nodes where ways to weights and to inputs meet. Where a
    weight has several of them, one may stand before another: what that one hands on came to it already. (torch's own, of
    2.11, counts it twice and takes a node's results for one, which 2.13 has mended.)"""
    for group in groups:
        saved = [each for each in zip(group.pop("intermediates"), group.pop("grads", ()), strict=False) if each[1] is not None]
        begun = [(GradientEdge(node, i), grad) for node, grads in saved for i, grad in enumerate(grads) if grad is not None]
        if not begun:
            continue
        handles = [node.register_prehook(lambda _, grads=grads: grads) for node, grads in saved]
        try:
            weights = tuple(group["params"])
            ends = tuple(GradientEdge(weight, 0) for weight in weights)
            edges, grads = zip(*begun, strict=True)
            made = torch.autograd.grad(edges, ends, grads)
        finally:
            for handle in handles:
                handle.remove()
        for weight, grad in zip(weights, made, strict=True):
            parameter: Tensor = weight.variable
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)


def _gather_once(order: dict[int, list[Any]]) -> None:
    """Weights that ZeRO shares out stay gathered from a stage's first pass until its gradients are reduced. torch keeps three
    stages of a rank gathered, the next that it runs, and gathers the others again and again."""
    for rank, actions in order.items():
        kept: list[Any] = []
        gathered: set[int] = set()
        for action in actions:
            kind, stage = action.computation_type, action.stage_index
            if kind == _ComputationType.RESHARD or (kind == _ComputationType.UNSHARD and stage in gathered):
                continue
            kept.append(action)
            if kind == _ComputationType.UNSHARD:
                gathered.add(stage)
            elif kind == _ComputationType.REDUCE_GRAD:
                kept.append(type(action)(stage, _ComputationType.RESHARD, None))
        order[rank] = kept


def _own_outputs(_module: nn.Module, _arguments: Any, output: Any) -> Any:
    """Outputs that are views are copied: torch detaches a stage's outputs in place, and views refuse that."""
    if isinstance(output, tuple):
        return tuple(x.clone() if x._is_view() else x for x in output)
    return output.clone() if output._is_view() else output


def placed_inputs(module: nn.Module, training: Training) -> tuple[tuple[str, ...], dict[str, str]]:
    """Names of the inputs that the first stage is given in order; those that every stage is given besides what the stage before
    it returns, by its argument. The only input of a model may have any name there."""
    parameters = inspect.signature(module.forward).parameters.values()
    arguments = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    only = training.inputs[0] if len(training.inputs) == 1 else None
    keywords = {argument: only or argument for argument in arguments}
    return tuple(name for name in training.inputs if name not in keywords.values()), keywords


def boundaries(make: StageClass, parallel: Parallel, training: Training, mesh: Mesh) -> list[tuple[Tensor, ...]]:
    """Meta tensors that stand before each virtual stage, and after the last. torch takes a value's need of a gradient from
    them, too."""
    inputs = {name: _empty(name, parallel, training) for name in training.inputs}
    positional, keywords = placed_inputs(on_meta(make, 0, mesh), training)
    # a first stage that is given everything by keyword has no positional arguments
    values: list[tuple[Tensor, ...]] = [tuple(inputs[name] for name in positional)]
    for index in range(len(parallel.stages)):
        module = on_meta(make, index, mesh)
        if training.precision == "bf16":
            module = module.to(torch.bfloat16)
        given: Sequence[Tensor] = values[-1]
        with torch.no_grad():
            output = module(*given, **{argument: inputs[name] for argument, name in keywords.items()})
        made = output if isinstance(output, tuple) else (output,)
        values.append(tuple(torch.empty_like(x, requires_grad=x.is_floating_point()) for x in made))
    return values


def _empty(name: str, parallel: Parallel, training: Training) -> Tensor:
    """A micro-batch of an input on the meta device."""
    length = training.objective.length(name, training.sequence) // (1 if name in training.whole else parallel.context)
    return torch.empty(parallel.micro_batch, length, dtype=torch.int64, device="meta")
