"""Is the number of layers to reuse chosen well? All stage boundaries tried out, 500 training pictures each.

    python bench/depth.py DATA_FOLDER [--sets elpv,icons] [--epochs 5] [--budget 5m]
    python bench/depth.py --table

DATA_FOLDER/SET/{train,test}/CLASS hold the pictures; 500 training pictures are drawn by class, one seed. For each stage
boundary of the default network everything above it is fine-tuned for five epochs from the probe's head, everything
below stays frozen (`picture`: nothing does), and all test pictures are judged. The choice is what `fit` gives for the
same pictures; it sees no test picture. Regret: the best of all boundaries on the test pictures, the plain probe among
them, less what was chosen; that best is picked on the test pictures themselves, which flatters it. One row is appended
to depth.jsonl for each boundary, and what is there is not run again.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import regraft
from accuracy import GROUPS
from kept import Row, append, rows
from never_worse import thinned
from pretrained import tabled
from regraft.allocator import memory_kept
from regraft.augment import Augment
from regraft.backbone import Backbone, load_backbone
from regraft.candidates import Candidate
from regraft.cut import split
from regraft.data import Dataset, load_data, read, subset
from regraft.depth_curve import faithful_numerics
from regraft.finetune import Ground, fit_all
from regraft.ladder import maps_of
from regraft.learned import task_of
from regraft.preprocess import fit_to_size, normalise
from regraft.probe import Bench, all_grey
from regraft.search import run_trials
from regraft.tuned import PICTURE, Grown, run_tuned

KEY = ("set", "frozen up to")
SETS = ("elpv", "icons", "clipart", "emoji", "silhouettes", "fashion")
PICTURES = 500
BOUNDARIES = (PICTURE, "blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4", "blocks.5", "blocks")
FROZEN, CHOSEN = "all frozen", "regraft"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--budget", default="5m")
    parser.add_argument("--only", choices=["chosen", "boundaries"])
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table or options.data is None:
        print(table(rows("depth", KEY)))
        return
    for name in options.sets.split(","):
        dataset = thinned(load_data(options.data / name, group=GROUPS.get(name)), PICTURES, 0)
        if options.only != "boundaries":
            chosen(name, dataset, options.budget)
        if options.only != "chosen":
            with memory_kept():
                boundaries(name, dataset, options.epochs)


def chosen(name: str, dataset: Dataset, budget: str) -> None:
    """Test accuracy of what `fit` gives with a budget, and with none of the probe alone."""
    for below, asked in ((CHOSEN, budget), (FROZEN, "0trials")):
        if (name, below) in rows("depth", KEY):
            continue
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            fitted = regraft.fit(dataset, out=folder, budget=asked)
        finished(name, below, fitted.record["test"]["accuracy"], started, chosen=fitted.record["chosen"]["name"])


def boundaries(name: str, dataset: Dataset, epochs: int) -> None:
    """Test accuracy of the network fine-tuned above every boundary."""
    tested = subset(dataset, "test")
    missing = [b for b in BOUNDARIES if (name, b) not in rows("depth", KEY)]
    if not missing:
        return
    ground = ground_of(subset(dataset, "train", "validation"), load_backbone())
    end = ground.backbone.shown[-1].name
    for below in missing:
        started = time.perf_counter()
        does = f"layers above {below} fine-tuned from the probe"
        views = Augment(crop=True, mix=True)
        candidate = Candidate(f"above {below}", does, below, end, epochs=epochs, augment=views, alone=True)
        maps = maps_of(ground, candidate, lambda what, done, total: None)
        module = fit_all(ground, candidate, maps, epochs, slower=1.0, checkpoints=lambda module: None)  # type: ignore[arg-type,return-value]
        finished(name, below, judged(module, ground, tested, below), started)


def ground_of(dataset: Dataset, backbone: Backbone) -> Ground:
    """Features, folds and probes of these pictures."""
    table = tabled(dataset, list(dataset.examples), backbone)
    everything = np.arange(len(table.ids))
    bench = Bench(table, everything, all_grey(table, everything))
    task = task_of(table, everything, len(dataset.labels), 0)
    trials = run_trials(bench, task, [(cut.name, cut.depth) for cut in backbone.shown])
    return Ground(backbone, faithful_numerics(backbone, "auto")[0], bench, task, {t.name: t for t in trials})


def judged(module: Grown, ground: Ground, tested: Dataset, below: str) -> float:
    """The share of test pictures that the frozen part and the trained part answer right."""
    backbone, right = ground.backbone, 0
    lower = None if below == PICTURE else split(backbone.trace, below)[0].eval()
    for i in range(0, len(tested.examples), 32):
        some = tested.examples[i : i + 32]
        x = torch.stack([fit_to_size(read(e).decode().pixels, backbone.preprocess) for e in some])
        with torch.inference_mode():
            value = x if lower is None else lower(normalise(x, backbone.preprocess))
        said = run_tuned(module, value).argmax(1)
        right += int((said == torch.tensor([e.label for e in some])).sum())
    return right / len(tested.examples)


def finished(name: str, below: str, accuracy: float, started: float, **facts: object) -> None:
    """One finished run."""
    row = {"set": name, "frozen up to": below, "accuracy": accuracy, "seconds": round(time.perf_counter() - started, 1)}
    row |= {"date": str(datetime.date.today()), **facts}
    append("depth", row)
    print(*row.values(), flush=True)


def table(found: dict[tuple[object, ...], Row]) -> str:
    """Accuracy by set and boundary, and the regret of the choice."""
    by = {key: float(row["accuracy"]) for key, row in found.items()}  # type: ignore[arg-type]
    places = (*BOUNDARIES, FROZEN)
    lines = ["| set | " + " | ".join(places) + " | regraft | regret, points |", "|---" * (len(places) + 3) + "|"]
    regrets = []
    for name in dict.fromkeys(s for s, _ in by):
        cells = [f"{by[name, p]:.4f}" if (name, p) in by else "" for p in places]
        regret = ""
        if all((name, p) in by for p in (*places, CHOSEN)):
            regrets.append(100 * (max(by[name, p] for p in places) - by[name, CHOSEN]))
            regret = f"{regrets[-1]:+.2f}"
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {by.get((name, CHOSEN), float('nan')):.4f} | {regret} |")
    if regrets:
        lines.append(f"\nMean regret {statistics.mean(regrets):+.2f} points over {len(regrets)} sets.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
