"""The ledger: bytes on the fullest rank of each pipeline stage, at the moment when it holds the most (moments.py).

State is that of holdings.py. Passes: what one micro-batch leaves on a stage, times the micro-batches that the schedule holds
there; while the loss is computed, what that needs; in a layer's backward pass what recomputing brings back and what one
operation needs. torch's pipeline stages keep a receive buffer for every micro-batch, in both directions, and a stage's outputs
until their backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import mul
from typing import Literal, NamedTuple

from mlmdsl.grammar.spec import Device
from mlmdsl.planner.blend import How, first_of, regions_of, runs_of
from mlmdsl.planner.holdings import State
from mlmdsl.planner.moments import Moment, Turn
from mlmdsl.planner.passes import PassCost, Passes
from mlmdsl.planner.plan import StageMemory
from mlmdsl.planner.stages import Chain, Part

MIB = 2**20
# What a process takes before any tensor: driver context, kernels and cuBLAS workspaces on a GPU; Python with torch (resident,
# measured with torch 2.13) on a CPU. Each communicator of NCCL or RCCL adds its channels' buffers.
CONTEXT_BYTES = {"cuda": 700 * MIB, "rocm": 900 * MIB, "cpu": 320 * MIB}
COMMUNICATOR_BYTES = {"cuda": 200 * MIB, "rocm": 200 * MIB, "cpu": 2 * MIB}
# Share by which an allocator's blocks exceed what is asked for (expandable segments on a GPU; arenas of malloc on a CPU)
SLACK = {"cuda": 0.04, "rocm": 0.04, "cpu": 0.15}
# Share of the device's memory that a plan leaves free
HEADROOM = 0.05


def capacity_bytes(device: Device) -> int:
    """What a plan may use of the device."""
    return usable_bytes(device.memory_bytes)


def usable_bytes(memory_bytes: int) -> int:
    """Of a device's memory what a plan may use."""
    return int(memory_bytes * (1 - HEADROOM))


def context_bytes(kind: Literal["cuda", "rocm", "cpu"], communicators: int) -> int:
    return CONTEXT_BYTES[kind] + communicators * COMMUNICATOR_BYTES[kind]


# ---- passes ---------------------------------------------------------------------------------------------------------


Needs = tuple[int, int, int]  # bytes, as Turnovers has them


class Turnover(NamedTuple):
    """While a layer's backward pass runs, at the most: `working`, what recomputing brings back and the layers behind it have
    made for all, less what they have left; `transient`, what one operation needs."""

    working: int
    transient: int


class Turnovers(NamedTuple):
    """plain: without gradients of weights; making: with those of the layer's weights; adding: with those of one operation."""

    plain: Turnover
    making: Turnover
    adding: Turnover


class Passing(NamedTuple):
    """Bytes that one micro-batch leaves on one part, for one way of recomputing.

    kept: until its backward pass; layer: of these, what the last layer keeps; received: of a receive buffer, one direction;
    working, transient: at the most in any layer's backward pass; backward: in the course of all, further: of all but the last
    layer's; waiting: gradients of weights that are put off; loss: kept by the loss and model output; output: of these, what
    stays until the end of the backward pass; loss_transient: besides, with the gradients of the head's weights, and
    least_transient without; spare: room that the model's output leaves to nothing as small."""

    kept: int
    layer: int
    received: int
    sent: int
    working: int
    transient: int
    backward: Turnovers
    further: Turnovers
    waiting: int
    loss: int
    output: int
    loss_transient: int
    least_transient: int
    spare: int


