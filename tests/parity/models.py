"""The models of the parity tests, as specs, and their programs under a plan that is pinned in full.

A GPT-2-like model: learned positions, biases, LayerNorm, a head tied to the embedding. A Llama-like one: RMSNorm, rotary
positions, grouped heads, SwiGLU, a head of its own. Both small enough for eight ranks on two cores, and divisible by four.
Beside them the shipped architectures made small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from mlmdsl.compile import compile_spec
from mlmdsl.planner.plan import PlanVariables

SPECS = Path(__file__).resolve().parents[2] / "specs" / "models"
VOCAB, SEQUENCE, BATCH = 64, 16, 8

GPT = """
block GPTBlock(x: [B, S, d], heads: int) {
  h = x + Attention(LayerNorm(x), heads = heads, causal = true)
  output h + MLP(LayerNorm(h), hidden = 2 * d)
}

model gpt {
  param d = 32
  param layers = 4
  input tokens: int[B, S]
  tok = Embedding(tokens, vocab = 64, dim = d)
  h = tok + Position(tokens, max = 16, dim = d)
  repeat layers as blocks { h = GPTBlock(h, heads = 4) }
  output Linear(LayerNorm(h), weight = tok.weight)
}
"""

LLAMA = """
block LlamaBlock(x: [B, S, d], heads: int, kv_heads: int) {
  attn = Attention(RMSNorm(x), heads = heads, kv_heads = kv_heads, causal = true, bias = false, rope_theta = 10_000.0)
  h = x + attn
  output h + SwiGLU(RMSNorm(h), hidden = 2 * d)
}

model llama {
  param d = 32
  param layers = 4
  input tokens: int[B, S]
  h = Embedding(tokens, vocab = 64, dim = d)
  repeat layers as blocks { h = LlamaBlock(h, heads = 8, kv_heads = 4) }
  output Linear(RMSNorm(h), out = 64, bias = false)
}
"""

SETTINGS = """
cluster here {
  nodes = 1
  devices_per_node = 8
  device = cpu(memory = 2 GiB, fp32 = 50 GFLOPS)
  intra = loopback(bandwidth = 1 GB/s per gpu, latency = 500 us)
}

train {
  data = text("unused.txt")
  tokenizer = bytes()
  objective = next_token()
  seq_len = 16 tok
  batch = 8 seq
  stop = 8 steps
  optimizer = adamw(lr = 0.3, betas = (0.9, 0.95), weight_decay = 0.1, clip = 1.0)
  schedule = cosine(warmup = 2 steps, min_lr = 0.01)
  precision = fp32
}
"""

# Experts with capacities and every kind of balance
LIMITED = """
block Sparse(x: [B, S, d]) {
  h = x + Attention(RMSNorm(x), heads = 4, causal = true, rope_theta = 10_000.0)
  moe = Experts(
    RMSNorm(h),
    experts = 4,
    top_k = 2,
    hidden = d,
    bias_rate = 0.05,
    balance_loss = 0.5,
    z_loss = 0.1,
    capacity = 0.75,
  )
  output h + moe
}

