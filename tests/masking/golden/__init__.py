"""Statistics of masks, the test that compares two sets of them, and the signals they are drawn on.

A *case* is what one JSON file next to this one holds several of: a generator's masks on one grid,
reduced to histograms (a dictionary, value to frequency) and to shares (a list, ``p_...``).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent

# --- what is measured


def components(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count the 4-connected components of each ``(B, H, W)`` mask, and the cells of its largest.

    Every hidden cell starts with a label of its own; sweeps down, up, right and left spread the
    greatest label through each component until nothing changes, for all masks at once.
    """
    batch, height, width = masks.shape
    cells = height * width
    hidden = np.ascontiguousarray(masks.transpose(1, 2, 0)).astype(np.int16)
    own = np.arange(1, cells + 1, dtype=np.int16).reshape(height, width, 1) * hidden
    final, todo, label = own.copy(), np.arange(batch), own.copy()
    down = [(y, y - 1) for y in range(1, height)]
    right = [(x, x - 1) for x in range(1, width)]
    while todo.size:
        part, before = hidden[:, :, todo], label.copy()
        for to, of in down + [(of, to) for to, of in reversed(down)]:
            np.maximum(label[to], label[of], out=label[to])
            label[to] *= part[to]
        for to, of in right + [(of, to) for to, of in reversed(right)]:
            np.maximum(label[:, to], label[:, of], out=label[:, to])
            label[:, to] *= part[:, to]
        changed = (label != before).any(axis=(0, 1))
        final[:, :, todo[~changed]] = label[:, :, ~changed]
        todo, label = todo[changed], np.ascontiguousarray(label[:, :, changed])
    count = ((final == own) & (hidden > 0)).sum(axis=(0, 1))
    where = final.reshape(cells, batch).astype(np.int64) + np.arange(batch) * (cells + 1)
    size = np.bincount(where.ravel(), minlength=batch * (cells + 1)).reshape(batch, cells + 1)
    return count, size[:, 1:].max(axis=1)


def histogram(values: np.ndarray) -> dict[int, int]:
    values, frequencies = np.unique(values, return_counts=True)
    return {int(v): int(f) for v, f in zip(values, frequencies, strict=True)}


def describe(masks: Tensor | np.ndarray, grid: tuple[int, int]) -> dict[str, Any]:
    """Reduce masks ``(B, N)`` or ``(B, H, W)`` to the statistics that every case has."""
    masks = np.asarray(masks).astype(bool).reshape(-1, *grid)
    count, largest = components(masks)
    return {
        "counts": histogram(masks.sum(axis=(1, 2))),
        "p_hidden": masks.mean(axis=0),
        "components": histogram(count),
        "largest": histogram(largest),
    }


def by_rank(masks: Tensor, signal: Tensor) -> np.ndarray:
    """Share of draws in which the patch of each rank is hidden, from the highest signal down."""
    return masks.gather(1, signal.argsort(dim=1, descending=True)).float().mean(dim=0).numpy()


def in_parts(masks: Tensor, parts: Tensor) -> dict[str, dict[int, int]]:
    """Histograms of how many patches of each part are hidden, and of how many whole parts."""
    labels = parts.unique()
    hidden = torch.stack([(masks & (parts == k)).sum(dim=1) for k in labels])
    whole = torch.stack([(masks | (parts != k)).all(dim=1) for k in labels]).sum(dim=0)
    found = {f"part {int(k)}": histogram(h.numpy()) for k, h in zip(labels, hidden, strict=True)}
    return {"whole parts": histogram(whole.numpy())} | found


# --- how it is compared


def homogeneity(a: dict[int, int], b: dict[int, int], least: int = 20) -> float:
    """Two-sample chi-square test that two histograms come from one distribution; the p-value.

    Neighbouring bins are pooled until each holds ``least`` draws of both samples together.
    """
    bins: list[list[int]] = []
    full = True
    for value in sorted(a.keys() | b.keys()):
        if full:
            bins.append([0, 0])
        bins[-1][0] += a.get(value, 0)
        bins[-1][1] += b.get(value, 0)
        full = sum(bins[-1]) >= least
    if not full and len(bins) > 1:  # the last bin joins its neighbour
        last = bins.pop()
        bins[-1] = [bins[-1][0] + last[0], bins[-1][1] + last[1]]
    if len(bins) == 1:
        return 1.0
    table = np.array(bins, dtype=np.float64)
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    square = float(((table - expected) ** 2 / expected).sum())
    degrees = torch.tensor((len(bins) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, torch.tensor(square / 2, dtype=torch.float64)))


