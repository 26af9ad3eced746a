"""From a measured run to its prediction: the model as a spec, the plan as a candidate, and how its framework executes both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from mlmdsl.compile import compile_spec
from mlmdsl.diagnostics import MlmError
from mlmdsl.planner.bench import Bench, Setting
from mlmdsl.planner.candidate import Candidate, Times
from mlmdsl.planner.execution import Execution
from mlmdsl.planner.passes import MODES
from mlmdsl.planner.plan import Schedule
from mlmdsl.planner.pricing import Place
from mlmdsl.planner.schedule import executable
from mlmdsl.planner.sharding import Infeasible
from mlmdsl.validation.footprint import footprint
from mlmdsl.validation.runs import Problem, Run

# One direction of one device inside its node, where the table is silent: NVLink's generations as datasheets have them
_INTRA = {"V100": 150, "A100": 300, "A800": 200, "H100": 450, "H800": 200, "H200": 450, "B200": 900, "GB200": 900}
_PCIE = ("PCIE", "L40S", "RTX")
_INTER_GBPS = {"V100": 100, "A100": 200, "H100": 400, "H200": 400, "B200": 400, "GB200": 400, "MI300X": 400}


@dataclass(frozen=True)
class Prediction:
    seconds: float
    peak_bytes: int
    times: Times


def predict(run: Run) -> Prediction:
    """Raises Problem where the run's model or plan is none that the planner knows."""
    place, candidate = placed(run)
    times = place.times(candidate)
    return Prediction(times.total, footprint(run, place, candidate), times)


def placed(run: Run) -> tuple[Place, Candidate]:
    """The run's plan over its model."""
    if run.world_size > run.nodes * run.gpus_per_node:
        raise Problem(f"the plan wants {run.world_size} devices, and there are {run.nodes * run.gpus_per_node}")
    if run.global_batch % (run.data * run.micro_batch):
        raise Problem(f"a batch of {run.global_batch} is not divided by data x micro-batch, {run.data} x {run.micro_batch}")
    bench = _bench(spec_text(run), execution_of(run), run.tensor, run.sequence_parallel and run.tensor > 1)
    along = bench.over_context(run.context)
    if isinstance(along, Infeasible):
        raise Problem(along.message)
    place = Place(along.over_experts(run.expert), run.pipeline, run.data)
    if run.recompute not in MODES:
        raise Problem(f"recompute is {run.recompute!r}, not one of {', '.join(MODES)}")
    mode, micro_batches = MODES.index(run.recompute), run.global_batch // (run.data * run.micro_batch)
    schedule = _schedule(run, micro_batches)
    zero = run.zero if place.replicas > 1 else 0
    candidate = Candidate(
        run.tensor,
        bench.sharding.sequence_parallel,
        run.pipeline,
        run.data,
        run.micro_batch,
        schedule,
        _interleave(run),
        mode,
        1 if zero == 2 else zero,
        place.given(_even(run), schedule),
        run.context,
        run.expert,
    )
    return place, candidate


@cache
def _setting(text: str, execution: Execution) -> Setting:
    try:
        done = compile_spec(text, path="run.mlm", until="graph")
    except MlmError as problem:
        raise Problem("; ".join(each.message for each in problem.diagnostics)) from None
    assert done.spec is not None and done.graph is not None
    return Setting(done.spec, done.graph, execution)


@cache
def _bench(text: str, execution: Execution, tensor: int, sequence_parallel: bool) -> Bench:
    found = _setting(text, execution).shard(tensor, sequence_parallel)
    if isinstance(found, Infeasible):
        raise Problem(found.message)
    return found


