"""What the tests of this room emit from: small specs, plans, and graphs that stretch the cutting of stages."""

from __future__ import annotations

from collections.abc import Sequence

from mlmdsl.diagnostics import Diagnostics, Span
from mlmdsl.grammar import syntax
from mlmdsl.grammar.resolve import resolve
from mlmdsl.grammar.spec import (
    Cluster,
    Data,
    Device,
    LearningRateSchedule,
    Link,
    ModelSource,
    Objective,
    Optimizer,
    PlanConstraints,
    Pool,
    Spec,
    Tokenizer,
    Train,
)
from mlmdsl.graph.build import build
from mlmdsl.graph.graph import Carried, Graph, Node, Region, Scalar
from mlmdsl.graph.tensor import Dim, Init, TensorType, Weight
from mlmdsl.planner.plan import (
    ClusterFacts,
    ModelFacts,
    Plan,
    PlanVariables,
    Predicted,
    RegionLayout,
    SearchReport,
)

HERE = Span("tiny.mlm", 1, 1, 1, 2)
NORMAL, ZEROS, ONES = Init("normal", 0.02), Init("zeros"), Init("ones")
TOKENS = TensorType("int", ("B", "S"))


def spec(
    *,
    path: str = "/specs/tiny.mlm",
    model: str = "tiny",
    patterns: tuple[str, ...] = ("/data/*.txt",),
    field: str | None = None,
    tokenizer: str | None = None,
    sources: dict[str, str] | None = None,
) -> Spec:
    """A spec with nothing but settings: the graph is given separately."""
    device = Device(
        name="cpu",
        kind="cpu",
        memory_bytes=2**31,
        memory_bytes_per_second=2e10,
        peak_flops_per_second={"fp32": 5e10},
        launch_seconds=1e-6,
        power_watts=65,
    )
    link = Link(kind="loopback", bytes_per_second=1e9, latency_seconds=1e-4)
    source = syntax.Model(model, None, (), (), span=HERE, name_span=HERE)
    train = Train(
        data=Data(kind="jsonl" if field else "text", paths=patterns, field=field),
        tokenizer=Tokenizer(kind="hf" if tokenizer else "bytes", path=tokenizer),
        objective=Objective(kind="next_token"),
        seq_len=64,
        batch=32,
        steps=200,
        optimizer=Optimizer(kind="adamw", lr=3e-4),
        schedule=LearningRateSchedule(kind="cosine", warmup_steps=20, min_lr=3e-5),
        precision="fp32",
        spans={},
    )
    return Spec(
        path=path,
        folder="/specs",
        sources=sources or {path: "# tiny\n"},
        sha256="0" * 64,
        overrides=(),
        model=ModelSource(model=source, values={}, blocks={}, names={}),
        cluster=Cluster(
            name="laptop",
            pools=(Pool(name="", nodes=1, devices_per_node=8, device=device, intra=link),),
            inter=None,
            span=HERE,
        ),
        train=train,
        plan=PlanConstraints(),
    )


def plan(
    graph: Graph,
    variables: PlanVariables,
    layout: Sequence[RegionLayout] = (),
    *,
    model: str | None = None,
    cluster: str = "laptop",
) -> Plan:
    """A plan with made-up predictions around `variables` and `layout`."""
    return Plan(
        spec_sha256="0" * 64,
        plan=variables,
        predicted=Predicted(
            step_time_s=0.213,
            tokens_per_s_per_device=9615.0,
            model_tflops_per_device=0.0123,
            mfu=0.246,
            bubble_fraction=0.1,
            peak_memory_bytes=tuple(2**28 + i * 2**20 for i in range(variables.pipeline)),
            train_days=0.1,
            cost_usd=None,
            energy_kwh=0.1,
            breakdown_s={},
        ),
        model=ModelFacts(
            name=graph.model if model is None else model,
            parameters=graph.parameters,
            parameters_active=graph.parameters,
            flops_per_token=4.9e6,
        ),
        cluster=ClusterFacts(
            name=cluster,
            device="cpu",
            device_memory_bytes=2**31,
            peak_flops_per_second=5e10,
            nodes=1,
            devices_per_node=8,
            world_size=8,
            links={},
        ),
        search=SearchReport(candidates=1, feasible=1, seconds=0.0, rejected=()),
        alternatives=(),
        seq_len=64,
        batch=32,
        precision="fp32",
        memory=(),
        layout=tuple(layout),
        collectives=(),
    )


