"""From a list of computations to the body of a function: what is inlined, what variables are called, where comments stand.

A computation (`Step`) makes one value out of others and knows how to write itself as an expression. `write` inlines what a
person would inline, gives the remaining statements their variable names by live ranges (a name is reused as soon as its value
is dead, and made unique only when two live values want it), and lays the statements out.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, count
from typing import Literal

from mlmdsl.codegen.names import variable
from mlmdsl.codegen.text import INDENT, commented, remark

Key = tuple[str, str]  # a value in one placement: (path of its node, placement)
Kind = Literal["heavy", "light", "reshape", "collective", "alias", "block", "return"]

_FOLLOWERS: tuple[Kind, ...] = ("light", "reshape", "collective")
INLINE_WIDTH = 92  # of an expression with something inlined


@dataclass(frozen=True)
class Step:
    """One computation.

    kind: "heavy" and "light" operations (elementwise) and "reshape"s are expressions; "collective"s stand alone on a line with
    a comment; an "alias" is the same value under another name; a "block" writes its own lines; "return" ends the function.
    template: an expression in which `slot(i)` stands for input i. lines: of a "block", given the names of all values.
    hints: the user's names for the results; `soft` ones only name a parameter (`up = Linear(x)`).
    scope: the block calls around, as (path, block) pairs.
    condition: of the `if` that the statement stands under; "" for none."""

    kind: Kind
    inputs: tuple[Key, ...]
    results: tuple[Key, ...]
    template: str = ""
    lines: Callable[[Mapping[Key, str]], list[str]] | None = None
    hints: tuple[str, ...] = ()
    soft: bool = False
    comment: str = ""
    shape: str = ""
    scope: tuple[tuple[str, str], ...] = ()
    condition: str = ""


@dataclass(frozen=True)
class Tree:
    """A statement: a step with other steps written inside it."""

    step: Step
    inlined: tuple[tuple[int, Tree], ...] = ()

    @property
    def leaves(self) -> tuple[Key, ...]:
        inner = dict(self.inlined)
        parts = (inner[i].leaves if i in inner else (key,) for i, key in enumerate(self.step.inputs))
        return tuple(chain.from_iterable(parts))

    @property
    def heavy(self) -> bool:
        return self.step.kind == "heavy" or any(tree.heavy for _, tree in self.inlined)

    @property
    def hint(self) -> str:
        inner = [tree.hint for _, tree in self.inlined] if len(self.step.inputs) == 1 else []
        return next(filter(None, (*self.step.hints, *inner)), "")

    @property
    def named(self) -> bool:
        """Has the user given this value a name that is worth keeping?"""
        hinted = any(self.step.hints)
        return not self.step.soft if hinted else any(tree.named for _, tree in self.inlined)

    def expression(self, names: Mapping[Key, str]) -> str:
        inner = dict(self.inlined)
        given = [inner[i].expression(names) if i in inner else names[key] for i, key in enumerate(self.step.inputs)]
        return fill(self.step.template, given)

    def with_inlined(self, index: int, tree: Tree) -> Tree:
        return Tree(self.step, ((index, tree), *self.inlined))


@dataclass(frozen=True)
class Body:
    """A function's statements, one level deep, and what its values are called."""

    lines: tuple[str, ...]
    names: Mapping[Key, str]


def write(steps: Sequence[Step], given: Mapping[Key, str], indent: int = 2, shape: str = "") -> Body:
    """The body that computes `steps`; `given` names the arguments; a comment on the line before says `shape`."""
    trees = inline(gathered(steps))
    names = allocate(trees, given)
    return Body(tuple(_lines(trees, names, indent, shape)), names)


def slot(index: int) -> str:
    """What stands for input `index` in a template."""
    return f"_{index}_"


def fill(template: str, given: Sequence[str]) -> str:
    """The template with its slots filled, in parentheses where an expression would bind more loosely than its surroundings."""
    for index, start, end, argument in reversed(_slots(template)):
        text = given[index] if argument else _atom(given[index])
        template = template[:start] + text + template[end:]
    return template


def _atom(text: str) -> str:
    node = ast.parse(text, mode="eval").body
    tight = isinstance(node, ast.Name | ast.Attribute | ast.Call | ast.Subscript | ast.Constant)
    return text if tight else f"({text})"


