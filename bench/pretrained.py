"""Does pretraining without the task's labels pay? Accuracy with 50, 100 and 500 labels, five draws of each or more.

    python bench/pretrained.py DATA_FOLDER OUT_FOLDER [--sets fashion,silhouettes,emoji] [--budget 15m] [--methods ...]
                                [--sizes 100] [--draws 20]
    python bench/pretrained.py --table

DATA_FOLDER/SET/{train,test}/CLASS hold the pictures; for fashion all 60,000. A network is pretrained once for each
method on the training pictures, without their labels (`pairs` on emoji: by identity, from emoji/train alone), and kept
in OUT_FOLDER. For each draw the rule of `curve` chooses cuts and strength by cross-validation on the drawn labels, and
the head is judged on all test pictures. Rows, beside the methods:

    input      the raw picture, linear or through a random hidden layer, chosen likewise
    random     the same network with random weights, frozen; `random narrow`, `random dense`, `random sigmoid` for dense
               layers
    scratch    the convolutional network, all layers trained on the drawn labels, epochs by cross-validation
    default    EfficientNet-Lite0, ImageNet, frozen

    METHOD tuned: all layers trained further from pretrained weights, by the recipe of scratch at a third of its rate

The autoencoders and the RBM train dense layers, the other methods the small convolutional network: on the pictures they
were developed on, autoencoders gained over random weights in dense layers alone, and those that nothing but the narrow
code keeps from copying (plain and masked) in `dense-100-30`; in `dense-500-250` they gained nothing (rows `wide`).

One row is appended to pretrained.jsonl for each set, method and draw, with what was pretrained, and what is there is
not run again. One network is pretrained for each method and set, and one is drawn at random: the intervals are over
draws of labels alone. The methods were developed on pictures of fashion/train (`--develop`), never on test pictures.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student

from choice import stratified, test_accuracy
from kept import Row, append, rows
from regraft.augment import Augment
from regraft.backbone import Backbone, is_backbone_folder, load_backbone
from regraft.candidates import all_layers_alone
from regraft.data import Dataset, Example, load_data, subset
from regraft.depth_curve import faithful_numerics
from regraft.features import FeatureTable, extract
from regraft.finetune import Ground, fit_all
from regraft.heads import INPUT
from regraft.ladder import maps_of, try_alone
from regraft.methods import LABELLED, METHODS
from regraft.prepared import prepare
from regraft.preprocess import fit_to_size
from regraft.pretraining import SMALL, begin, pretrain
from regraft.probe import Bench, Task, all_grey
from regraft.search import choose, run_trials
from regraft.splits import fold_assignments, together
from regraft.store import open_store
from regraft.tuned import run_tuned

KEY = ("set", "method", "labels", "draw")
IDENTITY = {"emoji": r"([^/]+)-[^-]+$"}
DENSE, NARROW = "dense-500-250", "dense-100-30"
ARCHS = {"autoencoder": NARROW, "masked": NARROW, "random narrow": NARROW}
ARCHS |= {"denoising": DENSE, "rbm": DENSE, "random dense": DENSE, "random sigmoid": DENSE}
RANDOM = {
    "denoising": "random dense",
    "autoencoder": "random narrow",
    "masked": "random narrow",
    "rbm": "random sigmoid",
}
SIZES = (50, 100, 500)
DRAWS = 5
TUNED = " tuned"
MIRRORED = True
HELD = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--sets", default="fashion,silhouettes,emoji")
    parser.add_argument("--methods", default="input,random,scratch,default,contrastive")
    parser.add_argument("--budget", default="15m")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--develop", action="store_true", help="Judge on training pictures; nothing is appended.")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table or options.data is None:
        print(table(rows("pretrained", KEY)))
        return
    for name in options.sets.split(","):
        run(name, options)


def run(name: str, options: argparse.Namespace) -> None:
    """All methods on one set."""
    dataset = load_data(options.data / name, group=IDENTITY.get(name))
    draws = drawn(dataset, [int(n) for n in options.sizes.split(",")], options.draws, develop=options.develop)
    judged = draws.pop("judged")
    everything = sorted({e for chosen in draws.values() for e in chosen}, key=lambda e: e.where)
    for method in options.methods.split(","):
        done = {} if options.develop else rows("pretrained", KEY)
        wanted = [(n, k) for n, k in draws if (name, method, n, k) not in done]
        if not wanted:
            continue
        backbone, made = network(name, method, options)
        tables = [tabled(dataset, examples, backbone) for examples in (everything, judged)]
        for n, k in wanted:
            row = {"set": name, "method": method, "labels": n, "draw": k, "date": str(datetime.date.today())}
            row |= made
            row["accuracy"] = accuracy(method, backbone, dataset, draws[n, k], *tables, seed=k)
            print(*row.values(), flush=True)
            if not options.develop:
                append("pretrained", row)


def drawn(dataset: Dataset, sizes: list[int], count: int, *, develop: bool) -> dict[object, list[Example]]:
    """Training pictures by (labels, draw), and those that all are judged on under `judged`."""
    train = list(subset(dataset, "train", "validation").examples)
    judged = list(subset(dataset, "test").examples)
    if develop:
        held = set(np.random.default_rng(99).permutation(len(train))[:HELD].tolist())
        judged = [e for i, e in enumerate(train) if i in held]
        groups = {e.group for e in judged if e.group}
        train = [e for i, e in enumerate(train) if i not in held and e.group not in groups]
    labels = np.array([e.label for e in train])
    out: dict[object, list[Example]] = {"judged": judged}
    for n in sizes:
        for k in range(count):
            out[n, k] = [train[i] for i in stratified(labels, n, np.random.default_rng([n, k]))]
    return out


def network(name: str, method: str, options: argparse.Namespace) -> tuple[Backbone, dict[str, object]]:
    """The backbone of a method, pretrained now if it was not before, and how it was made."""
    if method in LABELLED and name not in IDENTITY:
        raise SystemExit(f"{method} would learn the classes of {name} themselves: it is for {', '.join(IDENTITY)}")
    method = method.removesuffix(TUNED)
    data, out = options.data / name, options.out / name / method
    if method == "default":
        return load_backbone(), {}
    arch = ARCHS.get(method, SMALL)
    if method in ("input", "scratch") or method.startswith("random"):
        few = replace(dataset := load_data(data), examples=dataset.examples[::50])
        return begin(arch, prepare(few).preprocess, sigmoid=method == "random sigmoid"), {}
    if not is_backbone_folder(str(out)):
        group = IDENTITY.get(name) if method == "pairs" else None
        pretrain(data, method=method, out=out, arch=arch, group=group, budget=options.budget)
    record = json.loads((out / "record.json").read_text())
    made = {"epochs": len(record["losses"]), "steps": record["plan"]["steps"], "weights": record["weights"]}
    made |= {"seconds": round(record["seconds"]["total"]), "per_second": round(record["pictures_per_second"])}
    print(name, method, *made.values(), flush=True)
    return load_backbone(out), made


def tabled(dataset: Dataset, examples: list[Example], backbone: Backbone) -> FeatureTable:
    """Features of these pictures at all shown cuts."""
    numerics, _ = faithful_numerics(backbone, "auto")
    names = [cut.name for cut in backbone.shown]
    return extract(replace(dataset, examples=tuple(examples)), backbone, names, open_store(), numerics)


def accuracy(
    method: str,
    backbone: Backbone,
    dataset: Dataset,
    chosen: list[Example],
    learned: FeatureTable,
    judged: FeatureTable,
    *,
    seed: int,
) -> float:
    """Test accuracy of what cross-validation on the drawn labels chooses."""
    place = {e.where: i for i, e in enumerate(learned.examples)}
    picked = np.array([place[e.where] for e in chosen])
    labels = np.array([e.label for e in chosen])
    bench = Bench(learned, picked, all_grey(learned, picked))
    groups = together([learned.pixels[i] for i in picked], [e.group for e in chosen])
    task = Task(labels, groups, fold_assignments(labels, groups, seed=seed), len(dataset.labels))
    trials = run_trials(bench, task, [(cut.name, cut.depth) for cut in backbone.shown])
    truth = torch.tensor([e.label for e in judged.examples])
    if method == "scratch" or method.endswith(TUNED):
        ground = Ground(
            backbone, faithful_numerics(backbone, "auto")[0], bench, task, {t.name: t for t in trials}, seed
        )
        return all_layers_accuracy(ground, judged, truth, scratch=method == "scratch")
    raw = next(t for t in trials if t.name == INPUT)
    network = [t for t in trials if t is not raw]
    choice = choose(trials, task)
    best = choice.trial if choice.helps else min(network, key=lambda t: t.log_loss)
    return test_accuracy(raw if method == "input" else best, bench, task, judged, truth)


def all_layers_accuracy(ground: Ground, judged: FeatureTable, truth: torch.Tensor, *, scratch: bool) -> float:
    """All layers trained on all drawn pictures for the epochs that the folds chose."""
    n, end = len(ground.task.labels), ground.backbone.shown[-1].name
    candidate = all_layers_alone(n, end, Augment(crop=True, flip=MIRRORED), scratch=scratch)
    attempt = try_alone(ground, candidate, lambda what, done, total: None)
    maps = maps_of(ground, candidate, lambda what, done, total: None)
    nowhere = lambda module: None  # noqa: E731
    module = fit_all(ground, candidate, maps, attempt.epochs, slower=attempt.slower, checkpoints=nowhere)
    said = torch.cat([run_tuned(module, x).argmax(1) for x in _pictures(judged, ground.backbone)])
    return float((said == truth).float().mean())


def _pictures(table: FeatureTable, backbone: Backbone) -> Iterator[torch.Tensor]:
    from regraft.data import read

    for i in range(0, len(table.examples), 256):
        some = table.examples[i : i + 256]
        yield torch.stack([fit_to_size(read(e).decode().pixels, backbone.preprocess) for e in some])


def table(kept: dict[tuple[object, ...], Row]) -> str:
    """Mean accuracy over five draws by set and labels, and paired gains over the better of scratch and input.

    Those over random weights are of all draws that there are.
    """
    lines, found = [], list(kept.values())
    for name in dict.fromkeys(r["set"] for r in found):
        sizes = sorted({int(r["labels"]) for r in found if r["set"] == name})  # type: ignore[call-overload]
        lines += [
            f"\n### {name}\n",
            "| | " + " | ".join(f"{n} labels" for n in sizes) + " |",
            "|---" * (len(sizes) + 1) + "|",
        ]
        by = {(r["method"], r["labels"], r["draw"]): float(r["accuracy"]) for r in found if r["set"] == name}  # type: ignore[arg-type]
        for method in dict.fromkeys(m for m, _, _ in by):
            cells = []
            for n in sizes:
                draws = [k for m, size, k in by if m == method and size == n]
                if not draws:
                    cells.append("–")
                    continue
                cell = f"{statistics.mean(by[method, n, k] for k in draws if k < DRAWS):.4f}"
                base = [m for m in ("scratch", "input") if any((m, n, k) in by for k in draws)]
                if method not in ("scratch", "input") and base:
                    both = [k for k in draws if all((m, n, k) in by for m in base)]
                    best = max(base, key=lambda m: statistics.mean(by[m, n, k] for k in both))
                    cell += f" ({interval([by[method, n, k] - by[best, n, k] for k in both])})"
                if n == 100 and method in METHODS:
                    same = RANDOM.get(method, "random")
                    both = [k for k in draws if (same, n, k) in by]
                    cell += f" [{interval([by[method, n, k] - by[same, n, k] for k in both])} over {same}"
                    cell += f", {len(both)} draws]" if len(both) > DRAWS else "]"
                cells.append(cell)
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def interval(differences: list[float]) -> str:
    """Mean in points with its 95 % interval by Student's t over the draws."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{100 * mean:+.1f}"
    half = float(student.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / len(differences) ** 0.5
    return f"{100 * mean:+.1f}, {100 * (mean - half):+.1f} to {100 * (mean + half):+.1f}"


if __name__ == "__main__":
    main()