def proportions(p: np.ndarray, n: int, q: np.ndarray, m: int) -> float:
    """Two-proportion z test of every cell; the least p-value times the number of cells.

    With the continuity correction, without which cells that are hardly ever hidden, or hardly ever
    shown, would be rejected too often.
    """
    p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    both = (p * n + q * m) / (n + m)
    error = np.sqrt(np.maximum(both * (1 - both), 1e-12) * (1 / n + 1 / m))
    z = np.maximum(np.abs(p - q) - (1 / n + 1 / m) / 2, 0) / error
    return min(1.0, p.size * math.erfc(float(z.max()) / math.sqrt(2)))


def compare(golden: dict[str, Any], draws: int, ours: dict[str, Any], m: int) -> dict[str, float]:
    """Test each statistic of a golden case against ours; p-values, adjusted for their number.

    Bonferroni: each p-value is multiplied by the number of statistics, and the map's also by its
    cells, so the case as a whole is rejected by chance with at most the probability that the least
    of them is held against.
    """
    found = {}
    for name in statistics(golden):
        theirs = golden[name]
        if isinstance(theirs, dict):
            value = homogeneity({int(k): v for k, v in theirs.items()}, ours[name])
        else:
            value = proportions(np.asarray(theirs), draws, ours[name], m)
        found[name] = min(1.0, value * len(statistics(golden)))
    return found


def statistics(case: dict[str, Any]) -> list[str]:
    """Name what a case measures: its histograms and its shares."""
    known = ("counts", "components", "largest", "sizes", "whole parts")
    return [name for name in case if name in known or name.startswith(("p_", "part "))]


def read() -> dict[str, dict[str, Any]]:
    """Read all golden files, by method."""
    return {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(HERE.glob("*.json"))}


# --- the signals of guided maskers: made, not stored


def attention(n: int, grid: tuple[int, int], seed: int = 0) -> Tensor:
    """Make attention ``(n, N)``, each row a softmax of normal logits twice as wide as usual."""
    logits = torch.randn(n, grid[0] * grid[1], generator=torch.Generator().manual_seed(seed))
    return (2 * logits).softmax(dim=1)


def parts(n: int, grid: tuple[int, int]) -> Tensor:
    """Make seven parts of unequal sizes ``(n, N)``: each patch belongs to the nearest centre."""
    centres = torch.tensor([[1, 1], [2, 11], [4, 6], [7, 2], [8, 10], [12, 4], [12, 12]])
    y, x = (torch.arange(side) for side in grid)
    cells = torch.cartesian_prod(y, x)
    away = (cells[:, None] - centres).square().sum(dim=2)
    return away.argmin(dim=1).expand(n, -1)


PIXELS = 4
"""Along a side of a patch of ``images``."""


def images(n: int, grid: tuple[int, int], seed: int = 0) -> Tensor:
    """Make images ``(n, 3, 4 H, 4 W)`` in which patches are more or less alike."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (side * PIXELS for side in grid)
    coarse = torch.randn(n, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(
        coarse, size=(height, width), mode="bilinear", align_corners=False
    )
    return smooth + 0.15 * torch.randn(n, 3, height, width, generator=generator)


def typicality(pictures: Tensor, grid: tuple[int, int]) -> Tensor:
    """Measure how alike each patch is to its image's others on average: ``(n, N)`` cosines."""
    patches = pictures.unfold(2, PIXELS, PIXELS).unfold(3, PIXELS, PIXELS)
    values = patches.permute(0, 2, 3, 1, 4, 5).reshape(len(pictures), grid[0] * grid[1], -1)
    values = torch.nn.functional.normalize(values - values.mean(dim=2, keepdim=True), dim=2)
    return (values * values.mean(dim=1, keepdim=True)).sum(dim=2)
