"""What the combinators mean, and how often."""

from __future__ import annotations

import pytest
import torch

import maskdistill as md

GRID = (14, 14)
half = md.RandomMasker(0.5)


def share(masker: md.Masker, n: int = 2000) -> float:
    return float(masker(n, GRID).float().mean())


def test_shares_of_independent_draws() -> None:
    assert share(half | half) == pytest.approx(0.75, abs=0.01)
    assert share(half & half) == pytest.approx(0.25, abs=0.01)
    assert share(half - half) == pytest.approx(0.25, abs=0.01)
    assert share(~md.RandomMasker(0.3)) == pytest.approx(0.7, abs=0.01)


def test_exactly_trims_and_tops_up_within_the_mask() -> None:
    attention = torch.arange(196.0).expand(4, -1)
    top = md.AttentionGuidedMasker(0.5)
    full = top(4, GRID, attention=attention)
    fewer = top.exactly(0.2)(4, GRID, attention=attention)
    more = top.exactly(0.8)(4, GRID, attention=attention)
    assert (fewer <= full).all(), "trimming hides nothing new"
    assert (full <= more).all(), "topping up uncovers nothing"
    assert not torch.equal(fewer[0], fewer[1]), "at random"


def test_sometimes_masks_whole_images() -> None:
    rows = md.RandomMasker(0.3).sometimes(0.25)(4000, GRID).sum(dim=1)
    assert set(rows.tolist()) == {0, 59}
    assert float((rows > 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert (md.RandomMasker(0.3).sometimes(1.0)(100, GRID).sum(dim=1) == 59).all()
    assert not md.RandomMasker(0.3).sometimes(0.0)(100, GRID).any()


def test_mixture_chooses_per_image_by_weight() -> None:
    mixture = md.Mixture(
        {md.RandomMasker(0.25): 0.5, md.RandomMasker(0.5): 0.3, md.NoMasker(): 0.2}
    )
    rows = mixture(6000, GRID).sum(dim=1)
    assert set(rows.tolist()) == {49, 98, 0}
    for count, weight in ((49, 0.5), (98, 0.3), (0, 0.2)):
        assert float((rows == count).float().mean()) == pytest.approx(weight, abs=0.03)


def test_mixture_is_a_value_of_its_own() -> None:
    weights = {md.NoMasker(): 0.5, half: 0.5}
    mixture = md.Mixture(weights)
    weights[half] = 0.1
    assert mixture.weights[half] == 0.5
    assert mixture == md.Mixture({half: 0.5, md.NoMasker(): 0.5})
    assert hash(mixture) == hash(md.Mixture({half: 0.5, md.NoMasker(): 0.5}))


def test_fixed_counts() -> None:
    assert half.fixed_count((7, 7)) == 25
    assert (~half).fixed_count((7, 7)) == 24
    assert (half | half).fixed_count((7, 7)) is None
    assert (half | half).exactly(0.3).fixed_count((7, 7)) == 15
    assert half.sometimes(0.5).fixed_count((7, 7)) is None
    assert md.RandomMasker(md.Uniform(0.1, 0.5)).fixed_count((7, 7)) is None
    assert md.RandomMasker(md.Linear(0, 1)).fixed_count((10, 10), progress=0.5) == 50
    assert md.BlockMasker(0.5, exact=False).fixed_count((7, 7)) is None
    assert md.Mixture({half: 0.5, md.BlockMasker(0.5): 0.5}).fixed_count((7, 7)) == 25
    assert md.Mixture({half: 0.5, md.NoMasker(): 0.5}).fixed_count((7, 7)) is None


def test_repr_keeps_precedence() -> None:
    a, b, c = md.RandomMasker(0.1), md.RandomMasker(0.2), md.NoMasker()
    for masker in (a | b & c, (a | b) & c, ~(a | b), ~a | b, (a - b) - c, a - (b - c),
                   (~a).exactly(0.5), (a & b).sometimes(0.5).exactly(0.3)):  # fmt: skip
        assert md.parse_masker(repr(masker)) == masker
    assert repr((a | b) & c) == "(RandomMasker(0.1) | RandomMasker(0.2)) & NoMasker()"
