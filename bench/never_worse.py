"""Is the search ever worse than what people would run instead? Nine sets, at most 1,000 training pictures each.

    python bench/never_worse.py DATA_FOLDER [--sets photos,elpv] [--seeds 3] [--budget 5m] [--rivals regraft,probe]
    python bench/never_worse.py --table

DATA_FOLDER/SET/{train,test}/CLASS hold the pictures; training pictures are drawn by class from the seed, all test
pictures are judged. One row is appended to never_worse.jsonl for each finished run, and what is there is not run again,
so the bench can be stopped at any time. Rivals, all from the same weights:

    probe        regraft's own probe, nothing trained beyond it (`--budget 0trials`)
    everything   all layers trained for 5 epochs
    fastai       the new head for 1 epoch, then all layers for 5 at discriminative rates, as fastai's `fine_tune(5)`
    scratch      a small network from random weights on pictures of 32 x 32, 40 epochs; so few pictures teach it more
                 than they teach the large one, of which 15 epochs got .47 of photos right

The rivals are plain torch in float32, with random crops and mirrored pictures drawn anew in every epoch (no mirroring
for digits), AdamW, one cycle, label smoothing .1. Their rates are the usual ones, not tuned on any of these sets.
"""

from __future__ import annotations

import argparse
import base64
import datetime
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import regraft
from accuracy import GROUPS, REFERENCES
from kept import Row, append, rows
from regraft.allocator import memory_kept
from regraft.data import Dataset, load_data, read, subset
from regraft.networks.embedded import EMBEDDED, load_embedded_weights
from regraft.networks.small import FEATURES, small_network
from regraft.preprocess import fit_to_size, input_spec, normalise
from regraft.scores import paired_difference

KEY = ("set", "seed", "rival")
RIVALS = ("probe", "everything", "fastai", "scratch")
MOST = 1000
BATCH = 32
NOT_MIRRORED = ("digits", "mnist10k")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--sets", default=",".join(REFERENCES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", default="5m")
    parser.add_argument("--rivals", default=",".join(("regraft", *RIVALS)))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table or options.data is None:
        print(table(rows("never_worse", KEY)))
        return
    for seed in range(options.seeds):
        for name in options.sets.split(","):
            for rival in options.rivals.split(","):
                if (name, seed, rival) not in rows("never_worse", KEY):
                    run(options.data / name, name, seed, rival, options.budget)


def run(place: Path, name: str, seed: int, rival: str, budget: str) -> None:
    """One run, from files to test score; its row is appended."""
    dataset = thinned(load_data(place, group=GROUPS.get(name)), MOST, seed)
    tested = subset(dataset, "test")
    started = time.perf_counter()
    facts: dict[str, object] = {}
    if rival in ("regraft", "probe"):
        with tempfile.TemporaryDirectory() as folder:
            asked = budget if rival == "regraft" else "0trials"
            fitted = regraft.fit(dataset, out=folder, seed=seed, budget=asked)
            seconds = time.perf_counter() - started
            known = {label: i for i, label in enumerate(fitted.model.labels)}
            answers = fitted.model.answers(tested.examples)
            hits = [
                int(answer.probabilities.argmax()) == known[tested.labels[example.label]]  # type: ignore[union-attr]
                for example, answer in zip(tested.examples, answers, strict=True)
            ]
            facts = {"chosen": fitted.record["chosen"]["name"], "stated": fitted.record["chosen"]["score"]["score"]}
            facts["framing"] = fitted.record["framing"]["chosen"]
            facts["tried"] = {a["name"]: [a["status"], a["gain"]] for a in fitted.record["ladder"]["attempts"]}
    else:
        with memory_kept():
            hits = train_rival(dataset, rival, seed, mirrored=name not in NOT_MIRRORED)
        seconds = time.perf_counter() - started
    row = {"set": name, "seed": seed, "rival": rival, "accuracy": float(np.mean(hits)), "seconds": round(seconds, 1)}
    row |= {"date": str(datetime.date.today()), "pictures": len(hits), **facts}
    row["hits"] = base64.b64encode(np.packbits(np.array(hits, bool)).tobytes()).decode()
    append("never_worse", row)
    print(name, seed, rival, f"{row['accuracy']:.4f} in {seconds:.0f} s", facts.get("chosen", ""), flush=True)


def thinned(dataset: Dataset, most: int, seed: int) -> Dataset:
    """At most so many training pictures, drawn by class; all test pictures."""
    learned = [e for e in dataset.examples if e.split != "test"]
    rest = tuple(e for e in dataset.examples if e.split == "test")
    if len(learned) > most:
        rng = np.random.default_rng(seed)
        by_class = [[e for e in learned if e.label == c] for c in range(len(dataset.labels))]
        counts = [max(2, round(most * len(members) / len(learned))) for members in by_class]
        learned = [m[i] for m, k in zip(by_class, counts, strict=True) for i in sorted(rng.permutation(len(m))[:k])]
    return replace(dataset, examples=(*learned, *rest))


