"""Names in emitted text: what may be a variable, an attribute, a class, and how a user's name becomes one of them.

User identifiers are identifiers in Python too, but some mean something there already: `input = ...` would hide a builtin,
`self.half = ...` a method of nn.Module, and `class` cannot be written at all. Such names get one underscore appended.
Attributes are parts of checkpoint keys, so there the rule is reversible (`attribute`; the runtime goes the other way).
"""

from __future__ import annotations

import builtins
import keyword
import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Public attributes of torch.nn.Module in 2.11 and 2.13 (a test compares), and what emitted modules call their own.
MODULE_ATTRIBUTES = _words(
    """T_destination add_module apply bfloat16 buffers call_super_init children compile cpu cuda double dump_patches eval
    extra_repr float forward get_buffer get_extra_state get_parameter get_submodule half ipu load_state_dict modules mtia
    named_buffers named_children named_modules named_parameters parameters register_backward_hook register_buffer
    register_forward_hook register_forward_pre_hook register_full_backward_hook register_full_backward_pre_hook
    register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module register_parameter
    register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ set_extra_state set_submodule share_memory
    state_dict to to_empty train training type xpu zero_grad"""
)
OWN_ATTRIBUTES = frozenset({"tp", "cp", "ep", "tally", "first", "last", "lo", "hi", "self"})

# Everything an emitted program may refer to by a bare name: no variable and no class is called so.
PROGRAM_NAMES = _words(
    """torch F nn tally Tally tp cp ep lo hi self mesh index block values loss main Stage PARALLEL TRAINING
    AdamW Axis Data Mesh Objective Parallel Schedule Scope Tokenizer Training
    all_gather all_reduce all_reduce_both all_to_all copy_to gather reduce_scatter split
    attention cross_entropy normal ones positions recomputed recomputed_blocks rotary
    vocab_parallel_cross_entropy vocab_parallel_embedding weight zeros
    add_loss balanced_top_k combine concat dispatch grouped_linear limit load route top_k"""
)
WORDS = frozenset(keyword.kwlist) | frozenset(keyword.softkwlist) | frozenset(dir(builtins))


def attribute(name: str) -> str:
    """The attribute that holds a module or weight of this name: one underscore more where the name is taken or ends in one, two
    where it begins with one, and one before the number of a pass of a repeat inside a block."""
    if name.isdigit():
        return f"_{name}"
    if name.startswith("_"):
        return name + "__"  # Python rewrites names in a class that start with two underscores, unless they end with two
    taken = name in MODULE_ATTRIBUTES or name in OWN_ATTRIBUTES or keyword.iskeyword(name)
    return name + "_" if taken or name.endswith("_") else name


def attribute_path(name: str) -> str:
    """`attn.half.weight` -> `attn.half_.weight`."""
    return ".".join(attribute(part) for part in name.split("."))


def variable(name: str, taken: frozenset[str] = PROGRAM_NAMES) -> str:
    """A local variable's name: underscores appended while the name means something else."""
    while name in WORDS or name in taken:
        name += "_"
    return name


def class_name(name: str) -> str:
    """`dense_blocks` -> `DenseBlocks`; a name that is capitalised already stays as it is."""
    camel = name if name[:1].isupper() else "".join(part[:1].upper() + part[1:] for part in name.split("_") if part)
    return variable(camel or "Layer")


def mentions(text: str, name: str) -> bool:
    """Does this line's code refer to `name` other than as an attribute?"""
    text = text.partition("  # ")[0]
    return not text.lstrip().startswith("#") and re.search(rf"(?<![\w.]){re.escape(name)}\b", text) is not None