def passing(passes: Passes, chain: Chain, part: Part, how: How, pipeline: int) -> Passing:
    costs, kinds = passes.costs, [chain.kinds[kind] for kind, count in enumerate(part.layers) if count]
    regions = regions_of(chain, part, how)
    kept = sum(count * costs[i].saved_bytes[mode] for i, mode, count in regions)
    beginning = [costs[i] for i in chain.first] if part.first else []
    layered, ending = [costs[i] for kind in kinds for i in kind], [costs[i] for i in chain.last] if part.last else []
    layers = [(_layer(costs, chain.kinds[kind], mode), count) for kind, mode, count in runs_of(part, how)]
    straight = [chain.first * part.first, *(chain.kinds[kind][1:] for kind, _, _ in runs_of(part, how)), chain.last * part.last]
    backward, further = _turnovers(layers, beginning, kept, _tied(passes, straight))
    logits = sum(cost.logits_bytes for cost in ending)
    output = logits if pipeline > 1 else 0
    loss = sum(cost.loss_bytes + cost.logits_bytes * (pipeline > 1 or cost.keeps_logits) for cost in ending)
    received, sent = map(sum, crossings(passes, chain, part))
    if not part.first:  # lies in the receive buffer
        kept -= min(received, costs[kinds[0][0]].entry_bytes[first_of(how)])
    return Passing(
        kept=kept + sent,
        layer=layers[-1][0].kept if layers else 0,
        received=received,
        sent=sent,
        working=max((costs[i].working_bytes[mode] for i, mode, _ in regions), default=0),
        transient=max([*(c.transient_bytes for c in layered), *(c.transient_bytes - kept for c in beginning)], default=0),
        backward=backward,
        further=further,
        waiting=max(0, sum(count * costs[i].waiting_bytes for i, _, count in regions) - sent),  # which lies in a receive buffer
        loss=loss,
        output=output,
        least_transient=sum(c.loss_transient_bytes for c in ending),
        loss_transient=max(
            [*(c.loss_transient_bytes for c in ending), *(c.making_bytes - (loss - output) for c in ending)], default=0
        ),
        spare=logits if pipeline == 1 and passes.float_bytes < 4 and not any(cost.keeps_logits for cost in ending) else 0,
    )


class _Layer(NamedTuple):
    """What a layer keeps, what recomputing brings back, and what one operation of its backward pass needs (as Turnovers);
    the repeat that it is a pass of, and the bytes of gradients that its passes add up."""

    kept: int
    working: int
    needed: Needs
    repeat: int
    given: int


def _layer(costs: Sequence[PassCost], regions: Sequence[int], mode: int) -> _Layer:
    each = [costs[i] for i in regions]
    needed = (max(c.transient_bytes for c in each), max(c.making_bytes for c in each), max(c.adding_bytes for c in each))
    kept, working = sum(c.saved_bytes[mode] for c in each), max(c.working_bytes[mode] for c in each)
    return _Layer(kept, working, needed, regions[0], each[0].given_bytes)


def _turnovers(
    layers: Sequence[tuple[_Layer, int]], beginning: Sequence[PassCost], kept: int, tied: Sequence[Needs]
) -> tuple[Turnovers, Turnovers]:
    """Of a stage's layers (in model order, each so many times), the last of which is the first to have its backward pass, and
    of what stands before them; and the same without the last layer. `tied`: what their weights need besides, of what stands
    before them first."""
    found: list[tuple[int, int, Needs]] = []
    freed, begun = 0, -1
    for (layer, count), more in zip(reversed(layers), reversed(tied[1:]), strict=True):
        for n in range(min(count, 2)):
            sums = layer.given * (n > 0 or layer.repeat == begun)
            found.append((layer.working + sums, freed + n * layer.kept, _sum(layer.needed, more)))
        freed, begun = freed + count * layer.kept, layer.repeat
    found += [(0, kept, _sum((c.transient_bytes, c.making_bytes, c.adding_bytes), tied[0])) for c in beginning]
    return _most(found), _most(found[1:] or [(0, freed, (0, 0, 0))])


def _tied(passes: Passes, straight: Sequence[Sequence[int]]) -> list[Needs]:
    """Of a stage's straight code but the last, what gradients take of weights that come in several places: they wait for those
    of the first place, and are added up into new ones. Those that the last code has made count elsewhere where all of a layer
    are made."""
    bytes = [{key: size for i in each for key, size in passes.straight_weights(i).items()} for each in straight]
    found: list[Needs] = []
    for place, own in enumerate(bytes[:-1]):
        later = {key for each in bytes[place + 1 : -1] for key in each}
        last, here = bytes[-1], {key: size for each in bytes[: place + 1] for key, size in each.items()}
        waiting = sum(size for key, size in here.items() if key in later)
        heads = sum(size for key, size in here.items() if key in last and key not in later)
        added = sum(size for key, size in own.items() if key in later or key in last)
        found.append((0, waiting + added, waiting + heads + added))
    return found


def _sum(one: Needs, other: Needs) -> Needs:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def _most(found: Sequence[tuple[int, int, Needs]]) -> Turnovers:
    """Of (what is brought back, what is gone, what is needed)."""
    each = ([Turnover(working - freed, needed[i]) for working, freed, needed in found] for i in range(3))
    return Turnovers(*(max(turnovers, key=sum, default=Turnover(0, 0)) for turnovers in each))


