"""Ratios, schedules and the one rounding rule."""

from __future__ import annotations

import math

import pytest
import torch

import maskdistill as md
from maskdistill.masking.ratios import bounds, hidden_count


def test_rounding_is_half_away_from_zero() -> None:
    assert [hidden_count(0.5, n) for n in (1, 2, 3, 5, 49)] == [1, 1, 2, 3, 25]
    assert hidden_count(0.3, 196) == 59


def test_schedules_move_between_their_ends() -> None:
    for schedule in (md.Linear(0.1, 0.5), md.masking.Cosine(0.1, 0.5)):
        values = [schedule.at(p / 10) for p in range(11)]
        assert values[0] == pytest.approx(0.1)
        assert values[-1] == pytest.approx(0.5)
        assert values == sorted(values)
        assert values[5] == pytest.approx(0.3)
    assert md.masking.Cosine(0.0, 1.0).at(0.25) == pytest.approx(0.5 - 0.5 * math.cos(math.pi / 4))


def test_progress_moves_the_ratio() -> None:
    masker = md.RandomMasker(md.Linear(0.0, 1.0))
    counts = [int(masker(1, (10, 10), progress=p / 4).sum()) for p in range(5)]
    assert counts == [0, 25, 50, 75, 100]


def test_uniform_ratios_vary_by_image_within_their_range() -> None:
    counts = md.RandomMasker(md.Uniform(0.1, 0.5))(4000, (10, 10)).sum(dim=1)
    assert 10 <= counts.min() <= 12
    assert 48 <= counts.max() <= 50
    assert float(counts.float().mean()) == pytest.approx(30, abs=1)


def test_stratified_ratios_take_each_stratum_once() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = md.Stratified(0.0, 1.0).sample(8, lambda *shape: torch.rand(shape, generator=generator))
    assert sorted((drawn * 8).floor().long().tolist()) == list(range(8))
    assert drawn.tolist() != sorted(drawn.tolist()), "strata come in random order"


def test_ranges_may_move() -> None:
    ratio = md.Uniform(0.1, md.Linear(0.1, 0.5))
    assert bounds(ratio) == (0.1, 0.5)
    masker = md.RandomMasker(ratio)
    assert masker(100, (10, 10), progress=0.0).sum(dim=1).unique().tolist() == [10]
    assert int(masker(500, (10, 10), progress=1.0).sum(dim=1).max()) > 40


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan, "0.3", None, True, md.Linear(0.5, 1.5),
                                 md.Uniform(-0.5, 0.5), [0.3]])  # fmt: skip
def test_bad_ratios_are_refused(bad: object) -> None:
    for build in (md.RandomMasker, md.BlockMasker, md.AttentionGuidedMasker,
                  md.NoMasker().exactly):  # fmt: skip
        with pytest.raises(ValueError, match="ratio must"):
            build(bad)  # type: ignore[arg-type]


def test_a_percentage_gets_a_hint() -> None:
    with pytest.raises(ValueError, match=r"write 0\.3"):
        md.RandomMasker(30)


def test_other_bad_arguments() -> None:
    with pytest.raises(ValueError, match="low must not exceed high"):
        md.Uniform(0.5, 0.1)
    with pytest.raises(ValueError, match="low and high must be numbers"):
        md.Stratified("a", 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="start must be a number"):
        md.Linear(None, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="p must"):
        md.NoMasker().sometimes(md.Uniform(0, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hide must be"):
        md.AttentionGuidedMasker(0.3, hide="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature must be"):
        md.AttentionGuidedMasker(0.3, temperature=-1.0)
    with pytest.raises(ValueError, match="sum to 1"):
        md.Mixture({md.NoMasker(): 0.5})
    with pytest.raises(ValueError, match="non-empty"):
        md.Mixture({})
    with pytest.raises(ValueError, match="must be a masker"):
        md.Mixture({"a": 1.0})  # type: ignore[dict-item]


def test_every_schedule() -> None:
    assert md.masking.Quadratic(0.2, 0.6).at(0.5) == pytest.approx(0.3)
    steps = md.masking.Steps([0.1, 0.5, 0.3], [0.25, 0.75])  # type: ignore[arg-type]
    assert [steps.at(p) for p in (0, 0.24, 0.25, 0.74, 0.75, 1)] == [0.1, 0.1, 0.5, 0.5, 0.3, 0.3]
    assert steps.bounds() == (0.1, 0.5)
    assert hash(steps) == hash(md.masking.Steps((0.1, 0.5, 0.3), (0.25, 0.75)))
    warm = md.masking.WarmUp(md.Linear(0.4, 0.8), until=0.5, start=0.2)
    assert [warm.at(p) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.2, 0.35, 0.6, 0.8])
    assert warm.bounds() == (0.2, 0.8)
    assert md.masking.WarmUp(0.3, until=1.0).at(1.0) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: md.masking.Steps((0.1,), (0.5,)), "one more than starts"),
        (lambda: md.masking.Steps((0.1, 0.2, 0.3), (0.5, 0.4)), "must ascend"),
        (lambda: md.masking.Steps((0.1, 0.2), (0.0,)), "must ascend"),
        (lambda: md.masking.Steps(0.1, (0.5,)), "sequence of numbers"),
        (lambda: md.masking.Steps(("a", 0.2), (0.5,)), "must be a number"),
        (lambda: md.masking.WarmUp(0.3, until=0.0), "until must lie"),
        (lambda: md.masking.WarmUp("x", until=0.5), "or a schedule"),
        (lambda: md.RandomMasker(md.masking.Steps((0.1, 1.2), (0.5,))), r"must lie in \[0, 1\]"),
        (
            lambda: md.RandomMasker(md.masking.WarmUp(0.3, until=0.5, start=-0.1)),
            r"must lie in \[0, 1\]",
        ),
        (lambda: md.Uniform(md.masking.Steps((0.1, 0.9), (0.5,)), 0.5), "low must not exceed high"),
        (lambda: md.Stratified(0.1, 0.5, share=1.5), "share must lie"),
    ],
)
def test_bad_schedules_are_refused(build, match: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=match):
        build()


