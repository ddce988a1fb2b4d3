"""The parameters of crops: their distribution, and that they depend on nothing but their key."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from maskdistill.data.crops import CropDistribution, CropParameters, image_keys, sample_crops

N = 20_000


def rates(scale: tuple[float, float] = (0.05, 0.4), **more: float) -> CropDistribution:
    blur, solarize = more.get("blur", 0.5), more.get("solarize", 0.2)
    return CropDistribution(
        torch.tensor([scale]), torch.tensor([blur]), torch.tensor([solarize]), (0.1, 2.0)
    )


def keys(count: int, seed: int = 0, epoch: int = 0) -> Tensor:
    return image_keys(seed, torch.full((count,), epoch), torch.arange(count))


def sample(
    size: tuple[int, int] = (375, 500), distribution: CropDistribution | None = None
) -> CropParameters:
    return sample_crops(keys(N), torch.tensor([size]).expand(N, 2), distribution or rates())


def ks_distance(a: Tensor, b: Tensor) -> float:
    """Return the two-sample Kolmogorov-Smirnov statistic."""
    a, b = a.double().sort().values, b.double().sort().values
    at = torch.cat([a, b])
    below = [torch.searchsorted(x, at, right=True) / len(x) for x in (a, b)]
    return float((below[0] - below[1]).abs().max())


@pytest.mark.parametrize("scale", [(0.05, 0.4), (0.4, 1.0)])
@pytest.mark.parametrize("size", [(375, 500), (84, 84), (40, 200), (3, 5)])
def test_boxes_are_sampled_as_by_torchvision(
    size: tuple[int, int], scale: tuple[float, float]
) -> None:
    n = 4000
    torch.manual_seed(1)
    picture = torch.empty(1, 1, 1).expand(3, *size)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(picture, list(scale), [3 / 4, 4 / 3]) for _ in range(n)]
    )[:, [1, 0, 3, 2]]  # top, left, height, width
    ours = sample(size, rates(scale)).box[:n, 0]
    # The statistic exceeds this once in 10,000 tests where the distributions are the same.
    limit = math.sqrt(-math.log(1e-4 / 2) / 2) * math.sqrt(2 / n)
    for what, a, b in (
        ("left", ours[:, 0], theirs[:, 0]),
        ("top", ours[:, 1], theirs[:, 1]),
        ("area", ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]),
        ("ratio", ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3]),
        ("right", ours[:, 0] + ours[:, 2], theirs[:, 0] + theirs[:, 2]),
    ):
        assert ks_distance(a, b) < limit, what
    assert bool((ours[:, :2] >= 0).all())
    assert bool((ours[:, 2:] >= 1).all())
    assert bool((ours[:, :2] + ours[:, 2:] <= torch.tensor(size[::-1])).all())


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((10, 400), [193, 0, 13, 10]),
        ((400, 10), [0, 193, 10, 13]),
        ((1, 1), [0, 0, 1, 1]),
        ((1, 7), [3, 0, 1, 1]),
    ],
)
def test_where_no_box_fits_the_centre_is_cut(size: tuple[int, int], box: list[int]) -> None:
    torch.manual_seed(0)
    boxes = sample(size, rates((0.9, 1.0))).box[:50, 0].tolist()
    picture = torch.empty(1, 1, 1).expand(3, *size)
    top, left, height, width = RandomResizedCrop.get_params(picture, [0.9, 1.0], [3 / 4, 4 / 3])
    assert [left, top, width, height] == box
    assert boxes == [box] * 50


def test_rates() -> None:
    sampled = sample(distribution=rates(blur=0.3, solarize=0.2))
    for what, happened, p in (
        ("flip", sampled.flip, 0.5),
        ("jitter", sampled.jitter, 0.8),
        ("grey", sampled.grey, 0.2),
        ("blur", sampled.sigma > 0, 0.3),
        ("solarize", sampled.solarize, 0.2),
    ):
        # Four standard deviations: once in 16,000 tests by chance.
        margin = 4 * math.sqrt(p * (1 - p) / N)
        assert float(happened.float().mean()) == pytest.approx(p, abs=margin), what
    always = sample(distribution=rates(blur=1.0, solarize=0.0))
    assert bool((always.sigma > 0).all())
    assert not bool(always.solarize.any())


def test_factors_are_uniform() -> None:
    sampled = sample(distribution=rates(blur=1.0))
    values_of = [*sampled.factors[:, 0].unbind(-1), sampled.sigma[:, 0]]
    bounds = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), (0.1, 2.0)]
    for values, (low, high) in zip(values_of, bounds, strict=True):
        shares = (values - low) / (high - low)
        counts = shares.mul(20).long().bincount(minlength=20)
        assert len(counts) == 20
        chi2 = float(((counts - N / 20) ** 2 / (N / 20)).sum())
        assert chi2 < 50.8  # 19 degrees of freedom, once in 10,000 tests by chance


def test_every_order_is_as_likely() -> None:
    order = sample().order[:, 0].long()
    assert torch.equal(order.sort(dim=1).values, torch.arange(4).expand(N, 4))
    counts = (order * torch.tensor([64, 16, 4, 1])).sum(dim=1).unique(return_counts=True)[1]
    assert len(counts) == 24
    chi2 = float(((counts - N / 24) ** 2 / (N / 24)).sum())
    assert chi2 < 57.1  # 23 degrees of freedom, once in 10,000 tests by chance


def test_numbers_do_not_hang_together() -> None:
    """Neither within a view, nor between the views, images and epochs next to each other."""
    two = CropDistribution(*(torch.cat([x, x]) for x in rates(blur=1.0)[:3]), (0.1, 2.0))
    size = torch.tensor([[375, 500]]).expand(N, 2)
    first, later = (sample_crops(keys(N, epoch=epoch), size, two) for epoch in (0, 1))

    def columns(sampled: CropParameters) -> Tensor:
        numbers = [sampled.box.double(), sampled.factors.double()]
        switches = [sampled.flip, sampled.jitter, sampled.grey, sampled.sigma, sampled.solarize]
        return torch.cat(
            [*numbers, torch.stack([s.double() for s in switches], dim=-1)], dim=-1
        ).flatten(1)

    x = columns(first)
    x = torch.cat([x, columns(later)[:, :13], x.roll(1, dims=0)[:, :13]], dim=1)
    correlation = torch.corrcoef(x.T)
    box = torch.arange(len(correlation)) % 13 < 4  # the numbers of a box do hang together
    own = torch.arange(len(correlation)) // 13
    expected = (own[:, None] == own) & box[:, None] & box | torch.eye(len(box), dtype=torch.bool)
    assert float(correlation[~expected].abs().max()) < 5 / math.sqrt(N)


def test_golden_crops() -> None:
    """A change of these changes every run: say so in the CHANGELOG."""
    sampled = sample_crops(keys(2, seed=7, epoch=3), torch.tensor([[375, 500], [84, 84]]), rates())
    assert sampled.box.tolist() == GOLDEN_BOXES
    assert sampled.order.tolist() == GOLDEN_ORDERS


GOLDEN_BOXES = [[[88, 110, 145, 120]], [[27, 29, 49, 49]]]
GOLDEN_ORDERS = [[[0, 2, 1, 3]], [[2, 3, 1, 0]]]
