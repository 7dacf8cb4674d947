"""Fine-tune a candidate from its cut: on the pictures of all folds but one, or on all for the final model.

The frozen part is not run: the part above the cut is trained on stored maps (see `maps`). The output layer begins as
the probe solved at that depth (linear probing, then fine-tuning: Kumar et al. 2022), so at step 0 the network is a
probe, but for roots, which are softened at 0. That probe's strength was chosen on all folds. Knows candidates, maps and
labels; nothing of budgets or of which candidate is good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from regraft.augment import Augment
from regraft.backbone import Backbone
from regraft.candidates import BATCH, Candidate
from regraft.graph import find_cut, shares_above
from regraft.heads import INPUT, View
from regraft.maps import Maps, views_stored
from regraft.networks.small import FEATURES
from regraft.nn import Clipping
from regraft.numerics import Numerics
from regraft.probe import Bench, Task, Trial, fit_head, narrowed, next_start, probe_several
from regraft.training import Checkpoints, Diverged, Halted, Plan, Stage, batches_of, shuffled, train
from regraft.tuned import PICTURE, SMALL, Grown, Plot, batch_norms, grow, renew, run_tuned, stage_names

SEVERAL = 4
"""The cuts that the output layer of a candidate reads at most."""
TOP_RATE = 0.1
"""Share of the learning rate for an output layer that begins as a probe: at more it forgets what regularised it."""
SMOOTHING = 0.1
STORED = "stored maps"
MIX = 0.2
NOISE = 0.1
JUDGED_AT_ONCE = 64
LOWER_OPENS = 0.3
"""Share of the epochs after which the next stage below opens."""
FEW_POSITIONS = 64
"""Up to so many positions of a map bfloat16 trains faster than float32 on a processor that has it."""


@dataclass(frozen=True)
class Ground:
    """What all candidates stand on: features, labels, folds, and the probes of the curve by name."""

    backbone: Backbone
    numerics: Numerics
    bench: Bench
    task: Task
    trials: Mapping[str, Trial]
    seed: int = 0
    balanced: bool = False
    clipping: Clipping = Clipping("norm", 1.0)
    starts: dict[tuple[str, str], Trial] = field(default_factory=dict, repr=False, compare=False)


def plot_of(ground: Ground, candidate: Candidate) -> Plot:
    """The part of the network that a candidate trains, with what its head sees."""
    channels = 1 if ground.bench.grey else 3
    if candidate.cut == INPUT:
        return Plot(INPUT, (View(SMALL, 1, FEATURES, True),), ground.task.classes, channels=channels)
    views = ground.trials[candidate.end].views if candidate.fresh == PICTURE else start_of(ground, candidate).views
    return Plot(candidate.cut, views, ground.task.classes, candidate.fresh, candidate.hidden, channels)


def start_of(ground: Ground, candidate: Candidate) -> Trial:
    """The probe that a candidate begins as: on the deepest layer it keeps, alone or with the best of those below it.

    Of the heads on the cuts from its own up, that with the least log-loss out of fold.
    """
    asked = (candidate.cut, candidate.end)
    if asked not in ground.starts:
        names = cuts_read(ground, candidate)
        best = sorted(names[:-1], key=lambda name: ground.trials[name].log_loss)
        depth = find_cut(ground.backbone.trace, candidate.end).depth
        alone = ground.trials[candidate.end]
        several = partial(probe_several, ground.bench, ground.task, names, [candidate.end, *best], depth)
        joint = [several(root=root, start=next_start(alone)) for root in (False, True)] if best else []
        ground.starts[asked] = min([alone, *joint], key=lambda trial: trial.log_loss)
    return ground.starts[asked]


def cuts_read(ground: Ground, candidate: Candidate) -> list[str]:
    """The cuts that the output layer may read, in order of depth: the deepest kept and the best of those below."""
    depth = {cut.name: cut.depth for cut in ground.backbone.shown}
    low = 0 if candidate.cut == PICTURE else find_cut(ground.backbone.trace, candidate.cut).depth
    inside = [name for name in depth if low <= depth[name] < depth[candidate.end]]
    best = sorted(inside, key=lambda name: ground.trials[name].log_loss)[: SEVERAL - 1]
    return [*sorted(best, key=lambda name: depth[name]), candidate.end]


def train_fold(
    ground: Ground, candidate: Candidate, maps: Maps, fold: int, *, slower: float = 1.0, halt: Callable[[], bool]
) -> np.ndarray:
    """Logits of the pictures of one fold after every epoch on the others: float32 (epochs, held out, classes).

    slower: factor on the learning rate. Raises Diverged and Halted as `train` does.
    """
    folds = ground.task.folds[0]
    learned, held = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
    module = begin(ground, candidate, learned)
    out = []

    def judge(epoch: int) -> bool:
        logits = logits_of(module, maps, held, ground.numerics.device, halt)
        if not np.isfinite(logits).all():
            raise Diverged(epoch, batches_of(len(learned), BATCH) - 1)
        out.append(logits)
        return False

    _train(ground, candidate, module, maps, learned, slower, halt, judge, None)
    return np.stack(out)


def fit_all(
    ground: Ground,
    candidate: Candidate,
    maps: Maps,
    epochs: int,
    *,
    slower: float,
    halt: Callable[[], bool] = lambda: False,
    checkpoints: Callable[[nn.Module], Checkpoints],
) -> Grown:
    """The part trained on all pictures, up to the end of so many of its epochs, in evaluation."""
    module = begin(ground, candidate, np.arange(len(ground.task.labels)))
    rows = np.arange(len(ground.task.labels))
    _train(ground, candidate, module, maps, rows, slower, halt, lambda epoch: epoch + 1 >= epochs, checkpoints(module))
    renew(module)
    return module.eval().requires_grad_(False)


def begin(ground: Ground, candidate: Candidate, learned: np.ndarray) -> Grown:
    """The part as training begins, its output layer the probe's on these rows where there is one to begin from."""
    plot = plot_of(ground, candidate)
    module = grow(plot, ground.backbone, seed=ground.seed)
    if begins_as_probe(candidate):
        head = fit_head(*narrowed(ground.bench, ground.task, learned), start_of(ground, candidate))
        output = module.top[-1]  # type: ignore[index]
        with torch.no_grad():
            output.weight.copy_(head.weight)
            output.bias.copy_(head.bias)
    return module.to(ground.numerics.device)


