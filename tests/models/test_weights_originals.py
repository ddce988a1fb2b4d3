"""Weights that the authors' own code saves give the same features in timm, masked and clean.

Runs where MASKDISTILL_ORIGINALS names a folder with checkouts of dino, dinov2, dinov3 and ibot;
with ``pytest -s`` it prints how far apart the features are.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from maskdistill.models import MaskedViT
from maskdistill.models.weights import load_weights
from tests.models.elsewhere import V2, V2R, V3, shake

ORIGINALS = os.environ.get("MASKDISTILL_ORIGINALS")
needs_originals = pytest.mark.skipif(
    ORIGINALS is None, reason="MASKDISTILL_ORIGINALS names no checkouts"
)


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Put a checkout on the path; forget its modules afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


def original_dino() -> tuple[nn.Module, str, dict[str, Any]]:
    import vision_transformer

    return vision_transformer.vit_small(patch_size=16), "vit_small_patch16_224", {}


def original_ibot() -> tuple[nn.Module, str, dict[str, Any]]:
    from models import vision_transformer

    model = vision_transformer.vit_small(patch_size=16, return_all_tokens=False)
    model.masked_embed = nn.Parameter(torch.randn(1, 384))
    return model, "vit_small_patch16_224", {}


def original_dinov2(**settings: Any) -> nn.Module:
    from dinov2.models import vision_transformer

    build_model = settings.pop("build", "vit_small")
    usual = {"patch_size": 14, "img_size": 518, "init_values": 1.0, "block_chunks": 0}
    return getattr(vision_transformer, build_model)(**{**usual, **settings})


def original_dinov3(**settings: Any) -> nn.Module:
    from dinov3.models.vision_transformer import DinoVisionTransformer

    model = DinoVisionTransformer(
        pos_embed_rope_dtype="fp32", embed_dim=384, num_heads=6, layerscale_init=1e-5,
        norm_layer="layernormbf16", n_storage_tokens=4, mask_k_bias=True, **settings,
    )  # fmt: skip
    model.init_weights()
    return model


TOKEN = {"global_pool": "token"}
FROM_ORIGINALS: dict[str, tuple[str, Callable[[], tuple[nn.Module, str, dict[str, Any]]]]] = {
    "dino": ("dino", original_dino),
    "ibot": ("ibot", original_ibot),
    "dinov2": ("dinov2", lambda: (original_dinov2(), V2, {"img_size": 518})),
    "dinov2 reg4, chunks": ("dinov2", lambda: (
        original_dinov2(num_register_tokens=4, block_chunks=4), V2R, {})),
    "dinov2 giant": ("dinov2", lambda: (
        original_dinov2(build="DinoVisionTransformer", embed_dim=1536, depth=2, num_heads=24,
                        ffn_layer="swiglufused", num_register_tokens=4, img_size=224),
        "vit_giant_patch14_reg4_dinov2", {"depth": 2, "img_size": 224})),
    "dinov3": ("dinov3", lambda: (original_dinov3(), V3, TOKEN)),
    "dinov3 plus": ("dinov3", lambda: (
        original_dinov3(ffn_layer="swiglu", ffn_ratio=6, untie_global_and_local_cls_norm=True),
        "vit_small_plus_patch16_dinov3_qkvb", TOKEN)),
}  # fmt: skip


@needs_originals
@pytest.mark.parametrize("name", FROM_ORIGINALS)
def test_the_originals_own_code(name: str, tmp_path: Path) -> None:
    """Random weights saved by their code give the same features in timm, masked and clean."""
    repository, make = FROM_ORIGINALS[name]
    with importable(Path(str(ORIGINALS)) / repository):
        original, timm_name, settings = make()
        if not timm.is_model(timm_name):
            pytest.skip(f"timm has no {timm_name} yet")
        shake(original)
        torch.save(original.state_dict(), tmp_path / "weights.pth")
        target = MaskedViT(timm.create_model(timm_name, num_classes=0, **settings).eval())
        report = load_weights(target, tmp_path / "weights.pth")
        x = torch.randn(1, 3, *target.patch_embed.img_size)
        grid = target.grid(*x.shape[-2:])
        hidden = torch.rand(1, grid[0] * grid[1]) < 0.3
        with torch.no_grad():
            theirs, ours = original(x), target(x)
            scale = theirs.abs().max()
            off = ((ours - theirs).abs().max() / scale).item()
            print(f"\n{name}: {report.layout}, {report.tensors} tensors, off by {off:.1e}")
            assert off < 1e-5
            if repository == "dino":  # has no masks
                return
            if repository == "ibot":
                original.masked_im_modeling = True
                theirs = original(x, mask=hidden.reshape(1, *grid))
            else:
                theirs = original(x, masks=hidden)
            masked = target(x, hidden)
        off, moved = (((masked - other).abs().max() / scale).item() for other in (theirs, ours))
        print(f"{name}: masked, off by {off:.1e}; the mask moves it by {moved:.1e}")
        assert off < 1e-5 < moved


ELSEWHERE: dict[str, tuple[str, Callable[[], tuple[nn.Module, str, dict[str, Any]]], float]] = {
    "dino at 96": ("dino", lambda: (*original_dino()[:2], {"img_size": 96}), 0.1),
    "dinov2 at 224": ("dinov2", lambda: (original_dinov2(), V2, {"img_size": 224}), 0.1),
    "dinov2 reg4 at 224": ("dinov2", lambda: (
        original_dinov2(num_register_tokens=4, interpolate_antialias=True, interpolate_offset=0.0),
        V2R, {"img_size": 224}), 1e-5),
    "dinov3, rounded periods": ("dinov3", lambda: (rounded(original_dinov3()), V3, TOKEN), 0.01),
}  # fmt: skip


def rounded(model: Any) -> nn.Module:
    """With rotary periods in bfloat16, as the released files have them."""
    model.rope_embed.periods = model.rope_embed.periods.bfloat16().float()
    return model  # type: ignore[no-any-return]


@needs_originals
@pytest.mark.parametrize("name", ELSEWHERE)
def test_where_timm_computes_otherwise(name: str) -> None:
    """At other sizes than the file's, and with rounded periods: how far apart the features are."""
    repository, make, most = ELSEWHERE[name]
    with importable(Path(str(ORIGINALS)) / repository):
        original, timm_name, settings = make()
        if not timm.is_model(timm_name):
            pytest.skip(f"timm has no {timm_name} yet")
        target = timm.create_model(timm_name, num_classes=0, **settings).eval()
        load_weights(target, shake(original).state_dict())
        x = torch.randn(1, 3, *target.patch_embed.img_size)
        with torch.no_grad():
            theirs, ours = original(x), target(x)
    off = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"\n{name}: off by {off:.1e}")
    assert off < most
