"""What a model can call besides blocks: the language's names for the primitive operations, with their arguments.

A capitalised call owns parameters; a lower-case one is a pure function.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from mlmdsl.frozen import frozen

Kind = Literal["int", "float", "bool", "weight", "optional float", "optional int"]
REQUIRED: Any = object()


@frozen
class Argument:
    """A named argument that is no tensor: its type, and its default (REQUIRED where there is none)."""

    name: str
    kind: Kind
    default: Any = REQUIRED


@frozen
class Signature:
    """`tensors` are the leading positional arguments, `optional` those after them that may be left out or `none`, of which
    attributes of those `noted` say whether they are there; `bias` says that a bias operation may follow (argument `bias`)."""

    op: str
    tensors: tuple[str, ...]
    arguments: tuple[Argument, ...] = ()
    optional: tuple[str, ...] = ()
    noted: tuple[str, ...] = ()
    owns: bool = False
    bias: bool = False


_STD = Argument("std", "float", 0.02)  # of the normal initialisation (GPT-2's)
_WEIGHT = Argument("weight", "weight", None)

SIGNATURES: Mapping[str, Signature] = {
    "Linear": Signature(
        "linear", ("x",), (Argument("out", "int", None), Argument("bias", "bool", None), _WEIGHT, _STD), owns=True, bias=True
    ),
    "Embedding": Signature(
        "embedding", ("tokens",), (Argument("vocab", "int", None), Argument("dim", "int", None), _WEIGHT, _STD), owns=True
    ),
    "Position": Signature("position", ("tokens",), (Argument("max", "int"), Argument("dim", "int"), _STD), owns=True),
    "LayerNorm": Signature(
        "layer_norm",
        ("x",),
        (Argument("eps", "float", 1e-5), Argument("bias", "bool", True), Argument("affine", "bool", True)),
        owns=True,
    ),
    "RMSNorm": Signature(
        "rms_norm",
        ("x",),
        (Argument("eps", "float", 1e-5), Argument("offset", "float", 0.0), Argument("affine", "bool", True)),
        owns=True,
    ),
    "gelu": Signature("gelu", ("x",), (Argument("tanh", "bool", False),)),
    "relu": Signature("relu", ("x",)),
    "silu": Signature("silu", ("x",)),
    "sigmoid": Signature("sigmoid", ("x",)),
    "tanh": Signature("tanh", ("x",)),
    "exp": Signature("exp", ("x",)),
    "log": Signature("log", ("x",)),
    "softplus": Signature("softplus", ("x",)),
    "softmax": Signature("softmax", ("x",)),
    "split_heads": Signature("split_heads", ("x",), (Argument("heads", "int"),)),
    "merge_heads": Signature("merge_heads", ("x",)),
    "rotary": Signature(
        "rotary",
        ("x",),
        (
            Argument("theta", "float", 10000.0),
            Argument("factor", "float", 1.0),
            Argument("low_freq_factor", "float", 1.0),
            Argument("high_freq_factor", "float", 4.0),
            Argument("original_max", "int", 8192),
            Argument("dim", "optional int", None),
            Argument("interleaved", "bool", False),
        ),
    ),
    "attend": Signature(
        "attend",
        ("q", "k", "v"),
        (
            Argument("causal", "bool", False),
            Argument("scale", "optional float", None),
            Argument("window", "optional int", None),
            Argument("softcap", "optional float", None),
        ),
        optional=("bias", "valid", "documents"),
        noted=("documents",),
    ),
    "RelativePosition": Signature(
        "relative_position",
        ("x",),
        (
            Argument("heads", "int"),
            Argument("buckets", "int", 32),
            Argument("max_distance", "int", 128),
            Argument("bidirectional", "bool", True),
            _WEIGHT,
            _STD,
        ),
        owns=True,
    ),
    "alibi": Signature("alibi", ("x",), (Argument("heads", "int"), Argument("bidirectional", "bool", False))),
    "top_k": Signature(
        "top_k",
        ("x",),
        (
            Argument("k", "int"),
            Argument("fill", "float", 0.0),
            Argument("groups", "int", 1),
            Argument("group_limit", "optional int", None),
            Argument("group_best", "int", 2),
        ),
        optional=("by",),
    ),
    "BalancedTopK": Signature(
        "balanced_top_k",
        ("x",),
        (
            Argument("k", "int"),
            Argument("rate", "float", 1e-3),
            Argument("groups", "int", 1),
            Argument("group_limit", "optional int", None),
            Argument("group_best", "int", 2),
        ),
        owns=True,
    ),
    "add_loss": Signature("add_loss", ("x", "loss"), (Argument("factor", "float"),)),
    "load": Signature("load", ("gates",)),
    "limit": Signature("limit", ("gates",), (Argument("top_k", "int"), Argument("factor", "float"))),
    "first": Signature("first", ("x",), (Argument("size", "int"),)),
    "last": Signature("last", ("x",), (Argument("size", "int"),)),
    "concat": Signature("concat", ("x", "y")),
    "sum": Signature("sum", ("x",), (Argument("keep", "bool", False),)),
    "route": Signature("route", ("gates",), (Argument("top_k", "int"),)),
    "dispatch": Signature("dispatch", ("x", "routing")),
    "GroupedLinear": Signature("grouped_linear", ("rows", "routing"), (Argument("out", "int"), _STD), owns=True),
    "combine": Signature("combine", ("rows", "gates", "routing")),
}

OPERATORS: Mapping[str, str] = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}
