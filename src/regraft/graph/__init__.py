"""Where a network falls in two, found in its graph of operations.

follow    module -> torch.fx graph that reads the mode (training or not) when it runs
leaves    what is kept in one piece, attempt by attempt
facts     what sizes and types are while a module is followed, for code that branches on them
kept      what a module keeps in its attributes, so that running its code can be undone
twins     modules that share tensors with the network and have a mode of their own; makes graphs runnable
observe   what each value of the graph is, from a few runs, and whether the graph does what the network does
rebuild   sizes that cross a cut, read off the tensor at the cut
layout    which axis holds the channels, and how many tokens stand in front
shown     the 10 to 25 cuts that a curve is drawn over
cuts      the sweep that finds the cuts
arithmetic how much is computed above each cut
"""

from regraft.graph.arithmetic import shares_above
from regraft.graph.cuts import Cut, Trace, find_cut, trace

__all__ = ["Cut", "Trace", "find_cut", "shares_above", "trace"]