def begins_as_probe(candidate: Candidate) -> bool:
    """Whether the output layer starts from a solved head; above new layers there is none."""
    return candidate.cut != INPUT and not candidate.hidden and not candidate.fresh


def stages_of(ground: Ground, candidate: Candidate, module: Grown) -> list[Stage]:
    """The new layers and, from the top down, the reused ones between neighbouring shown cuts, with their rates."""
    backbone, parameters = ground.backbone, dict(module.body.named_parameters())
    top = Stage("top", tuple(module.top.parameters()), TOP_RATE if begins_as_probe(candidate) else 1.0)
    if candidate.cut == INPUT:
        return [top, Stage("body", tuple(parameters.values()))]
    shown = {cut.name: cut.depth for cut in backbone.shown}
    low = 0 if candidate.cut == PICTURE else find_cut(backbone.trace, candidate.cut).depth
    high = find_cut(backbone.trace, candidate.end).depth
    if not parameters:
        return [top]
    ends = [name for name, depth in shown.items() if low < depth < high]
    named = stage_names(plot_of(ground, candidate), backbone, module, ends)
    stages, rate = [top], 1.0
    for end, names in zip(reversed([*ends, candidate.end]), reversed(named), strict=True):
        if not names:
            continue
        above = sum(shown[end] <= shown[cut] for cut in candidate.opens)
        opens = round(LOWER_OPENS * above * candidate.epochs)
        fresh = bool(candidate.fresh) and shown[end] > shown.get(candidate.fresh, 0)
        stages.append(Stage(end, tuple(parameters[name] for name in names), 1.0 if fresh else rate, opens))
        rate *= candidate.decay
    return stages


def logits_of(
    module: Grown, maps: Maps, rows: np.ndarray, device: str, halt: Callable[[], bool] = lambda: False
) -> np.ndarray:
    """Logits float32 (rows, classes) of the pictures themselves (view 0), as the saved part will give them.

    Raises Halted soon after `halt` says so.
    """
    mode = [norm for norm in batch_norms(module) if norm.training]
    renew(module)
    module.eval()
    parts = []
    for i in range(0, len(rows), JUDGED_AT_ONCE):
        if halt():
            raise Halted
        some = rows[i : i + JUDGED_AT_ONCE]
        parts.append(run_tuned(module, maps.batch(some, np.zeros(len(some), np.int64)).to(device)))
    for norm in mode:
        norm.train()
    return torch.cat(parts).numpy()


