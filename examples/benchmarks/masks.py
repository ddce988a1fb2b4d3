"""How fast masks are drawn: each of our maskers by turns with the generator it stands for.

    python examples/benchmarks/masks.py                    # ours; and lightly's where installed
    python examples/benchmarks/masks.py --peers CLONES     # and every peer cloned into CLONES
    python examples/benchmarks/masks.py --scaling          # cost over batch sizes and grids

What is not here is listed as skipped, with the command that gets it.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peers import OURS, PEERS, AbsentError, Draw, Peer, Request, draws
from torch.utils.benchmark import Measurement, Timer

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
    ratio: float = 0.5
    """Share of patches to hide."""
    rounds: int = 21
    """How often each of a pair is timed, by turns."""
    seconds: float = 0.02
    """Least time of one round, in seconds; short draws are repeated within it."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where our masks, and those of peers that can, are drawn; loops stay on the CPU."""
    only: tuple[str, ...] = ()
    """Only pairs whose names (peer, its folder, or our class) contain one of these."""
    scaling: bool = False
    """Also measure how the cost grows over batch sizes and grids."""
    markdown: bool = False
    """Print Markdown tables."""
    json: Path | None = None
    """File for everything measured, every round of it."""

    def check(self) -> None:
        """Raise ValueError where the settings cannot work."""
        if min(self.batch, self.rounds, *self.grid) < 1 or not 0 <= self.ratio <= 1:
            raise ValueError("batch, rounds and grid must be >= 1, and ratio must lie in [0, 1].")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("no CUDA device is available; leave --device out.")

    def wants(self, *names: str) -> bool:
        """Return whether ``--only`` lets something of these names through."""
        joined = " ".join(names).lower()
        return not self.only or any(wanted.lower() in joined for wanted in self.only)


@dataclass(frozen=True)
class Pair:
    """Ours and another, timed by turns. Times are in milliseconds per batch, one per round."""

    ours: str
    name: str
    times: tuple[float, ...]
    other_times: tuple[float, ...]
    goal: float | None

    @property
    def ratio(self) -> float:
        """How many times faster ours is: the ratio of the medians."""
        return float(np.median(self.other_times) / np.median(self.times))

    @property
    def verdict(self) -> str:
        """The goal, and whether it is met."""
        if self.goal is None:
            return ""
        return f"{self.goal:g}x " + ("met" if self.ratio >= self.goal else "MISSED")


@dataclass(frozen=True)
class Growth:
    """How the cost of one masker grows: milliseconds at each size, and slopes in log-log scale."""

    masker: str
    over: str
    sizes: tuple[int, ...]
    times: tuple[float, ...]

    @property
    def slope(self) -> float:
        """Slope of the line fitted to log(time) over log(size)."""
        return float(np.polyfit(np.log(self.sizes), np.log(self.times), 1)[0])

    @property
    def last_slope(self) -> float:
        """Slope between the two largest sizes, where fixed costs count least."""
        return float(np.diff(np.log(self.times[-2:]))[0] / np.diff(np.log(self.sizes[-2:]))[0])

    @property
    def superlinear(self) -> bool:
        """Whether the cost grows faster than linearly."""
        return max(self.slope, self.last_slope) > MAX_SLOPE


# Measuring.


def alternate(draws: Sequence[Draw], settings: Settings) -> list[tuple[float, ...]]:
    """Time functions by turns on one thread, so that a busy machine slows all of them alike.

    On a CPU the clock is the process's own, which other processes hardly move; with a CUDA device
    it is the wall's, and the device is waited for.
    """
    clock: dict[str, Any] = {"timer": time.process_time} if settings.device == "cpu" else {}
    timers = [Timer("draw()", globals={"draw": draw}, num_threads=1, **clock) for draw in draws]
    first = [timer.timeit(1).median for timer in timers]
    repeats = [max(1, round(settings.seconds / max(seconds, 1e-6))) for seconds in first]
    rounds: list[list[Measurement]] = [
        [timer.timeit(number) for timer, number in zip(timers, repeats, strict=True)]
        for _ in range(settings.rounds)
    ]
    return [tuple(1e3 * m.median for m in column) for column in zip(*rounds, strict=True)]


