"""The training run: `main` is what an emitted program calls, `Trainer` one rank's part of it.

A step is: this data rank's rows of the global batch; forward and backward passes (pipeline.py); gradients added up over the
axes (state.py); norm and clipping; AdamW. Besides what the plan lists, each step has two small collectives: the count of valid
tokens over the replicas, and one vector over the world with norm, loss and memory.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import resource
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mlmdsl.diagnostics import Diagnostic, MlmError, RunError
from mlmdsl.runtime import balance, checkpoint, launch, metrics, profile
from mlmdsl.runtime import mesh as meshes
from mlmdsl.runtime.collectives import sliced
from mlmdsl.runtime.config import Parallel, Training
from mlmdsl.runtime.data import TokenDataset
from mlmdsl.runtime.functions import IGNORE
from mlmdsl.runtime.mesh import Mesh
from mlmdsl.runtime.optimizer import learning_rate
from mlmdsl.runtime.parallel import StageClass, on_meta
from mlmdsl.runtime.pipeline import Batch, LossFunction, make_engine
from mlmdsl.runtime.state import make_state, outline


class Dataset(Protocol):
    """What a trainer asks of its data: rows low to high of global batch `step`, each [rows, length]."""

    @property
    def batches(self) -> int: ...

    def batch(self, step: int, low: int, high: int) -> Batch: ...


@dataclass(frozen=True)
class StepReport:
    """Of one optimizer step, alike on every rank. `loss` in nats per valid token; memory in bytes, by rank."""

    step: int  # counted from 1
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int  # valid ones of the whole run so far
    memory_bytes: tuple[int, ...]
    balance: Mapping[str, float]  # by the names of `balance.reported`


class Trainer:
    """This rank's stages, and the step. Needs the default process group where the plan has several ranks."""

    def __init__(
        self,
        make: StageClass,
        loss: LossFunction,
        parallel: Parallel,
        training: Training,
        mesh: Mesh,
        data: Dataset,
        validation: Dataset | None = None,
        source: Path | None = None,
    ):
        """`source`: the checkpoint to go on from; None: from the beginning."""
        _check_batch(parallel, training)
        self.parallel, self.training, self.mesh = parallel, training, mesh
        self.data, self.validation = data, validation
        self.done, self.tokens = 0, 0  # optimizer steps; valid tokens
        stages = {index: on_meta(make, index, mesh) for index in parallel.stages_of(mesh.pipeline.rank)}
        self.state = make_state(stages, outline(make, parallel, mesh), parallel, training, mesh)
        self.engine = make_engine(stages, self.state, make, loss, parallel, training, mesh)
        rows = training.batch // parallel.data
        self.rows = (mesh.data.rank * rows, (mesh.data.rank + 1) * rows)
        self.tells_loss = len(parallel.stages) - 1 in stages and mesh.tensor.rank == 0
        if source is None:
            self.state.initialise()
        else:
            self.load(source)

    # ---- training ---------------------------------------------------------------------------------------------------

    def step(self) -> StepReport:
        """One optimizer step."""
        count, total = self.backward()
        norm_squared, loss, memory, balanced = self._reported(total)
        norm = norm_squared**0.5
        clip = self.training.optimizer.clip
        if clip is not None and norm > clip:
            self.state.scale_gradients(clip / norm)
        optimizer, schedule = self.training.optimizer, self.training.schedule
        rate = learning_rate(schedule, optimizer.lr, self.training.steps, self.done)
        self.state.step(rate)
        self.done, self.tokens = self.done + 1, self.tokens + count
        return StepReport(self.done, loss / max(1, count), norm, rate, self.tokens, memory, balanced)

    def backward(self) -> tuple[int, Tensor]:
        """Whole gradients of the next step's loss in `state`; its count of valid tokens, this rank's sum of losses."""
        batch = self._local(self.data.batch(self.done, *self.rows))
        count = self._counted(batch["targets"])
        self.state.before_step()
        self.mesh.tally.sums.clear()
        total = self.engine.train(batch, 1.0 / count if count else 0.0)
        self.state.synchronise()
        return count, total

    def _local(self, batch: Batch) -> Batch:
        """This rank's part of its rows: all of them, or the context axis' share of each."""
        whole = self.training.whole
        parts = {name: x if name in whole else sliced(x, self.mesh.context, 1) for name, x in batch.items()}
        return {name: x.to(self.mesh.device) for name, x in parts.items()}

    def _counted(self, targets: Tensor) -> int:
        """Valid targets of the whole batch."""
        count = (targets != IGNORE).sum()
        if self.mesh.replicas.size > 1:
            dist.all_reduce(count, group=self.mesh.group("replicas"))
        return int(count)

    def _reported(self, total: Tensor) -> tuple[float, float, tuple[int, ...], dict[str, float]]:
        """Squared norm and loss of the world, each rank's memory, and the tally: one vector in which every rank fills in its
        part."""
        share = self.mesh.tally.shares(self.mesh.tensor.rank == 0 and self.mesh.context.rank == 0)
        vector = torch.zeros(2 + self.mesh.world_size + len(share), dtype=torch.float64)
        vector[-len(share) :] = torch.tensor(share)
        vector[0] = self.state.square_norm()
        vector[1] = float(total) if self.tells_loss else 0.0
        vector[2 + self._rank] = peak_memory_bytes(self.mesh.device)
        norm_squared, loss, *others = self._summed(vector)
        memory, sums = others[: -len(share)], others[-len(share) :]
        return norm_squared, loss, tuple(int(m) for m in memory), balance.reported(sums)

    def _summed(self, vector: Tensor) -> list[float]:
        if self.mesh.world_size > 1:
            vector = vector.to(self.mesh.device)
            dist.all_reduce(vector)
        return vector.tolist()

    @property
    def _rank(self) -> int:
        return dist.get_rank() if self.mesh.world_size > 1 else 0

    # ---- validation -------------------------------------------------------------------------------------------------

    def validate(self) -> float | None:
        """Loss in nats per token over all that is held out; None where nothing is."""
        if self.validation is None or not self.validation.batches:
            return None
        sums = torch.zeros(2, dtype=torch.float64)
        for k in range(self.validation.batches):
            batch = self._local(self.validation.batch(k, *self.rows))
            loss = self.engine.evaluate(batch)
            if self.tells_loss:
                sums += torch.tensor([float(loss), float((batch["targets"] != IGNORE).sum())], dtype=torch.float64)
        loss, count = self._summed(sums)
        return loss / count if count else None

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save(self, out: Path) -> Path:
        facts = {"tokens": self.tokens, "batch": self.training.batch, "sequence": self.training.sequence}
        return checkpoint.save(out, self.done, self.state.stored(all_holders=False), facts)

    def load(self, folder: Path) -> None:
        """Weights, optimizer and position, from a checkpoint that any plan has written; weights alone where it was imported."""
        manifest = checkpoint.read_manifest(folder)
        weights_only = bool(manifest.facts.get("weights_only"))
        checkpoint.load(folder, self.state.stored(all_holders=True, weights_only=weights_only))
        self.done, self.tokens = manifest.step, int(manifest.facts.get("tokens", 0))
        self.state.loaded(self.done)