def _interleave(run: Run) -> int:
    """Virtual stages of a rank that have a layer each: Llama 3's first and last stage have none (arXiv:2407.21783, section
    3.3.2)."""
    if run.pipeline > run.layers:
        raise Problem(f"{run.layers} layers cannot make {run.pipeline} stages")
    return min(run.interleave, run.layers // run.pipeline)


def _even(run: Run) -> tuple[int, ...]:
    """Layers per virtual stage: as many each, the first ones more where that does not divide."""
    stages = run.pipeline * _interleave(run)
    each, more = divmod(run.layers, stages)
    return tuple(each + (stage < more) for stage in range(stages))


def _schedule(run: Run, micro_batches: int) -> Schedule:
    named: Schedule | None = next((s for s in ("gpipe", "1f1b", "zb_v", "dualpipe_v") if s == run.schedule), None)
    if named is not None:
        return named
    if _interleave(run) > 1 and run.pipeline > 1:
        return "interleaved_1f1b"
    return "1f1b" if executable("1f1b", run.pipeline, micro_batches) else "gpipe"


# ---- how frameworks execute -----------------------------------------------------------------------------------------


def _megatron(run: Run) -> Execution:
    """Gradients in the training precision where that is fp16 (they are summed in fp32 beside bf16), added up by the last
    backward pass and then reduced; apex's fused Adam over fp32 masters with gradients copied, unscaled and clipped first:
    60 bytes an element (megatron/optimizer/optimizer.py, Float16OptimizerWithFloat16Params)."""
    half = run.precision == "fp16"
    separate = (half and (run.year or 2024) < 2022) or "deepspeed" in run.framework.lower()
    return Execution(
        dropout=run.arch == "gpt",
        gradient_bytes=2.0 if half else 4.0,
        accumulated_bytes=8.0 if separate else 2.0,
        early_stop=False,
        optimizer_bytes=60.0 if half else None,
        scattered_sends=True,
        gathers_wait=True,
        sums_wait=True,
        fused_gates=True,
        fused_rotary=True,
        fused_products=True,
        shards_sums=False,
        static_buffers=False,
        probabilities=True,
        selective="attention",
        launch_seconds=_MEGATRON_LAUNCH,
    )


# A layer as Megatron-LM writes it (copies of a joint product's parts, baddbmm into an empty buffer, forked generators of
# dropout), of tensors of next to nothing, on a core of a 2.8 GHz Xeon: 0.86 ms forward for what is 17 calls here, 2.26 ms with
# the backward pass for 46
_MEGATRON_LAUNCH = 50e-6


def _nemo(run: Run) -> Execution:
    """Megatron-LM with its collectives behind kernels, as NeMo's recipes have it."""
    return replace(_megatron(run), gathers_wait=False, sums_wait=False)


def _attention_speed(run: Run) -> float:
    """Flash attention's generations, the device's curves being the best for it: the second (July 2023) is twice as fast as the
    first (arXiv:2307.08691); on Hopper it reaches 335 TFLOP/s where kernels made for it, which Transformer Engine takes, reach
    540 to 640 (arXiv:2407.08608)."""
    year, name = run.year or 2024, run.framework.lower()
    engine = "nemo" in name or ("megatron" in name and run.precision == "fp8")
    first = 0.5 if year <= 2023 and not engine else 1.0
    hopper = 0.6 if run.gpu.startswith(("H100", "H200", "H800")) and year <= 2024 and not engine else 1.0
    return first * hopper


def _torchtitan(run: Run) -> Execution:
    """Its selective recomputation runs every second product again (parallelize_llama.py); norms and rotary positions are simple
    operations unless compiled; loss_parallel shifts the logits of its vocabulary in a copy."""
    copies = int(run.tensor > 1)
    return Execution(selective="alternate", composed=not run.compiled, loss_copies=copies, probabilities=True)


def _internevo(run: Run) -> Execution:
    return Execution(gradient_bytes=2.0, gathers_wait=True, fused_rotary=True, fused_products=True, probabilities=True)


# By a word of the framework's name, lower case
_FRAMEWORKS: tuple[tuple[str, Callable[[Run], Execution]], ...] = (
    ("nemo", _nemo),
    ("megatron", _megatron),
    ("megascale", _nemo),
    ("torchtitan", _torchtitan),
    ("foundry", lambda run: Execution(fused_products=True)),
    ("internevo", _internevo),
)


def execution_of(run: Run) -> Execution:
    made = next((make for word, make in _FRAMEWORKS if word in run.framework.lower()), None)
    common = made(run) if made else Execution()
    unfused = run.attention == "unfused"
    return replace(
        common,
        attention_speed=_attention_speed(run),
        attention="unfused" if unfused else "flash",
        compiled=run.compiled,
        fp8=run.precision == "fp8",
        products=run.precision if run.precision in ("tf32", "fp16") else None,
    )


# ---- the spec -------------------------------------------------------------------------------------------------------


def spec_text(run: Run) -> str:
    """The run's model and cluster in the language; its plan is left out."""
    return f"""block Layer(x: [B, S, d]) {{
  h = x + {_attention(run)}
  output h + {_mlp(run)}
}}
model m {{
  input tokens: int[B, S]
  tok = Embedding(tokens, vocab = {_padded(run)}, dim = {run.hidden})
  h = tok{f" + Position(tokens, max = {run.sequence}, dim = {run.hidden})" if run.arch == "gpt" else ""}
  repeat {run.layers} as blocks {{ h = Layer(h) }}
  output Linear({_norm(run, "h")}, {"weight = tok.weight" if run.tied_embeddings else f"out = {_padded(run)}, bias = false"})
}}
{_cluster(run)}
train {{
  data = text("x")
  objective = next_token()
  seq_len = {run.sequence} tok
  batch = {run.global_batch} seq
  stop = 1 steps
  optimizer = adamw(lr = 1e-3)
  precision = {"fp32" if run.precision in ("fp32", "tf32") else "bf16"}
}}
"""


def _padded(run: Run) -> int:
    """A vocabulary is padded to 128 x tensor (megatron/tokenizer), so that it divides."""
    multiple = 128 * run.tensor
    return -(-run.vocab // multiple) * multiple if run.vocab % run.tensor else run.vocab


def _norm(run: Run, value: str) -> str:
    return f"LayerNorm({value})" if run.arch == "gpt" else f"RMSNorm({value})"


def _attention(run: Run) -> str:
    settings = [f"heads = {run.heads}", "causal = true"]
    if run.kv_heads != run.heads:
        settings.append(f"kv_heads = {run.kv_heads}")
    if run.arch != "gpt":
        settings += ["bias = false", "rope_theta = 10_000"]
    return f"Attention({_norm(run, 'x')}, {', '.join(settings)})"


def _mlp(run: Run) -> str:
    value = _norm(run, "h")
    if run.experts:
        hidden = run.moe_ffn or run.ffn
        return f"Experts({value}, experts = {run.experts}, top_k = {run.experts_per_token}, hidden = {hidden})"
    if run.gated_mlp:
        return f"SwiGLU({value}, hidden = {run.ffn})"
    return f"MLP({value}, hidden = {run.ffn}{'' if run.arch == 'gpt' else ', bias = false'})"


def _cluster(run: Run) -> str:
    name = run.gpu.replace("-", "_")
    family = next((part for part in ("GB200", *_INTRA, "MI300X") if name.startswith(part)), "")
    if any(word in name for word in _PCIE):
        intra = "pcie(bandwidth = 25 GB/s per gpu)"
    elif family == "MI300X":
        intra = "infinity_fabric(bandwidth = 350 GB/s per gpu)"
    else:
        intra = f"nvlink(bandwidth = {_INTRA.get(family, 300)} GB/s per gpu)"
    speed = run.inter_bytes_per_second or _INTER_GBPS.get(family, 200) * 1e9 / 8
    inter = f"\n  inter = infiniband(bandwidth = {speed * 8 / 1e9:g} Gb/s per gpu, latency = 5 us)" if run.nodes > 1 else ""
    return f"""cluster c {{
  nodes = {run.nodes}
  devices_per_node = {run.gpus_per_node}
  device = {name}
  intra = {intra}{inter}
}}"""
