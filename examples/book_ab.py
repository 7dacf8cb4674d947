"""The textbook's experiment on reusing layers, over many seeds and beside what a simpler method reaches.

    python examples/book_ab.py [--data FOLDER] [--far FOLDER] [--seeds 10] [--quick] [--json] [--out FOLDER]

After "Transfer Learning with Keras" in chapter 11 of A. Geron, Hands-On Machine Learning, 3rd ed.: of the first 55,000
training pictures of Fashion-MNIST, task A has eight classes and many pictures, task B is T-shirt or pullover from 200
pictures; the test is the 2,000 of both in the test set. A never sees B's classes. Every method is judged over `--seeds`
runs, on the book's first 200 pictures (a run = a seed of every network) and on random draws of 200 (another for each).

Nothing is chosen by the test. How the source network was designed stands beside `small_cnn`; see also docs/book.md.
With --out each finished seed is kept, and the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.artifact import assemble
from regraft.files import write_atomic
from regraft.numerics import pick_numerics
from regraft.preprocess import PreprocessSpec, plain_spec
from regraft.probe import fit_head
from regraft.store import open_store

DEBIAN = (Path("/usr/share/dataset-fashion-mnist"), Path("/usr/share/datasets/fashion-mnist"))
TRAINING = 55_000
"""The book keeps the last 5,000 training pictures for validation; so do we, for the design of the source network."""
KINDS = {0: "T-shirt", 2: "pullover"}
FEW = 200
PUBLISHED = {"book_scratch": 91.85, "book_reuse": 93.85}
MEASURED = {"book_scratch": (91.60, 1.19), "book_reuse": (92.54, 1.22)}
MEASURED_RUNS = 40
GREY = PreprocessSpec((28, 28), (28, 28), (0.286,), (0.353,), channels=1, resize="stretch", fill=(0,))
"""Mean and deviation of Fashion-MNIST's training pictures."""
BLACK = -GREY.mean[0] / GREY.std[0]
METHODS = {
    "raw_pixels": "raw pixels, logistic regression",
    "book_scratch": "book: MLP from scratch",
    "book_reuse": "book: MLP reusing A",
    "raw_head": "raw pixels, regraft's head",
    "mlp_network": "MLP of A, best frozen cuts",
    "cnn_scratch": "CNN from scratch",
    "cnn_reuse": "CNN reusing A, the book's way",
    "cnn_random": "CNN never trained, best frozen cuts",
    "cnn_network": "CNN of A, best frozen cuts",
    "regraft": "regraft.fit on the CNN of A",
    "all_labels": "CNN, all labels of B (reference)",
}


