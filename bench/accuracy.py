"""Test accuracy of `regraft fit` on real data sets, against two reference heads.

    python bench/accuracy.py DATA_FOLDER [--sets photos,elpv] [--seeds 3] [--budget 0trials] [--note TEXT]

DATA_FOLDER/SET/train/CLASS and DATA_FOLDER/SET/test/CLASS hold the pictures. Everything is chosen by cross-validation
on train/; nothing is chosen on test/. Each run appends a dated row per set to bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from pathlib import Path

import regraft

# Logistic regression on at most 700 training pictures: on the last layer's features, and on 32 x 32 raw pixels.
REFERENCES = {
    "photos": (0.937, 0.450),
    "silhouettes": (0.949, 0.694),
    "emoji": (0.751, 0.466),
    "elpv": (0.834, 0.789),
    "clipart": (0.748, 0.395),
    "icons": (0.668, 0.487),
    "fashion": (0.851, 0.771),
    "mnist10k": (0.886, 0.829),
    "digits": (0.891, 0.946),
}
GROUPS = {"emoji": r"([^/]+)-[^-]+$", "icons": r"([^/]+)-[^-]+$", "clipart": r"([^/]+?)[_\d]*\.png$"}
RESULTS = Path(__file__).parent / "RESULTS.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", default=",".join(REFERENCES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", default="0trials", help="0trials: frozen layers only")
    parser.add_argument("--note", default="")
    options = parser.parse_args()
    rows = [measure(options.data, name, options.seeds, options.budget) for name in options.sets.split(",")]
    write(rows, options.note)


def measure(data: Path, name: str, seeds: int, budget: str) -> dict[str, object]:
    """Fit with each seed; the accuracy of the saved models on test/."""
    found, stated, seconds, chosen, error, pictures = [], [], [], [], [], 0
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            run = regraft.fit(data / name, out=folder, group=GROUPS.get(name), seed=seed, budget=budget)
            seconds.append(time.perf_counter() - started)
        found.append(run.record["test"]["accuracy"])
        stated.append(run.record["chosen"]["score"]["score"])
        error.append(run.record["test"]["calibration_error"])
        chosen.append(run.record["chosen"]["name"])
        pictures = run.record["test"]["pictures"]
        print(
            name, seed, f"test {found[-1]:.4f} stated {stated[-1]:.4f} in {seconds[-1]:.1f} s:", chosen[-1], flush=True
        )
    return {
        "set": name,
        "test": statistics.mean(found),
        "seeds": found,
        "stated": statistics.mean(stated),
        "ece": statistics.mean(error),
        "pictures": pictures,
        "seconds": seconds,
        "chosen": sorted(set(chosen)),
    }


def write(rows: list[dict[str, object]], note: str) -> None:
    """Append the table to bench/RESULTS.md and print it."""
    lines = [f"\n## Accuracy, {datetime.date.today()}, regraft {regraft.__version__}{', ' + note if note else ''}\n"]
    lines.append("| set | test | stated on train | larger reference | noise (2 se) | ECE | s per seed | chosen |")
    lines.append("|---|---|---|---|---|---|---|---|")
    for r in rows:
        test, n = float(r["test"]), int(r["pictures"])  # type: ignore[arg-type]
        noise = 2 * (test * (1 - test) / n) ** 0.5
        spent = ", ".join(f"{s:.0f}" for s in r["seconds"])  # type: ignore[union-attr]
        chosen = "; ".join(str(c) for c in r["chosen"])  # type: ignore[union-attr]
        lines.append(
            f"| {r['set']} | {test:.4f} | {r['stated']:.4f} | {max(REFERENCES[str(r['set'])]):.3f} | {noise:.3f} "
            f"| {r['ece']:.3f} | {spent} | {chosen} |"
        )
    mean = statistics.mean(float(r["test"]) for r in rows)  # type: ignore[arg-type]
    reference = statistics.mean(REFERENCES[str(r["set"])][0] for r in rows)
    lines.append(f"\nMean {mean:.4f}, features column {reference:.4f}, gain {100 * (mean - reference):+.1f} points.")
    print("\n".join(lines))
    with RESULTS.open("a") as f:
        f.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
