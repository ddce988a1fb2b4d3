"""Ratios, schedules and the one rounding rule."""

from __future__ import annotations

import math

import pytest
import torch

import maskdistill as md
from maskdistill.masking.ratios import bounds, hidden_count


def test_rounding_is_half_away_from_zero() -> None:
    assert [hidden_count(0.5, n) for n in (1, 2, 3, 5, 49)] == [1, 1, 2, 3, 25]
    assert hidden_count(0.3, 196) == 59


def test_schedules_move_between_their_ends() -> None:
    for schedule in (md.Linear(0.1, 0.5), md.Cosine(0.1, 0.5)):
        values = [schedule.at(p / 10) for p in range(11)]
        assert values[0] == pytest.approx(0.1)
        assert values[-1] == pytest.approx(0.5)
        assert values == sorted(values)
        assert values[5] == pytest.approx(0.3)
    assert md.Cosine(0.0, 1.0).at(0.25) == pytest.approx(0.5 - 0.5 * math.cos(math.pi / 4))


def test_progress_moves_the_ratio() -> None:
    masker = md.RandomMasker(md.Linear(0.0, 1.0))
    counts = [int(masker(1, (10, 10), progress=p / 4).sum()) for p in range(5)]
    assert counts == [0, 25, 50, 75, 100]


def test_uniform_ratios_vary_by_image_within_their_range() -> None:
    counts = md.RandomMasker(md.Uniform(0.1, 0.5))(4000, (10, 10)).sum(dim=1)
    assert 10 <= counts.min() <= 12
    assert 48 <= counts.max() <= 50
    assert float(counts.float().mean()) == pytest.approx(30, abs=1)


def test_stratified_ratios_take_each_stratum_once() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = md.Stratified(0.0, 1.0).sample(8, lambda *shape: torch.rand(shape, generator=generator))
    assert sorted((drawn * 8).floor().long().tolist()) == list(range(8))
    assert drawn.tolist() != sorted(drawn.tolist()), "strata come in random order"


def test_ranges_may_move() -> None:
    ratio = md.Uniform(0.1, md.Linear(0.1, 0.5))
    assert bounds(ratio) == (0.1, 0.5)
    masker = md.RandomMasker(ratio)
    assert masker(100, (10, 10), progress=0.0).sum(dim=1).unique().tolist() == [10]
    assert int(masker(500, (10, 10), progress=1.0).sum(dim=1).max()) > 40


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan, "0.3", None, True, md.Linear(0.5, 1.5),
                                 md.Uniform(-0.5, 0.5), [0.3]])  # fmt: skip
def test_bad_ratios_are_refused(bad: object) -> None:
    for build in (md.RandomMasker, md.BlockMasker, md.AttentionGuidedMasker,
                  md.NoMasker().exactly):  # fmt: skip
        with pytest.raises(ValueError, match="ratio must"):
            build(bad)  # type: ignore[arg-type]


def test_a_percentage_gets_a_hint() -> None:
    with pytest.raises(ValueError, match=r"write 0\.3"):
        md.RandomMasker(30)


def test_other_bad_arguments() -> None:
    with pytest.raises(ValueError, match="low must not exceed high"):
        md.Uniform(0.5, 0.1)
    with pytest.raises(ValueError, match="low and high must be numbers"):
        md.Stratified("a", 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="start must be a number"):
        md.Linear(None, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="p must"):
        md.NoMasker().sometimes(md.Uniform(0, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hide must be"):
        md.AttentionGuidedMasker(0.3, hide="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature must be"):
        md.AttentionGuidedMasker(0.3, temperature=-1.0)
    with pytest.raises(ValueError, match="sum to 1"):
        md.Mixture({md.NoMasker(): 0.5})
    with pytest.raises(ValueError, match="non-empty"):
        md.Mixture({})
    with pytest.raises(ValueError, match="must be a masker"):
        md.Mixture({"a": 1.0})  # type: ignore[dict-item]