@dataclass(frozen=True)
class Labelled:
    """Pictures uint8 (n, 28, 28) with their labels int64 (n,)."""

    images: np.ndarray
    labels: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> Labelled:
        return Labelled(self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class Book:
    """The split of the book: A's pictures with labels 0..7, all of B's and B's test with labels 0 and 1."""

    a: Labelled
    b: Labelled
    test: Labelled


FIT: dict[str, Any] = {"budget": "0trials"}
"""What `regraft.fit` is told beyond its defaults."""
EPOCHS = {"book": 20, "source": 2, "few": 30, "everything": 10}
QUICK = {"book": 2, "source": 1, "few": 4, "everything": 1}
REFERENCES = 3
"""Seeds for which the reference with all labels is trained: it is the slowest, and only a mark to look up to."""


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the four idx files, with or without .gz")
    parser.add_argument("--far", type=Path, help="folder of class folders: a task far from A, say handwritten digits")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="one seed and few epochs: the figures mean nothing")
    parser.add_argument("--json", action="store_true", help="print one document instead of a table")
    parser.add_argument("--out", type=Path, help="folder for book.json, book.svg and each seed's results")
    options = parser.parse_args(words)
    try:
        book = split_of_the_book(*read_fashion(options.data))
        far = regraft.load_data(options.far) if options.far else None
    except (OSError, ValueError, regraft.RegraftError) as e:
        print(e, file=sys.stderr)
        return 1
    epochs, seeds = (QUICK, 1) if options.quick else (EPOCHS, options.seeds)
    runs = []
    for seed in range(seeds):
        name = f"{'quick' if options.quick else 'seed'}-{seed}.json"
        runs.append(resumed(options.out, name, lambda seed=seed: one_seed(seed, book, far, epochs)))
        print(f"seed {seed}: {runs[-1]['first_200']}", file=sys.stderr, flush=True)
    found = summary(runs)
    if options.out:
        (options.out / "book.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.out / "book.svg").write_text(figure(found, runs))
    print(json.dumps(found) if options.json else table(found))
    return 0


def read_fashion(folder: Path | None) -> tuple[Labelled, Labelled]:
    """Training and test set. Raises FileNotFoundError saying what to install."""
    folders = [folder] if folder else list(DEBIAN)
    try:
        place = next(p for p in folders if list(p.glob("train-images-idx3-ubyte*")))
    except StopIteration:
        raise FileNotFoundError(
            f"Fashion-MNIST must lie in {' or '.join(map(str, folders))}: apt-get install dataset-fashion-mnist, or "
            "give --data FOLDER, say torchvision's FashionMNIST/raw."
        ) from None

    def array(name: str, start: int) -> np.ndarray:
        packed, plain = place / f"{name}.gz", place / name
        data = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
        return np.frombuffer(data, np.uint8, offset=start)

    def both(kind: str) -> Labelled:
        images = array(f"{kind}-images-idx3-ubyte", 16).reshape(-1, 28, 28)
        return Labelled(images, array(f"{kind}-labels-idx1-ubyte", 8).astype(np.int64))

    return both("train"), both("t10k")


def split_of_the_book(train: Labelled, test: Labelled) -> Book:
    train = train[np.arange(min(TRAINING, len(train.labels)))]

    def part(whole: Labelled, classes: list[int]) -> Labelled:
        found = whole[np.isin(whole.labels, classes)]
        return Labelled(found.images, np.searchsorted(classes, found.labels))

    others = sorted(set(range(10)) - set(KINDS))
    return Book(part(train, others), part(train, list(KINDS)), part(test, list(KINDS)))


def drawn(book: Book, which: str, seed: int) -> Labelled:
    """B's pictures to learn from: the book's, or a random draw that the seed names."""
    if which == "first_200":
        return book.b[np.arange(FEW)]
    return book.b[np.random.default_rng(seed).choice(len(book.b.labels), FEW, replace=False)]


def one_seed(seed: int, book: Book, far: regraft.Dataset | None, epochs: dict[str, int]) -> dict[str, Any]:
    """Accuracy of every method in percent for both ways to have 200 pictures, the depth curves and the seconds."""
    out: dict[str, Any] = {"first_200": {}, "random_200": {}, "curves": {}, "seconds": {}}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        at = time.perf_counter()
        result = work()
        out["seconds"].setdefault(name, []).append(round(time.perf_counter() - at, 1))
        return result

    mlp = timed("mlp on A", lambda: book_training(book_mlp(8, seed), book.a, epochs["book"], seed))
    blank = small_cnn(8, seed)
    cnn = timed("cnn on A", lambda: train_cnn(copy.deepcopy(blank), book.a, epochs["source"], 3e-3, seed))
    unit = plain_spec(28, 28, 1)
    for which in ("first_200", "random_200"):
        few, accuracy = drawn(book, which, seed), out[which]
        accuracy["raw_pixels"] = judged(logistic_regression(few), book.test, unit)
        scratch = book_training(book_mlp(1, seed), few, epochs["book"], seed)
        accuracy["book_scratch"] = judged(scratch, book.test, unit)
        accuracy["book_reuse"] = judged(book_reuse(mlp, few, epochs["book"], seed), book.test, unit)
        alone = train_cnn(small_cnn(2, seed), few, epochs["few"], 3e-3, seed, batch=50)
        accuracy["cnn_scratch"] = judged(alone, book.test, GREY)
        reused = timed("cnn reused", lambda few=few: cnn_reuse(cnn, few, epochs["few"], seed))
        accuracy["cnn_reuse"] = judged(reused, book.test, GREY)
        with tempfile.TemporaryDirectory() as folder:
            place, data = Path(folder), named(few)
            run = timed("regraft on B", lambda place=place, data=data: by_regraft(cnn, GREY, data, seed, place))
            accuracy["regraft"] = evaluated(run.model, book.test)
            curves = {
                "mlp": by_curve(mlp, unit, data, seed, place, book.test),
                "untrained": by_curve(blank, GREY, data, seed, place, book.test),
                "cnn": by_curve(cnn, GREY, data, seed, place, book.test),
            }
            if far and which == "first_200":
                out["curves"]["cnn, far task"] = by_curve(cnn, GREY, few_of(far, seed), seed, place)
        accuracy |= {"raw_head": curves["cnn"]["raw"], "mlp_network": curves["mlp"]["network"]}
        accuracy |= {"cnn_random": curves["untrained"]["network"], "cnn_network": curves["cnn"]["network"]}
        out["curves"] |= {f"{name}, {which}": curve for name, curve in curves.items()}
    if seed < REFERENCES:
        everything = train_cnn(small_cnn(2, seed), book.b, epochs["everything"], 3e-3, seed)
        out["first_200"]["all_labels"] = judged(everything, book.test, GREY)
    return out


def judged(net: nn.Module, test: Labelled, spec: PreprocessSpec) -> float:
    """Percent of the test pictures that a network with two outputs, or one, has right."""
    with torch.inference_mode():
        scores = torch.cat([net.eval()(part) for part in as_input(test, spec).split(500)])
    answers = (scores[:, 0] > 0) if scores.shape[1] == 1 else scores.argmax(1)
    return 100 * float((answers.numpy() == test.labels).mean())


def as_input(data: Labelled, spec: PreprocessSpec) -> torch.Tensor:
    """Pictures as a network takes them, float32 (n, 1, 28, 28)."""
    return (torch.from_numpy(data.images.copy())[:, None].float() / 255 - spec.mean[0]) / spec.std[0]


def by_regraft(net: nn.Module, spec: PreprocessSpec, data: Any, seed: int, place: Path) -> regraft.Run:
    """regraft's own choice on the 200 pictures; it sees no others. This is the call that a user writes."""
    backbone = regraft.load_backbone(net, example=torch.zeros(2, 1, 28, 28), preprocess=spec)
    return regraft.fit(data, backbone, out=place / "run", seed=seed, store=open_store(place / "features"), **FIT)


def by_curve(
    net: nn.Module, spec: PreprocessSpec, data: Any, seed: int, place: Path, test: Labelled | None = None
) -> dict[str, Any]:
    """The depth curve; and on the test, in percent, its best head on the network and its head on the raw picture.

    `regraft.fit` keeps the raw picture unless the network beats it beyond the noise, which 200 pictures seldom show;
    what the network has to give, by the least cross-validated log-loss, is therefore reported apart.
    """
    backbone = regraft.load_backbone(net, example=torch.zeros(2, 1, 28, 28), preprocess=spec)
    found = regraft.curve(data, backbone, seed=seed, store=open_store(place / "features"))
    raw, network = found.trials[0], found.trials[1:]
    best = min(network, key=lambda trial: trial.log_loss)
    single = min((trial for trial in network if len(trial.views) == 1), key=lambda trial: trial.log_loss)
    labels = tuple(sorted(KINDS.values()))
    tested = {
        name: evaluated(assemble(backbone, fit_head(found.bench, found.task, trial), labels, found.numerics), test)
        for name, trial in (("network", best), ("raw", raw))
        if test
    }
    return tested | {
        "cuts": {point["name"]: 100 * point["score"] for point in found.to_json()["cuts"]},
        "recommended": found.choice.trial.name,
        "best_head": best.name,
        "best_cut": single.name,
        "best_cut_depth": 100 * single.depth / max(cut.depth for cut in backbone.shown),
        "transfer_helps": found.choice.helps,
        "gain": 100 * found.choice.gain.score,
        "log_loss_gain": found.choice.sharper.score,
    }


def evaluated(model: regraft.TransferModel, test: Labelled) -> float:
    return 100 * regraft.evaluate(model, named(test)).accuracy.score


def named(data: Labelled) -> tuple[np.ndarray, list[str]]:
    return data.images, [list(KINDS.values())[label] for label in data.labels]


def few_of(far: regraft.Dataset, seed: int) -> regraft.Dataset:
    """As many pictures of the far task as B has, equally many of each class."""
    rng, each = np.random.default_rng(seed), max(2, FEW // len(far.labels))
    rows: list[int] = []
    for label in range(len(far.labels)):
        own = [i for i, example in enumerate(far.examples) if example.label == label and example.split != "test"]
        rows += rng.choice(own, min(each, len(own)), replace=False).tolist()
    return regraft.Dataset(far.source, far.labels, tuple(far.examples[i] for i in rows))


def book_mlp(outputs: int, seed: int) -> nn.Sequential:
    """784-100-100-100 with ReLU, begun as Keras does: he_normal, cut at two deviations; Glorot, uniform."""
    torch.manual_seed(seed)
    dense = regraft.nn.mlp([784, 100, 100, 100, outputs], "relu")
    for layer in (dense.hidden1, dense.hidden2, dense.hidden3):
        deviation = (2 / layer.in_features) ** 0.5 / 0.8796  # that of the normal before it is cut
        nn.init.trunc_normal_(layer.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
    nn.init.xavier_uniform_(dense.output.weight)
    return nn.Sequential(nn.Flatten(), *dense)


def book_training(net: nn.Sequential, data: Labelled, epochs: int, seed: int) -> nn.Sequential:
    """Plain gradient descent as in the book: rate 0.001, batches of 32, pixels in [0, 1]."""
    shuffle = torch.Generator().manual_seed(seed)
    x, y = as_input(data, plain_spec(28, 28, 1)), torch.from_numpy(data.labels)
    learnt = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learnt, lr=0.001)
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=shuffle).split(32):
            scores = net(x[rows])
            if scores.shape[1] == 1:
                loss = F.binary_cross_entropy_with_logits(scores[:, 0], y[rows].float())
            else:
                loss = F.cross_entropy(scores, y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net


def book_reuse(source: nn.Sequential, few: Labelled, epochs: int, seed: int) -> nn.Sequential:
    """A's layers but the last under a new output: frozen for a fifth of the epochs, then all of them learn."""
    net = nn.Sequential(*copy.deepcopy(source)[:-1], book_mlp(1, seed)[-1])
    net[:-1].requires_grad_(False)
    book_training(net, few, epochs // 5, seed)
    return book_training(net.requires_grad_(True), few, epochs - epochs // 5, seed + 1000)


def logistic_regression(few: Labelled) -> nn.Sequential:
    """On pixels in [0, 1], with half the squared weights as the penalty of the summed loss."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 1))
    nn.init.zeros_(net[1].weight)
    nn.init.zeros_(net[1].bias)
    x, y = as_input(few, plain_spec(28, 28, 1)), torch.from_numpy(few.labels).float()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        wrong = F.binary_cross_entropy_with_logits(net(x)[:, 0], y, reduction="sum")
        total = wrong + net[1].weight.square().sum() / 2
        total.backward()
        return total

    optimizer.step(loss)
    return net


def small_cnn(outputs: int, seed: int) -> nn.Sequential:
    """Three convolutions with batch norm and one linear layer: about a minute on A.

    The design was chosen among twelve without the test and without the first 200: heads on ten draws of 200 of B's
    pictures in the last 5,000 training pictures, judged on 4,000 of B's others. All lay within 0.3.
    """
    torch.manual_seed(seed)

    def block(inputs: int, units: int, size: int = 3, stride: int = 1) -> nn.Sequential:
        convolution = nn.Conv2d(inputs, units, size, stride, size // 2, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(units), nn.ReLU())

    blocks = [block(1, 32, 5, 2), block(32, 64), nn.MaxPool2d(2), block(64, 128)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(128 * 7 * 7, outputs))


def train_cnn(
    net: nn.Sequential, data: Labelled, epochs: int, rate: float, seed: int, *, batch: int = 128
) -> nn.Sequential:
    """AdamW under a one-cycle rate on varied pictures; in bfloat16 where the processor has it."""
    chance = torch.Generator().manual_seed(seed)
    fast = pick_numerics("cpu").precision == "bfloat16"
    net.train().to(memory_format=torch.channels_last)
    x, y = as_input(data, GREY), torch.from_numpy(data.labels)
    learnt = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=rate, weight_decay=0.05)
    steps = epochs * -(-len(y) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=chance).split(batch):
            seen = varied(x[rows], chance).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                scores = net(seen)
            loss = F.cross_entropy(scores.float(), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval().to(memory_format=torch.contiguous_format)


def varied(x: torch.Tensor, chance: torch.Generator, shift: int = 2) -> torch.Tensor:
    """Each picture moved by up to two pixels each way, and every other one mirrored."""
    n, side = len(x), torch.arange(28)
    padded = F.pad(x, (shift,) * 4, value=BLACK)[:, 0]
    top, left = torch.randint(0, 2 * shift + 1, (2, n, 1), generator=chance)
    moved = padded[torch.arange(n)[:, None, None], (top + side)[:, :, None], (left + side)[:, None, :]][:, None]
    mirrored = torch.rand(n, generator=chance) < 0.5
    return torch.where(mirrored[:, None, None, None], moved.flip(3), moved)


def cnn_reuse(source: nn.Sequential, few: Labelled, epochs: int, seed: int) -> nn.Sequential:
    """The book's way with the CNN: a new output, first alone and then with all layers at a lower rate."""
    net = nn.Sequential(*copy.deepcopy(source)[:-1], small_cnn(2, seed)[-1])
    net[:-1].requires_grad_(False)
    train_cnn(net, few, max(1, epochs // 5), 1e-2, seed, batch=50)
    return train_cnn(net.requires_grad_(True), few, epochs - epochs // 5, 1e-3, seed + 1000, batch=50)


def resumed(folder: Path | None, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The results of one seed, computed once for a folder."""
    if folder and (folder / name).exists():
        kept: dict[str, Any] = json.loads((folder / name).read_text())
        return kept
    result = work()
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, [json.dumps(result).encode()])
    return result


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over runs: of every method, of gains (paired by run), of depths."""
    found: dict[str, Any] = {}
    for method in METHODS:
        found[method] = {
            which: spread([run[which][method] for run in runs if method in run[which]])
            for which in ("first_200", "random_200")
            if any(method in run[which] for run in runs)
        }

    def gain(reused: str, alone: str) -> dict[str, dict[str, float]]:
        return {w: spread([r[w][reused] - r[w][alone] for r in runs]) for w in ("first_200", "random_200")}

    found["gains"] = {
        "mlp": gain("book_reuse", "book_scratch"),
        "cnn": gain("cnn_reuse", "cnn_scratch"),
        "mlp_frozen": gain("mlp_network", "book_scratch"),
        "cnn_frozen": gain("cnn_network", "cnn_scratch"),
        "cnn_frozen_over_untrained": gain("cnn_network", "cnn_random"),
    }
    found["depth"] = {}
    for name in sorted(set.intersection(*(set(run["curves"]) for run in runs))):
        curves = [run["curves"][name] for run in runs]
        found["depth"][name] = {
            "best_cut_depth": spread([curve["best_cut_depth"] for curve in curves]),
            "transfer_helps": sum(curve["transfer_helps"] for curve in curves),
            "recommended": [curve["recommended"] for curve in curves],
            "cuts": {cut: spread([curve["cuts"][cut] for curve in curves]) for cut in curves[0]["cuts"]},
        }
    found["seconds"] = {name: spread([s for run in runs for s in run["seconds"][name]]) for name in runs[0]["seconds"]}
    found["book"] = {name: against_measured(name, found[name]["first_200"]) for name in MEASURED}
    if "cnn, far task" not in found["depth"]:
        found["left_out"] = ["near against far: give --far FOLDER, say handwritten digits in class folders"]
    return found


def spread(values: list[float]) -> dict[str, float]:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": round(float(np.mean(values)), 3), "std": round(deviation, 3), "n": len(values)}


def against_measured(name: str, ours: dict[str, float]) -> dict[str, Any]:
    """Ours agrees with 40 earlier runs where the means are within two standard errors of their difference."""
    mean, deviation = MEASURED[name]
    allowed = 2 * deviation * (1 / MEASURED_RUNS + 1 / ours["n"]) ** 0.5
    agrees = abs(ours["mean"] - mean) <= allowed
    return {"published": PUBLISHED[name], "measured": mean, "allowed": round(allowed, 2), "agrees": agrees}


def table(found: dict[str, Any]) -> str:
    """What was found, for people."""

    def line(title: str, *entries: dict[str, float] | None) -> str:
        cells = [f"{e['mean']:7.2f} +- {e['std']:4.2f} ({e['n']})" if e else "" for e in entries]
        return f"{title:38}" + "".join(f"{cell:23}" for cell in cells)

    both = ("first_200", "random_200")
    lines = ["test accuracy in % over runs: first 200, random 200"]
    lines += [line(title, *(found[name].get(which) for which in both)) for name, title in METHODS.items()]
    lines += ["gain in points, paired by run"]
    lines += [line(name, *(gain[which] for which in both)) for name, gain in found["gains"].items()]
    lines += ["depth of the best cut in % of the network; in how many runs transfer helps beyond the noise"]
    lines += [line(name, d["best_cut_depth"]) + str(d["transfer_helps"]) for name, d in found["depth"].items()]
    lines += ["depth curves, cross-validated on the 200, in %"]
    lines += [
        f"{name}: " + ", ".join(f"{cut} {entry['mean']:.1f}" for cut, entry in d["cuts"].items())
        for name, d in found["depth"].items()
    ]
    lines += [f"{name}: {json.dumps(facts)}" for name, facts in found["book"].items()]
    lines += [line(f"seconds, {name}", seconds) for name, seconds in found["seconds"].items()]
    return "\n".join([*lines, *found.get("left_out", [])])


def figure(found: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """SVG: every run of every method as a dot, full for the first 200 and hollow for random draws; bars are means."""
    low, high, left, wide, row = 86, 98, 290, 570, 34
    bottom = 40 + row * len(METHODS)

    def at(value: float) -> str:
        return f"{left + (min(max(value, low), high) - low) / (high - low) * wide:.1f}"

    out = [f'<text x="{left}" y="20">test accuracy in %: one dot a run (full: first 200, hollow: random 200)</text>']
    for tick in range(low, high + 1):
        out.append(f'<path d="M{at(tick)} 30V{bottom}" stroke="#ddd"/>')
        out.append(f'<text x="{at(tick)}" y="{bottom + 16}" text-anchor="middle">{tick}</text>')
    for y, (name, title) in zip(range(50, bottom, row), METHODS.items(), strict=False):
        out.append(f'<text x="{left - 12}" y="{y + 8}" text-anchor="end">{title}</text>')
        for which, fill, line in (("first_200", "#246", y), ("random_200", "none", y + 11)):
            for value in (run[which][name] for run in runs if name in run[which]):
                out.append(f'<circle cx="{at(value)}" cy="{line}" r="3.5" fill="{fill}" stroke="#246"/>')
            if which in found[name]:
                out.append(
                    f'<path d="M{at(found[name][which]["mean"])} {line - 6}v12" stroke="#c30" stroke-width="3"/>'
                )
        if name in PUBLISHED:
            out.append(
                f'<path d="M{at(PUBLISHED[name])} {y}m-5 -5l10 10m0 -10l-10 10" stroke="#c30" stroke-width="2"/>'
            )
    legend = f"bars: means; crosses: the one run that the book shows; at the left edge: {low} or less"
    out.append(f'<text x="{left}" y="{bottom + 36}">{legend}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="890" height="{bottom + 50}" font-family="sans-serif"'
    return "\n".join([head + ' font-size="13"><rect width="100%" height="100%" fill="white"/>', *out, "</svg>\n"])


if __name__ == "__main__":
    sys.exit(main())
