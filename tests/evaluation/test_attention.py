"""Attention against object masks."""

from __future__ import annotations

import pytest
import torch

from maskdistill.evaluation import attention_jaccard, keep_mass


def test_keep_mass_keeps_the_fewest() -> None:
    attention = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
    assert keep_mass(attention, 0.6).tolist() == [[True, True, False, False],
                                                  [True, True, True, False]]  # fmt: skip
    assert keep_mass(attention, 1.0).all()
    assert keep_mass(7 * attention, 0.6).equal(keep_mass(attention, 0.6)), "scale is no matter"


def test_jaccard_of_known_overlaps() -> None:
    # 2x2 patches of 2x2 pixels; the object is the upper half.
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, :2] = True
    upper, left, corner = [0.5, 0.5, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]
    attention = torch.tensor([[upper, left, corner]])
    jaccard = attention_jaccard(attention, mask, (2, 2), mass=0.9)
    assert jaccard.best_head == 1.0
    assert jaccard.mean_over_heads == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    # The mean over heads is 2/3, 1/6, 1/6, 0: with 0.6 of the mass, the corner alone.
    assert attention_jaccard(attention, mask, (2, 2)).head_mean == pytest.approx(0.5)


def test_bad_input() -> None:
    attention, mask = torch.rand(2, 3, 4), torch.ones(2, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="grid of 3x3"):
        attention_jaccard(attention, mask, (3, 3))
    with pytest.raises(ValueError, match="bool"):
        attention_jaccard(attention, mask.float(), (2, 2))
    with pytest.raises(ValueError, match="B = 2"):
        attention_jaccard(attention, mask[:1], (2, 2))
    mask[1] = False
    with pytest.raises(ValueError, match="empty"):
        attention_jaccard(attention, mask, (2, 2))