class Builder:
    """Puts a graph together node by node."""

    def __init__(self) -> None:
        self.weights: dict[str, Weight] = {}
        self.regions: list[Region] = []
        self._nodes: list[Node] = []

    def weight(self, region: str, name: str, shape: tuple[int, ...], init: Init = NORMAL) -> str:
        made = Weight(region, name, shape, init, decay=len(shape) > 1)
        self.weights[made.key] = made
        return made.key

    def node(
        self,
        path: str,
        op: str,
        inputs: Sequence[str] = (),
        shape: tuple[Dim, ...] = ("B", "S", 64),
        *,
        weights: Sequence[str] = (),
        variable: str = "",
        type: TensorType | None = None,
        **attributes: Scalar,
    ) -> str:
        kind = type or TensorType("float", shape)
        settings = tuple(sorted(attributes.items()))
        self._nodes.append(Node(path, op, tuple(inputs), kind, settings, tuple(weights), variable=variable))
        return path

    def region(self, name: str = "", count: int = 1, carried: Sequence[Carried] = ()) -> None:
        self.regions.append(Region(name, count, tuple(self._nodes), tuple(carried)))
        self._nodes = []

    def graph(self, model: str, output: str, loss: str) -> Graph:
        return Graph(model, tuple(self.regions), self.weights, ("tokens", "targets"), output, loss)


def two_stacks(encoder: int = 4, decoder: int = 6) -> Graph:
    """Two repeats with straight code between, two carried values, a skip from the first to the last operation, a captured
    value, a weight of straight code used on every pass, weights used in two places, and an unpleasant name."""
    b = Builder()
    tok = b.weight("", "tok.weight", (256, 64))
    shared = b.weight("", "shared.weight", (64, 64))
    b.node("tokens", "input", type=TOKENS, variable="tokens")
    b.node("targets", "input", type=TOKENS, variable="targets")
    b.node("tok", "embedding", ["tokens"], weights=[tok], variable="tok")
    b.node("skip", "linear", ["tok"], weights=[shared], variable="skip")
    b.region()
    a = b.weight("encoder", "a.weight", (64, 64))
    b.node("encoder.h", "carry", variable="h")
    b.node("encoder.a", "linear", ["encoder.h"], weights=[a])
    b.node("encoder.h_2", "add", ["encoder.h", "encoder.a"], variable="h")
    b.region("encoder", encoder, [Carried("h", "encoder.h", "tok", "encoder.h_2")])
    bridge, bias = b.weight("", "bridge.weight", (64, 64)), b.weight("", "bridge.bias", (64,), ZEROS)
    b.node("bridge", "linear", ["encoder.h_2"], weights=[bridge])
    b.node("bridge.bias", "bias", ["bridge"], weights=[bias], variable="memory")
    b.node("y", "embedding", ["tokens"], weights=[tok], variable="y")
    b.region()
    half = b.weight("decoder", "half.weight", (64, 64))
    b.node("decoder.y", "carry", variable="y")
    b.node("decoder.z", "carry", variable="z")
    b.node("decoder.half", "linear", ["decoder.y"], weights=[half], variable="half")
    b.node("decoder.shared", "linear", ["bridge.bias"], weights=[shared])
    b.node("decoder.y_2", "add", ["decoder.half", "decoder.shared"], variable="y")
    b.node("decoder.z_2", "add", ["decoder.z", "decoder.y_2"], variable="z")
    both = [Carried("y", "decoder.y", "y", "decoder.y_2"), Carried("z", "decoder.z", "y", "decoder.z_2")]
    b.region("decoder", decoder, both)
    b.node("sum", "add", ["decoder.y_2", "decoder.z_2"])
    b.node("sum_2", "add", ["sum", "skip"])
    b.node("head", "linear", ["sum_2"], weights=[bridge])
    b.node("logits", "linear", ["head"], ("B", "S", 256), weights=[tok])
    b.node("cross_entropy", "cross_entropy", ["logits", "targets"], type=TensorType("fp32", ()))
    b.region()
    return b.graph("two_stacks", "logits", "cross_entropy")


