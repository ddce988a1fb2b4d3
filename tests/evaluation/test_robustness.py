"""Occlusion: what is hidden, what takes its place, and the curve."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import maskdistill as md
from maskdistill.data import Scenes, normalize
from maskdistill.evaluation import extract_features
from maskdistill.evaluation.features import evaluation_images, generator_of
from maskdistill.evaluation.knn import knn_classifier
from maskdistill.evaluation.robustness import (
    KINDS,
    OCCLUSION_FILLS,
    TENTHS,
    OcclusionFill,
    attention_maps,
    occlude,
    occluded_features,
    occlusion_curve,
    occlusion_mask,
)

SIZE, PATCH, N = 32, 8, 16


def vit(apply: md.applying.Application = "pixel") -> md.MaskedViT:
    torch.manual_seed(0)
    return md.MaskedViT(md.create_backbone("vit_tiny_patch16_224", SIZE, PATCH, depth=1), apply)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return evaluation_images(Scenes(22, SIZE), SIZE)[0]


def test_evaluation_images_are_what_features_are_made_of() -> None:
    model, scenes = vit(), Scenes(9, 48)
    images, labels = evaluation_images(scenes, SIZE, indices=[2, 5, 7])
    features, same = extract_features(model, scenes, SIZE, indices=[2, 5, 7])
    assert labels.equal(same)
    torch.testing.assert_close(occluded_features(model, images), features)
    whole = evaluation_images(scenes, SIZE, crop=False)[0]
    assert len(whole) == 9
    assert not whole[[2, 5, 7]].equal(images)
    with pytest.raises(ValueError, match="at least one image"):
        evaluation_images(scenes, SIZE, indices=[])


# --- Masks


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_the_protocols_counts(rows: int, columns: int, tenth: int) -> None:
    mask = occlusion_mask("random", TENTHS[tenth], (rows, columns), 2)
    assert mask.sum(dim=1).tolist() == [tenth * rows * columns // 10] * 2


def test_random_masks_grow_and_differ_by_image() -> None:
    masks = [
        occlusion_mask("random", r, (7, 7), 50, generator=generator_of(3, "x")) for r in TENTHS
    ]
    for smaller, greater in itertools.pairwise(masks):
        assert bool((greater | ~smaller).all()), "what was hidden stays hidden"
    assert len({tuple(row.tolist()) for row in masks[5]}) == 50
    assert masks[5].float().mean(dim=0).std() < 0.15, "no place is hidden much more often"


def test_guided_masks_go_by_attention() -> None:
    attention = torch.rand(6, 3, N)
    mean = attention.mean(dim=1)
    salient = occlusion_mask("salient", 0.4, (4, 4), 6, attention=attention)
    background = occlusion_mask("background", 0.4, (4, 4), 6, attention=attention)
    for row, high, low in zip(mean, salient, background, strict=True):
        assert row[high].min() > row[~high].max()
        assert row[low].max() < row[~low].min()
    assert not (salient & background).any()
    assert salient.sum(dim=1).tolist() == [6] * 6


def test_masks_refuse() -> None:
    with pytest.raises(ValueError, match="attention_maps"):
        occlusion_mask("salient", 0.5, (4, 4), 2)
    with pytest.raises(ValueError, match="random, salient, background"):
        occlusion_mask("least", 0.5, (4, 4), 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        occlusion_mask("random", 30, (4, 4), 2)


# --- Fills


def test_fills_before_and_after_normalisation(pixels: Tensor) -> None:
    mask = occlusion_mask("random", 0.5, (4, 4), len(pixels))
    hidden = mask.view(-1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    hidden = hidden.expand(-1, 3, -1, -1)
    clean = normalize(pixels)
    for fill in ("black", "mean", "noise"):
        changed = normalize(occlude(pixels, mask, PATCH, fill))
        torch.testing.assert_close(changed[~hidden], clean[~hidden])
        if fill == "mean":
            assert changed[hidden].abs().max() < 1e-5, "0 after normalisation"
        if fill == "black":
            black = normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))
            assert black.flatten().tolist() == pytest.approx([-2.1179, -2.0357, -1.8044], abs=1e-4)
            torch.testing.assert_close(changed[hidden], black.expand_as(changed)[hidden])
        if fill == "noise":
            noise = occlude(pixels, torch.ones_like(mask), PATCH, "noise")
            own = pixels.float()
            gap = (noise.mean(dim=(2, 3)) - own.mean(dim=(2, 3))) / own.std(dim=(2, 3))
            assert gap.abs().max() < 0.2
            assert 0.8 < (noise.std(dim=(2, 3)) / own.std(dim=(2, 3))).mean() < 1.2


@pytest.mark.parametrize("fill", ["black", "mean", "noise"])
def test_batches_do_not_matter(pixels: Tensor, fill: OcclusionFill) -> None:
    model = vit()
    masks = occlusion_mask("random", 0.5, (4, 4), len(pixels))
    one = occluded_features(model, pixels, masks, fill=fill, seed=5)
    many = occluded_features(model, pixels, masks, fill=fill, seed=5, batch_size=3)
    torch.testing.assert_close(one, many)
    other = occluded_features(model, pixels, masks, fill=fill, seed=6)
    assert one.equal(other) == (fill != "noise")


def test_dropped_tokens_are_dropped(pixels: Tensor) -> None:
    model = vit("drop")
    masks = occlusion_mask("random", 0.6, (4, 4), len(pixels))
    features = occluded_features(model, pixels, masks, fill="drop", batch_size=5)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(features, model.embed(normalize(pixels), masks))
    # What the pixels of dropped patches are is no matter.
    filled = occlude(pixels, masks, PATCH, "black").to(torch.uint8)
    torch.testing.assert_close(features, occluded_features(model, filled, masks, fill="drop"))


def test_features_refuse(pixels: Tensor) -> None:
    model, masks = vit(), torch.zeros(len(pixels), N, dtype=torch.bool)
    with pytest.raises(ValueError, match="apply='pixel'"):
        occluded_features(model, pixels, masks, fill="drop")
    with pytest.raises(ValueError, match=r"\(B, N\)"):
        occluded_features(model, pixels, masks[:, :9])
    with pytest.raises(ValueError, match="before normalisation"):
        occluded_features(model, normalize(pixels), masks)
    with pytest.raises(ValueError, match="black, mean, noise, drop"):
        occluded_features(model, pixels, masks, fill="white")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="removes tokens"):
        occlude(pixels, masks, PATCH, "drop")
    masks[0, :3] = True
    with pytest.raises(ValueError, match="from 13 to 16"):
        occluded_features(vit("drop"), pixels, masks, fill="drop")


# --- The curve


class Brightest(nn.Module):
    """Knows one thing: the mean of each patch's red, before normalisation, as a feature."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 1, PATCH, PATCH)
        nn.init.constant_(self.patch_embed.weight, 0.0)
        nn.init.constant_(self.patch_embed.weight[:, :1].detach(), 1.0 / PATCH**2)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.patch_embed(x).flatten(1)
        return tokens


