"""Maskers from text: nothing but maskers, and nothing runs."""

from __future__ import annotations

import pytest

import maskdistill as md


def test_reads_what_a_person_types() -> None:
    assert md.parse_masker(" RandomMasker( ratio=.3 ) ") == md.RandomMasker(0.3)
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
