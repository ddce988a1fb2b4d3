"""Crops of several sizes, in any order, through one backbone."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import maskdistill as md
from maskdistill.models import create_backbone


@pytest.fixture
def net() -> md.MultiCropWrapper:
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=0, depth=1,
        dynamic_img_size=True,
    )  # fmt: skip
    return md.MultiCropWrapper(md.MaskedViT(vit), nn.Linear(192, 5)).eval()


@torch.no_grad()
def test_order_and_grouping(net: md.MultiCropWrapper) -> None:
    # Interleaved and oblong sizes: the original groups only consecutive, square ones.
    sizes = [(32, 32), (16, 16), (32, 32), (16, 24), (16, 16)]
    crops = [torch.randn(3, 3, *size) for size in sizes]
    calls: list[int] = []
    net.backbone.backbone.register_forward_pre_hook(lambda m, x: calls.append(len(x[0])))
    output = net(crops)
    assert sorted(calls) == [3, 6, 6], "one forward per size"
    assert output.logits.shape == (15, 5)
    for i, crop in enumerate(crops):
        features = net.backbone(crop)
        torch.testing.assert_close(output.features[3 * i : 3 * i + 3], features)
        torch.testing.assert_close(output.logits[3 * i : 3 * i + 3], net.head(features))


@torch.no_grad()
def test_masks_reach_their_crops(net: md.MultiCropWrapper) -> None:
    crops = [torch.randn(2, 3, 32, 32) for _ in range(3)]
    masks = [md.RandomMasker(0.5)(2, (4, 4)), None, md.RandomMasker(0.25)(2, (4, 4))]
    output = net(crops, masks)
    for i, (crop, mask) in enumerate(zip(crops, masks, strict=True)):
        torch.testing.assert_close(output.features[2 * i : 2 * i + 2], net.backbone(crop, mask))


@torch.no_grad()
def test_patch_tokens_of_the_first_crops(net: md.MultiCropWrapper) -> None:
    crops = [torch.randn(3, 3, size, size) for size in (32, 32, 16)]
    masks = [md.RandomMasker(0.5)(3, (4, 4)), None, None]
    plain, output = net(crops, masks), net(crops, masks, patches=2)
    assert plain.patches is None
    torch.testing.assert_close(output.logits, plain.logits)
    torch.testing.assert_close(output.features, plain.features)
    for i in range(2):
        tokens = net.backbone.forward_features(crops[i], masks[i])[:, 1:]
        torch.testing.assert_close(output.patches[3 * i : 3 * i + 3], tokens)
    torch.testing.assert_close(
        net.mean_patch_scores(output.patches),
        net.score_patches(output.patches.flatten(0, 1)).mean(dim=0, keepdim=True),
    )


def test_create_backbone_refuses_what_is_no_vit() -> None:
    with pytest.raises(ValueError, match=r"no model 'vit_tinny.*Did you mean vit_tiny"):
        create_backbone("vit_tinny_patch16_224", 32, 8)
    with pytest.raises(ValueError, match="cannot be built for images of 32x32"):
        create_backbone("resnet10t", 32, 8, depth=2)
    with pytest.raises(ValueError, match="its patches are of 32x32"):
        create_backbone("resnet10t", 64, 7)
    with pytest.raises(
        ValueError, match=r"beit.*for images of 32x32 and 16x16.*takes one size only"
    ):
        create_backbone("beit_base_patch16_224", 32, 8, local_size=16, depth=1)
    assert create_backbone("beit_base_patch16_224", 32, 8, local_size=32, depth=1)


@pytest.mark.parametrize(
    ("name", "patch_size"), [("swin_tiny_patch4_window7_224", 4), ("pvt_v2_b0", 32)]
)
def test_create_backbone_of_other_families(name: str, patch_size: int) -> None:
    model = create_backbone(name, 64, patch_size)
    for size in (64, 32):
        assert model(torch.zeros(1, 3, size, size)).ndim == 2


def test_create_backbone_starts_as_the_original() -> None:
    torch.manual_seed(0)
    model = create_backbone("vit_tiny_patch16_224", 32, 8, depth=2)
    assert float(model.cls_token.detach().std()) == pytest.approx(0.02, rel=0.3)  # type: ignore[operator]
    assert model.training