def known() -> tuple[md.MaskedViT, Tensor, Tensor, Tensor]:
    """Images whose label is the place of their one white patch, and attention that knows it."""
    images = torch.zeros(N, 3, SIZE, SIZE, dtype=torch.uint8)
    for i in range(N):
        row, column = divmod(i, 4)
        images[i, :, PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)] = 255
    model = md.MaskedViT(Brightest(), "pixel", patch_size=PATCH, image_size=(SIZE, SIZE))
    return model, images, torch.arange(N), torch.eye(N) + 0.01 * torch.rand(N, N)


def find(features: Tensor) -> Tensor:
    """Return the place of the brightest patch; -1 where none stands out."""
    top = features.topk(2, dim=1)
    return torch.where(top.values[:, 0] - top.values[:, 1] > 1, top.indices[:, 0], -1)


def test_the_curve_of_a_known_answer() -> None:
    model, images, labels, attention = known()
    curves = occlusion_curve(model, find, images, labels, kinds=KINDS, attention=attention)
    assert curves["salient"].accuracies == (1.0,) + (0.0,) * 9, "the one patch goes first"
    assert curves["background"].accuracies == (1.0,) * 10, "and last"
    assert curves["background"].area == pytest.approx(1.0)
    assert curves["salient"].area == pytest.approx(0.05 / 0.9)
    random = curves["random"]
    assert list(random.accuracies) == sorted(random.accuracies, reverse=True), "masks grow"
    assert random.hidden == tuple(i * N // 10 for i in range(10))
    assert random.retention == random.accuracies
    assert random.clean == 1.0
    # The patch is hidden with probability hidden / N: 16 images stray from that by 0.125.
    for value, hidden in zip(random.accuracies, random.hidden, strict=True):
        assert abs(value - (1 - hidden / N)) < 0.4


def test_one_draw_for_all_images() -> None:
    model, images, labels, _ = known()
    curve = occlusion_curve(model, find, images, labels, per_image=False)["random"]
    assert curve.accuracies == tuple(1 - hidden / N for hidden in curve.hidden)


@pytest.mark.parametrize("fill", OCCLUSION_FILLS)
def test_a_curve_of_a_vit(pixels: Tensor, fill: OcclusionFill) -> None:
    model = vit("drop" if fill == "drop" else "pixel")
    labels = torch.arange(len(pixels)) % 11
    classify = knn_classifier(occluded_features(model, pixels), labels, k=1)
    attention = attention_maps(model, pixels, batch_size=5)
    assert attention.shape == (len(pixels), N)
    kwargs = {"kinds": KINDS, "attention": attention, "fill": fill, "ratios": (0, 0.3, 0.6)}
    curves = occlusion_curve(model, classify, pixels, labels, **kwargs)  # type: ignore[arg-type]
    for curve in curves.values():
        assert curve.accuracies[0] == curve.clean == 1.0
        assert curve.accuracies[2] < 1.0
        assert curve.hidden == (0, 4, 9)
    again = occlusion_curve(
        model, classify, pixels, labels, batch_size=4, **kwargs,  # type: ignore[arg-type]
    )  # fmt: skip
    assert again == curves


def test_nothing_right_gives_no_retention(pixels: Tensor) -> None:
    curve = occlusion_curve(
        vit(), lambda f: f.new_full((len(f),), -1), pixels, torch.zeros(22), ratios=(0.1, 0.2)
    )["random"]
    assert curve.area == 0.0
    assert all(value != value for value in curve.retention)


def test_curves_refuse(pixels: Tensor) -> None:
    model, labels = vit(), torch.zeros(len(pixels))
    for ratios in ((), (0.1,), (0.5, 0.1), (0.1, 0.1), (0.5, 1.0), (-0.1, 0.5)):
        with pytest.raises(ValueError, match="ratios must be"):
            occlusion_curve(model, find, pixels, labels, ratios=ratios)
    with pytest.raises(ValueError, match="one per image"):
        occlusion_curve(model, find, pixels, labels[1:])
    with pytest.raises(ValueError, match="attention_maps"):
        occlusion_curve(model, find, pixels, labels, kinds=("random", "salient"))
    with pytest.raises(ValueError, match="B=22"):
        occlusion_curve(
            model, find, pixels, labels, kinds=("salient",), attention=torch.rand(22, 9)
        )