@cache
def _slots(template: str) -> tuple[tuple[int, int, int, bool], ...]:
    """(input, start, end, stands between commas) of every slot, from left to right."""
    tree = ast.parse(template, mode="eval")
    loose: list[ast.AST] = [tree.body]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            loose += [*node.args, *(keyword.value for keyword in node.keywords)]
        elif isinstance(node, ast.Tuple | ast.List):
            loose += node.elts
    found = [
        (int(node.id[1:-1]), node.col_offset, node.end_col_offset or 0, node in loose)
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and re.fullmatch(r"_\d+_", node.id)
    ]
    return tuple(sorted(found, key=lambda item: item[1]))


def returning(results: tuple[Key, ...], condition: str = "") -> Step:
    """The end of the function, or of its part under `condition`."""
    return Step("return", results, (), ", ".join(slot(i) for i in range(len(results))), condition=condition)


# ---- inlining -------------------------------------------------------------------------------------------------------


def gathered(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Collectives, elementwise operations and reshapes stand right behind what makes their only input, where nothing else
    uses it."""
    uses = Counter(key for step in steps for key in step.inputs)
    maker = {key: step for step in steps for key in step.results}
    behind: dict[int, list[Step]] = {}
    for step in steps:
        source = maker.get(step.inputs[0]) if len(step.inputs) == 1 and step.kind in _FOLLOWERS else None
        alone = uses[step.inputs[0]] == 1 if source else False
        if source and alone and source.kind in (*_FOLLOWERS, "heavy") and source.condition == step.condition:
            behind.setdefault(id(source), []).append(step)
    moved = {id(step) for followers in behind.values() for step in followers}
    return tuple(chain.from_iterable(_chain(step, behind) for step in steps if id(step) not in moved))


def _chain(step: Step, behind: Mapping[int, Sequence[Step]]) -> Iterable[Step]:
    yield step
    for follower in behind.get(id(step), ()):
        yield from _chain(follower, behind)


def inline(steps: Sequence[Step]) -> tuple[Tree, ...]:
    """Steps that are used once, by what follows at once, move into it where a person would write them there."""
    uses = Counter(key for step in steps for key in step.inputs)
    trees: list[Tree] = []
    for step in steps:
        tree = Tree(step)
        while trees and (index := _operand(tree, trees[-1], uses)) is not None:
            tree = tree.with_inlined(index, trees.pop())
        trees.append(tree)
    return tuple(trees)


def _operand(tree: Tree, last: Tree, uses: Counter[Key]) -> int | None:
    """Which operand of `tree` the statement before it may be written as."""
    if last.step.kind not in ("heavy", "light", "reshape") or last.step.condition != tree.step.condition:
        return None
    key, taken = last.step.results[0], dict(tree.inlined)
    index = next((i for i, k in enumerate(tree.step.inputs) if k == key and i not in taken), None)
    if index is None or uses[key] != 1 or not _fits(tree, last):
        return None
    if sum(used == index for used, *_ in _slots(tree.step.template)) != 1:
        return None
    longer = tree.with_inlined(index, last)
    width = len(longer.expression({leaf: "x" for leaf in longer.leaves}))
    return index if width <= INLINE_WIDTH else None


def _fits(tree: Tree, last: Tree) -> bool:
    kind = tree.step.kind
    if kind in ("return", "alias"):
        return len(tree.step.inputs) == 1 and not last.named
    if kind not in ("heavy", "light", "reshape"):
        return False
    if last.named and kind != "reshape":
        return False
    return not (kind == "heavy" and last.heavy)


# ---- names ----------------------------------------------------------------------------------------------------------


@dataclass
class _Names:
    """Names in force while statements are visited in order."""

    names: dict[Key, str]
    last_use: Mapping[Key, int]
    live: dict[str, Key] = field(default_factory=dict[str, Key])

    def release(self, keys: Iterable[Key], index: int) -> set[str]:
        """Frees the names of values used for the last time in statement `index`; returns them."""
        dead = {key for key in keys if self.last_use.get(key, -1) <= index}
        freed = {self.names[key] for key in dead if self.live.get(self.names[key]) == key}
        for name in freed:
            del self.live[name]
        return freed

    def assign(self, key: Key, candidates: Iterable[str]) -> None:
        name = next(c for c in candidates if c not in self.live)
        self.names[key] = name
        self.live[name] = key


def allocate(trees: Sequence[Tree], given: Mapping[Key, str]) -> Mapping[Key, str]:
    """A name for every value that is not inlined."""
    last_use = {key: index for index, tree in enumerate(trees) for key in tree.leaves}
    state = _Names(dict(given), last_use, {name: key for key, name in given.items() if key in last_use})
    wishes = _foreseen(trees, last_use)
    for index, tree in enumerate(trees):
        old = [state.names[key] for key in tree.leaves]
        freed = state.release(tree.leaves, index)
        for position, key in enumerate(tree.step.results):
            state.assign(key, _candidates(wishes.get(key) or _wish(tree, position, old, freed)))
    return state.names


def _foreseen(trees: Sequence[Tree], last_use: Mapping[Key, int]) -> Mapping[Key, str]:
    """Values without a name of their own that become a variable of the user's are called so from the start."""
    wishes: dict[Key, str] = {}
    nameless = {key for tree in trees if not tree.named for key in tree.step.results}
    for index, tree in reversed(list(enumerate(trees))):
        if tree.step.kind in ("alias", "collective") and not tree.inlined and last_use[tree.step.inputs[0]] == index:
            wish = next(iter(tree.step.hints), "") or wishes.get(tree.step.results[0], "")
            if wish and tree.step.inputs[0] in nameless:
                wishes[tree.step.inputs[0]] = wish
    return wishes


def _wish(tree: Tree, position: int, old: Sequence[str], freed: Collection[str]) -> str:
    """What result number `position` would like to be called: a block's results like its inputs, a collective's result like
    a value that ends there, others as the user says."""
    hints = tree.step.hints
    if tree.step.kind == "block" and position < len(old):
        return old[position]
    if tree.step.kind == "collective" and old[0] in freed:
        return old[0]
    return hints[position] if position < len(hints) and hints[position] else tree.hint


def _candidates(hint: str) -> Iterable[str]:
    """The user's name or a plain one, then numbered."""
    base = variable(hint) if hint else "x"
    short = () if hint else ("y", "z")
    return chain((base, *short), (f"{base}{number}" for number in count(2)))


# ---- lines ----------------------------------------------------------------------------------------------------------


def _lines(trees: Sequence[Tree], names: Mapping[Key, str], indent: int, shape: str) -> Iterable[str]:
    outer = _common_scope(trees)
    condition, scope = "", outer
    for tree in trees:
        step = tree.step
        level = indent + bool(step.condition)
        text = _statement(tree, names, level, shape)
        if not text:
            continue
        if step.condition != condition and step.condition:
            yield f"{INDENT * indent}if {step.condition}:"
        if step.kind not in ("block", "alias", "return"):
            yield from _passage(step.scope[len(outer) :], scope[len(outer) :], level)
            scope = step.scope
        yield from text
        condition = step.condition
        said = text[-1].partition("  # ")[2]
        shape = step.shape if step.shape and said.startswith(step.shape) else shape


def _statement(tree: Tree, names: Mapping[Key, str], indent: int, shape: str) -> list[str]:
    """The lines of one statement; none for an alias that needs none."""
    step = tree.step
    if step.kind == "block":
        assert step.lines is not None
        return [INDENT * indent + line for line in step.lines(names)]
    if step.kind == "alias" and not tree.inlined and names[step.inputs[0]] == names[step.results[0]]:
        return []
    expression = tree.expression(names)
    new_shape = tree.inlined[0][1].step.shape if step.kind in ("return", "alias") and tree.inlined else step.shape
    code = f"return {expression}" if step.kind == "return" else f"{names[step.results[0]]} = {expression}"
    return commented(code, (new_shape if new_shape != shape else "", step.comment), indent)


def _passage(scope: tuple[tuple[str, str], ...], before: tuple[tuple[str, str], ...], indent: int) -> Iterable[str]:
    """A comment line where a block's passage begins: `# attn: Attention`, or `# MLP` where the call has no name."""
    entered = [pair for index, pair in enumerate(scope) if before[: index + 1] != scope[: index + 1]]
    for path, block in entered:
        name = path.rpartition(".")[2]
        plain = name.rstrip("_0123456789").replace("_", "") == block.lower()
        yield from remark(block if plain else f"{name}: {block}", indent)


def _common_scope(trees: Sequence[Tree]) -> tuple[tuple[str, str], ...]:
    """The block calls around every expression of the body: its docstring names them."""
    scopes = [tree.step.scope for tree in trees if tree.step.kind in ("heavy", "light", "reshape")]
    if not scopes:
        return ()
    length = 0
    while all(len(s) > length for s in scopes) and len({s[length] for s in scopes}) == 1:
        length += 1
    return scopes[0][:length]