def against_peers(settings: Settings, request: Request) -> tuple[list[Pair], dict[str, str]]:
    """Time ours by turns with each peer; return the pairs, and why which peers were skipped."""
    pairs, skipped = [], {}
    for peer in PEERS:
        masker = peer.ours(request)
        if not settings.wants(peer.name, peer.folder, repr(masker)):
            continue
        _progress(peer.name)
        try:
            other = peer.load(settings.peers, request)
        except AbsentError as error:
            skipped[peer.name] = str(error)
            continue
        times, other_times = alternate([draws(masker, request), other], settings)
        pairs.append(Pair(repr(masker), peer.name, times, other_times, _goal(peer, settings)))
    return pairs, skipped


def _goal(peer: Peer, settings: Settings) -> float | None:
    if settings.device == "cpu" or peer.goal is None:
        return peer.goal
    return LOOP_GOAL_CUDA if peer.loop else None


def among_ours(settings: Settings, request: Request) -> list[Pair]:
    """Time each of our maskers by turns with the first of them."""
    reference, *others = (ours(request) for ours in OURS)
    pairs = []
    for masker in others:
        if settings.wants(repr(masker)):
            _progress(repr(masker))
            other_times, times = alternate(
                [draws(reference, request), draws(masker, request)], settings
            )
            pairs.append(Pair(repr(masker), repr(reference), times, other_times, None))
    return pairs


def growth(settings: Settings, request: Request) -> list[Growth]:
    """Measure each of our maskers over batch sizes and over square grids."""
    by_batch = [dataclasses.replace(request, batch=batch) for batch in BATCHES]
    by_grid = [dataclasses.replace(request, batch=256, grid=(side, side)) for side in GRIDS]
    grown = []
    for ours in OURS:
        if not settings.wants(repr(ours(request))):
            continue
        for over, requests in (("batch", by_batch), ("patches", by_grid)):
            _progress(f"{ours(request)!r} over {over}")
            sizes = tuple(getattr(r, over) for r in requests)
            times = alternate([draws(ours(r), r) for r in requests], settings)
            medians = tuple(float(np.median(t)) for t in times)
            grown.append(Growth(repr(ours(request)), over, sizes, medians))
    return grown


