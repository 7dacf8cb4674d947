"""Same emoji or not? Equal-error rate of the pairs task on identities that it never saw, across vendors.

    python bench/verification.py DATA_FOLDER OUT_FOLDER [--budget 15m] [--from SPEC]

DATA_FOLDER/emoji_identity/{train,test}/IDENTITY hold 300 emoji, each drawn by several vendors; some are related, such
as merman and mermaid, and may lie on both sides. The 200 identities whose names have the lowest digests make the pairs
to learn from; on the other 100, every pair of pictures of different vendors is verified by the cosine of their features
at the last cut, standardised by those of the pictures learned from, as the method does in training. The equal-error
rate is where as many same pairs are refused as different ones are let through; its interval is a bootstrap over
identities. Raw pixels: the cosine of centred pixels at 32 x 32. Before: the backbone that pairs went on from.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import shutil
from pathlib import Path

import numpy as np
import torch

from regraft.backbone import Backbone, load_backbone
from regraft.data import Dataset, load_data, read
from regraft.frozen import as_grid, freeze_lower, values_at_cuts
from regraft.numerics import pick_numerics
from regraft.preprocess import fit_to_size, input_spec
from regraft.pretraining import pretrain

RESULTS = Path(__file__).parent / "RESULTS.md"
LEARNED = 200
DRAWS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--budget", default="15m")
    parser.add_argument("--from", dest="start", default=None)
    parser.add_argument("--develop", action="store_true", help="Hold out 50 of the 200 instead; nothing is appended.")
    options = parser.parse_args()
    source = options.data / "emoji_identity"
    names = sorted({p.name for p in source.glob("*/*")}, key=lambda n: hashlib.sha256(n.encode()).hexdigest())
    learned, judged = names[:LEARNED], names[LEARNED:]
    if options.develop:
        learned, judged = learned[:-50], learned[-50:]
    folder = options.out.parent / f"{options.out.name}-pictures"
    for part, identities in (("learned", learned), ("judged", judged)):
        for name in identities:
            for file in source.glob(f"*/{name}/*"):
                place = folder / part / name / f"{file.parent.parent.name}-{file.name}"
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
    done = pretrain(folder / "learned", method="pairs", out=options.out, start=options.start, budget=options.budget)
    pictures = load_data(folder / "judged")
    known = load_data(folder / "learned")
    rows = {"raw pixels": raw(pictures), "pairs": standardised(pictures, known, done.backbone)}
    if options.start:
        rows["before"] = standardised(pictures, known, load_backbone(options.start))
    lines = [
        f"\n## Verification of emoji, {datetime.date.today()}\n",
        f"{len(learned)} identities learned from, {len(judged)} judged, {len(pictures.examples)} pictures; "
        f"{len(done.record['losses'])} epochs in {done.record['seconds']['total']:.0f} s, "
        f"from {options.start or 'random weights'}\n",
        "| | equal-error rate | 95 % interval | ratio to raw |",
        "|---|---|---|---|",
    ]
    labels = np.array([e.label for e in pictures.examples])
    vendors = np.array([Path(e.inside).stem.rpartition("-")[2] for e in pictures.examples])
    everyone = np.arange(labels.max() + 1)
    base = equal_error(rows["raw pixels"], labels, vendors, everyone)
    for name, values in rows.items():
        rate = equal_error(values, labels, vendors, everyone)
        rng = np.random.default_rng(0)
        draws = [rng.integers(0, len(everyone), len(everyone)) for _ in range(DRAWS)]
        drawn = np.array([[equal_error(v, labels, vendors, d) for v in (values, rows["raw pixels"])] for d in draws])
        low, high = np.percentile(drawn[:, 0], [2.5, 97.5])
        least, most = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
        lines.append(
            f"| {name} | {rate:.4f} | {low:.4f} to {high:.4f} | {rate / base:.2f}, {least:.2f} to {most:.2f} |"
        )
    print("\n".join(lines))
    if not options.develop:
        with RESULTS.open("a") as file:
            file.write("\n".join(lines) + "\n")


def raw(pictures: Dataset) -> np.ndarray:
    """Unit vectors of centred pixels."""
    rows = [fit_to_size(read(e).decode().pixels, input_spec(3)).flatten().float() for e in pictures.examples]
    return unit(torch.stack(rows))


def standardised(pictures: Dataset, known: Dataset, backbone: Backbone) -> np.ndarray:
    """Unit vectors of the features, less the mean and over the deviation that those of the known pictures have."""
    here, there = features(pictures, backbone), features(known, backbone)
    return torch.nn.functional.normalize((here - there.mean(0)) / (there.std(0) + 1e-3), dim=1).numpy()


def features(pictures: Dataset, backbone: Backbone) -> torch.Tensor:
    """Their means over places at the last cut, float32 (n, dim)."""
    frozen = freeze_lower(
        backbone.trace, [backbone.shown[-1].name], backbone.preprocess, pick_numerics("cpu", "float32")
    )
    rows = []
    for i in range(0, len(pictures.examples), frozen.numerics.batch):
        some = pictures.examples[i : i + frozen.numerics.batch]
        x = torch.stack([fit_to_size(read(e).decode().pixels, backbone.preprocess) for e in some])
        grid = as_grid(values_at_cuts(frozen, x)[0], frozen.cuts[0], frozen.parts[0])
        rows.append(torch.from_numpy(grid.astype(np.float32)).mean(1))
    return torch.cat(rows)


def unit(x: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(x - x.mean(1, keepdim=True), dim=1).numpy()


def equal_error(values: np.ndarray, labels: np.ndarray, vendors: np.ndarray, identities: np.ndarray) -> float:
    """The equal-error rate over pairs of different vendors. identities: some may stand there several times.

    Such copies are not held to be different from each other, and count each as same.
    """
    alike = values @ values.T
    counts = np.bincount(identities, minlength=labels.max() + 1).astype(np.float64)
    first, second = np.triu_indices(len(labels), 1)
    kept = vendors[first] != vendors[second]
    first, second = first[kept], second[kept]
    same = labels[first] == labels[second]
    weight = np.where(same, counts[labels[first]], counts[labels[first]] * counts[labels[second]])
    order = np.argsort(-alike[first, second], kind="stable")
    same, weight = same[order], weight[order]
    refused = 1 - np.cumsum(weight * same) / (weight * same).sum()
    passed = np.cumsum(weight * ~same) / (weight * ~same).sum()
    at = int(np.argmin(np.abs(refused - passed)))
    return float((refused[at] + passed[at]) / 2)


if __name__ == "__main__":
    main()