TINY_GPT = """\
block GPTBlock(x: [B, S, d], heads: int) {
  h = x + Attention(LayerNorm(x), heads = heads, causal = true)
  output h + MLP(LayerNorm(h), hidden = 4 * d)
}

model tiny_gpt {
  param d = 64
  param layers = 4
  input tokens: int[B, S]
  tok = Embedding(tokens, vocab = 256, dim = d)
  h = tok + Position(tokens, max = 64, dim = d)
  repeat layers as blocks { h = GPTBlock(h, heads = 4) }
  output Linear(LayerNorm(h), weight = tok.weight)
}
"""

TINY_LLAMA = """\
block LlamaBlock(x: [B, S, d], heads: int, kv_heads: int, hidden: int) {
  attn_norm = RMSNorm(x, eps = 1e-5)
  attn = Attention(attn_norm, heads = heads, kv_heads = kv_heads, causal = true, bias = false, rope_theta = 500_000.0)
  h = x + attn
  mlp_norm = RMSNorm(h, eps = 1e-5)
  mlp = SwiGLU(mlp_norm, hidden = hidden)
  output h + mlp
}

model tiny_llama {
  param d = 64
  param layers = 5
  input tokens: int[B, S]
  h = Embedding(tokens, vocab = 256, dim = d)
  repeat layers as blocks { h = LlamaBlock(h, heads = 4, kv_heads = 2, hidden = 192) }
  norm = RMSNorm(h, eps = 1e-5)
  output Linear(norm, out = 256, bias = false)
}
"""

UNPLEASANT = """\
block Stage(x: [B, S, d]) {
  self = Linear(x, out = d)
  half = Linear(gelu(self), out = d)
  tp = half * 0.5
  weight = tp + x
  torch = RMSNorm(weight, eps = 1e-5)
  output torch
}
block Mesh(x: [B, S, d]) {
  forward = Linear(x, out = d)
  type = Linear(forward, out = d)
  output x + type
}
model unpleasant {
  param d = 64
  input lambda: int[B, S]
  F = Embedding(lambda, vocab = 256, dim = d)
  nn = F + Position(lambda, max = 64, dim = d)
  repeat 2 as main { nn = Stage(nn) }
  repeat 2 as stage { nn = Stage(nn) }
  repeat 3 as eval { nn = Mesh(nn) }
  last = LayerNorm(nn)
  output Linear(last, weight = F.weight)
}
"""

SETTINGS = """
cluster laptop {
  nodes = 1
  devices_per_node = 8
  device = cpu(memory = 2 GiB, fp32 = 50 GFLOPS)
  intra = loopback(bandwidth = 1 GB/s per gpu, latency = 100 us)
}

train {
  data = text("corpus/*.txt")
  tokenizer = bytes()
  objective = next_token()
  seq_len = 64 tok
  batch = 32 seq
  stop = 200 steps
  optimizer = adamw(lr = 3e-4, betas = (0.9, 0.95), weight_decay = 0.1, clip = 1.0)
  schedule = cosine(warmup = 20 steps, min_lr = 3e-5)
  precision = fp32
}
"""


def graph_of(model: str) -> Graph:
    """The graph of a model's text."""
    found = Diagnostics()
    source = resolve("/specs/tiny.mlm", model + SETTINGS, found).model
    built = build(source, found) if source else None
    assert built is not None and not found.items, found.items
    return built