model limited {
  param d = 32
  param layers = 4
  input tokens: int[B, S]
  h = Embedding(tokens, vocab = 64, dim = d)
  repeat layers as blocks { h = Sparse(h) }
  output Linear(RMSNorm(h), out = 64, bias = false)
}
"""

MODELS = {"gpt": GPT, "llama": LLAMA}
OTHERS = {"limited": LIMITED}


# ---- shipped architectures -------------------------------------------------------------------------------------------

_COMMON = {"d": 32, "layers": 4, "vocab": 64}

# family -> (spec, its params made small)
FAMILIES: dict[str, tuple[str, Mapping[str, float]]] = {
    "gpt2": ("gpt2_124m", {"heads": 4}),
    "llama2": ("llama2_70b", {"heads": 8, "kv_heads": 4, "ff": 64}),
    # at 32 features rounding in the gradients of its norms grows to 1e-5 within five steps, micro-batches alone to 5e-6
    "olmo2": ("olmo2_7b", {"d": 64, "heads": 8, "ff": 128}),
    "pythia": ("pythia_6p9b", {"heads": 4}),
    "mixtral": ("mixtral_8x7b", {"heads": 8, "kv_heads": 4, "ff": 32, "experts": 4}),
    "deepseek_v3": (
        "deepseek_v3",
        {"heads": 4, "query_rank": 16, "kv_rank": 16, "head_dim": 8, "rope_dim": 4, "ff": 32, "expert_ff": 16}
        | {"dense": 1, "experts": 8, "top_k": 2, "groups": 4, "group_limit": 2, "bias_rate": 0.05},
    ),
    "qwen3_moe": (
        "qwen3_30b_a3b",
        {"heads": 4, "kv_heads": 4, "head_dim": 16, "ff": 16, "experts": 8, "top_k": 3},
    ),
    "qwen3": ("qwen3_8b", {"heads": 4, "kv_heads": 4, "head_dim": 16, "ff": 64}),
    "llama3p2": ("llama3p2_1b", {"heads": 8, "kv_heads": 4, "head_dim": 4, "ff": 64}),
    "mistral": ("mistral_7b", {"heads": 8, "kv_heads": 4, "head_dim": 4, "ff": 64, "window": 5}),
    "gemma": ("gemma_2b", {"heads": 8, "head_dim": 8, "ff": 64}),
    "gemma2": ("gemma2_2b", {"d": 64, "heads": 8, "head_dim": 8, "ff": 128, "window": 5}),
    "falcon": ("falcon_7b", {"heads": 8}),
    "mpt": ("mpt_7b", {"heads": 4}),
    "bloom": ("bloom_7b", {"heads": 4}),
    "olmo": ("olmo_7b", {"heads": 4, "ff": 64}),
    "qwen2": ("qwen2p5_7b", {"heads": 8, "ff": 64}),
    "phi3": ("phi3_mini", {"heads": 8, "kv_heads": 8, "ff": 64}),
    "bert": ("bert_base", {"heads": 4}),
    "t5": ("t5_base", {"heads": 4, "head_dim": 4, "ff": 64}),
    "t5_v1p1": ("t5_v1p1_base", {"heads": 4, "head_dim": 16, "ff": 64}),
}
# what they learn, where it is not the next token, and over how many repeats their layers are spread
_SPANS = "span_corruption(target_len = 12 tok)"
OBJECTIVES = {"bert": "masked_token()", "t5": _SPANS, "t5_v1p1": _SPANS}
STACKS = {"t5": 2, "t5_v1p1": 2}


def small_model(family: str) -> str:
    """The spec's blocks and model with other values of its params, without the count that it expects."""
    name, sizes = FAMILIES[family]
    text = (SPECS / f"{name}.mlm").read_text(encoding="utf-8")
    text = text[: text.index("cluster ")].replace(f"model {name} ", f"model {family} ")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("expect ")]
    for key, value in (_COMMON | sizes).items():
        found = [i for i, line in enumerate(lines) if line.startswith(f"  param {key} = ")]
        assert len(found) == 1, (family, key)
        lines[found[0]] = f"  param {key} = {value}"
    return "\n".join(lines) + "\n"


# ---- programs -------------------------------------------------------------------------------------------------------


def program_text(model: str, variables: PlanVariables) -> str:
    """The emitted program with every variable of the plan pinned; as many layers as its stages say."""
    layers = f"{model}.layers={sum(variables.stages) // STACKS.get(model, 1)}"
    objective = f"train.objective={OBJECTIVES.get(model, 'next_token()')}"
    return emitted((MODELS | OTHERS).get(model) or small_model(model), variables, layers, objective)


def emitted(text: str, variables: PlanVariables, *overrides: str) -> str:
    """The program of a model's text, every variable pinned."""
    devices = f"cluster.devices_per_node={variables.world_size}"
    pins = [f"{name}={_written(value)}" for name, value in asdict(variables).items()]
    done = compile_spec(text + SETTINGS, path="/specs/model.mlm", overrides=(*overrides, devices), pins=pins)
    assert done.plan is not None and done.program is not None
    assert done.plan.plan == variables
    return done.program.text


def _written(value: object) -> str:
    """As in the language."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
