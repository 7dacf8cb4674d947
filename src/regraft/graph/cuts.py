"""Find where a network falls in two: the cuts, places where exactly one tensor is alive.

    input --> conv --> relu --+--> conv --> bn --> add --> relu --> pool --> head --> output
                   ^       ^  |                     ^   ^       ^        ^
                  cut     cut +---------------------+  cut     cut      cut       (none inside the skip)

The network is followed once (a graph of operations), run on a few inputs to learn the shape of every value, and swept
in order of computation while the values that are still needed are counted. No family of networks is known by name.

Knows graphs and shapes, not weights, training or what a cut is good for. Not covered: networks with several inputs,
cuts through tensors of rank 1 or above 4, and tokens with the channels in front (one operation further there is a cut
of the same content in a plain layout).
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from regraft.errors import CutError
from regraft.graph.follow import Followed, follow
from regraft.graph.layout import Layout, layouts, prefix_tokens
from regraft.graph.observe import Depends, Pass, Sight, Tensor, observe
from regraft.graph.rebuild import recipes
from regraft.graph.shown import Draft, choose
from regraft.graph.twins import runnable


@dataclass(frozen=True)
class Cut:
    """A place where exactly one tensor is alive.

    `name` is the path of the outermost module whose output the tensor is, or else the path of the module in whose
    `forward` it arises and the name of the operation. `aliases` are the other modules that end at the same value;
    `path@2` is the second run of a module that runs several times. `depth` counts from 1 in order of computation.
    `shape` is for one example; `prefix_tokens` counts the class and register tokens in front of the others.
    `shown` marks the 10 to 25 cuts at the ends of blocks and stages.
    """

    name: str
    aliases: tuple[str, ...]
    depth: int
    node: str
    shape: tuple[int, ...]
    layout: Layout
    prefix_tokens: int
    shown: bool


@dataclass(frozen=True)
class Trace:
    """A network, the graph of its operations, what was observed of each value, and its cuts in order of depth.

    `ends` maps module paths to the node of the one tensor that the module returns (None: it returns several); `sights`
    and `refused` map nodes to facts and to the reason why there is no cut. The graph reads the mode (`training`) when
    it runs.
    """

    module: nn.Module
    graph: fx.Graph
    example_shape: tuple[int, ...]
    cuts: tuple[Cut, ...]
    ends: Mapping[str, str | None] = field(repr=False)
    constants: Mapping[str, object] = field(repr=False)
    sights: Mapping[str, Sight] = field(repr=False)
    refused: Mapping[str, str] = field(repr=False)


def trace(
    module: nn.Module,
    example: torch.Tensor,
    *,
    leaf_modules: Collection[type[nn.Module]] = (),
    leaf_functions: Collection[Callable[..., Any]] = (),
) -> Trace:
    """The network with all its cuts; `example` is a batch of any size, of which only shape and type matter.

    A submodule that cannot be followed is kept in one piece, and so are `leaf_modules` and `leaf_functions`. The
    module is left as it was: mode, running statistics, random state. Raises TraceError when the network refuses the
    example, cannot be followed from input to output, or gives something else when run as a graph.

        >>> trace(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()), torch.zeros(1, 2)).cuts[0].name
        '0'
    """
    followed = follow(module, example=example, leaf_modules=leaf_modules, leaf_functions=leaf_functions)
    part = runnable(followed.graph, module, followed.constants)
    sights, passes = observe(followed.graph, module, part, example)
    found, refused, joins = _sweep(followed, passes, sights)
    by_name = {node.name: node for node in followed.graph.nodes}
    ends = {path: _one_tensor([by_name[n] for n in nodes], sights) for path, nodes in followed.ends.items()}
    cuts = _cuts(followed, ends, module, passes, sights, found, refused, joins)
    shape = tuple(example.shape)
    return Trace(module, followed.graph, shape, cuts, ends, followed.constants, sights, refused)


def find_cut(trace: Trace, name: str) -> Cut:
    """The cut of that name, alias or node.

    Raises CutError, which says why there is none at that place and names the nearest ones.
    """
    by_name = {alias: cut for cut in trace.cuts for alias in (cut.name, *cut.aliases)}
    by_node = {cut.node: cut for cut in trace.cuts if f"{name}@1" not in trace.ends}
    cut = by_name.get(name) or by_node.get(name)
    if cut is not None:
        return cut
    if not trace.cuts:
        raise CutError(f"A cut must lie where one tensor is alive; {_class(trace.module)} has no such place.")
    raise CutError(_why_not(trace, name))


# ---- the sweep --------------------------------------------------------------------------------------------------


def _sweep(
    followed: Followed, passes: Sequence[Pass], sights: Mapping[str, Sight]
) -> tuple[list[fx.Node], dict[str, str], set[int]]:
    """The nodes to cut at; for the others, why not; the places after which several tensors are alive."""
    nodes = list(followed.graph.nodes)
    last_use = _last_uses(nodes, sights)
    output = {n.name for n in nodes[-1].all_input_nodes if len(n.users) == 1}
    found: list[fx.Node] = []
    refused: dict[str, str] = {}
    joins: set[int] = set()
    alive: list[fx.Node] = []
    for place, node in enumerate(nodes[:-1]):
        if sights[node.name].depends is Depends.CONTENT:
            alive.append(node)
        alive = [n for n in alive if last_use.get(n.name, -1) > place]
        if len(alive) > 1:
            joins.add(place)
        reason = _unfit(node, sights[node.name], passes) or _not_alone(node, alive, followed.scopes, output)
        if reason is None and recipes(nodes, sights, node) is None:
            reason = "what is computed above it needs sizes that cannot be read off it"
        if reason is None:
            found.append(node)
        else:
            refused[node.name] = reason
    return found, refused, joins


def _last_uses(nodes: Sequence[fx.Node], sights: Mapping[str, Sight]) -> dict[str, int]:
    """For every node, the last place that needs its content; reading a size or checking one does not count."""
    needed: set[str] = set()
    last: dict[str, int] = {}
    for place in range(len(nodes) - 1, -1, -1):
        node, sight = nodes[place], sights[nodes[place].name]
        if place == len(nodes) - 1 or sight.effect or node.name in needed:
            for value in node.all_input_nodes:
                needed.add(value.name)
                if sight.depends is Depends.CONTENT or sight.effect:
                    last.setdefault(value.name, place)
    return last


def _unfit(node: fx.Node, sight: Sight, passes: Sequence[Pass]) -> str | None:
    """Why the value itself cannot be the tensor at a cut."""
    if node.op == "placeholder":
        return "it is the input itself"
    tensors = [t for t in sight.seen if isinstance(t, Tensor)]
    if len(tensors) != len(sight.seen):
        return "it is not one tensor"
    if sight.depends is not Depends.CONTENT:
        return "it does not depend on the content of the input"
    if not all(t.dtype.is_floating_point for t in tensors):
        return f"its numbers are {tensors[0].dtype}, not real ones"
    shapes = [t.shape for t in tensors]
    if not 2 <= len(shapes[0]) <= 4 or len({len(shape) for shape in shapes}) > 1:
        return f"its rank is {len(shapes[0])}, not 2, 3 or 4"
    batches = [one.x.shape[0] for one in passes]
    if any(s[0] != batch for s, batch in zip(shapes, batches, strict=True)) or shapes[0][1:] != shapes[1][1:]:
        return "its first axis is not the batch alone"
    return None


def _not_alone(
    node: fx.Node, alive: Sequence[fx.Node], scopes: Mapping[str, str], output: Collection[str]
) -> str | None:
    if node.name in output:
        return "it is the output of the network"
    if [n.name for n in alive] == [node.name]:
        return None
    if node not in alive:
        return "nothing above it needs it"
    names = ", ".join(_label(n, scopes) for n in alive[:4])
    return f"{len(alive)} tensors are alive there ({names}{', ...' if len(alive) > 4 else ''})"


# ---- naming the cuts --------------------------------------------------------------------------------------------


def _one_tensor(nodes: Sequence[fx.Node], sights: Mapping[str, Sight]) -> str | None:
    """The one tensor in the result of a module; sizes and the like beside it do not count.

    Of a tuple that a module in one piece returns, it is the part that is taken out of it.
    """
    tuples = [node for node in nodes if isinstance(sights[node.name].seen[0], tuple)]
    taken = [user for node in tuples for user in node.users if user.target is operator.getitem]
    content = [n.name for n in [*nodes, *taken] if sights[n.name].depends is Depends.CONTENT]
    tensors = [name for name in content if isinstance(sights[name].seen[0], Tensor)]
    return tensors[0] if len(tensors) == 1 else None


def _cuts(
    followed: Followed,
    ends: Mapping[str, str | None],
    module: nn.Module,
    passes: Sequence[Pass],
    sights: Mapping[str, Sight],
    found: Sequence[fx.Node],
    refused: dict[str, str],
    joins: set[int],
) -> tuple[Cut, ...]:
    """Names, layouts and the choice of what is shown; a tensor without a layout is refused after all."""
    other = next((i for i, one in enumerate(passes) if one.varies == "size"), None)
    layout = layouts(followed.graph, module, sights, base=0, other=other)
    refused |= {n.name: "its channels are not on a usual axis" for n in found if layout[n.name] is None}
    paths = _paths(ends, module)
    drafts = [
        Draft(n, sights[n.name].place, paths.get(n.name, ()), _seen(sights, n)[0].shape[1:])
        for n in found
        if layout[n.name] is not None
    ]
    content = {name: s for name, s in followed.scopes.items() if sights[name].depends is Depends.CONTENT}
    shown = choose(drafts, nodes=list(followed.graph.nodes), module=module, scopes=content, joins=joins)
    return tuple(
        Cut(
            name=draft.paths[0] if draft.paths else _unique(_label(draft.node, followed.scopes), ends),
            aliases=draft.paths[1:],
            depth=depth,
            node=draft.node.name,
            shape=_seen(sights, draft.node)[0].shape[1:],
            layout=kind,
            prefix_tokens=_prefix(module, passes, _seen(sights, draft.node)) if kind == "tokens" else 0,
            shown=draft.node.name in shown,
        )
        for depth, draft in enumerate(drafts, start=1)
        if (kind := layout[draft.node.name]) is not None
    )


def _paths(ends: Mapping[str, str | None], module: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each node the modules that end there, the outermost first and those that do nothing last."""
    found: dict[str, list[str]] = {}
    for path, node in ends.items():
        if node is not None:
            found.setdefault(node, []).insert(0, path)

    def rank(path: str) -> tuple[bool, int]:
        return isinstance(module.get_submodule(path.split("@")[0]), nn.Identity), path.count(".")

    return {node: tuple(sorted(paths, key=rank)) for node, paths in found.items()}


