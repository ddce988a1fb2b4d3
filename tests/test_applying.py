"""Tokens replaced, tokens dropped, pixels filled."""

from __future__ import annotations

import pytest
import torch

import maskdistill as md
from maskdistill.masking.mask import patch_grid
from maskdistill.models.tokens import drop_tokens, replace_tokens, visible_indices

IMAGES = torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(0))
MASK = md.RandomMasker(0.5)(3, (2, 3), generator=torch.Generator().manual_seed(0))


def patches(images: torch.Tensor) -> torch.Tensor:
    return images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


@pytest.mark.parametrize("fill", ["zero", "mean", "noise", "blur"])
def test_only_hidden_pixels_change(fill: str) -> None:
    filled = md.mask_pixels(IMAGES, MASK, 4, fill)  # type: ignore[arg-type]
    assert filled.shape == IMAGES.shape
    same = (patches(filled) == patches(IMAGES)).all(dim=-1)
    assert torch.equal(same, ~MASK)


def test_fills_are_what_they_say() -> None:
    everything = torch.ones(3, 6, dtype=torch.bool)
    assert not md.mask_pixels(IMAGES, everything, 4).any()
    mean = md.mask_pixels(IMAGES, everything, 4, "mean")
    torch.testing.assert_close(mean[:, :, 0, 0], IMAGES.mean(dim=(2, 3)))
    big = torch.randn(2, 3, 64, 64) * 3 + 5
    noise = md.mask_pixels(big, torch.ones(2, 256, dtype=torch.bool), 4, "noise")
    torch.testing.assert_close(noise.mean(dim=(2, 3)), big.mean(dim=(2, 3)), atol=0.3, rtol=0)
    torch.testing.assert_close(noise.std(dim=(2, 3)), big.std(dim=(2, 3)), atol=0.3, rtol=0)
    blurred = md.mask_pixels(big, torch.ones(2, 256, dtype=torch.bool), 4, "blur")
    assert blurred.std() < 0.5 * big.std()


def test_noise_comes_from_the_generator() -> None:
    def noise() -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return md.mask_pixels(IMAGES, MASK, 4, "noise", generator=generator)

    state = torch.random.get_rng_state()
    assert torch.equal(noise(), noise())
    assert torch.equal(torch.random.get_rng_state(), state)


def whole(mask: torch.Tensor) -> torch.Tensor:
    """Per patch to per pixel: ``(3, 6)`` to ``(3, 1, 8, 12)``."""
    return mask.view(3, 1, 2, 3).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


def test_bool_masks_are_bit_identical_to_a_choice_of_pixels() -> None:
    for fill, filling in (("zero", torch.zeros(())), ("mean", IMAGES.mean((2, 3), keepdim=True))):
        wanted = torch.where(whole(MASK), filling, IMAGES)
        assert torch.equal(md.mask_pixels(IMAGES, MASK, 4, fill), wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("fill", ["zero", "mean", "noise", "blur"])
def test_a_soft_mask_of_zeros_and_ones_is_the_bool_mask(fill: str) -> None:
    def fill_by(mask: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return md.mask_pixels(IMAGES, mask, 4, fill, generator=generator)  # type: ignore[arg-type]

    for soft in (MASK.float(), whole(MASK).float(), whole(MASK).double()):
        assert torch.equal(fill_by(soft), fill_by(MASK))


def test_soft_masks_mix_image_and_filling() -> None:
    soft = torch.rand(3, 1, 8, 12)
    mean = IMAGES.mean((2, 3), keepdim=True)
    mixed = md.mask_pixels(IMAGES, soft, 4, "mean")
    torch.testing.assert_close(mixed, IMAGES * (1 - soft) + mean * soft)
    per_patch = torch.rand(3, 6)
    assert torch.equal(
        md.mask_pixels(IMAGES, per_patch, 4), md.mask_pixels(IMAGES, whole(per_patch), 4)
    )
    assert md.mask_pixels(IMAGES.bfloat16(), soft, 4).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(3, 6), (3, 1, 8, 12)])
