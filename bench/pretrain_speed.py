"""What the training loop adds to a bare step: pictures per second of each method, and the same loss in a plain loop.

    python bench/pretrain_speed.py DATA_FOLDER [--steps 20] [--rounds 5]

DATA_FOLDER/fashion/train/CLASS holds pictures of 28 x 28. The bare step: batches that lie ready as floats, loss,
backward, torch's AdamW, nothing else. Ours: `training.train` as `pretrain` calls it, with batches drawn, converted,
clipped gradients, learning rates and the check for a finite loss. Both in turn in one process; the median ratio of the
rounds.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from regraft.allocator import memory_kept
from regraft.cut import split
from regraft.data import load_data, subset
from regraft.methods import METHODS, VIEWS, Batch, Encoder, Task
from regraft.prepared import Pictures, prepare
from regraft.pretrain_steps import Work, batches_of_epoch
from regraft.pretraining import begin, cut_for
from regraft.training import Plan, Stage, train

RESULTS = Path(__file__).parent / "RESULTS.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    pictures = prepare(subset(load_data(options.data / "fashion"), "train"))
    lines = [
        f"\n## Steps of pretraining, {datetime.date.today()}\n",
        f"{torch.get_num_threads()} threads, pictures of 28 x 28, {options.steps} steps, {options.rounds} rounds\n",
        "| method | pictures per second | time against a bare step |",
        "|---|---|---|",
    ]
    for method in METHODS:
        rate, ratio = measured(method, pictures, options.steps, options.rounds)
        lines.append(f"| {method} | {rate:,.0f} | {ratio:.2f} |")
        print(lines[-1], flush=True)
    with RESULTS.open("a") as file:
        file.write("\n".join(lines) + "\n")


def measured(method: str, pictures: Pictures, steps: int, rounds: int) -> tuple[float, float]:
    """Pictures per second in our loop, and the median over rounds of its time over that of the bare loop."""
    work = work_of(method, pictures)
    plan, stages = work.learner.plan, [Stage("all", tuple(work.modules.parameters()))]
    rates = Plan(1, plan.lr, plan.warmup, plan.weight_decay, plan.clipping, plan.falls, plan.rule, plan.betas)
    ready = list(batches_of_epoch(work, 0, 1, steps))
    begun = copy.deepcopy(work.modules.state_dict())
    ours, bare = [], []

    def batches(epoch: int) -> Iterator[Batch]:
        return batches_of_epoch(work, epoch, 1, steps)

    with memory_kept():
        for _ in range(rounds + 1):
            at = time.perf_counter()
            train(stages, rates, batches, steps, work.learner.loss, seed=0)
            ours.append(time.perf_counter() - at)
            work.modules.load_state_dict(begun)
            optimizer = torch.optim.AdamW(work.modules.parameters(), 1e-4)
            at = time.perf_counter()
            for batch in ready:
                loss = work.learner.loss(batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            bare.append(time.perf_counter() - at)
            work.modules.load_state_dict(begun)
    seen = sum(len(batch.labels) for batch in ready)
    return seen / statistics.median(ours[1:]), statistics.median(a / b for a, b in zip(ours[1:], bare[1:], strict=True))


def work_of(method: str, pictures: Pictures) -> Work:
    """What `pretrain` trains."""
    backbone = begin("dense-500-250" if method == "rbm" else "small", pictures.preprocess, sigmoid=method == "rbm")
    cut = cut_for(backbone, method)
    encoder = Encoder(split(backbone.trace, cut.name)[0].requires_grad_(True), cut, pictures.preprocess)
    learner = METHODS[method](encoder, Task(10, frozenset(VIEWS)))
    work = Work(method, learner, encoder, pictures, 0, "cpu", begun_from=False)
    work.modules.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    return work


if __name__ == "__main__":
    main()
