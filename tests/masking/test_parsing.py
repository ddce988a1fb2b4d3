"""Maskers from text: nothing but maskers, and nothing runs."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import maskdistill as md


def test_reads_what_a_person_types() -> None:
    assert md.parse_masker(" RandomMasker( ratio=.3 ) ") == md.RandomMasker(0.3)
    for name in ("GridMasker", "md.GridMasker", "masking.GridMasker", "md.masking.GridMasker"):
        assert md.parse_masker(f"{name}()") == md.masking.GridMasker()
    assert md.parse_masker("BlockMasker(0.4, aspect=(0.5, 2.0)).sometimes(0.5)") == (
        md.BlockMasker(0.4, aspect=(0.5, 2.0)).sometimes(0.5)
    )
    assert md.parse_masker("Mixture({RandomMasker(0.3): 0.5, NoMasker(): 0.5})") == md.Mixture(
        {md.RandomMasker(0.3): 0.5, md.NoMasker(): 0.5}
    )
    scheduled = md.parse_masker("~(RandomMasker(Linear(0, 1)) - NoMasker()) & BlockMasker(0.1)")
    assert scheduled == ~(md.RandomMasker(md.Linear(0, 1)) - md.NoMasker()) & md.BlockMasker(0.1)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "RandomMasker.__class__",
        "RandomMasker(0.3).__reduce__()",
        "(lambda: 0)()",
        "[RandomMasker(0.3) for _ in (1,)]",
        "RandomMasker(*[0.3])",
        "RandomMasker(**{'ratio': 0.3})",
        "RandomMasker(0.1 + 0.2)",
        "RandomMasker(0.3)(4, (2, 2))",
        "RandomMasker(0.3) + NoMasker()",
        "RandomMasker(0.3) | 0.5",
        "Uniform(0.1, 0.5)",
        "RandomMasker(",
        "RandomMasker()",
        "RandomMasker(0.3, colour='red')",
        "RandomMasker",
        "",
        "0.3",
        "RandomMasker(f'{1}')",
        "RandomMasker(0.3)" + " | NoMasker()" * 1000,
        "~" * 4000 + "NoMasker()",
    ],
)
def test_refuses_everything_else(text: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        md.parse_masker(text)


def test_suggests_a_name() -> None:
    with pytest.raises(ValueError, match="Did you mean RandomMasker"):
        md.parse_masker("RandonMasker(0.3)")
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        md.parse_masker("RandomMasker(1.3)")


def test_lists_and_numpys_numbers_are_as_good() -> None:
    listed = md.BlockMasker(0.3, aspect=[0.5, 2])  # type: ignore[arg-type]
    assert listed == md.BlockMasker(0.3, aspect=(0.5, 2.0))
    assert hash(listed) == hash(md.BlockMasker(0.3, aspect=(0.5, 2.0)))
    assert md.parse_masker("BlockMasker(0.3, aspect=[0.5, 2])") == listed
    for masker in (
        md.masking.SingleBlockMasker(0.3, aspect=[0.5, 2]),  # type: ignore[arg-type]
        md.masking.MultiBlockMasker(target_scale=[0.1, 0.2]),  # type: ignore[arg-type]
        md.SceneMasker(md.NoMasker(), grid=[8, 8]),  # type: ignore[arg-type]
        md.RandomMasker(np.float64(0.3)),
        md.RandomMasker(md.Linear(np.float64(0.1), 1)),
    ):
        assert md.parse_masker(repr(masker)) == masker
        assert hash(masker) == hash(md.parse_masker(repr(masker)))
        assert "np." not in repr(masker)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: md.BlockMasker(0.3, aspect=0.5), "two numbers"),  # type: ignore[arg-type]
        (lambda: md.masking.SingleBlockMasker(0.3, aspect=("a", "b")), "two numbers"),  # type: ignore[arg-type]
        (lambda: md.masking.MultiBlockMasker(context_scale=0.2), "two numbers"),  # type: ignore[arg-type]
        (lambda: md.SceneMasker(md.NoMasker(), grid=16), "two ints"),  # type: ignore[arg-type]
        (lambda: md.SceneMasker(md.NoMasker(), cover="0.5"), "cover"),  # type: ignore[arg-type]
        (lambda: md.RandomMasker(Fraction(3, 10)), "Write float"),  # type: ignore[arg-type]
        (lambda: md.AttentionGuidedMasker(0.3, temperature=md.Linear(math.inf, 1)), "finite"),
        (
            lambda: md.AttentionGuidedMasker(0.3, temperature=md.masking.WarmUp(math.inf, 0.5)),
            "finite",
        ),
        (lambda: md.masking.ClusterMasker(0.5, least=0.3), "exact=False"),
        (lambda: md.masking.ClusterMasker(md.Uniform(0.1, 0.5), exact=False), "ratio"),
        (
            lambda: md.Uniform(md.Linear(0.0, 1.0), md.masking.Quadratic(0.0, 1.0)),
            "low must not exceed",
        ),
        (lambda: md.parse_masker(None), "must be a string"),  # type: ignore[arg-type]
        (lambda: md.parse_masker("Mixture({{}: 1.0})"), "not a masker"),
    ],
)
def test_what_is_no_setting_is_refused(build, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=said):
        build()


def test_settings_that_fit_no_grid_are_refused_in_the_draw() -> None:
    with pytest.raises(ValueError, match="least area is 16"):
        md.BlockMasker(0.4, min_patches=None, max_patches=4)(2, (14, 14))


def test_no_share_is_lost_to_rounding_errors() -> None:
    assert md.RandomMasker(0.29).fixed_count((5, 10)) == 15
    assert int((md.Stratified(0.5, 0.5, share=0.29).sample(100, torch.rand) > 0).sum()) == 29
    loss = torch.rand(2, 100)
    mask = md.SignalMasker(1.0, "loss", share=0.29)(2, (10, 10), loss=loss)
    assert mask.all()


def test_a_free_cluster_mask_can_hide_nothing() -> None:
    images = torch.rand(4, 3, 28, 28)
    assert not md.masking.ClusterMasker(0.0, exact=False)(4, (14, 14), images=images).any()


def test_a_learned_masker_names_its_network() -> None:
    masker = md.masking.LearnedMasker(0.3, torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1)))
    assert repr(masker) == "LearnedMasker(0.3, <Sequential>)"


def test_what_people_type_from_habit() -> None:
    assert md.parse_masker("md.RandomMasker(0.3).rolled()") == md.RandomMasker(0.3).rolled()
    with pytest.raises(ValueError, match=r"write for example BlockMasker\(0.3\)"):
        md.parse_masker("BlockMasker")
    with pytest.raises(ValueError, match=r"Write Uniform\(0.1, 0.5\)"):
        md.RandomMasker((0.1, 0.5))  # type: ignore[arg-type]


def test_a_masker_of_ones_own_that_goes_wrong() -> None:
    class Floats(md.Masker):
        def draw(self, context: md.masking.MaskContext) -> torch.Tensor:
            return context.rand(context.batch, context.patches)

    with pytest.raises(ValueError, match=r"must return a bool tensor \(B, N\) = \(2, 16\)"):
        Floats()(2, (4, 4))
    assert repr(Floats()) == "Floats()"
