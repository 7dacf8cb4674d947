"""What is gained by showing the network whole or larger pictures than it states?

    python bench/framing.py DATA_FOLDER [--sets clipart,icons]

At most 1,000 training pictures of each set, drawn by class; the test pictures are not touched. Each framing
has a curve of its own on the same folds; gains are paired differences from the stated one, by the nested procedure.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import regraft
from accuracy import GROUPS, REFERENCES
from never_worse import MOST, thinned
from regraft.backbone import reframed
from regraft.data import Example, load_data, read, subset
from regraft.framing import framings
from regraft.scores import Interval, paired_difference

SIZES = (224, 288, 384)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", default=",".join(REFERENCES))
    options = parser.parse_args()
    stated = regraft.load_backbone()
    whole = framings(stated.preprocess)[0][1]
    tried = {f"{kind} {size}": (kind, size) for kind in ("longest", "stretch") for size in SIZES}
    print("| set | stated | " + " | ".join(tried) + " |\n" + "|---" * (len(tried) + 2) + "|", flush=True)
    for name in options.sets.split(","):
        everything = thinned(load_data(options.data / name, group=GROUPS.get(name)), MOST, seed=0)
        dataset = subset(everything, "train", "validation")
        first = regraft.curve(dataset, stated)
        square = all(picture_is_square(example) for example in dataset.examples[:: max(1, len(dataset.examples) // 50)])
        cells = [f"{first.choice.own_hits.mean():.4f}, {first.choice.own_losses.mean():.3f}"]
        for kind, size in tried.values():
            if kind == "stretch" and square:
                cells.append("")
                continue
            spec = replace(whole, resize=kind, size=(size, size), resize_to=(size, size))
            found = regraft.curve(dataset, reframed(stated, spec))
            ours, theirs, groups = found.choice, first.choice, first.task.groups
            gain = paired_difference(ours.own_hits, theirs.own_hits, groups)
            sharper = paired_difference(theirs.own_losses, ours.own_losses, groups)
            cells.append(f"{said(gain, 100, 1)}; {said(sharper, 1, 3)}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def picture_is_square(example: Example) -> bool:
    """Whether a picture is as high as it is wide."""
    height, width = read(example).decode().pixels.shape[:2]
    return height == width


def said(gain: Interval, scale: float, places: int) -> str:
    """A paired difference, in bold where it lies above the noise."""
    text = f"{scale * gain.score:+.{places}f} ({scale * gain.low:+.{places}f} to {scale * gain.high:+.{places}f})"
    return f"**{text}**" if gain.low > 0 else text


if __name__ == "__main__":
    main()