def _train(
    ground: Ground,
    candidate: Candidate,
    module: Grown,
    maps: Maps,
    rows: np.ndarray,
    slower: float,
    halt: Callable[[], bool],
    after: Callable[[int], bool],
    checkpoints: Checkpoints | None,
) -> None:
    device, seed, task = ground.numerics.device, ground.seed, ground.task
    stages = stages_of(ground, candidate, module)
    plan = Plan(candidate.epochs, candidate.lr * slower, clipping=ground.clipping)
    if candidate.statistics:
        moving = [*batch_norms(module.body)]
        for norm in moving:
            norm.train()
    weight = _class_weights(task.labels[rows], task.classes).to(device) if ground.balanced else None
    half = trains_in_bfloat16(ground, candidate)

    def batches(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        rng = np.random.default_rng([seed, epoch, 1])
        for chosen in shuffled(rows, BATCH, seed=seed, epoch=epoch):
            x = maps.batch(chosen, rng.integers(0, maps.views, len(chosen)))
            targets = F.one_hot(torch.from_numpy(task.labels[chosen]), task.classes).float()
            yield _mixed(x, targets, candidate.augment, rng)

    def loss(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x, targets = (t.to(device) for t in batch)
        with torch.autocast(device, torch.bfloat16, enabled=half):
            logits = module(x)
        return F.cross_entropy(logits.float(), targets, weight=weight, label_smoothing=SMOOTHING)

    steps = batches_of(len(rows), BATCH)
    train(stages, plan, batches, steps, loss, after=after, checkpoints=checkpoints, halt=halt)


def trained_on(ground: Ground, candidate: Candidate) -> str:
    """What the steps of a candidate read, in words."""
    if candidate.epochs == 0:
        return "stored features"
    if candidate.cut in (INPUT, PICTURE):
        return "pictures in memory"
    if stored_of(ground, candidate):
        return STORED
    return "pictures in memory, frozen layers run at every step: storing their maps would cost more than it saves"


def stored_of(ground: Ground, candidate: Candidate) -> int:
    """How many views are stored as maps at the candidate's cut (see `views_stored`)."""
    trace, spec = ground.backbone.trace, ground.backbone.preprocess
    cut = find_cut(trace, candidate.cut)
    below = 1 - shares_above(trace, [cut])[0]
    return views_stored(len(ground.task.labels), cut.shape, below, spec, candidate.views)


def trains_in_bfloat16(ground: Ground, candidate: Candidate) -> bool:
    """Whether a step runs in bfloat16: on small maps, or on a GPU; larger maps train faster in float32 on a CPU."""
    if ground.numerics.precision != "bfloat16" or ground.numerics.emulated:
        return False
    if ground.numerics.device != "cpu":
        return True
    if candidate.cut in (INPUT, PICTURE):
        return False
    cut = find_cut(ground.backbone.trace, candidate.cut)
    return int(np.prod(cut.shape)) // max(1, cut.shape[0] if cut.layout == "NCHW" else cut.shape[-1]) <= FEW_POSITIONS


def _mixed(
    x: torch.Tensor, targets: torch.Tensor, augment: Augment, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convex mixes of maps with each other, and noise. Pictures are left as they are: their views do the work."""
    if x.dtype == torch.uint8:
        return x, targets
    if augment.mix:
        share = float(rng.beta(MIX, MIX))
        x, targets = torch.lerp(x.flip(0), x, share), torch.lerp(targets.flip(0), targets, share)
    if augment.noise:
        drawn = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
        x = x + NOISE * x.std() * drawn
    return x, targets


def _class_weights(labels: np.ndarray, classes: int) -> torch.Tensor:
    """Weights that give every class the same say, of mean 1 over the pictures."""
    counts = np.bincount(labels, minlength=classes)
    weights = len(labels) / (np.maximum(counts, 1) * max(1, int((counts > 0).sum())))
    return torch.from_numpy(weights).float()
