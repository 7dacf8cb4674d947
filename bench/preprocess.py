"""Preparation against timm's evaluation transform, on real photographs.

    python bench/preprocess.py PHOTO_FOLDER [--pictures 200]

From the decoded RGB array on: the largest and the mean difference in grey levels. Decoding: share of files whose pixels
equal PIL's.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import numpy as np
from PIL import Image

from regraft.backbone import load_backbone
from regraft.pictures import decode
from regraft.preprocess import fit_to_size

RESULTS = Path(__file__).parent / "RESULTS.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--pictures", type=int, default=200)
    options = parser.parse_args()
    backbone = load_backbone()
    import timm.data  # only now: load_backbone has made it importable beside a CPU build of torch

    config = timm.data.resolve_data_config({}, model=backbone.module)
    transform = timm.data.create_transform(**config)
    largest, means, equal = 0.0, [], 0
    files = sorted(p for p in options.photos.rglob("*") if p.is_file())[: options.pictures]
    for file in files:
        ours = decode(file.read_bytes(), where=file.name).pixels
        theirs = Image.open(file)
        rgb = theirs.convert("RGB")
        equal += np.array_equal(np.broadcast_to(ours, (*ours.shape[:2], 3)), np.asarray(rgb))
        mean, std = (np.array(config[k]).reshape(3, 1, 1) for k in ("mean", "std"))
        reference = (transform(rgb).numpy() * std + mean) * 255
        difference = np.abs(fit_to_size(ours, backbone.preprocess).numpy() - reference.round())
        largest, means = max(largest, float(difference.max())), [*means, float(difference.mean())]
    line = (
        f"\n## Preparation, {datetime.date.today()}\n\n{len(files)} photographs: largest difference {largest:.0f} grey "
        f"levels, mean {np.mean(means):.4f}; decoded pixels equal PIL's for {equal} of {len(files)}."
    )
    print(line)
    with RESULTS.open("a") as f:
        f.write(line + "\n")


if __name__ == "__main__":
    main()
