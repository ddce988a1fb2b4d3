"""How fast masks are drawn: each of our maskers by turns with the generator it stands for.

    python examples/benchmarks/masks.py                    # ours; and lightly's where installed
    python examples/benchmarks/masks.py --peers CLONES     # and every peer cloned into CLONES
    python examples/benchmarks/masks.py --scaling          # cost over batch sizes and grids

What is not here is listed as skipped, with the command that gets it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from peers import OURS, PEERS, AbsentError, Peer, Request, draws
from timing import by_turns, machine, seconds, table

RATIO = 0.5
BATCHES = (64, 256, 1024, 4096)
GRIDS = (7, 14, 28, 64)
LOOP_GOAL_CUDA = 100.0
"""How many times faster ours is meant to be on a CUDA device than a loop on the CPU."""
MAX_SLOPE = 1.15
"""Above this slope of log(time) over log(size), the cost counts as growing faster than linearly."""


@dataclass(frozen=True)
class Settings:
    """What to time, and how."""

    peers: Path | None = None
    """Folder with clones of the peers' repositories; None times only what is installed."""
    batch: int = 1024
    """Masks per draw."""
    grid: tuple[int, int] = (14, 14)
    """Patch rows and columns."""
    rounds: int = 21
    """How often each of a pair is timed, by turns."""
    least: float = 0.02
    """Least time of one round, in seconds; short draws are repeated within it."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where our masks, and those of peers that can, are drawn; loops stay on the CPU."""
    only: tuple[str, ...] = ()
    """Only pairs whose names (peer, its folder, or our class) contain one of these."""
    scaling: bool = False
    """Also measure how the cost grows over batch sizes and grids."""

    def wants(self, *names: str) -> bool:
        """Return whether ``--only`` lets something of these names through."""
        joined = " ".join(names).lower()
        return not self.only or any(wanted.lower() in joined for wanted in self.only)

    def times(self, calls: dict[str, Callable[[], object]], what: str) -> list[list[float]]:
        """Return the milliseconds of each round of some draws, timed by turns."""
        timed = {}
        for name, call in calls.items():
            repeats = max(1, round(self.least / max(seconds(call, self.device), 1e-6)))
            timed[name] = partial(seconds, call, self.device, repeats)
        taken = by_turns(timed, self.rounds, what)
        return [[1e3 * t for t in rounds] for rounds in taken.values()]


def ratio(times: Sequence[float], other_times: Sequence[float]) -> float:
    """Return how many times faster the first is: the ratio of the medians."""
    return float(np.median(other_times) / np.median(times))


def slopes(sizes: Sequence[int], times: Sequence[float]) -> tuple[float, float]:
    """Return the slope of log(time) over log(size): fitted, and between the two largest sizes."""
    x, y = np.log(sizes), np.log(times)
    return float(np.polyfit(x, y, 1)[0]), float((y[-1] - y[-2]) / (x[-1] - x[-2]))


def spread(times: Sequence[float]) -> str:
    """Return the median and the interquartile range."""
    low, middle, high = np.quantile(times, (0.25, 0.5, 0.75))
    return f"{middle:.2f} ± {high - low:.2f}"


def peers_report(s: Settings, request: Request) -> Iterator[str]:
    """Time ours by turns with each peer; tell what was measured, and what was not."""
    rows, skipped, met, goals = [], [], 0, 0
    for peer in PEERS:
        masker = peer.ours(request)
        if not s.wants(peer.name, peer.folder, repr(masker)):
            continue
        try:
            other = peer.load(s.peers, request)
        except AbsentError as error:
            skipped.append(f"- {peer.name}: {error}")
            continue
        times, other_times = s.times({"ours": draws(masker, request), "peer": other}, peer.name)
        goal, reached = _goal(peer, s), ratio(times, other_times)
        goals += goal is not None
        met += goal is not None and reached >= goal
        rows.append(
            (peer.name, f"`{masker!r}`", f"{reached:.1f}", goal or "", spread(times),
             spread(other_times))
        )  # fmt: skip
    if rows:
        yield from table(("peer", "ours", "faster", "goal", "ours, ms", "peer, ms"), rows)
        yield f"\ngoals met: {met} of {goals}\n"
    if skipped:
        yield "skipped:\n" if s.peers else "skipped (and --peers PEERS):\n"
        yield from (*skipped, "")


def _goal(peer: Peer, s: Settings) -> float | None:
    if s.device == "cpu" or peer.goal is None:
        return peer.goal
    return LOOP_GOAL_CUDA if peer.loop else None


def ours_report(s: Settings, request: Request) -> Iterator[str]:
    """Time each of our maskers by turns with the first of them."""
    reference, *others = (ours(request) for ours in OURS)
    rows = []
    for masker in others:
        if s.wants(repr(masker)):
            calls = {"reference": draws(reference, request), "ours": draws(masker, request)}
            other_times, times = s.times(calls, repr(masker))
            rows.append((f"`{masker!r}`", spread(times), f"{1 / ratio(times, other_times):.1f}"))
    if rows:
        yield from (*table(("masker", "ms", f"times the cost of `{reference!r}`"), rows), "")


def growth_report(s: Settings, request: Request) -> Iterator[str]:
    """Time each of our maskers over batch sizes and over square grids."""
    over = {
        "batch": [dataclasses.replace(request, batch=batch) for batch in BATCHES],
        "patches": [dataclasses.replace(request, batch=256, grid=(side, side)) for side in GRIDS],
    }
    for what, requests in over.items():
        sizes = [getattr(r, what) for r in requests]
        rows = []
        for ours in OURS:
            name = repr(ours(request))
            if s.wants(name):
                calls = {str(n): draws(ours(r), r) for n, r in zip(sizes, requests, strict=True)}
                times = [float(np.median(t)) for t in s.times(calls, f"{name} over {what}")]
                slope, last = slopes(sizes, times)
                mark = "*" * (max(slope, last) > MAX_SLOPE)
                rows.append(
                    (f"`{name}`", *(f"{t:.2f}" for t in times), f"{slope:.2f}", f"{last:.2f}{mark}")
                )
        yield from (*table((f"ms over {what}", *map(str, sizes), "slope", "last"), rows), "")
    yield "slope: of log(time) over log(size), fitted; last: between the two largest sizes;"
    yield f"* grows faster than linearly, above {MAX_SLOPE}"


def main(s: Settings) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    request = Request(s.batch, s.grid, RATIO, s.device)
    known = [repr(ours(request)) for ours in OURS]
    known += [f"{peer.name} {peer.folder} {peer.ours(request)!r}" for peer in PEERS]
    if not any(map(s.wants, known)):
        sys.exit(f"error: nothing has a name that contains any of {s.only}.")
    print(machine(s.device), s, sep="\n", end="\n\n")
    for report in (peers_report, ours_report, *[growth_report] * s.scaling):
        for line in report(s, request):
            print(line, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
