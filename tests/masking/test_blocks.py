"""What makes BlockMasker BEiT's: the distribution of its rectangles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import maskdistill as md
from maskdistill.masking import blocks


def draws(masker: md.Masker, n: int, grid: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return masker(n, grid, generator=torch.Generator().manual_seed(seed))


# Obtained by running dinov2/data/masking.py of facebookresearch/dinov2 at commit
# b8931f7bf91576930313be2c6d6af376033b35f0, 20,000 draws each on 14x14 with min_num_patches=4 and
# max_num_patches=98: the share of rows per number of patches short of the request (0, 1, 2, 3+),
# and P(hidden) averaged over the central 4x4, the first row, and the four corners.
DINOV2 = {
    59: ((0.93120, 0.06745, 0.00130, 0.00005), (0.52599, 0.11333, 0.04330)),
    98: ((0.91955, 0.07565, 0.00415, 0.00065), (0.81415, 0.20947, 0.07740)),
}


@pytest.mark.parametrize("count", DINOV2)
def test_draws_like_dinov2(count: int) -> None:
    """Two-sample comparison at 4 standard errors: a false alarm in about 1 of 2,000 runs."""
    n = 20_000
    mask = draws(md.BlockMasker(count / 196, max_patches=98, exact=False), n, (14, 14))
    short = count - mask.sum(dim=1)
    assert short.min() >= 0, "never more than asked for"
    ours = [float((short == k).float().mean()) for k in range(3)]
    ours.append(float((short >= 3).float().mean()))
    theirs, places = DINOV2[count]
    for p, q in zip(ours, theirs, strict=True):
        assert abs(p - q) <= 4 * np.sqrt(max(p + q, 2 / n) / n)
    hidden = mask.float().mean(dim=0).reshape(14, 14)
    found = (
        float(hidden[5:9, 5:9].mean()),
        float(hidden[0].mean()),
        float(hidden[[0, 0, -1, -1], [0, -1, 0, -1]].mean()),
    )
    # Rows of one mask are correlated: count each draw once, not each patch.
    for p, q in zip(found, places, strict=True):
        assert abs(p - q) <= 4 * np.sqrt(2 * q * (1 - q) / n)


def test_more_rounds_would_hide_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    masker = md.BlockMasker(0.75, exact=False)
    few = draws(masker, 4000, (14, 14)).sum(dim=1).float()
    monkeypatch.setattr(blocks, "_ROUNDS", 48)
    many = draws(masker, 4000, (14, 14), seed=1).sum(dim=1).float()
    standard_error = float((few.var() + many.var()).sqrt()) / 4000**0.5
    assert abs(float(few.mean() - many.mean())) < 4 * standard_error


def test_the_last_row_and_column_are_hidden_as_often_as_the_first() -> None:
    hidden = draws(md.BlockMasker(0.3), 20_000, (10, 14)).float().mean(0).reshape(10, 14)
    assert float(hidden[-1].mean() / hidden[0].mean()) == pytest.approx(1, abs=0.05)
    assert float(hidden[:, -1].mean() / hidden[:, 0].mean()) == pytest.approx(1, abs=0.05)


def test_hides_rectangles_not_dust() -> None:
    """A patch beside a hidden one is hidden far more often than at random."""

    def neighbours(masker: md.Masker) -> float:
        mask = draws(masker, 2000, (14, 14)).reshape(-1, 14, 14)
        both = mask[:, :, 1:] & mask[:, :, :-1]
        return float(both.sum() / mask[:, :, :-1].sum())

    assert neighbours(md.BlockMasker(0.3)) > 0.7
    assert neighbours(md.RandomMasker(0.3)) < 0.35


def test_bad_arguments() -> None:
    for bad in ({"min_patches": 0}, {"max_patches": 2}, {"aspect": (2.0, 1.0)},
                {"aspect": (0.0, 1.0)}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(bad))):
            md.BlockMasker(0.3, **bad)
