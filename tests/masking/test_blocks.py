"""What BlockMasker's rectangles are like; test_faithful.py compares them with the originals'."""

from __future__ import annotations

import pytest
import torch

import maskdistill as md
from maskdistill.masking import rectangles as blocks


def draws(masker: md.Masker, n: int, grid: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return masker(n, grid, generator=torch.Generator().manual_seed(seed))


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
