"""Models that nobody foresaw: blocks with nothing in common with a transformer's but the operations.

crossed   two streams that look at each other, each gated by the other, with a third that no attention touches
mixed     softmax over features, products of streams, a matrix used twice in a block, attention over a gated layer's values
nested    repeats inside a block, one matrix in all passes, an early value added in a later repeat, two outputs
pair      an encoder whose result every pass of a decoder looks at
beside    attention and MLP side by side, with biases: partial sums and shares of biases are added up before one collective
"""

from __future__ import annotations

from mlmdsl.planner.plan import PlanVariables
from tests.parity.curve import compare, train_curve
from tests.parity.models import emitted

CROSSED = """
block Look(x: [B, S, d], other: [B, S, d], heads: int) {
  q = split_heads(Linear(RMSNorm(x), out = d, bias = false), heads = heads)
  k = split_heads(Linear(other, out = d / 2), heads = heads / 2)
  v = split_heads(Linear(other, out = d / 2, bias = false), heads = heads / 2)
  a = attend(rotary(q), rotary(k), v, causal = true, scale = 0.3)
  output Linear(merge_heads(a), out = d)
}

block Crossing(left: [B, S, d], right: [B, S, d], slow: [B, S, e]) {
  gate = sigmoid(Linear(right, out = d))
  seen = Look(left, LayerNorm(right), heads = 4)
  new_left = left + gate * seen
  new_right = right - tanh(Linear(RMSNorm(new_left), out = d)) * sigmoid(left)
  new_slow = slow * 0.5 + Linear(silu(new_right), out = e, bias = false)
  output new_left, new_right, new_slow
}

model strange {
  param layers = 4
  input tokens: int[B, S]
  left = Embedding(tokens, vocab = 64, dim = 32)
  right = Position(tokens, max = 16, dim = 32) + left
  slow = Linear(left, out = 16)
  repeat layers as blocks { left, right, slow = Crossing(left, right, slow) }
  output Linear(RMSNorm(left + right * 0.5), out = 64) + Linear(slow, out = 64, bias = false)
}
"""

MIXED = """
block Twice(x: [B, S, d]) {
  there = Linear(x, out = d, bias = false)
  back = Linear(gelu(there), weight = there.weight)
  output there * sigmoid(back)
}

block Mixing(x: [B, S, d], heads: int) {
  norm = LayerNorm(x)
  up = Linear(norm, out = 2 * d, bias = false)
  shares = softmax(split_heads(up, heads = heads))
  values = split_heads(SwiGLU(norm, hidden = 3 * d), heads = heads)
  keys = split_heads(Linear(norm, out = d), heads = heads)
  seen = attend(keys, keys, values, causal = true)
  mixed = merge_heads(shares) * relu(Linear(merge_heads(seen), out = 2 * d))
  h = x + Linear(mixed, out = d)
  output h + Twice(RMSNorm(h)) / (1.5 + sigmoid(x))
}

model strange {
  param layers = 4
  input tokens: int[B, S]
  tok = Embedding(tokens, vocab = 64, dim = 32)
  h = tok
  repeat layers as blocks { h = Mixing(h, heads = 4) }
  output Linear(LayerNorm(h), weight = tok.weight)
}
"""

NESTED = """
block Deep(x: [B, S, d], depth: int) {
  h = x
  repeat depth as inner { h = h + Linear(tanh(RMSNorm(h)), out = d) }
  output h, h - x
}

model strange {
  param layers = 3
  input tokens: int[B, S]
  tok = Embedding(tokens, vocab = 64, dim = 32)
  shared = Linear(tok, out = 32)
  h = shared
  repeat 1 as early {
    h, change = Deep(h, depth = 2)
    h = h + Attention(LayerNorm(change), heads = 4, causal = true)
  }
  first = RMSNorm(h)
  repeat layers as late {
    more, _change = Deep(h, depth = 2)
    h = more + Linear(first, weight = shared.weight) * sigmoid(_change)
  }
  output Linear(RMSNorm(h), out = 64)
}
"""

PAIR = """
block Read(x: [B, S, d], heads: int) {
  h = x + Attention(LayerNorm(x), heads = heads)
  output h + MLP(LayerNorm(h), hidden = 2 * d)
}

block Write(x: [B, S, d], memory: [B, T, d], heads: int) {
  h = x + Attention(LayerNorm(x), heads = heads, causal = true)
  c = h + CrossAttention(LayerNorm(h), memory, heads = heads)
  output c + MLP(LayerNorm(c), hidden = 2 * d)
}

model strange {
  param layers = 2
  input tokens: int[B, S]
  tok = Embedding(tokens, vocab = 64, dim = 32)
  pos = Position(tokens, max = 16, dim = 32)
  e = tok + pos
  repeat 2 as encoder { e = Read(e, heads = 4) }
  memory = LayerNorm(e)
  h = tok + pos
  repeat layers as decoder { h = Write(h, memory, heads = 4) }
  output Linear(LayerNorm(h), weight = tok.weight)
}
"""

BESIDE = """
block Beside(x: [B, S, d]) {
  n = LayerNorm(x)
  output x + Attention(n, heads = 4, causal = true) + MLP(n, hidden = 64)
}

model strange {
  param layers = 4
  input tokens: int[B, S]
  h = Embedding(tokens, vocab = 64, dim = 32)
  repeat layers as blocks { h = Beside(h) }
  output Linear(LayerNorm(h), out = 64, bias = false)
}
"""

STRANGE = {"crossed": CROSSED, "mixed": MIXED, "nested": NESTED, "pair": PAIR, "beside": BESIDE}

PLANS = (
    PlanVariables(tensor=2, pipeline=2, data=2, micro_batch=2, stages=(2, 2)),
    PlanVariables(tensor=2, sequence_parallel=True, pipeline=2, data=2, zero=3, micro_batch=2, recompute="full", stages=(3, 1)),
    PlanVariables(tensor=2, pipeline=2, data=2, zero=1, interleave=2, schedule="zb_v", micro_batch=1, stages=(1, 1, 1, 1)),
    PlanVariables(
        tensor=2,
        sequence_parallel=True,
        pipeline=2,
        data=2,
        zero=1,
        interleave=2,
        schedule="interleaved_1f1b",
        micro_batch=2,
        recompute="selective",
        stages=(1, 1, 1, 1),
    ),
)
ALONE = PlanVariables(micro_batch=8, stages=(4,))


def difference(text: str, variables: PlanVariables, *, double: bool = False) -> float:
    """The largest of losses, norms and gradients from those of one process."""
    one, many = (train_curve(emitted(text, plan), plan.world_size, double=double) for plan in (ALONE, variables))
    return compare(one, many).largest
