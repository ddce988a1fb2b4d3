"""Attention before and after a change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import maskdistill as md
from maskdistill.data import Scenes
from maskdistill.evaluation.features import evaluation_images
from maskdistill.evaluation.robustness import (
    KINDS,
    attention_stability,
    compare_attention,
    occlusion_stability,
)


def by_definition(
    clean: Tensor, changed: Tensor, hidden: Tensor, mass: float
) -> tuple[float, float]:
    cosines, overlaps = [], []
    for a, b, h in zip(clean.mean(1), changed.mean(1), hidden, strict=True):
        a, b = a[~h] / a[~h].sum(), b[~h] / b[~h].sum()
        cosines.append(float(a @ b / (a.norm() * b.norm())))
        kept = []
        for p in (a, b):
            held, chosen = 0.0, set()
            for i in p.argsort(descending=True).tolist():
                if held >= mass - 1e-6:
                    break
                held += float(p[i])
                chosen.add(i)
            kept.append(chosen)
        overlaps.append(len(kept[0] & kept[1]) / len(kept[0] | kept[1]))
    return sum(cosines) / len(cosines), sum(overlaps) / len(overlaps)


@given(st.integers(0, 999), st.floats(0.1, 0.95))
@settings(max_examples=40, deadline=None)
def test_is_the_definition(seed: int, mass: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    clean, changed = torch.rand(2, 4, 3, 20, generator=generator) ** 3
    hidden = torch.rand(4, 20, generator=generator) < 0.4
    hidden[:, 0] = False
    found = compare_attention(clean, changed, hidden, mass=mass)
    assert found == pytest.approx(by_definition(clean, changed, hidden, mass), abs=1e-5)


def test_known_cases() -> None:
    a = torch.tensor([[0.7, 0.1, 0.1, 0.1]])
    assert compare_attention(a, 5 * a) == pytest.approx((1.0, 1.0)), "scale is no matter"
    assert compare_attention(a, a.flip(1)).overlap == 0.0
    away = torch.tensor([[True, False, False, False]])
    # Only the hidden patch differs.
    b = torch.tensor([[0.0, 0.1, 0.1, 0.1]])
    assert compare_attention(a, b, away, mass=1.0) == pytest.approx((1.0, 1.0))
    assert compare_attention(a, b).cosine < 0.3


def test_stability_of_a_vit() -> None:
    vit = md.MaskedViT(md.create_backbone("vit_tiny_patch16_224", 32, 8, depth=2), "pixel")
    pixels = evaluation_images(Scenes(11, 32), 32)[0]
    same = attention_stability(vit, pixels, lambda batch, first: batch)
    assert same == pytest.approx((1.0, 1.0))

    noise = torch.randn(11, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def noisy(strength: float) -> float:
        def change(batch: Tensor, first: int) -> Tensor:
            return (batch + strength * noise[first : first + len(batch)]).clamp(0, 255)

        found = attention_stability(vit, pixels, change, batch_size=7)
        assert found == pytest.approx(attention_stability(vit, pixels, change), abs=1e-6)
        return found.cosine

    assert 1 > noisy(20) > noisy(100)

    settings: dict[str, Any] = {"kinds": KINDS, "ratios": (0.0, 0.5), "fill": "noise"}
    found = occlusion_stability(vit, pixels, **settings)
    again = occlusion_stability(vit, pixels, **settings, batch_size=7)
    for kind in KINDS:
        assert found[kind][0.0] == pytest.approx((1.0, 1.0))
        assert found[kind][0.5].cosine < 0.9999
        assert found[kind][0.5] == pytest.approx(again[kind][0.5], abs=1e-5)


def test_bad_input() -> None:
    a = torch.rand(2, 3, 16)
    with pytest.raises(ValueError, match="one shape"):
        compare_attention(a, a[:1])
    with pytest.raises(ValueError, match="mass"):
        compare_attention(a, a, mass=0.0)
    with pytest.raises(ValueError, match="diverged"):
        compare_attention(a, a * float("nan"))
    with pytest.raises(ValueError, match=r"\(B, N\)"):
        compare_attention(a, a, torch.zeros(2, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="no patch at all"):
        compare_attention(a, a, torch.ones(2, 16, dtype=torch.bool))
    vit = md.MaskedViT(md.create_backbone("vit_tiny_patch16_224", 32, 8, depth=1), "drop")
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="black, mean, noise"):
        occlusion_stability(vit, pixels, fill="drop")
    with pytest.raises(ValueError, match="same shape"):
        attention_stability(vit, pixels, lambda batch, first: batch[:1])
