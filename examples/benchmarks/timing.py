"""What the benchmarks share: things timed by turns, ratios of medians, Markdown tables, clones."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles

import timm
import torch
from tqdm import tqdm


def seconds(call: Callable[[], object], device: str = "cpu", repeats: int = 1) -> float:
    """Time a call, on average over some repeats.

    On one CPU thread the clock is the process's own, which other processes hardly move. With
    several threads, or with a CUDA device, which is waited for, it is the wall's.
    """
    on_cuda = device == "cuda"
    clock = time.perf_counter if on_cuda or torch.get_num_threads() > 1 else time.process_time
    if on_cuda:
        torch.cuda.synchronize()
    begin = clock()
    for _ in range(repeats):
        call()
    if on_cuda:
        torch.cuda.synchronize()
    return (clock() - begin) / repeats


def by_turns(
    timed: Mapping[str, Callable[[], float]], rounds: int, what: str = "timing"
) -> dict[str, list[float]]:
    """Time things by turns in one process, so that a busy machine slows all of them alike.

    Args:
        timed: what each is called, and a function that returns its seconds; each is called once
            before, to warm up.
        rounds: how often each is timed; the order turns around from round to round.
        what: name of the progress bar, shown in a terminal only.
    """
    for measure in timed.values():
        measure()
    taken: dict[str, list[float]] = {name: [] for name in timed}
    quiet = not sys.stderr.isatty()
    for turn in tqdm(range(rounds), desc=what, leave=False, disable=quiet):
        for name in list(timed)[:: 1 if turn % 2 else -1]:
            taken[name].append(timed[name]())
    return taken


def faster(reference: Sequence[float], taken: Sequence[float]) -> tuple[str, str]:
    """Return how many times faster than the reference: of medians, and the rounds' quartiles."""
    low, _, high = quantiles([a / b for a, b in zip(reference, taken, strict=True)], n=4)
    return f"{median(reference) / median(taken):.3g}", f"{low:.3g} to {high:.3g}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """Lay out a Markdown table whose first column is text, and the others numbers."""
    yield "| " + " | ".join(head) + " |"
    yield "|---|" + "--:|" * (len(head) - 1)
    yield from ("| " + " | ".join(map(str, row)) + " |" for row in rows)


def machine(device: str = "cpu") -> str:
    """Say on what this runs."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        named = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = named[0].partition(":")[2].strip() if named else cpu
    where = (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    )
    return (
        f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}; "
        f"{cpu}, {where}"
    )


def main_dino_of(clone: Path) -> Path:
    """Return the script of a clone of facebookresearch/dino, or say how to get one."""
    if not (clone / "main_dino.py").is_file():
        raise SystemExit(
            f"error: no main_dino.py in {clone}. Get one: git clone "
            "https://github.com/facebookresearch/dino"
        )
    return clone / "main_dino.py"