def crossings(passes: Passes, chain: Chain, part: Part) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bytes of each value that a stage is given by the one before, and hands to the next: what the next layer is given, of the
    same repeat, or after the straight code behind its last pass of the next one."""
    kinds = [chain.kinds[kind] for kind, count in enumerate(part.layers) if count]
    received = () if part.first else passes.crossings[kinds[0][0]]
    if part.last:
        return received, ()
    last = kinds[-1]
    following = last[0] if len(last) == 1 else next(kind[0] for kind in chain.kinds if kind[0] > last[-1])
    return received, passes.crossings[following]


class Held(NamedTuple):
    """Bytes on a rank besides its state."""

    activations: int
    loss: int
    buffers: int
    workspace: int
    slack: int


def _largest(each: Sequence[Turnovers]) -> Turnovers:
    return each[0] if len(each) == 1 else Turnovers(*(max(turnovers, key=sum) for turnovers in zip(*each, strict=True)))


class Filling:
    """What a rank with these virtual stages holds besides its state, at any moment."""

    def __init__(self, stages: Sequence[Passing], micro_batches: int, kind: str, turns: bool = False):
        """`turns`: the first of two stages hands its results to the second: they are the second's receive buffers."""
        self.last = stages[-1]
        self.each = [s.kept - s.sent * (turns and i == 0) for i, s in enumerate(stages)]
        self.kept = sorted(self.each, reverse=True)
        self.waiting = [s.waiting for s in stages]
        self.layer = min(s.layer for s in stages)
        unlike = list({id(s): s for s in stages}.values())
        working, transient = max([s.working for s in unlike]), max([s.transient for s in unlike])
        self.backward, self.further = _largest([s.backward for s in unlike]), _largest([s.further for s in unlike])
        self.buffers = micro_batches * sum([s.received + s.sent for s in stages])
        self.slack, self.unused = SLACK[kind], (working + transient + self.last.spare) * (kind != "cpu")

    def at(self, moment: Moment) -> Held:
        """The larger of its counts are charged to the larger stages: which of a rank's stages holds more changes in the course
        of an interleaved step."""
        turn, last = moment.turn, self.last
        counts = sorted(moment.held, reverse=True) if len(moment.held) > 1 else moment.held
        activations = sum(map(mul, self.each, moment.held) if moment.settled else map(mul, self.kept, counts))
        if moment.waiting:
            activations += sum(map(mul, self.waiting, moment.waiting))
        loss, transient = last.loss * (moment.held[len(moment.held) - 1] - moment.past), 0
        if turn == "loss":
            loss += last.least_transient if moment.apart else last.loss_transient
        elif turn in ("backward", "next"):
            each = self.backward if turn == "backward" else self.further
            turnover = each.plain if moment.apart else each.making if moment.makes else each.adding
            activations, transient = activations + turnover.working, turnover.transient
        if turn in ("gather", "backward", "layer", "next") and loss and not moment.apart:
            loss += last.output - last.loss
        if turn in ("gather", "layer"):
            activations -= self.layer
        slack = int(self.slack * (activations + loss + self.buffers + transient))
        return Held(activations, loss, self.buffers, transient, slack + self.unusable(moment))

    def unusable(self, moment: Moment) -> int:
        """What a GPU's allocator has from layers' passes and the model's output, in blocks that are smaller than the loss' (a
        CPU's gives such large ones back)."""
        return self.unused if moment.turn == "loss" else 0


def stage_memory(stage: int, turn: Turn, state: State, rest: Held, context: int) -> StageMemory:
    """The ledger's entry."""
    return StageMemory(
        stage=stage,
        moment=turn,
        weights_bytes=state.weights,
        master_weights_bytes=state.master,
        gradients_bytes=state.gradients,
        optimizer_bytes=state.optimizer,
        activations_bytes=rest.activations,
        logits_and_loss_bytes=rest.loss,
        unsharded_weights_bytes=state.unsharded,
        buffers_bytes=rest.buffers + state.buffers,
        workspace_bytes=rest.workspace + rest.slack,
        slack_bytes=rest.slack,
        context_bytes=context,
        total_bytes=sum(state) + sum(rest) + context,
    )
