"""Cut a traced network in two: `lower` up to a cut, `upper` above it, with `upper(lower(x)) == module(x)`.

Both parts hold the parameters and buffers of the network itself, under their names, so training a part trains the
network; the modes (`.train()`, `.eval()`) of the parts are their own. Neither part writes into a tensor it was given
or has handed out: where the network goes on in place, it goes on with a copy.

Knows graphs and what was observed of them, not which cut is good or how features are kept.
Not covered: layers that are replaced in the network after it was cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn

from regraft.errors import CutError
from regraft.graph import Cut, Trace, find_cut
from regraft.graph.observe import Depends
from regraft.graph.rebuild import Again, Axis, Fixed, Recipe, Same, Sizes, Trait, reachable, recipes
from regraft.graph.twins import runnable


def split(trace: Trace, name: str) -> tuple[nn.Module, nn.Module]:
    """The part of the network below the cut called `name`, and the part above it.

    `lower` takes what the network takes and returns the tensor at the cut, of shape (batch, *cut.shape); `upper`
    takes that tensor and returns what the network returns, equal bit for bit, also in training from the same random
    state. Both start in the mode of the network. Raises CutError as `find_cut` does. Where the network carries height
    and width beside its tokens, `upper` is for pictures of the size of the example and raises CutError for others.

        >>> lower, upper = split(trace(network, example), "layer3")
    """
    cut = find_cut(trace, name)
    lower = _lower_graph(trace, [cut], single=True)
    upper = _upper_graph(trace, cut)
    return runnable(lower, trace.module, trace.constants), runnable(upper, trace.module, trace.constants)


def between(trace: Trace, name: str, ends: Sequence[str]) -> nn.Module:
    """The part of the network from the cut called `name` up to the deepest of `ends`, as `split` gives its parts.

    It takes the tensor at the first and returns the tensors at the ends as a tuple, in that order; the first itself may
    be among them. Raises CutError as `find_cut` does, and unless all ends lie there or above.
    """
    cut, last = find_cut(trace, name), [find_cut(trace, end) for end in ends]
    if not last or min(end.depth for end in last) < cut.depth:
        raise CutError(f"A part must end where it begins or above; {', '.join(ends)} lie not above {name}.")
    return runnable(_upper_graph(trace, cut, last), trace.module, trace.constants)


def lower_at(trace: Trace, names: Sequence[str]) -> nn.Module:
    """One module that computes the tensors at several cuts in one pass and returns them as a tuple, in that order.

    Nothing above the deepest of them is run. Raises CutError as `find_cut` does, and when `names` is empty.
    """
    if isinstance(names, str) or not names:
        raise CutError(f"lower_at needs the names of one or more cuts in a list; found {names!r}.")
    graph = _lower_graph(trace, [find_cut(trace, name) for name in names], single=False)
    return runnable(graph, trace.module, trace.constants)


def _lower_graph(trace: Trace, cuts: Sequence[Cut], *, single: bool) -> fx.Graph:
    """Everything up to the deepest cut that it needs, or that leaves a trace (random numbers, writes, checks)."""
    nodes = list(trace.graph.nodes)
    deepest = max(trace.sights[cut.node].place for cut in cuts)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    kept: dict[str, fx.Node] = {}
    wanted = {cut.node for cut in cuts}
    for node in nodes[: deepest + 1]:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        if node.name in wanted:
            later = any(place <= deepest for place in trace.sights[node.name].overwritten)
            kept[node.name] = graph.call_method("clone", (copies[node],)) if later else copies[node]
    values = [kept[cut.node] for cut in cuts]
    graph.output(values[0] if single else tuple(values))
    must_stay = {copies[n] for n in nodes[: deepest + 1] if trace.sights[n.name].effect or not n.users}
    for copy in reversed(copies.values()):
        if not copy.users and copy.op != "placeholder" and copy not in must_stay:
            graph.erase_node(copy)
    return graph


def _upper_graph(trace: Trace, cut: Cut, ends: Sequence[Cut] = ()) -> fx.Graph:
    """Everything above the cut, up to the ends where they are given; what is not carried across is made anew."""
    nodes = list(trace.graph.nodes)
    sights = trace.sights
    at = next(n for n in nodes if n.name == cut.node)
    known = recipes(nodes, sights, at)
    assert known is not None, "a place without recipes is no cut"
    writer = _Writer(at, known, copied=bool(sights[cut.node].overwritten))
    last = max((sights[end.node].place for end in ends), default=len(nodes) - 1)
    wanted = {end.node: end for end in ends}
    for node in [at] if cut.node in wanted else []:
        writer.keep(node, overwritten=any(place <= last for place in sights[node.name].overwritten))
    for node in nodes[sights[cut.node].place + 1 : last + 1]:
        once = sights[node.name].depends is Depends.CONTENT or sights[node.name].effect or node.op == "output"
        check = not node.users and not once and reachable(node, sights, at, known)
        if once or check:
            writer.copy(node)
        if node.name in wanted:
            writer.keep(node, overwritten=any(place <= last for place in sights[node.name].overwritten))
    if ends:
        writer.graph.output(tuple(writer.kept[end.node] for end in ends))  # type: ignore[misc]
    if writer.fixed:
        with writer.graph.inserting_after(writer.h):
            writer.graph.call_function(require_size, (writer.h, cut.shape, cut.name))
    return writer.graph


def require_size(h: torch.Tensor, shape: Sequence[int], name: str) -> None:
    """Refuse a tensor of another size, above a cut that holds for one picture size only; raises CutError."""
    if tuple(h.shape[1:]) != tuple(shape):
        raise CutError(
            f"Above cut {name!r} the network keeps to the picture size it was traced with, so the tensor must have "
            f"shape (batch, {', '.join(map(str, shape))}); found {tuple(h.shape)}: trace with an example of that size."
        )


class _Writer:
    """Writes the graph above a cut: `h` is the tensor it is given, `values` holds what each old node became."""

    def __init__(self, cut: fx.Node, known: dict[str, Recipe], *, copied: bool) -> None:
        self.graph = fx.Graph()
        self.known = known
        self.h = self.graph.placeholder("h")
        self.read: dict[Recipe, object] = {}
        self.fixed = False
        self.kept: dict[str, object] = {}
        self.values: dict[fx.Node, object] = {cut: self.graph.call_method("clone", (self.h,)) if copied else self.h}

    def copy(self, node: fx.Node) -> object:
        for value in node.all_input_nodes:
            self.value(value)
        self.values[node] = self.graph.node_copy(node, lambda n: self.values[n])  # type: ignore[arg-type, return-value]
        return self.values[node]

    def keep(self, node: fx.Node, *, overwritten: bool) -> None:
        """Keep the value of this old node to be returned, a copy where the network goes on to write into it."""
        value = self.value(node)
        self.kept[node.name] = self.graph.call_method("clone", (value,)) if overwritten else value  # type: ignore[arg-type]

    def value(self, node: fx.Node) -> object:
        """The value of an old node, made anew where it lies below the cut."""
        if node not in self.values:
            recipe = self.known[node.name]
            self.values[node] = self.copy(node) if isinstance(recipe, Again) else self.read_off(recipe)
        return self.values[node]

    def read_off(self, recipe: Recipe) -> object:
        if recipe not in self.read:
            self.read[recipe] = self._read_off(recipe)
        return self.read[recipe]

    def _read_off(self, recipe: Recipe) -> object:
        match recipe:
            case Same(value):
                return value
            case Fixed(value):
                self.fixed = True
                return value
            case Axis(index):
                return self.graph.call_method("size", (self.h, index))
            case Trait(name):
                return self.graph.call_function(getattr, (self.h, name))
            case Sizes(parts, shape):
                row = tuple(self.read_off(part) for part in parts)
                return self.graph.call_function(torch.Size, (row,)) if shape else row  # type: ignore[arg-type]
        raise AssertionError(recipe)
