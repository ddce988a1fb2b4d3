"""Masks that are related: over the batch, over views, over roles."""

from __future__ import annotations

import pytest
import torch

import maskdistill as md

CROPS = [torch.zeros(6, 3, 64, 64)] * 2 + [torch.zeros(6, 3, 32, 32)] * 3
HALF = md.RandomMasker(0.5)


def masks(policy: md.ViewPolicy, seed: int = 0) -> md.ViewMasks:
    return policy(CROPS, 8, generator=torch.Generator().manual_seed(seed))


def test_shared_is_one_mask_for_the_batch() -> None:
    mask = md.BlockMasker(0.4).shared()(16, (14, 14))
    assert (mask == mask[0]).all()
    with pytest.raises(ValueError, match="one mask cannot serve"):
        md.AttentionGuidedMasker(0.5).shared()


def test_same_in_views() -> None:
    both = masks(md.ViewPolicy.symmetric(HALF.same_in_views()))
    first = both.student[0]
    assert first is not None
    assert len(first.unique(dim=0)) > 1, "images differ"
    for other in (both.student[1], *both.teacher):
        assert torch.equal(other, first)  # type: ignore[arg-type]
    local = masks(md.ViewPolicy.local_only(HALF.same_in_views())).student[2:]
    assert all(torch.equal(mask, local[0]) for mask in local)  # type: ignore[arg-type]
    again = masks(md.ViewPolicy.symmetric(HALF.same_in_views()), seed=1).student[0]
    assert not torch.equal(again, first)  # type: ignore[arg-type]


def test_the_teacher_sees_what_the_student_does_not() -> None:
    same = HALF.same_in_views()
    drawn = masks(md.ViewPolicy(student_global=same, teacher_global=~same))
    for student, teacher in zip(drawn.student, drawn.teacher, strict=False):
        assert (student ^ teacher).all()  # type: ignore[operator]


def test_a_guided_mask_follows_the_first_view() -> None:
    attention = [torch.rand(6, 64), torch.rand(6, 64)]
    policy = md.AsymmetricMaskPolicy(md.AttentionGuidedMasker(0.3).same_in_views())
    first, second = policy(CROPS, 8, attention=attention).student[:2]
    expected = md.AttentionGuidedMasker(0.3)(6, (8, 8), attention=attention[0])
    assert torch.equal(first, expected)  # type: ignore[arg-type]
    assert torch.equal(second, expected)  # type: ignore[arg-type]


def test_complementary_views() -> None:
    drawn = masks(md.ViewPolicy.student_all_views(md.BlockMasker(0.4).complementary_views()))
    first, second, *local = drawn.student
    assert (first ^ second).all()  # type: ignore[operator]
    assert (local[0] ^ local[1]).all()  # type: ignore[operator]
    assert torch.equal(local[0], local[2])  # type: ignore[arg-type]
    assert [mask.count for mask in drawn.student_masks] == [None] * 5
    halves = HALF.complementary_views()
    assert halves.fixed_count((8, 8)) == 32
    assert halves.fixed_count((7, 7)) is None


def test_total() -> None:
    masker = md.RandomMasker(md.Uniform(0.0, 1.0)).total(0.4)
    drawn = masks(md.AsymmetricMaskPolicy(masker)).student[:2]
    counts = torch.stack([mask.sum(dim=1) for mask in drawn])  # type: ignore[union-attr]
    assert counts.sum(dim=0).tolist() == [51] * 6  # round(0.4 * 128)
    assert counts.unique().numel() > 4, "the views share it unevenly"
    ragged = md.BlockMasker(0.5).total(md.Uniform(0.1, 0.9))(12, (5, 7), views=3)
    assert ragged.shape == (12, 35)


def test_total_keeps_what_need_not_change() -> None:
    """Topping up hides more, and shows nothing that was hidden."""
    generator = torch.Generator().manual_seed(0)
    few = HALF(8, (6, 6), generator=generator)
    generator.manual_seed(0)
    more = HALF.total(0.8)(8, (6, 6), generator=generator, views=2)
    assert (more | ~few).all()


def test_several_masks_per_image() -> None:
    attention = torch.rand(3, 2, 49)
    masker = md.AttentionGuidedMasker(0.3, temperature=1.0)
    drawn = masker.several(5, 3, (7, 7), attention=attention)
    assert drawn.shape == (3, 5, 49)
    assert len(drawn[0].unique(dim=0)) > 1
    hard = md.AttentionGuidedMasker(0.3).several(2, 3, (7, 7), attention=attention)
    assert torch.equal(hard[:, 0], md.AttentionGuidedMasker(0.3)(3, (7, 7), attention=attention))
    assert md.NoMasker().several(4, 0, (2, 2)).shape == (0, 4, 4)
    with pytest.raises(ValueError, match="masks must be an int"):
        md.NoMasker().several(0, 1, (2, 2))


def test_rolling_moves_each_image_by_itself_and_favours_no_place() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = md.BlockMasker(0.3).rolled()(20_000, (14, 14), generator=generator)
    hidden = mask.float().mean(dim=0)
    # Binomial: 4.5 standard errors bound all 196 patches at once but in 1 of 700 runs.
    assert float((hidden - 59 / 196).abs().max()) < 4.5 * (0.3 * 0.7 / 20_000) ** 0.5
    straight = md.BlockMasker(0.3)(20_000, (14, 14), generator=generator).float().mean(dim=0)
    assert float(straight[0]) < 0.1 < 0.4 < float(straight[14 * 7 + 7])


def test_units_are_hidden_whole() -> None:
    mask = HALF.in_units(3)(50, (7, 9)).view(50, 7, 9)
    for row, column in ((0, 0), (3, 6), (6, 3)):
        unit = mask[:, row : row + 3, column : column + 3].flatten(1)
        assert ((unit.sum(1) == 0) | unit.all(1)).all()
    assert HALF.in_units(2).fixed_count((8, 8)) == 32
    assert HALF.in_units(3).fixed_count((7, 9)) is None
    assert md.RandomMasker(1.0).in_units(3).fixed_count((7, 9)) == 63
    with pytest.raises(ValueError, match="per patch, not per unit"):
        md.AttentionGuidedMasker(0.5).in_units(2)
    with pytest.raises(ValueError, match="size must be an int"):
        HALF.in_units(0)


def test_views_must_divide_the_batch() -> None:
    with pytest.raises(ValueError, match="divides the batch"):
        HALF(5, (4, 4), views=2)
