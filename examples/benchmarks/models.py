"""What MaskedViT costs without a mask, and what dropping tokens saves.

    python examples/benchmarks/models.py
    python examples/benchmarks/models.py --models vit_base_patch16_224 --device cuda

Each pair runs by turns in one process, and what is reported is the ratio of medians.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import Literal

import timm
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

import maskdistill as md
from maskdistill.masking.mask import PatchMask


@dataclass(frozen=True)
class Settings:
    """What to time, and how."""

    models: tuple[str, ...] = ("vit_tiny_patch16_224", "vit_small_patch16_224")
    """timm's names."""
    image_size: int = 224
    """Pixels of a side of a global view."""
    batch: int = 4
    """Images per forward."""
    ratio: float = 0.5
    """Share of the patches that is dropped."""
    rounds: int = 41
    """How often each of a pair is timed, by turns."""
    threads: int = 1
    """CPU threads."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run. On a CPU, time is CPU time, which other processes disturb least."""


Timed = Callable[[], float]


def by_turns(
    first: Timed, second: Timed, rounds: int, what: str
) -> tuple[list[float], list[float]]:
    """Return the seconds of each round of both, timed by turns; each goes first half the time."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for timed in (first, second):
        timed()
    for turn in tqdm(range(rounds), desc=what, leave=False):
        for which in (0, 1) if turn % 2 else (1, 0):
            seconds[which].append((first, second)[which]())
    return seconds


def _seconds(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000
    begin = time.process_time()
    call()
    return time.process_time() - begin


@torch.no_grad()
def forward(vit: nn.Module, images: Tensor, device: str, apply: str | None = None) -> float:
    """Time a forward of the bare model, or of the same one wrapped for this time alone."""
    if apply is None:
        return _seconds(lambda: vit(images), device)
    wrapped = md.MaskedViT(vit, apply)  # type: ignore[arg-type]
    seconds = _seconds(lambda: wrapped(images), device)
    wrapped.unwrap()
    return seconds


def step(vit: nn.Module, images: Tensor, device: str, mask: Tensor | None = None) -> float:
    """Time a forward and a backward, as of a student's global view."""
    counted = None if mask is None else PatchMask(mask, int(mask[0].sum()))

    def run() -> None:
        vit(images, counted).square().mean().backward()
        vit.zero_grad(set_to_none=True)

    return _seconds(run, device)


def row(name: str, what: str, plain: list[float], ours: list[float]) -> str:
    """Return a line of the table: the ratio of medians, and how far single rounds scatter."""
    ratios = [b / a for a, b in zip(plain, ours, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    ratio = median(ours) / median(plain)
    return (
        f"| {name} | {what} | {ratio:.3f} | {low:.3f} to {high:.3f} | {1000 * median(plain):.0f} |"
    )


def main(settings: Settings) -> None:
    """Time every model."""
    torch.set_num_threads(settings.threads)
    size, device = settings.image_size, settings.device
    images = torch.randn(settings.batch, 3, size, size, device=device)
    print(f"torch {torch.__version__}, timm {timm.__version__}, {settings}\n")
    print("| model | time of the second over the first | ratio | quartiles | first, ms |")
    print("|---|---|--:|--:|--:|")
    for name in settings.models:
        vit = timm.create_model(name, num_classes=0, dynamic_img_size=True).to(device)
        for apply in ("token", "drop"):
            seconds = by_turns(
                partial(forward, vit, images, device),
                partial(forward, vit, images, device, apply),
                settings.rounds,
                f"{name}, {apply}, no mask",
            )
            print(row(name, f"plain timm, `{apply}` with no mask; forward", *seconds))
        dropping = md.MaskedViT(vit, "drop")
        grid = dropping.grid(size, size)
        mask = md.RandomMasker(settings.ratio)(settings.batch, grid, device=device)
        seconds = by_turns(
            partial(step, dropping, images, device),
            partial(step, dropping, images, device, mask),
            settings.rounds,
            f"{name}, dropping",
        )
        what = f"all tokens, {settings.ratio:.0%} dropped; forward and backward"
        print(row(name, what, *seconds))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
