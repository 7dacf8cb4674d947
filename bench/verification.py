"""Same emoji or not? Equal-error rate of the pairs task on identities that it never saw, across vendors.

    python bench/verification.py DATA_FOLDER OUT_FOLDER [--budget 15m] [--from SPEC]

DATA_FOLDER/emoji_identity/{train,test}/IDENTITY hold 300 emoji, each drawn by several vendors. The 200 identities whose
names have the lowest digests make the pairs to learn from; on the other 100, every pair of pictures of different vendors is
verified by the cosine of their features at the last cut. The equal-error rate is where as many same pairs are refused as
different ones are let through; its interval is a bootstrap over identities. Raw pixels: the cosine of centred pixels at
32 x 32.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from regraft.backbone import Backbone, load_backbone
from regraft.data import Dataset, load_data, read
from regraft.frozen import as_grid, freeze_lower, values_at_cuts
from regraft.numerics import pick_numerics
from regraft.pretrain import pretrain
from regraft.preprocess import fit_to_size, input_spec

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
    with tempfile.TemporaryDirectory() as folder:
        for part, identities in (("learned", learned), ("judged", judged)):
            for name in identities:
                for file in source.glob(f"*/{name}/*"):
                    place = Path(folder, part, name, f"{file.parent.parent.name}-{file.name}")
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, place)
        done = pretrain(
            Path(folder, "learned"), method="pairs", out=options.out, start=options.start, budget=options.budget
        )
        pictures = load_data(Path(folder, "judged"))
        rows = {"raw pixels": raw(pictures), "pairs": features(pictures, done.backbone)}
        if options.start:
            rows["before"] = features(pictures, load_backbone(options.start))
    lines = [
        f"\n## Verification of emoji, {datetime.date.today()}\n",
        f"{len(learned)} identities learned from, {len(judged)} judged, {len(pictures.examples)} pictures; "
        f"{len(done.record['losses'])} epochs in {done.record['seconds']['total']:.0f} s, from {options.start or 'random'}\n",
        "| | equal-error rate | 95 % interval | ratio to raw |",
        "|---|---|---|---|",
    ]
    labels = np.array([e.label for e in pictures.examples])
    base = equal_error(rows["raw pixels"], labels)
    for name, values in rows.items():
        rate, drawn = equal_error(values, labels), bootstrapped(values, labels, rows["raw pixels"])
        low, high = np.percentile(drawn[:, 0], [2.5, 97.5])
        least, most = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
        lines.append(f"| {name} | {rate:.4f} | {low:.4f} to {high:.4f} | {rate / base:.2f}, {least:.2f} to {most:.2f} |")
    print("\n".join(lines))
    if not options.develop:
        with RESULTS.open("a") as file:
            file.write("\n".join(lines) + "\n")


def raw(pictures: Dataset) -> np.ndarray:
    """Unit vectors of centred pixels."""
    rows = [fit_to_size(read(e).decode().pixels, input_spec(3)).flatten().float() for e in pictures.examples]
    return unit(torch.stack(rows))


def features(pictures: Dataset, backbone: Backbone) -> np.ndarray:
    """Unit vectors of the means at the last cut."""
    frozen = freeze_lower(backbone.trace, [backbone.shown[-1].name], backbone.preprocess, pick_numerics("cpu", "float32"))
    rows = []
    for i in range(0, len(pictures.examples), frozen.numerics.batch):
        some = pictures.examples[i : i + frozen.numerics.batch]
        x = torch.stack([fit_to_size(read(e).decode().pixels, backbone.preprocess) for e in some])
        grid = as_grid(values_at_cuts(frozen, x)[0], frozen.cuts[0], frozen.parts[0])
        rows.append(torch.from_numpy(grid.astype(np.float32)).mean(1))
    x = torch.cat(rows)
    return torch.nn.functional.normalize(x, dim=1).numpy()


def unit(x: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(x - x.mean(1, keepdim=True), dim=1).numpy()


def equal_error(values: np.ndarray, labels: np.ndarray) -> float:
    """The equal-error rate over all pairs of different pictures (identities have one picture of each vendor)."""
    alike = values @ values.T
    first, second = np.triu_indices(len(labels), 1)
    same = labels[first] == labels[second]
    scores = alike[first, second]
    order = np.argsort(-scores, kind="stable")
    refused = 1 - np.cumsum(same[order]) / same.sum()
    passed = np.cumsum(~same[order]) / (~same).sum()
    at = int(np.argmin(np.abs(refused - passed)))
    return float((refused[at] + passed[at]) / 2)


def bootstrapped(values: np.ndarray, labels: np.ndarray, raw_values: np.ndarray) -> np.ndarray:
    """Rates of draws of identities with replacement, ours and of raw pixels, (draws, 2).

    A drawn twice identity counts as two.
    """
    rng = np.random.default_rng(0)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    out = []
    for _ in range(DRAWS):
        drawn = rng.integers(0, len(members), len(members))
        rows = np.concatenate([members[i] for i in drawn])
        named = np.concatenate([np.full(len(members[i]), k) for k, i in enumerate(drawn)])
        out.append((without_copies(values, rows, named), without_copies(raw_values, rows, named)))
    return np.array(out)


def without_copies(values: np.ndarray, rows: np.ndarray, named: np.ndarray) -> float:
    """The rate on drawn rows, leaving out pairs of a picture with itself and of two copies of one identity."""
    alike = values[rows] @ values[rows].T
    first, second = np.triu_indices(len(rows), 1)
    scores, same = alike[first, second], named[first] == named[second]
    kept = same | (scores < 0.9999999)
    order = np.argsort(-scores[kept], kind="stable")
    same = same[kept][order]
    refused, passed = 1 - np.cumsum(same) / same.sum(), np.cumsum(~same) / (~same).sum()
    at = int(np.argmin(np.abs(refused - passed)))
    return float((refused[at] + passed[at]) / 2)


if __name__ == "__main__":
    main()
