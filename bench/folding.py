"""What folding batch norm gains: forward passes of a network before and after, in turn.

    python bench/folding.py [NAME ...] [--rounds 9]

Random weights, float32, batches of 8 pictures of 224 x 224, channels last. Prints medians, ratios and the difference.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from regraft.graph import trace
from regraft.networks.timm_networks import create
from regraft.nn import fold_batchnorm, unfolded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["tf_efficientnet_lite0", "resnet18", "densenet121"])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    x = torch.randn(8, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    print("| network | norms left | whole, ms | folded, ms | ratio | relative difference |\n|---|---|---|---|---|---|")
    for name in options.names:
        traced = trace(create(name, pretrained=False).to(memory_format=torch.channels_last), x[:2])
        folded = fold_batchnorm(traced.module, traced.graph)
        left = len(unfolded(traced.module, traced.graph))
        times: tuple[list[float], list[float]] = ([], [])
        with torch.inference_mode():
            difference = (traced.module(x) - folded(x)).abs().max() / traced.module(x).abs().max()
            for _ in range(options.rounds):
                for module, taken in zip((traced.module, folded), times, strict=True):
                    started = time.perf_counter()
                    module(x)
                    taken.append(1000 * (time.perf_counter() - started))
        whole, less = map(statistics.median, times)
        print(f"| {name} | {left} | {whole:.0f} | {less:.0f} | {whole / less:.2f} | {difference:.0e} |")


if __name__ == "__main__":
    main()