def train_rival(dataset: Dataset, rival: str, seed: int, *, mirrored: bool) -> list[bool]:
    """Train the whole network with plain torch; whether each test picture is answered right."""
    spec = regraft.load_backbone().preprocess  # this declares what torchvision lacks beside the CPU build of torch
    import timm

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    if rival == "scratch":
        spec, head = input_spec(3), nn.Linear(FEATURES, len(dataset.labels))
        model: nn.Module = nn.Sequential(small_network(3), head)
    else:
        model = timm.create_model(EMBEDDED, num_classes=1000)
        load_embedded_weights(model)
        model.reset_classifier(len(dataset.labels))
        head = model.get_classifier()
    model = model.to(memory_format=torch.channels_last)
    learned, tested = subset(dataset, "train", "validation").examples, subset(dataset, "test").examples
    most = 64 if rival == "scratch" else 512
    pictures = [shrunk(read(e).decode().pixels, most) for e in learned]
    labels = torch.tensor([e.label for e in learned])
    top = [*head.parameters()]
    body = [p for p in model.parameters() if all(p is not q for q in top)]

    def epochs(count: int, rates: tuple[float, float], *, frozen: bool) -> None:
        for p in body:
            p.requires_grad_(not frozen)
        groups = [{"params": top, "lr": rates[0]}, {"params": [] if frozen else body, "lr": rates[1]}]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.01)
        steps = -(-len(learned) // BATCH)
        most = [g["lr"] for g in optimizer.param_groups]
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, most, total_steps=count * steps, pct_start=0.25)
        for _ in range(count):
            model.train()
            for chosen in np.array_split(rng.permutation(len(learned)), steps):
                x = torch.stack([fit_to_size(varied(pictures[i], rng, mirrored), spec) for i in chosen])
                out = model(normalise(x, spec).contiguous(memory_format=torch.channels_last))
                loss = nn.functional.cross_entropy(out, labels[chosen], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                cycle.step()

    if rival == "fastai":
        epochs(1, (2e-3, 0.0), frozen=True)
        epochs(5, (1e-3, 1e-4), frozen=False)
    elif rival == "everything":
        epochs(5, (1e-3, 1e-3), frozen=False)
    else:
        epochs(40, (3e-3, 3e-3), frozen=False)
    model.eval()
    hits: list[bool] = []
    with torch.inference_mode():
        for i in range(0, len(tested), BATCH):
            some = tested[i : i + BATCH]
            x = torch.stack([fit_to_size(read(e).decode().pixels, spec) for e in some])
            said = model(normalise(x, spec).contiguous(memory_format=torch.channels_last)).argmax(1)
            hits += [int(s) == e.label for s, e in zip(said, some, strict=True)]
    return hits


def shrunk(pixels: np.ndarray, most: int) -> np.ndarray:
    """The picture with no side longer than `most`, in its shape: large ones are not shrunk anew in every epoch."""
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    picture.thumbnail((most, most), Image.Resampling.BILINEAR)
    return np.array(picture).reshape(picture.height, picture.width, -1)


def varied(pixels: np.ndarray, rng: np.random.Generator, mirrored: bool) -> np.ndarray:
    """A random part of at least 35 % of the area, as fastai's RandomResizedCrop, mirrored half of the time."""
    height, width = pixels.shape[:2]
    side, shape = rng.uniform(0.35, 1) ** 0.5, np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    rows_, columns = (max(1, min(n, round(n * side * f))) for n, f in ((height, shape**0.5), (width, shape**-0.5)))
    top, left = rng.integers(0, height - rows_ + 1), rng.integers(0, width - columns + 1)
    part = pixels[top : top + rows_, left : left + columns]
    return np.ascontiguousarray(part[:, ::-1] if mirrored and rng.random() < 0.5 else part)


def table(by: dict[tuple[object, ...], Row]) -> str:
    """Means by set, and regraft minus probe with its paired interval, for the runs that are there."""
    lines = ["| set | seeds | regraft | " + " | ".join(RIVALS) + " | regraft - probe, points |", "|---" * 8 + "|"]
    means: dict[str, list[float]] = {rival: [] for rival in ("regraft", *RIVALS)}
    for name in REFERENCES:
        seeds = sorted(seed for s, seed, rival in by if s == name and rival == "regraft")  # type: ignore[type-var]
        cells = []
        for rival in ("regraft", *RIVALS):
            scores = [float(by[name, seed, rival]["accuracy"]) for seed in seeds if (name, seed, rival) in by]  # type: ignore[arg-type]
            cells.append(f"{statistics.mean(scores):.4f} ({len(scores)})" if scores else "")
            means[rival] += [statistics.mean(scores)] if scores else []
        both = [(by[name, s, "regraft"], by[name, s, "probe"]) for s in seeds if (name, s, "probe") in by]
        if both:
            ours, theirs = (np.mean([_hits(pair[k]) for pair in both], 0) for k in (0, 1))
            gain = paired_difference(ours, theirs, np.arange(len(ours)))
            cells.append(f"{100 * gain.score:+.2f} ({100 * gain.low:+.2f} to {100 * gain.high:+.2f})")
        if any(cells):
            lines.append(f"| {name} | {len(seeds)} | " + " | ".join(cells) + " |")
    lines.append("| mean | | " + " | ".join(f"{statistics.mean(m):.4f}" if m else "" for m in means.values()) + " | |")
    return "\n".join(lines)


def _hits(row: Row) -> np.ndarray:
    packed = np.frombuffer(base64.b64decode(str(row["hits"])), np.uint8)
    return np.unpackbits(packed)[: int(row["pictures"])].astype(np.float64)  # type: ignore[call-overload]


if __name__ == "__main__":
    main()
