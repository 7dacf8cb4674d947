"""The one training loop: batches, a loss, and stages that open at their epochs.

What is trained when is a pure function of the epoch, and the learning rate one of the step; the parameters of all
stages are in the optimizer from the start. So a run that is resumed at an epoch goes on bit for bit as if it had never
stopped. Knows parameters, losses and epochs; nothing of pictures, cuts or candidates.
Not covered: several devices.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn

from regraft.errors import TrainingError
from regraft.files import digest_json, write_atomic
from regraft.nn import Clipping, clip_gradients

KEPT_CHECKPOINTS = 2
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Stage:
    """Parameters that begin to train together.

    rate: their share of the learning rate; opens: the epoch from which they train, 0 for the first.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    rate: float = 1.0
    opens: int = 0


@dataclass(frozen=True)
class Plan:
    """How long and how fast.

    lr: highest learning rate of a stage of rate 1; warmup: share of all steps over which a stage's rate rises; it falls
    along a cosine to 0 at the last step, or stays where it is not to fall. weight_decay: of weights of two and more
    axes. rule: AdamW (Loshchilov and Hutter 2019), or plain gradient descent; betas: of AdamW.
    """

    epochs: int
    lr: float
    warmup: float = 0.1
    weight_decay: float = 0.05
    clipping: Clipping | None = Clipping("norm", 1.0)
    falls: bool = True
    rule: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class Checkpoints:
    """Where the state is kept after every epoch, and of what: a module and the facts that make it this very training.

    state: the module whose tensors are saved; facts: JSON values that must be the same to go on.
    """

    folder: Path
    state: nn.Module
    facts: dict[str, Any]


class Diverged(TrainingError):
    """The loss was not finite; the step was not applied."""

    def __init__(self, epoch: int, step: int) -> None:
        super().__init__(f"The loss must be finite; it is not in epoch {epoch}, batch {step}: lower the learning rate.")
        self.epoch = epoch
        self.step = step


class Halted(Exception):
    """Training was told to stop."""


def train(
    stages: Sequence[Stage],
    plan: Plan,
    batches: Callable[[int], Iterable[Batch]],
    steps: int,
    loss: Callable[[Batch], torch.Tensor],
    *,
    seed: int | None = None,
    after: Callable[[int], bool] = lambda epoch: False,
    checkpoints: Checkpoints | None = None,
    halt: Callable[[], bool] = lambda: False,
) -> list[float]:
    """Train, and return the mean loss of every epoch.

    batches: the batches of an epoch, `steps` of them; loss: a scalar with gradients; after: called at the end of every
    epoch, True stops early. seed: of torch's own generator, set anew for every epoch, where the loss draws from it (not
    for trainings side by side, which share it). checkpoints: the newest sound one of the same facts is gone on from.
    Raises Diverged where a loss is not finite, Halted soon after `halt` says so.
    """
    optimizer = _optimizer(stages, plan)
    losses, begun = _resumed(optimizer, checkpoints) if checkpoints else ([], 0)
    if begun and after(begun - 1):
        return losses
    for epoch in range(begun, plan.epochs):
        open_stages(stages, epoch)
        total = 0.0
        with _seeded(seed, epoch):
            for step, batch in enumerate(batches(epoch)):
                if halt():
                    raise Halted
                _set_rates(optimizer, stages, plan, epoch * steps + step, steps)
                optimizer.zero_grad(set_to_none=True)
                value = loss(batch)
                if not bool(torch.isfinite(value)):
                    raise Diverged(epoch, step)
                value.backward()  # type: ignore[no-untyped-call]
                if not _stepped(optimizer, stages, plan):
                    raise Diverged(epoch, step)
                total += float(value.detach())
        losses.append(total / max(1, steps))
        if checkpoints:
            _save(optimizer, checkpoints, losses)
        if after(epoch):
            break
    return losses


def open_stages(stages: Sequence[Stage], epoch: int) -> None:
    """Let those parameters have gradients whose stage is open in this epoch, and no others."""
    for stage in stages:
        for parameter in stage.parameters:
            parameter.requires_grad_(epoch >= stage.opens)
            if epoch < stage.opens:
                parameter.grad = None