def _check_batch(parallel: Parallel, training: Training) -> None:
    """Settings may be changed in a program by hand."""
    if training.batch % (parallel.data * parallel.micro_batch):
        _fail(
            "MLM0747",
            f"a batch of {training.batch} sequences does not divide into {parallel.data} data ranks with micro-batches of"
            f" {parallel.micro_batch}",
            f"make it a multiple of {parallel.data * parallel.micro_batch}",
        )


# ---- the program ----------------------------------------------------------------------------------------------------


def main(make: StageClass, loss: LossFunction, parallel: Parallel, training: Training) -> None:
    """Runs a program: under `mlmdsl run`, torchrun, or (one rank) plain python."""
    sys.excepthook = _say
    options = _parser().parse_args()
    device = _start(parallel)
    mesh = meshes.create(parallel, device)
    _run(options, mesh, make, loss, parallel, training)
    if dist.is_initialized():
        dist.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Trains the model of this program. Start one process per rank with torchrun.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for metrics, logs and checkpoints")
    parser.add_argument("--steps", type=int, metavar="N", help="stop after step N")
    parser.add_argument(
        "--resume", nargs="?", const="", metavar="DIR", help="go on from DIR's newest whole checkpoint, or from checkpoint DIR"
    )
    parser.add_argument("--profile", action="store_true", help="record torch.profiler traces of a few steps")
    return parser


def _run(
    options: argparse.Namespace, mesh: Mesh, make: StageClass, loss: LossFunction, parallel: Parallel, training: Training
) -> None:
    out: Path = options.out
    rank = dist.get_rank() if dist.is_initialized() else 0
    source = _checkpoint_to_resume(options.resume, out)
    cache = launch.cache_dir()
    data, validation = TokenDataset(training, "train", cache), TokenDataset(training, "validation", cache)
    trainer = Trainer(make, loss, parallel, training, mesh, data, validation, source)
    steps = training.steps if options.steps is None else min(options.steps, training.steps)
    record = None
    if rank == 0:
        record = metrics.Metrics(
            out,
            training,
            mesh.world_size,
            device=mesh.device.type,
            steps=steps,
            resumed=trainer.done,
            predicted=metrics.predicted(Path(sys.argv[0]).resolve().parent),
        )
    with profile.profiler(out, rank, options.profile, max(1, steps - trainer.done)) as profiler:
        memory = _train(trainer, steps, out, record, profiler)
    if record is not None:
        record.summary(_by_stage(memory, parallel))
        record.close()


