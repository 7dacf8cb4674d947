"""Choose the 10 to 25 cuts that are worth showing, out of the hundred that a network may have.

Blocks are found in the graph, not by name: wherever more than one tensor is alive for a while (a residual connection,
parallel branches), the innermost repeated submodule around that stretch is a block. A stage is a submodule that holds
blocks. Shown are the ends of blocks and stages, the stem before the first block, and what comes out of pooling. Too
many blocks are thinned evenly; where there are too few, or none, other finished values fill up, spread evenly.

Knows graphs and module trees, not what a network is called or who wrote it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import fx, nn

MOST = 25
FEWEST = 10


@dataclass(frozen=True)
class Draft:
    """A cut before it is known whether it is shown.

    `paths` are the modules that end there, the outermost first; `shape` is for one example.
    """

    node: fx.Node
    place: int
    paths: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def vector(self) -> bool:
        return len(self.shape) == 1


def choose(
    drafts: Sequence[Draft], *, nodes: Sequence[fx.Node], module: nn.Module, scopes: Mapping[str, str], joins: set[int]
) -> frozenset[str]:
    """Names of the nodes to show.

    `scopes` maps the nodes that depend on the content of the input to the path of the module that made them; `joins`
    holds the places in the order of computation after which more than one tensor is alive.
    """
    ends = {path: d for d in drafts for path in d.paths}
    blocks = _blocks(drafts, ends, nodes, module, scopes, joins)
    landmarks = _stages(ends, module, blocks)
    block_ends = {ends[path].place for path in blocks}
    finished = [d for d in drafts if _finished(d, module)]
    first, last = _span(blocks, nodes, scopes, ends)
    if blocks:
        before = [d for d in finished if d.place < first] or [d for d in drafts if d.place < first]
        landmarks |= {d.place for d in before[-1:]}
    landmarks |= _after(drafts, finished, module, last)
    found = landmarks | block_ends if blocks else landmarks | {d.place for d in finished}
    if len(found) > MOST:
        found = _spread(_spread(set(), landmarks, MOST), found, MOST)
    for more in (finished, [d for d in drafts if d.paths and not _is_dropout(d, module)], drafts):
        found = _spread(found, {d.place for d in more if not _is_dropout(d, module)} | found, max(FEWEST, len(found)))
    return frozenset(d.node.name for d in drafts if d.place in found)


def _blocks(
    drafts: Sequence[Draft],
    ends: Mapping[str, Draft],
    nodes: Sequence[fx.Node],
    module: nn.Module,
    scopes: Mapping[str, str],
    joins: set[int],
) -> set[str]:
    """Paths of the submodules that hold a stretch with several tensors alive, and of their like."""
    found: set[str] = set()
    start = 0
    for draft in drafts:
        if any(place in joins for place in range(start, draft.place)):
            around = _common([scopes[n.name] for n in nodes[start + 1 : draft.place + 1] if n.name in scopes])
            holders = [path for path in _upwards(around) if path in ends and _has_children(module, path)]
            found |= set([p for p in holders if _is_repeated(module, p)][:1] or holders[:1])
        start = draft.place
    kinds = {type(module.get_submodule(p)) for p in found if _is_repeated(module, p)} - {nn.Sequential, nn.ModuleList}
    like = {p for p in ends if type(module.get_submodule(_bare(p))) in kinds and _is_repeated(module, p)}
    return found | like


def _stages(ends: Mapping[str, Draft], module: nn.Module, blocks: Collection[str]) -> set[int]:
    """Places where a submodule ends that strictly holds blocks."""
    return {d.place for path, d in ends.items() if any(block.startswith(path + ".") for block in blocks)}


def _span(
    blocks: Collection[str], nodes: Sequence[fx.Node], scopes: Mapping[str, str], ends: Mapping[str, Draft]
) -> tuple[int, int]:
    """Where the first block starts and the last one ends; (-1, -1) without blocks."""
    if not blocks:
        return -1, -1
    starts = tuple(_bare(block) + "." for block in blocks)
    inside = [i for i, n in enumerate(nodes) if (scopes.get(n.name, "") + ".").startswith(starts)]
    return min(inside, default=0), max(ends[path].place for path in blocks)


def _after(drafts: Sequence[Draft], finished: Sequence[Draft], module: nn.Module, last: int) -> set[int]:
    """After the last block: the last value before pooling, the pooled vector, the last vector."""
    maps = [d.place for d in finished if d.place > last and prod(d.shape) > max(d.shape)]
    vectors = [d.place for d in drafts if d.place > last and d.vector and not _is_dropout(d, module)]
    pooled = [] if all(d.vector for d in drafts) else vectors[:1]
    return {*maps[-1:], *pooled, *[d.place for d in finished if d.place in vectors][-1:]}


def _spread(chosen: set[int], pool: Collection[int], most: int) -> set[int]:
    """`chosen` and more of `pool`, up to `most`, each as far as possible from those already there."""
    chosen, left = set(chosen), set(pool) - set(chosen)
    while left and len(chosen) < most:
        best = max(left, key=lambda p: (min((abs(p - c) for c in chosen), default=0), p))
        chosen.add(best)
        left.discard(best)
    return chosen


def _finished(draft: Draft, module: nn.Module) -> bool:
    """A module ends here, and what follows is not merely its normalisation or activation."""
    if not draft.paths or _is_dropout(draft, module):
        return False
    return not all(_is_pointwise(user, module) for user in draft.node.users)


def _is_dropout(draft: Draft, module: nn.Module) -> bool:
    if draft.node.op != "call_module":
        return "dropout" in getattr(draft.node.target, "__name__", "")
    layer = module.get_submodule(str(draft.node.target))
    return isinstance(layer, nn.modules.dropout._DropoutNd) or "Drop" in type(layer).__name__


def _is_pointwise(node: fx.Node, module: nn.Module) -> bool:
    """A layer without matrices that keeps the shape: normalisation or activation; or such a function."""
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        home = type(layer).__module__.rsplit(".", 1)[-1]
        norm = isinstance(layer, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm))
        return norm or home.startswith("activation")
    return (
        node.op == "call_function"
        and getattr(node.target, "__module__", "") == "torch.nn.functional"
        and (
            getattr(node.target, "__name__", "") in ("relu", "gelu", "silu", "hardswish", "leaky_relu", "elu", "relu6")
        )
    )


def _bare(path: str) -> str:
    return path.split("@")[0]


def _upwards(path: str) -> list[str]:
    """The path and all that hold it, the innermost first, without the network itself."""
    names = path.split(".") if path else []
    return [".".join(names[:i]) for i in range(len(names), 0, -1)]


def _common(paths: Sequence[str]) -> str:
    """The longest path that holds all of `paths`."""
    split = [path.split(".") if path else [] for path in paths]
    same: list[str] = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        same.append(names[0])
    return ".".join(same)


def _has_children(module: nn.Module, path: str) -> bool:
    return any(True for _ in module.get_submodule(_bare(path)).children())


def _is_repeated(module: nn.Module, path: str) -> bool:
    """One of several of its kind: in a list of modules, or beside others of the same class."""
    above, _, _ = _bare(path).rpartition(".")
    this, parent = module.get_submodule(_bare(path)), module.get_submodule(above)
    if not any(True for _ in this.children()):
        return False
    listed = isinstance(parent, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) and len(parent) > 1
    return listed or sum(type(sibling) is type(this) for sibling in parent.children()) > 1
