"""What each objective costs: a training step of the same network, by turns.

    python examples/benchmarks/objectives.py
    python examples/benchmarks/objectives.py --out-dim 65536 --device cuda --image-size 224

Half of the student's global views hide 30 % of their patches in all of them. What counts is the
ratio of medians; the batch is 16 images of two global and six local views.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from timing import by_turns, faster, machine, seconds, table

import maskdistill as md
from maskdistill.training import StepSettings, TrainingConfig, train_step
from maskdistill.training.distributed import Processes
from maskdistill.training.trainer import build_state

OBJECTIVES = ("dino", "dino+koleo", "msn", "dino+ibot", "dino+ibot+koleo")
BATCH = 16


def step(objective: str, options: argparse.Namespace) -> Callable[[], object]:
    """Return a training step with an objective."""
    size = options.image_size
    config = TrainingConfig(
        objective=objective, image_size=size, patch_size=size // 8, local_crops=6, depth=6,
        batch_size=BATCH, out_dim=options.out_dim, device=options.device,
    ).resolved(10_000)  # fmt: skip
    device = torch.device(options.device)
    policy = md.AsymmetricMaskPolicy(md.RandomMasker(0.3).sometimes(0.5))
    state = build_state(config, policy, Processes(0, 1, device))
    state.student.train()
    assert config.local_size is not None
    sizes = [size] * 2 + [config.local_size] * 6
    crops = [torch.randn(BATCH, 3, each, each, device=device) for each in sizes]
    settings = StepSettings(lr=1e-4, weight_decay=0.04, momentum=0.996, teacher_temp=0.04)
    return lambda: train_step(state, crops, policy, settings)


def main() -> None:
    """Time all objectives by turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out-dim", type=int, default=4096, help="prototypes")
    parser.add_argument("--image-size", type=int, default=64, help="pixels of a global view's side")
    parser.add_argument("--rounds", type=int, default=15, help="how often each is timed")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    torch.set_num_threads(1)
    timed = {name: partial(seconds, step(name, options), options.device) for name in OBJECTIVES}
    taken = by_turns(timed, options.rounds)
    print(machine(options.device), options, sep="\n")
    rows = [(f"`{name}`", *faster(times, taken["dino"])) for name, times in taken.items()]
    print(*table(("objective", "times DINO's step", "quartiles"), rows), sep="\n")


if __name__ == "__main__":
    main()