def _train(
    trainer: Trainer, steps: int, out: Path, record: metrics.Metrics | None, profiler: profile.Profiler
) -> tuple[int, ...]:
    """Goes on to step `steps`; each rank's peak memory."""
    training = trainer.training
    saved, memory = trainer.done, (0,) * trainer.mesh.world_size
    while trainer.done < steps:
        started = time.perf_counter()
        report = trainer.step()
        elapsed, memory = time.perf_counter() - started, report.memory_bytes
        validation = trainer.validate() if _due(report.step, training.validate_every, steps, first=True) else None
        if record is not None:
            record.step(
                report.step,
                loss=report.loss,
                grad_norm=report.grad_norm,
                learning_rate=report.learning_rate,
                tokens=report.tokens,
                step_time_s=elapsed,
                peak_memory_bytes=max(memory),
                validation_loss=validation,
                balance=report.balance,
            )
        if _due(report.step, training.checkpoint_every, steps, first=False) and report.step != saved:
            trainer.save(out)
            saved = report.step
        profiler.step()
    return memory


def _due(step: int, every: int | None, steps: int, *, first: bool) -> bool:
    """Every so many steps, after the last, and after the first where validation wants its starting point."""
    return step == steps or (every is not None and (step % every == 0 or (first and step == 1)))


def _by_stage(memory: Sequence[int], parallel: Parallel) -> list[int]:
    """Peak memory of the fullest rank of each pipeline stage."""
    return [max(memory[rank] for column in stage for rank in column) for stage in parallel.grid]


def peak_memory_bytes(device: torch.device) -> int:
    """What this process has taken at most: of the GPU's memory what torch's allocator has reserved, of a machine's what was
    resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024


def _checkpoint_to_resume(asked: str | None, out: Path) -> Path | None:
    """None: from the beginning. A run never writes over another's checkpoints."""
    if asked is None:
        if (found := checkpoint.latest(out)) is not None:
            _fail(
                "MLM0741",
                f"{out} holds checkpoints of an earlier run (the newest is {found.name})",
                "go on with --resume, or name another folder with --out",
            )
        return None
    return checkpoint.newest_whole(Path(asked) if asked else out)


# ---- processes ------------------------------------------------------------------------------------------------------


def _start(parallel: Parallel) -> torch.device:
    """The process group and this rank's device."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    where = launch.place_in_node()
    if where is None:
        if parallel.world_size > 1:
            _fail(
                "MLM0740",
                f"the program is for {parallel.world_size} processes, and was started as one",
                f"start it with: torchrun --nproc-per-node {parallel.world_size} {sys.argv[0]} --out DIR",
            )
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device("cpu")
    if torch.cuda.is_available() and torch.cuda.device_count() >= where.local_world_size:
        device = torch.device("cuda", where.local_rank)
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
    sys.excepthook = _say  # torch has put its own round it, which prints only when the inner one returns
    if dist.get_world_size() != parallel.world_size:
        _fail(
            "MLM0740",
            f"the program is for {parallel.world_size} processes, and was started as {dist.get_world_size()}",
            "give torchrun as many as PARALLEL has ranks (pipeline * data * context * tensor)",
        )
    return device


def _say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What is left of an error where no launcher takes it: one message, and an end at once. Other ranks find their connections
    closed, say so in their turn and end too; leaving by the ordinary way out would wait for them."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if isinstance(error, MlmError):
        if rank == 0 or not dist.is_initialized():
            for item in error.diagnostics:
                print(f"error[{item.code}]: {item.message}" + (f"\nhelp: {item.help}" if item.help else ""), file=sys.stderr)
    elif launch.LOST_PEER.search(str(error)):
        print(f"error[MLM0742]: rank {rank} lost another rank: {_cause(error)}", file=sys.stderr)
    else:
        traceback.print_exception(kind, error, trace)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.exit_status if isinstance(error, MlmError) else 4)


def _cause(error: BaseException) -> str:
    """gloo's first sentence, without the place in its source."""
    return re.sub(r"^\[[^\]]*\] ", "", str(error).splitlines()[0]).split(". ")[0]


def _fail(code: str, message: str, help: str = "") -> Any:
    raise RunError([Diagnostic(code, message, help=help)])
