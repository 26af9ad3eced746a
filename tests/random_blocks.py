"""Random blocks out of the catalogue, as mlm text: a hypothesis strategy.

A block is a list of statements, each an operation on values that stand before it. Operands are chosen by their shapes, so that
most blocks are sound; now and then they are not, and the block has to be refused. Values stay tame: denominators are kept away
from zero, and what a block adds to its input is normalised first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hypothesis import strategies as st

WIDTHS = (16, 32, 48, 64)
HEADS = (2, 4, 8)
POINTWISE = ("gelu", "relu", "silu", "sigmoid", "tanh", "softplus", "softmax")

# What a random statement does not call, and why
LEFT_OUT = {
    "Embedding": "takes tokens",
    "Position": "takes tokens",
    "route": "part of the block Experts",
    "dispatch": "part of the block Experts",
    "GroupedLinear": "part of the block Experts",
    "combine": "part of the block Experts",
}


@dataclass(frozen=True)
class Value:
    """`heads` 0: [B, S, width]; otherwise [B, S, heads, width]."""

    name: str
    width: int
    heads: int = 0

    def like(self, width: int, heads: int = 0) -> Value:
        return Value("", width, heads)


@dataclass
class Body:
    """Statements in the making."""

    draw: st.DrawFn
    values: list[Value]
    lines: list[str] = field(default_factory=list)
    weights: list[tuple[str, int, int]] = field(default_factory=list)  # of a Linear: its name, in and out

    def one(self, *choices: object) -> object:
        return self.draw(st.sampled_from(choices))

    def pick(self, accept: Callable[[Value], bool] = lambda value: True) -> Value | None:
        """A value that stands before, newer ones rather."""
        found = [value for value in self.values if accept(value)]
        return found[-1 - self.draw(st.integers(0, min(3, len(found) - 1)))] if found else None

    def add(self, text: str, like: Value) -> Value:
        made = Value(f"v{len(self.lines)}", like.width, like.heads)
        self.lines.append(f"{made.name} = {text}")
        self.values.append(made)
        return made

    def flat(self) -> Value:
        found = self.pick(lambda value: not value.heads)
        assert found is not None  # the block's own argument
        return found

    def in_heads(self) -> Value:
        """A value in heads, made now where there is none."""
        return self.pick(lambda value: value.heads > 0) or split_heads(self)


# ---- statements -----------------------------------------------------------------------------------------------------


def pointwise(b: Body) -> Value:
    x = b.pick() or b.flat()
    return b.add(f"{b.one(*POINTWISE)}({x.name})", x)


def norm(b: Body) -> Value:
    x = b.pick() or b.flat()
    options = b.one("", ", affine = false", ", bias = false") if (kind := b.one("LayerNorm", "RMSNorm")) == "LayerNorm" else ""
    return b.add(f"{kind}({x.name}{options or b.one('', ', eps = 1e-4')})", x)


def linear(b: Body) -> Value:
    x = b.flat()
    shared = [(name, out) for name, width, out in b.weights if width == x.width]
    if shared and b.one(True, False):
        name, out = b.draw(st.sampled_from(shared))
        return b.add(f"Linear({x.name}, weight = {name}.weight)", x.like(out))
    out = b.one(*WIDTHS)
    assert isinstance(out, int)
    made = b.add(f"Linear({x.name}, out = {out}{b.one('', ', bias = false')})", x.like(out))
    b.weights.append((made.name, x.width, out))
    return made


def arithmetic(b: Body) -> Value:
    x = b.pick() or b.flat()
    y = b.pick(lambda value: (value.width, value.heads) == (x.width, x.heads)) or x
    form = b.one(
        "{} + {}",
        "{} - {}",
        "{} * sigmoid({})",
        "{} / (1.5 + sigmoid({}))",
        "{} * 0.5 + {}",
        "1.0 - {} * {}",
        "{} * exp(-1.0 * softplus({}))",
        "1 / (1.0 + exp(tanh({})))",
        "log(1.5 + sigmoid({}))",
    )
    return b.add(str(form).format(x.name, y.name), x)


def split_heads(b: Body) -> Value:
    x = b.flat()
    heads = b.one(*HEADS)
    assert isinstance(heads, int)
    return b.add(f"split_heads({x.name}, heads = {heads})", x.like(x.width // heads, heads))


def merge_heads(b: Body) -> Value:
    x = b.in_heads()
    return b.add(f"merge_heads({x.name})", x.like(x.width * x.heads))


def rotary(b: Body) -> Value:
    x = b.in_heads()
    return b.add(f"rotary({x.name}{b.one('', ', theta = 500.0', ', dim = 2', ', interleaved = true')})", x)


def attend(b: Body) -> Value:
    q = b.in_heads()
    k = b.pick(lambda value: value.heads > 0 and q.heads % value.heads == 0 and value.width == q.width) or q
    v = b.pick(lambda value: value.heads == k.heads) or k
    options = [str(b.one("causal = true", "causal = false"))]
    options += [str(b.one("scale = 0.3", "window = 5", "softcap = 20.0"))] if b.one(True, False) else []
    if b.one(True, False):
        options.append(f"bias = {b.one(f'alibi({b.flat().name}, heads = {q.heads})', relative(b, q.heads))}")
    return b.add(f"attend({q.name}, {k.name}, {v.name}, {', '.join(options)})", q.like(v.width, q.heads))


def relative(b: Body, heads: int) -> str:
    return f"RelativePosition({b.flat().name}, heads = {heads}, buckets = 8, max_distance = 12)"


def shares(b: Body) -> Value:
    """The largest of the last dim, made to add up to one."""
    x = b.pick() or b.flat()
    chosen = b.add(f"{b.one('top_k', 'BalancedTopK')}(softmax({x.name}), k = 2)", x)
    return b.add(f"{chosen.name} / sum({chosen.name}, keep = true)", x)


def parts(b: Body) -> Value:
    """Features of two values, beside each other."""
    x = b.pick() or b.flat()
    y = b.pick(lambda value: (value.width, value.heads) == (x.width, x.heads)) or x
    size = b.one(1, x.width // 2)
    assert isinstance(size, int)
    return b.add(f"concat(last({y.name}, size = {x.width - size}), first({x.name}, size = {size}))", x)


def beside(b: Body) -> Value:
    """A loss of its own on the way."""
    x, y = b.pick() or b.flat(), b.pick() or b.flat()
    return b.add(f"add_loss({x.name}, sigmoid({y.name}), factor = 0.1)", x)


def gates(b: Body) -> Value:
    """A position is kept, or not, by those before it; loads of whole sequences."""
    x = b.flat()
    kept = b.add(f"limit(top_k(softmax({x.name}), k = 2), top_k = 2, factor = 1.5)", x)
    return b.add(f"{kept.name} * load({kept.name})", x)


def shipped(b: Body) -> Value:
    x, other, heads, width = b.flat(), b.flat(), b.one(*HEADS), b.one(*WIDTHS)
    form = b.one(
        f"Attention({{x}}, heads = {heads}, causal = true, kv_heads = {b.one(2, heads)}, rope_theta = 100.0)",
        f"CrossAttention({{x}}, {other.name}, heads = {heads})",
        f"MLP({{x}}, hidden = {width})",
        f"SwiGLU({{x}}, hidden = {width})",
        f"GeGLU({{x}}, hidden = {width}, tanh = true)",
        f"Experts({{x}}, experts = 4, top_k = 2, hidden = {width}, shared = {b.one('none', 1)})",
    )
    return b.add(str(form).format(x=x.name), x)


def careless(b: Body) -> Value:
    """Operands of any shape: mostly refused."""
    x, y = b.pick() or b.flat(), b.pick() or b.flat()
    form = b.one("{} + {}", "{} * {}", "attend({}, {}, {})", "Linear({}, out = 7)", "split_heads({}, heads = 5)", "Experts({})")
    return b.add(str(form).format(x.name, y.name, x.name), x)


STATEMENTS: Mapping[Callable[[Body], Value], int] = {
    pointwise: 4,
    norm: 3,
    linear: 5,
    arithmetic: 5,
    split_heads: 2,
    merge_heads: 2,
    rotary: 2,
    attend: 3,
    shares: 1,
    parts: 2,
    beside: 1,
    gates: 1,
    shipped: 3,
}


@st.composite
def blocks(draw: st.DrawFn, *, careful: bool = True, most: int = 10) -> str:
    """A model of four passes of one random block, without the items around it."""
    b = Body(draw, [Value("x", 32)])
    makers = [maker for maker, weight in STATEMENTS.items() for _ in range(weight)] + [careless] * (not careful) * 3
    for _ in range(draw(st.integers(1, most))):
        draw(st.sampled_from(makers))(b)
    last = b.values[-1] if not b.values[-1].heads else b.add(f"merge_heads({b.values[-1].name})", _merged(b.values[-1]))
    added = draw(st.sampled_from([f"Linear(RMSNorm({last.name}), out = d)", f"MLP(LayerNorm({last.name}), hidden = 16)"]))
    body = "\n".join(f"  {line}" for line in b.lines)
    if added.startswith("MLP"):
        body += f"\n  last = Linear({last.name}, out = d)"
        added = added.replace(last.name, "last")
    return TEMPLATE.format(body=body, added=added)


def _merged(value: Value) -> Value:
    return value.like(value.width * value.heads)


TEMPLATE = """block Random(x: [B, S, d]) {{
{body}
  output x + {added}
}}

model random {{
  param layers = 4
  input tokens: int[B, S]
  h = Embedding(tokens, vocab = 64, dim = 32)
  repeat layers as blocks {{ h = Random(h) }}
  output Linear(RMSNorm(h), out = 64)
}}
"""