def _label(node: fx.Node, scopes: Mapping[str, str]) -> str:
    """Where a value arises: the module, if a module makes it, or the module and the operation."""
    scope = scopes.get(node.name, "")
    if node.op == "call_module":
        return scope
    return f"{scope}.{node.name}" if scope else node.name


def _unique(name: str, taken: Collection[str]) -> str:
    return f"{name}()" if name in taken else name


def _seen(sights: Mapping[str, Sight], node: fx.Node) -> list[Tensor]:
    return [t for t in sights[node.name].seen if isinstance(t, Tensor)]


def _prefix(module: nn.Module, passes: Sequence[Pass], seen: Sequence[Tensor]) -> int:
    """From the evaluation runs on pictures; what the network itself states counts where it fits."""
    if passes[0].x.ndim != 4:
        return 0
    stated = getattr(module, "num_prefix_tokens", 0)
    sizes = [
        (t.shape[1], (one.x.shape[2], one.x.shape[3])) for t, one in zip(seen, passes, strict=True) if not one.train
    ]
    return prefix_tokens(sizes, stated if isinstance(stated, int) else 0)


# ---- saying why not ---------------------------------------------------------------------------------------------


def _why_not(trace: Trace, name: str) -> str:
    """One sentence: what is at that place, and the nearest cuts."""
    known = dict(trace.module.named_modules())
    calls = [path for path in trace.ends if path.split("@")[0] == name and path != name]
    node = trace.ends.get(name) or (name if name in trace.refused and not calls else None)
    if node is not None:
        reason = trace.refused.get(node, "nothing is computed there")
        return f"A cut must lie where one tensor is alive; at {name!r} {reason}: {_beside(trace, node)}."
    if calls:
        return f"Module {name!r} runs {len(calls)} times in {_class(trace.module)}: say one of {', '.join(calls)}."
    if name in trace.ends:
        return f"A cut must lie where one tensor is alive; {name!r} returns several: {_closest(trace, name)}."
    piece = next((n.target for n in trace.graph.nodes if n.op == "call_module" and name.startswith(f"{n.target}.")), "")
    if name in known and piece:
        return f"{name!r} lies inside {piece!r}, which is followed as one piece: {_closest(trace, str(piece))}."
    if name in known:
        return f"Module {name!r} is not run by {_class(trace.module)}.forward: {_closest(trace, name)}."
    return f"Cut {name!r} is not in {_class(trace.module)}: {_closest(trace, name)}."


def _beside(trace: Trace, node: str) -> str:
    place = trace.sights[node].place
    below = [c.name for c in trace.cuts if trace.sights[c.node].place < place][-1:]
    above = [c.name for c in trace.cuts if trace.sights[c.node].place > place][:1]
    return "; ".join([*(f"the nearest cut below is {n!r}" for n in below), *(f"above is {n!r}" for n in above)])


def _closest(trace: Trace, name: str) -> str:
    names = {alias: cut.name for cut in trace.cuts for alias in (cut.name, *cut.aliases)}
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    valid = near or [cut.name for cut in trace.cuts if cut.shown]
    return f"{'the nearest cuts are' if near else 'the cuts are'} {', '.join(valid)}"


def _class(module: nn.Module) -> str:
    return type(module).__name__