def rate_at(step: int, steps: int, plan: Plan, stage: Stage) -> float:
    """The learning rate of a stage at a step counted from the start; `steps` make an epoch."""
    total, opened = plan.epochs * steps, stage.opens * steps
    if step < opened:
        return 0.0
    rising = min(1.0, (step - opened + 1) / (plan.warmup * total + 1))
    falling = 0.5 * (1 + math.cos(math.pi * step / total)) if plan.falls else 1.0
    return plan.lr * stage.rate * rising * falling


def shuffled(rows: np.ndarray, size: int, *, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """Rows int64 (n,) in batches of `size`, shuffled by seed and epoch; a last batch of one joins the one before."""
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    edges = [*range(0, len(order), size), len(order)]
    if len(edges) > 2 and edges[-1] - edges[-2] == 1:
        del edges[-2]
    for i, j in zip(edges, edges[1:], strict=False):
        yield order[i:j]


def batches_of(n: int, size: int) -> int:
    """How many batches `shuffled` makes of n rows."""
    whole, rest = divmod(n, size)
    return whole + (rest > 1 or whole == 0)


@contextmanager
def _seeded(seed: int | None, epoch: int) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
        yield


def _optimizer(stages: Sequence[Stage], plan: Plan) -> torch.optim.Optimizer:
    groups = []
    for stage in stages:
        wide = [p for p in stage.parameters if p.dim() > 1]
        narrow = [p for p in stage.parameters if p.dim() <= 1]
        groups.append({"params": wide, "weight_decay": plan.weight_decay})
        groups.append({"params": narrow, "weight_decay": 0.0})
    return torch.optim.SGD(groups, lr=plan.lr) if plan.rule == "sgd" else torch.optim.AdamW(groups, plan.lr, plan.betas)


def _set_rates(optimizer: torch.optim.Optimizer, stages: Sequence[Stage], plan: Plan, step: int, steps: int) -> None:
    rates = [rate_at(step, steps, plan, stage) for stage in stages for _ in range(2)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _stepped(optimizer: torch.optim.Optimizer, stages: Sequence[Stage], plan: Plan) -> bool:
    """Clip and step; False, and no step, where a gradient is not finite."""
    parameters = [p for stage in stages for p in stage.parameters if p.grad is not None]
    if plan.clipping is not None:
        norm = clip_gradients(parameters, plan.clipping)
    else:
        norm = float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if not math.isfinite(norm):
        return False
    optimizer.step()
    return True


def _save(optimizer: torch.optim.Optimizer, checkpoints: Checkpoints, losses: list[float]) -> None:
    state = optimizer.state_dict()["state"]
    tensors = {f"state.{name}": t for name, t in checkpoints.state.state_dict().items()}
    tensors |= {f"optimizer.{i}.{name}": t for i, slots in state.items() for name, t in slots.items()}
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    about = {"facts": digest_json(checkpoints.facts), "losses": json.dumps(losses)}
    data = safetensors.torch.save(tensors, metadata=about)
    checkpoints.folder.mkdir(parents=True, exist_ok=True)
    name = f"epoch-{len(losses):05}-{hashlib.sha256(data).hexdigest()[:32]}.safetensors"
    write_atomic(checkpoints.folder / name, [data])
    for old in _files(checkpoints.folder)[:-KEPT_CHECKPOINTS]:
        old.unlink(missing_ok=True)


def _resumed(optimizer: torch.optim.Optimizer, checkpoints: Checkpoints) -> tuple[list[float], int]:
    """Fill module and optimizer from the newest sound checkpoint; the losses so far and the epoch to go on with."""
    for path in reversed(_files(checkpoints.folder)):
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest()[:32] != path.stem.rpartition("-")[2]:
            warnings.warn(f"The checkpoint {path} is damaged; the one before it is used, if any.", stacklevel=2)
            path.unlink()
            continue
        about = _metadata(data)
        if about["facts"] != digest_json(checkpoints.facts):
            path.unlink()  # of another training: it would outlive ours
            continue
        tensors = safetensors.torch.load(data)
        own = {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}
        checkpoints.state.load_state_dict(own)
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for name, t in tensors.items():
            if name.startswith("optimizer."):
                _, i, slot = name.split(".")
                slots.setdefault(int(i), {})[slot] = t
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
        losses = json.loads(about["losses"])
        return losses, len(losses)
    return [], 0


def _metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    about: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return about


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-*.safetensors"))
