"""How much regraft's care costs: the same kernels in a bare script, in turn, in one process each.

    python bench/speed.py PHOTO_FOLDER [--rounds 3] [--pictures 1000]

1,000 photographs of 640 x 480 (made once from PHOTO_FOLDER/train) through 10 cuts and `input`: decode, forward, solves.
`bare` decodes with simplejpeg, resizes, runs the folded bfloat16 channels_last network in batches of 8 (its best) and
solves one ridge head per cut; no store, no checks, no cross-validation, no intervals. Prints medians and the ratio.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"
CUTS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--only", choices=["bare", "regraft"])
    options = parser.parse_args()
    if options.only:
        print(json.dumps(bare(options.photos) if options.only == "bare" else ours(options.photos)))
        return
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "photos"
        make_photographs(options.photos, made, options.pictures)
        rounds: dict[str, list[dict[str, float]]] = {"bare": [], "cold": [], "warm": []}
        for i in range(options.rounds):
            cache = str(Path(folder) / f"cache{i}")
            rounds["bare"].append(child("bare", made, cache))
            rounds["cold"].append(child("regraft", made, cache))
            rounds["warm"].append(child("regraft", made, cache))
    write(rounds, options.pictures)


def child(which: str, photos: Path, cache: str) -> dict[str, float]:
    """One run in a process of its own: stages in seconds."""
    command = [sys.executable, __file__, str(photos), "--only", which]
    done = subprocess.run(command, env={**os.environ, "REGRAFT_CACHE": cache}, capture_output=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def make_photographs(source: Path, target: Path, count: int) -> None:
    """`count` JPEG files of 640 x 480, quality 90, each another crop of a real photograph, in its class folder."""
    import numpy as np
    from PIL import Image

    files = sorted(source.glob("train/*/*"))
    rng = np.random.default_rng(0)
    for i in range(count):
        file = files[i % len(files)]
        picture = Image.open(file).convert("RGB")
        share = rng.uniform(0.7, 1)
        left, top = rng.uniform(0, 1 - share, 2) * picture.size
        box = (left, top, left + share * picture.width, top + share * picture.height)
        folder = target / file.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        picture.resize((640, 480), Image.Resampling.BICUBIC, box).save(folder / f"{i}.jpg", quality=90)


def ours(photos: Path) -> dict[str, float]:
    """extract and probe as `fit` does."""
    import numpy as np

    from regraft.backbone import load_backbone
    from regraft.data import load_data
    from regraft.depth_curve import faithful_numerics
    from regraft.features import extract
    from regraft.learned import task_of
    from regraft.probe import Bench, all_grey
    from regraft.search import choose, run_trials
    from regraft.store import open_store

    started = time.perf_counter()
    backbone = load_backbone()
    numerics, agreement = faithful_numerics(backbone, "auto")
    cuts = [(c.name, c.depth) for c in spaced(backbone.shown)]
    loaded = time.perf_counter()
    dataset = load_data(photos)
    table = extract(dataset, backbone, [name for name, _ in cuts], open_store(), numerics)
    extracted = time.perf_counter()
    chosen = np.arange(len(table.ids))
    bench = Bench(table, chosen, all_grey(table, chosen))
    task = task_of(table, chosen, len(dataset.labels), 0)
    trials = run_trials(bench, task, cuts)
    probed = time.perf_counter()
    choose(trials, task)
    return {
        "load": loaded - started,
        "features": extracted - loaded,
        "solves": probed - extracted,
        "choice": time.perf_counter() - probed,
        "total": time.perf_counter() - loaded,
        "agreement": agreement,
    }


def bare(photos: Path) -> dict[str, float]:
    """The least that can be done with the same kernels."""
    import simplejpeg
    import torch
    import torch.nn.functional as F

    from regraft.backbone import load_backbone
    from regraft.frozen import freeze_lower, pooled
    from regraft.numerics import pick_numerics
    from regraft.preprocess import fit_to_size, normalise

    backbone = load_backbone()
    names = [c.name for c in spaced(backbone.shown)]
    frozen = freeze_lower(backbone.trace, names, backbone.preprocess, pick_numerics())
    files = sorted(photos.glob("*/*.jpg"))
    classes = sorted({f.parent.name for f in files})
    targets = F.one_hot(torch.tensor([classes.index(f.parent.name) for f in files])).float()
    started = time.perf_counter()
    pictures = [fit_to_size(simplejpeg.decode_jpeg(f.read_bytes()), backbone.preprocess) for f in files]
    decoded = time.perf_counter()
    rows: list[list[torch.Tensor]] = [[] for _ in names]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for i in range(0, len(pictures), 8):
            x = normalise(torch.stack(pictures[i : i + 8]), backbone.preprocess)
            values = frozen.module(x.contiguous(memory_format=torch.channels_last))
            for kept, value, cut, parts in zip(rows, values, frozen.cuts, frozen.parts, strict=True):
                kept.append(pooled(value, cut, parts).flatten(1))
    forwarded = time.perf_counter()
    for kept in rows:
        x = torch.cat(kept)
        x = (x - x.mean(0)) / (x.std(0) + 1e-3)
        gram = x @ x.T / x.shape[1] + 0.1 * torch.eye(len(x))
        x.T @ torch.linalg.solve(gram, targets)
    solved = time.perf_counter()
    return {
        "decode": decoded - started,
        "forward": forwarded - decoded,
        "solves": solved - forwarded,
        "total": solved - started,
    }


def spaced(cuts: tuple) -> list:  # type: ignore[type-arg]
    """CUTS of the shown cuts, evenly, the deepest among them."""
    return [cuts[round(i * (len(cuts) - 1) / (CUTS - 1))] for i in range(CUTS)]


def write(rounds: dict[str, list[dict[str, float]]], pictures: int) -> None:
    """Print the medians and append them to bench/RESULTS.md."""
    median = {k: {s: statistics.median(r[s] for r in v) for s in v[0]} for k, v in rounds.items()}
    lines = [f"\n## Speed, {datetime.date.today()}, {pictures} photographs of 640 x 480, {CUTS} cuts and input\n"]
    lines += ["| run | stages, s (medians) | total |", "|---|---|---|"]
    for name, stages in median.items():
        listed = ", ".join(f"{s} {v:.2f}" for s, v in stages.items() if s not in ("total", "agreement"))
        lines.append(f"| {name} | {listed} | {stages['total']:.2f} |")
    ratios = [c["total"] / b["total"] for c, b in zip(rounds["cold"], rounds["bare"], strict=True)]
    warm = [c["features"] / w["features"] for c, w in zip(rounds["cold"], rounds["warm"], strict=True)]
    whole = [c["total"] / w["total"] for c, w in zip(rounds["cold"], rounds["warm"], strict=True)]
    lines.append(
        f"\ncold / bare, pair by pair: {', '.join(f'{r:.2f}' for r in ratios)}; features cold / warm: "
        f"{', '.join(f'{r:.0f}' for r in warm)}; total cold / warm: {', '.join(f'{r:.1f}' for r in whole)}; "
        f"least cosine of bfloat16 with float32 over the cuts {median['cold']['agreement']:.4f}."
    )
    print("\n".join(lines))
    with RESULTS.open("a") as f:
        f.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