def test_gradients_reach_the_soft_mask(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, dtype=torch.double, requires_grad=True)
    images = IMAGES.double()

    def brightness(logits: torch.Tensor) -> torch.Tensor:
        return md.mask_pixels(images, logits.sigmoid(), 4, "blur").square().mean(dim=(1, 2, 3))

    assert torch.autograd.gradcheck(brightness, logits, fast_mode=True)
    brightness(logits).sum().backward()
    assert logits.grad is not None
    assert (logits.grad != 0).all()


def test_bad_soft_masks() -> None:
    with pytest.raises(ValueError, match=r"\(3, 6\) or .*\(3, 1, 8, 12\); got \(3, 8, 12\)"):
        md.mask_pixels(IMAGES, torch.rand(3, 8, 12), 4)
    with pytest.raises(ValueError, match=r"got \(3, 2, 8, 12\)"):
        md.mask_pixels(IMAGES, torch.rand(3, 2, 8, 12), 4)
    with pytest.raises(ValueError, match="from -2 to 1.*sigmoid"):
        md.mask_pixels(IMAGES, torch.tensor([[1.0, 1, 1, 1, 1, -2]] * 3), 4)
    with pytest.raises(ValueError, match="nan"):
        md.mask_pixels(IMAGES, torch.full((3, 6), float("nan")), 4)
    almost = torch.full((3, 6), 1.0 + 1e-6)  # as masks that sum to one
    assert md.mask_pixels(IMAGES, almost, 4).abs().max() < 1e-5
    assert md.mask_pixels(IMAGES[:0], torch.rand(0, 6), 4).shape == (0, 3, 8, 12)


def test_patches_need_not_be_square() -> None:
    mask = torch.zeros(1, 4, dtype=torch.bool)
    mask[0, 1] = True
    filled = md.mask_pixels(torch.ones(1, 1, 4, 12), mask, (2, 6))
    assert filled[0, 0, :2, 6:].sum() == 0
    assert filled.sum() == 36


def test_tokens() -> None:
    tokens = torch.arange(24.0).reshape(2, 4, 3)
    mask = torch.tensor([[True, False, False, True], [False, True, True, False]])
    replaced = replace_tokens(tokens, mask, torch.full((3,), -1.0))
    assert (replaced[mask] == -1).all()
    assert torch.equal(replaced[~mask], tokens[~mask])
    keep = visible_indices(mask)
    assert keep.tolist() == [[1, 2], [0, 3]]
    with_class = torch.cat([torch.full((2, 1, 3), 99.0), tokens], dim=1)
    dropped = drop_tokens(with_class, keep, prefix=1)
    assert dropped[:, 0].eq(99).all()
    assert torch.equal(dropped[:, 1:], tokens[~mask].reshape(2, 2, 3))
    assert torch.equal(drop_tokens(tokens, keep), dropped[:, 1:])


def test_unequal_rows_cannot_be_dropped() -> None:
    mask = torch.tensor([[True, False, False], [True, True, False]])
    with pytest.raises(ValueError, match="from 1 to 2"):
        visible_indices(mask)
    with pytest.raises(ValueError, match="no patch at all"):
        visible_indices(torch.ones(2, 3, dtype=torch.bool))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="8x12 pixels does not divide into patches of 5x5"):
        md.mask_pixels(IMAGES, MASK, 5)
    with pytest.raises(ValueError, match="bool"):
        md.mask_pixels(IMAGES, MASK.int(), 4)
    with pytest.raises(ValueError, match=r"\(3, 6\).*got \(3, 7\)"):
        md.mask_pixels(IMAGES, torch.zeros(3, 7, dtype=torch.bool), 4)
    with pytest.raises(ValueError, match="floats"):
        md.mask_pixels(torch.zeros(3, 3, 8, 12, dtype=torch.uint8), MASK, 4)
    with pytest.raises(ValueError, match="fill must be one of"):
        md.mask_pixels(IMAGES, MASK, 4, "black")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="patch_size"):
        patch_grid((8, 8), 0)