def machine(settings: Settings) -> dict[str, str]:
    """Say on what this runs."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = named[0].partition(":")[2].strip() if named else cpu
    device = torch.cuda.get_device_name() if settings.device == "cuda" else "CPU"
    return {
        "cpu": cpu, "threads": "1", "device": device, "torch": torch.__version__,
        "numpy": np.__version__, "python": platform.python_version(),
    }  # fmt: skip


# Printing.


def _progress(name: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{name[:90]}", end="", file=sys.stderr, flush=True)


def _show(lines: Iterable[str]) -> None:
    _progress("")
    for line in lines:
        print(line, flush=True)


def _milliseconds(times: Sequence[float]) -> tuple[str, str]:
    low, middle, high = np.quantile(times, (0.25, 0.5, 0.75))
    return f"{middle:.2f}", f"{high - low:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> Iterable[str]:
    """Lay out a table whose first column is text, and the others are aligned to the right."""
    if markdown:
        yield "| " + " | ".join(head) + " |"
        yield "|---|" + "---:|" * (len(head) - 1)
        yield from ("| " + " | ".join(row) + " |" for row in rows)
        return
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip()


def _peer_tables(pairs: Sequence[Pair], markdown: bool) -> Iterable[str]:
    rows = [
        (p.name, *_milliseconds(p.times), *_milliseconds(p.other_times),
         f"{p.ratio:.1f}x", p.verdict)
        for p in pairs
    ]  # fmt: skip
    head = ("peer", "ours ms", "IQR", "peer ms", "IQR", "ratio", "goal")
    if markdown:
        yield from _table(
            ("ours", *head),
            [(f"`{p.ours}`", *row) for p, row in zip(pairs, rows, strict=True)],
            markdown,
        )
        return
    lines = list(_table(head, rows, markdown))
    yield lines[0]
    for i, (pair, line) in enumerate(zip(pairs, lines[1:], strict=True)):
        if i == 0 or pairs[i - 1].ours != pair.ours:
            yield pair.ours
        yield line


def heading(settings: Settings) -> Iterable[str]:
    """Say what is timed, how, and on what."""
    rows, columns = settings.grid
    yield ", ".join(f"{key} {value}" for key, value in machine(settings).items())
    clock = "CPU time" if settings.device == "cpu" else "wall time, device synchronised"
    yield (
        f"batch {settings.batch}, grid {rows}x{columns}, ratio {settings.ratio:g}; medians of "
        f"{settings.rounds} rounds by turns, {clock}"
    )


def peers_report(
    pairs: Sequence[Pair], skipped: dict[str, str], settings: Settings
) -> Iterable[str]:
    """Lay out what was timed against peers, and what was not."""
    if pairs:
        yield from ("", *_peer_tables(pairs, settings.markdown))
        goals = [p.ratio >= p.goal for p in pairs if p.goal is not None]
        yield from ("", f"goals met: {sum(goals)} of {len(goals)}")
    if skipped:
        hint = " (and --peers PEERS)" if settings.peers is None else ""
        yield from ("", f"skipped{hint}:")
        for why in dict.fromkeys(skipped.values()):
            names = "; ".join(name for name, reason in skipped.items() if reason == why)
            yield f"- {names}: {why}" if settings.markdown else f"  {names}\n      {why}"


def ours_report(own: Sequence[Pair], settings: Settings) -> Iterable[str]:
    """Lay out what ours cost against the first of them."""
    if own:
        head = (f"ours, by turns with {own[0].name}", "ms", "IQR", "ms of that", "times its cost")
        lines = [
            (p.ours, *_milliseconds(p.times), _milliseconds(p.other_times)[0], f"{1 / p.ratio:.1f}")
            for p in own
        ]
        yield from ("", *_table(head, lines, settings.markdown))


def growth_report(grown: Sequence[Growth], settings: Settings) -> Iterable[str]:
    """Lay out how the cost grows."""
    for over in dict.fromkeys(g.over for g in grown):
        chosen = [g for g in grown if g.over == over]
        head = (f"ms over {over}", *map(str, chosen[0].sizes), "slope", "last")
        lines = [
            (g.masker, *(f"{t:.2f}" for t in g.times), f"{g.slope:.2f}",
             f"{g.last_slope:.2f}{'*' * g.superlinear}")
            for g in chosen
        ]  # fmt: skip
        yield from ("", *_table(head, lines, settings.markdown))
    if grown:
        yield from (
            "",
            "slope: of log(time) over log(size), fitted; last: between the two largest sizes;",
            f"* grows faster than linearly, above {MAX_SLOPE}: "
            f"{sum(g.superlinear for g in grown)} of {len(grown)}",
        )


def run(settings: Settings) -> int:
    """Measure, print, write; return the exit code."""
    settings.check()
    request = Request(settings.batch, settings.grid, settings.ratio, settings.device)
    _show(heading(settings))
    pairs, skipped = against_peers(settings, request)
    _show(peers_report(pairs, skipped, settings))
    own = among_ours(settings, request)
    _show(ours_report(own, settings))
    if not (pairs or skipped or own):
        raise ValueError(f"nothing has a name that contains any of {settings.only}.")
    grown = growth(settings, request) if settings.scaling else []
    _show(growth_report(grown, settings))
    if settings.json is not None:
        everything = {
            "machine": machine(settings),
            "settings": dataclasses.asdict(settings),
            "pairs": [{**dataclasses.asdict(p), "ratio": p.ratio} for p in pairs],
            "skipped": skipped,
            "ours": [{**dataclasses.asdict(p), "ratio": p.ratio} for p in own],
            "scaling": [{**dataclasses.asdict(g), "slope": g.slope} for g in grown],
        }
        settings.json.write_text(json.dumps(everything, indent=1, default=str) + "\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Read the arguments (None: the command line's) and run; return the exit code."""
    try:
        import tyro
    except ImportError:
        print(
            'error: this needs the train extra: pip install "maskdistill[train]"', file=sys.stderr
        )
        return 2
    try:
        return run(tyro.cli(Settings, description=__doc__, args=argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
