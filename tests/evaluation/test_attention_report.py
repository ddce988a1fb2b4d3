"""The report: each number is the instrument's, and the baselines are what they say."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import maskdistill as md
from maskdistill.data import Scenes, normalize
from maskdistill.evaluation import attention_jaccard
from maskdistill.evaluation.attention import (
    attention_distances,
    attention_entropy,
    head_diversity,
    pointing_game,
)
from maskdistill.evaluation.attention_report import attention_quality, reinitialised
from maskdistill.evaluation.discovery import (
    attention_boxes,
    corloc,
    in_pixels,
    last_keys,
    lost,
    mask_boxes,
    token_cut,
)


def scenes(count: int = 12) -> tuple[Tensor, Tensor]:
    pictures = Scenes(count, size=32, split="val")
    return torch.from_numpy(pictures.images).permute(0, 3, 1, 2), torch.from_numpy(pictures.masks)


def tiny() -> md.MaskedViT:
    torch.manual_seed(3)
    return md.MaskedViT(md.create_backbone("vit_tiny_patch16_224", 32, 8, depth=2))


def test_every_number_is_its_instruments() -> None:
    (images, masks), vit = scenes(), tiny()
    boxes = mask_boxes(masks)
    modes = [part.training for part in vit.modules()]
    quality = attention_quality(vit, images, masks, batch_size=5, tolerance=2, seeds=(4,))
    assert [part.training for part in vit.modules()] == modes
    assert quality.images == 12
    vit.eval()
    pixels = normalize(images)
    attention, keys = vit.attention(pixels), last_keys(vit, pixels)
    jaccard = attention_jaccard(attention, masks, (4, 4))
    pointing = pointing_game(attention, masks, (4, 4), tolerance=2)
    mean = attention_boxes(attention.mean(dim=1, keepdim=True), (4, 4), (32, 32))[:, 0]

    def found(boxes_: Tensor) -> float:
        return corloc(in_pixels(boxes_, (4, 4), (32, 32)), boxes)

    expected = {
        **{f"jaccard_{name}": value for name, value in jaccard._asdict().items()},
        **{f"pointing_{name}": value for name, value in pointing._asdict().items()},
        "corloc_attention": corloc(mean, boxes),
        "corloc_lost": found(lost(keys, (4, 4)).boxes),
        "corloc_token_cut": found(token_cut(keys, (4, 4)).boxes),
        "entropy": float(attention_entropy(attention).mean()),
        "head_diversity": float(head_diversity(attention).mean()),
        "attention_distance": float(attention_distances(vit, pixels)[-1].mean()),
    }
    ours = dataclasses.asdict(quality.model)
    ours.pop("attention_spread")
    assert ours == pytest.approx(expected, abs=1e-5)


def test_an_oracle_beats_its_baselines() -> None:
    """A model whose attention is the mask: what a perfect score looks like in the table."""
    images, vit = scenes(6)[0], tiny()
    masks = torch.zeros(6, 32, 32, dtype=torch.bool)
    masks[:, 8:24, 0:16] = True  # four patches, at the left
    backbone: Any = vit.backbone

    def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        weights = inputs[0].clone()
        on = torch.zeros(17).scatter(0, torch.tensor([5, 6, 9, 10]), 0.25)
        weights[:, :, 0] = on  # the class token's row; it is first itself
        return (weights,)

    hook = backbone.blocks[-1].attn.attn_drop.register_forward_pre_hook(see)
    quality = attention_quality(vit, images, masks, seeds=(0,), mass=0.9)
    hook.remove()
    assert quality.model.jaccard_best_head == quality.model.jaccard_head_mean == 1.0
    assert quality.model.corloc_attention == quality.model.pointing_head_mean == 1.0
    assert quality.model.entropy == pytest.approx(0.5), "4 of 16 patches"
    assert quality.model.head_diversity == 0
    # 16x16 pixels in the middle meet half of them; no centred box meets more.
    assert (quality.centre.jaccard, quality.centre.jaccard_area) == (pytest.approx(1 / 3), 0.25)
    assert quality.centre.corloc == 0
    assert quality.centre.pointing == 0, "the object ends left of the middle"


def test_baselines() -> None:
    (images, masks), vit = scenes(8), tiny()
    quality = attention_quality(vit, images, masks, seeds=(0, 1))
    assert len(quality.random_init_each) == 2
    assert quality.random_init_each[0] != quality.random_init_each[1]
    each = [scores.jaccard_best_head for scores in quality.random_init_each]
    assert quality.random_init.jaccard_best_head == pytest.approx(sum(each) / 2)
    other = attention_quality(reinitialised(vit, 1), images, masks, baseline=quality)
    assert other.model == quality.random_init_each[1], "the same seed, the same weights"
    assert other.random_init_each == quality.random_init_each
    assert attention_quality(vit, images, masks, seeds=(0, 1)) == quality


def test_random_weights_forget_everything() -> None:
    """Whatever a weight was, a copy with new ones does not depend on it."""
    vit = tiny()
    backbone: Any = vit.backbone
    backbone.learned = nn.Parameter(torch.zeros(2, 3))  # which no layer resets
    backbone.gamma = nn.Parameter(torch.zeros(5))
    moved = reinitialised(vit, 0)
    with torch.no_grad():
        for weight in vit.backbone.parameters():
            weight.copy_(torch.randn_like(weight))
    state = torch.get_rng_state()
    fresh, again = reinitialised(vit, 0), reinitialised(vit, 0)
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in fresh.backbone.named_parameters():
        assert torch.equal(weight, again.backbone.get_parameter(name)), name
        assert not torch.equal(weight, backbone.get_parameter(name)), name
        if name == "gamma":
            assert weight.tolist() == [1.0] * 5
        elif name != "learned":
            assert torch.equal(weight, moved.backbone.get_parameter(name)), name
    assert float(fresh.backbone.get_parameter("cls_token").detach().std()) > 0.01
    images = torch.randn(2, 3, 32, 32)
    assert not torch.equal(fresh.eval().embed(images), vit.eval().embed(images))


def test_random_weights_are_the_layers_own() -> None:
    network = nn.Sequential(nn.Conv2d(3, 64, 8, 8), nn.Flatten(), nn.BatchNorm1d(64 * 16))
    vit = md.MaskedViT(network, "pixel", patch_size=8)
    vit(torch.randn(8, 3, 32, 32))  # which moves the running mean
    fresh = reinitialised(vit)
    weight = fresh.backbone.get_parameter("0.weight").detach()
    assert float(weight.std()) == pytest.approx((3 * 192) ** -0.5, rel=0.05), "as of nn.Conv2d"
    assert not fresh.backbone.get_buffer("2.running_mean").any()
    assert vit.backbone.get_buffer("2.running_mean").any()


def test_floats_are_normalised_already() -> None:
    (images, masks), vit = scenes(4), tiny()
    pixels = attention_quality(vit, images, masks, seeds=(0,), discovery=False)
    assert pixels.model.corloc_lost is None
    assert pixels.model.corloc_token_cut is None
    floats = attention_quality(vit, normalize(images), masks, seeds=(0,))
    assert floats.model.jaccard_best_head == pixels.model.jaccard_best_head
    assert floats.model.corloc_lost is not None


def test_it_prints_as_a_table() -> None:
    images, masks = scenes(4)
    quality = attention_quality(tiny(), images, masks, seeds=(0, 1), discovery=False)
    lines = str(quality).splitlines()
    assert lines[0].split() == ["4", "images", "model", "random", "init", "(of", "seeds)", "centre"]
    assert len(lines) == 1 + len(dataclasses.fields(quality.model))
    assert max(map(len, lines)) <= 79
    assert lines[3].split()[:3] == ["jaccard", "head", "mean"]
    assert lines[3].split()[3] == f"{quality.model.jaccard_head_mean:.3f}"
    assert lines[3].split()[-1] == f"{quality.centre.jaccard:.3f}"


def test_bad_input() -> None:
    (images, masks), vit = scenes(4), tiny()
    quality = attention_quality(vit, images, masks, seeds=(0,), discovery=False)
    with pytest.raises(ValueError, match="masks must be .4, 32, 32. bool"):
        attention_quality(vit, images, masks[:, ::2])
    with pytest.raises(ValueError, match="masks must be"):
        attention_quality(vit, images, masks.float())
    with pytest.raises(ValueError, match="B >= 1"):
        attention_quality(vit, images[:0], masks[:0])
    with pytest.raises(ValueError, match="B >= 1"):
        attention_quality(vit, images.double(), masks)
    with pytest.raises(ValueError, match="empty"):
        attention_quality(vit, images, masks & False)
    with pytest.raises(ValueError, match="seeds must name"):
        attention_quality(vit, images, masks, seeds=())
    with pytest.raises(ValueError, match="baseline must be"):
        attention_quality(vit, images, masks, baseline="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="baseline is of 4 images"):
        attention_quality(vit, images[:2], masks[:2], baseline=quality)
    with torch.no_grad():
        vit.backbone.get_parameter("pos_embed").fill_(float("nan"))
    with pytest.raises(ValueError, match="diverged"):
        attention_quality(vit, images, masks, seeds=(0,))
