"""Restricted Boltzmann machines, stacked greedily: each layer learns the pictures' distribution, then feeds the next.

Hinton, Osindero and Teh 2006, trained by persistent contrastive divergence (Tieleman 2008), as scikit-learn's
BernoulliRBM is. The gradient of the difference of free energies is the update rule. For dense layers with sigmoids.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from regraft.errors import TrainingError
from regraft.methods.encoder import Encoder, in_order
from regraft.methods.method import Batch, Method, Panel, Part, Task
from regraft.training import Plan

BATCH = 64
RATE = 0.05
SHOWN = 8


class Machine(nn.Module):
    """A restricted Boltzmann machine on a dense layer. chain: its persistent particles, (particles, hidden), 0 or 1."""

    chain: torch.Tensor

    def __init__(self, layer: nn.Linear, particles: int) -> None:
        super().__init__()
        self.layer = layer
        self.visible = nn.Parameter(torch.zeros(layer.in_features))
        self.register_buffer("chain", torch.zeros(particles, layer.out_features))
        nn.init.normal_(layer.weight, std=0.01)  # Hinton's practical guide, 2012
        nn.init.zeros_(layer.bias)

    def up(self, v: torch.Tensor) -> torch.Tensor:
        """Probabilities of the hidden units, (n, hidden)."""
        return torch.sigmoid(self.layer(v))

    def down(self, h: torch.Tensor) -> torch.Tensor:
        """Probabilities of the visible units, (n, visible)."""
        return torch.sigmoid(h @ self.layer.weight + self.visible)

    def free_energy(self, v: torch.Tensor) -> torch.Tensor:
        """Free energy (n,): minus the logarithm of the probability of v, up to a constant."""
        return -(v @ self.visible) - F.softplus(self.layer(v)).sum(1)

    def contrast(self, v: torch.Tensor) -> torch.Tensor:
        """The difference of free energies of the pictures and of particles after one more step of Gibbs sampling."""
        with torch.no_grad():
            dreamt = torch.bernoulli(self.down(self.chain))
            self.chain = torch.bernoulli(self.up(dreamt))
        return self.free_energy(v).mean() - self.free_energy(dreamt).mean()


def pseudo_likelihood(machine: Machine, v: torch.Tensor) -> torch.Tensor:
    """A stochastic estimate of the log-likelihood (n,), from one flipped unit each, as scikit-learn's `score_samples`.

    v: (n, visible) in [0, 1].
    """
    n, visible = v.shape
    flipped = v.clone()
    at = (torch.arange(n, device=v.device), torch.randint(0, visible, (n,), device=v.device))
    flipped[at] = 1 - flipped[at]
    return visible * F.logsigmoid(machine.free_energy(flipped) - machine.free_energy(v))


def rbm(encoder: Encoder, task: Task) -> Method:
    """Train the dense layers one after another, each on the probabilities that those below it give."""
    layers = _dense_layers(encoder.module)
    machines = nn.ModuleList(Machine(layer, BATCH) for layer in layers)
    parts = tuple(Part(f"layer{i + 1}", machine, opens=i / len(machines)) for i, machine in enumerate(machines))

    def seen_by(level: int, x: torch.Tensor) -> torch.Tensor:
        v = x.flatten(1)
        with torch.no_grad():
            for machine in machines[:level]:
                v = machine.up(v)  # type: ignore[operator]
        return v

    def loss(batch: Batch) -> torch.Tensor:
        level = min(int(batch.done * len(machines) + 1e-9), len(machines) - 1)
        value: torch.Tensor = machines[level].contrast(seen_by(level, batch.pictures))  # type: ignore[operator]
        return value

    def show(batch: Batch) -> list[Panel]:
        x = batch.pictures[:SHOWN]
        down = seen_by(len(machines), x)
        for machine in reversed(machines):
            down = machine.down(down)  # type: ignore[operator]
        fit = float(pseudo_likelihood(machines[0], batch.pictures.flatten(1)).mean())  # type: ignore[arg-type]
        title = (
            "the picture, and what the highest layer says of it, sent down again "
            f"(pseudo-log-likelihood of the first layer: {fit:.1f})"
        )
        strongest = layers[0].weight.norm(dim=1).topk(min(SHOWN, layers[0].out_features)).indices
        filters = layers[0].weight[strongest]
        low, high = filters.amin(1, keepdim=True), filters.amax(1, keepdim=True)
        filters = ((filters - low) / (high - low).clamp(min=1e-9)).view(-1, *x.shape[1:])
        return [
            Panel(title, tuple(zip(x, down.view_as(x), strict=True))),
            Panel("what the strongest units of the first layer look for", (tuple(filters),)),
        ]

    plan = Plan(0, RATE, warmup=0.0, weight_decay=1e-4, clipping=None, rule="sgd")
    return Method(parts, loss, show, batch=BATCH, plan=plan)


def _dense_layers(network: nn.Module) -> list[nn.Linear]:
    """The layers of a stack of dense layers with sigmoids. Raises TrainingError for another network."""
    leaves = [m for m in in_order(network) if not isinstance(m, nn.Flatten | nn.Identity)]
    dense = [m for m in leaves[::2] if isinstance(m, nn.Linear)]
    if not dense or len(leaves) != 2 * len(dense) or not all(isinstance(m, nn.Sigmoid) for m in leaves[1::2]):
        raise TrainingError(
            "The method rbm must have dense layers, each with a sigmoid, and nothing else: pass --arch dense-500-250."
        )
    return dense