def test_a_schedule_moves_any_parameter() -> None:
    """Ratio, probability, weight, temperature, share and hint follow progress alone."""
    attention = torch.rand(64, 100, generator=torch.Generator().manual_seed(0))
    top = attention.argsort(dim=1, descending=True)

    def hidden(masker: md.Masker, progress: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return masker(64, (10, 10), generator=generator, progress=progress, attention=attention)

    rise = md.Linear(0.0, 1.0)
    masked = md.RandomMasker(0.5).sometimes(rise)
    assert [int(hidden(masked, p).any(1).sum()) for p in (0.0, 1.0)] == [0, 64]
    mixture = md.Mixture({md.NoMasker(): md.masking.Steps((1.0, 0.0), (0.5,)),
                          md.RandomMasker(1.0): md.masking.Steps((0.0, 1.0), (0.5,))})  # fmt: skip
    assert [float(hidden(mixture, p).float().mean()) for p in (0.4, 0.6)] == [0.0, 1.0]
    cooling = md.AttentionGuidedMasker(0.3, temperature=md.Linear(5.0, 0.0))
    sharing = md.AttentionGuidedMasker(0.3, share=rise)
    hinting = md.masking.AttentionHintMasker(0.3, hint=rise)
    foremost = [
        [float(hidden(m, p).gather(1, top[:, :10]).float().mean()) for p in (0.0, 0.5, 1.0)]
        for m in (cooling, sharing, hinting)
    ]
    assert foremost[0][0] < 0.5 < foremost[0][2] == 1.0
    assert foremost[1][0] < 0.4 < foremost[1][1] <= foremost[1][2] == 1.0
    assert foremost[2] == [1.0, 0.5, 0.0]


def test_weights_must_sum_to_one_all_along() -> None:
    a, b = md.RandomMasker(0.1), md.RandomMasker(0.2)
    with pytest.raises(ValueError, match=r"at progress 0\.25 they sum"):
        md.Mixture(
            {
                a: md.masking.Steps((1.0, 0.5, 0.0), (0.25, 0.5)),
                b: md.masking.Steps((0.0, 1.0), (0.5,)),
            }
        )
    with pytest.raises(ValueError, match=r"at progress 0\.5 they sum"):
        md.Mixture({a: md.masking.Quadratic(1.0, 0.0), b: md.Linear(0.0, 1.0)})


def test_stratified_shares_are_dinov2s() -> None:
    """Half the batch gets nothing; the others one ratio from each stratum."""
    half = md.Stratified(0.1, 0.5, share=0.5)
    ratios = half.sample(21, torch.rand).sort().values
    assert ratios[:11].eq(0).all()
    edges = torch.linspace(0.1, 0.5, 11)
    assert ((ratios[11:] >= edges[:-1]) & (ratios[11:] <= edges[1:])).all()
    upper = md.Stratified(0.1, 0.5, share=0.5, jitter=False).sample(20, torch.rand).sort().values
    assert torch.allclose(upper[10:], edges[1:])
    assert md.Stratified(0.2, 0.5, share=0.5).sample(1, torch.rand).tolist() == [0.0]
