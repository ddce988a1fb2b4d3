"""How attention guides."""

from __future__ import annotations

import math

import pytest
import torch

import maskdistill as md

ATTENTION = torch.tensor([[0.5, 0.2, 0.2, 0.1]])


def shares(masker: md.Masker, attention: torch.Tensor = ATTENTION, n: int = 20_000) -> list[float]:
    mask = masker(n, (2, 2), attention=attention.expand(n, -1))
    return mask.float().mean(dim=0).tolist()


def test_hard_masks_are_the_top_and_the_bottom() -> None:
    ranked = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    assert md.AttentionGuidedMasker(0.5)(1, (2, 2), attention=ranked).tolist() == [
        [False, True, False, True]
    ]
    least = md.AttentionGuidedMasker(0.5, hide="least")(1, (2, 2), attention=ranked)
    assert least.tolist() == [[True, False, True, False]]


def test_heads_are_averaged() -> None:
    heads = torch.tensor([[[0.9, 0.1, 0.0, 0.0], [0.0, 0.1, 0.6, 0.3]]])
    mask = md.AttentionGuidedMasker(0.5)(1, (2, 2), attention=heads)
    assert mask.tolist() == [[True, False, True, False]]


def test_temperature_one_samples_in_proportion() -> None:
    assert shares(md.AttentionGuidedMasker(0.25, temperature=1.0)) == pytest.approx(
        [0.5, 0.2, 0.2, 0.1], abs=0.015
    )
    inverse = 1 / ATTENTION[0]
    assert shares(md.AttentionGuidedMasker(0.25, hide="least", temperature=1.0)) == pytest.approx(
        (inverse / inverse.sum()).tolist(), abs=0.015
    )


def test_temperature_bridges_hard_and_uniform() -> None:
    assert shares(md.AttentionGuidedMasker(0.25, temperature=1e-3))[0] == pytest.approx(1)
    for temperature in (1e6, math.inf):
        assert shares(md.AttentionGuidedMasker(0.25, temperature=temperature)) == pytest.approx(
            [0.25] * 4, abs=0.015
        )
    tempered = ATTENTION[0] ** 0.5
    assert shares(md.AttentionGuidedMasker(0.25, temperature=2.0)) == pytest.approx(
        (tempered / tempered.sum()).tolist(), abs=0.015
    )


def test_zero_attention_is_no_accident() -> None:
    zeros = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    mask = md.AttentionGuidedMasker(0.5, temperature=1.0)(1, (2, 2), attention=zeros)
    assert mask[0, 0]
    assert mask.sum() == 2


@pytest.mark.parametrize("shape", [(2, 5), (3, 4), (4,), (2, 3, 2, 4)])
def test_misshapen_attention_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \(B, N\) or \(B, heads, N\)"):
        md.AttentionGuidedMasker(0.5)(2, (2, 2), attention=torch.ones(shape))


FLAT = torch.ones(200, 1, 196)


@pytest.mark.parametrize(
    ("masker", "given"),
    [
        (md.AttentionGuidedMasker(0.3), {"attention": FLAT[:, 0]}),
        (md.AttentionGuidedMasker(0.3, hide="least"), {"attention": FLAT[:, 0]}),
        (md.masking.AttentionHintMasker(0.3), {"attention": FLAT[:, 0]}),
        (md.SignalMasker(0.3, "loss"), {"loss": (torch.arange(196) % 2).expand(200, 196)}),
        (
            md.masking.LearnedMasker(0.3, lambda images: images[:, :1]),
            {"images": torch.ones(200, 3, 14, 14)},
        ),
        (md.masking.ClusterMasker(0.3), {"images": torch.ones(200, 3, 28, 28)}),
    ],
    ids=lambda value: repr(value) if isinstance(value, md.Masker) else "",
)
def test_ties_favour_no_place(masker: md.Masker, given: dict[str, torch.Tensor]) -> None:
    """Attention that is still uniform, flat ground, binary maps: order is no signal."""
    generator = torch.Generator().manual_seed(0)
    one = {name: signal[:1] for name, signal in given.items()}
    draws = torch.cat([masker(1, (14, 14), generator=generator, **one) for _ in range(200)])
    hidden = draws.float().mean(dim=0).view(14, 14)
    # 42 or 43 patches of 14 rows: a row's mean has a standard error below 0.013 or so.
    assert float(hidden[:7].mean()) == pytest.approx(float(hidden[7:].mean()), abs=0.05)
    assert len(draws.unique(dim=0)) > 100


def test_bad_names_of_signals() -> None:
    for name in ("progress", "generator", "class", "a b", 5, "boxes"):
        for build in (
            lambda n: md.SignalMasker(0.5, n),
            lambda n: md.masking.ClusterMasker(0.5, signal=n),
        ):
            with pytest.raises(ValueError, match="signal"):
                build(name)
