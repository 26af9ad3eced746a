"""`x + a + b` is `x + (a + b)`: what branches of a block bring is added up before it meets the residual.

Two partial sums then need one collective, as in a block whose attention and MLP lie side by side (arXiv:2204.02311, section 2).
Only sums without a name, of values of one type, are regrouped; Falcon's, GPT-J's and GPT-NeoX's own programs add in this order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from mlmdsl.graph.graph import Node, Region


def regrouped(regions: Iterable[Region], kept: Iterable[str]) -> tuple[Region, ...]:
    """`kept`: paths that are named from outside the regions, the model's output among them."""
    regions = tuple(regions)
    uses = Counter(path for region in regions for node in region.nodes for path in node.inputs)
    uses.update(kept)
    uses.update(path for region in regions for c in region.carried for path in (c.initial, c.next))
    return tuple(_regrouped(region, uses) for region in regions)


def _regrouped(region: Region, uses: Counter[str]) -> Region:
    nodes = list(region.nodes)
    for outer in region.nodes:
        inner = next((node for node in nodes if outer.inputs and node.path == outer.inputs[0]), None)
        if inner is None or not _regroups(inner, outer, nodes, uses):
            continue
        first, second = inner.inputs
        at = nodes.index(outer)
        nodes[at] = replace(outer, inputs=(first, inner.path))
        nodes.insert(at, replace(inner, inputs=(second, outer.inputs[1])))
        nodes.remove(inner)
    return replace(region, nodes=tuple(nodes))


def _regroups(inner: Node, outer: Node, nodes: list[Node], uses: Counter[str]) -> bool:
    if inner.op != "add" or outer.op != "add" or outer not in nodes or inner.variable or uses[inner.path] != 1:
        return False
    here = {node.path: node for node in nodes}
    branches = [here.get(path) for path in (inner.inputs[1], outer.inputs[1])]
    alike = all(branch is not None and branch.type == outer.type for branch in branches)
    return alike and inner.type == outer.type and inner.scope == outer.scope
