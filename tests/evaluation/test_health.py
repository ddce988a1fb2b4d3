"""Signs of collapse: known cases, independent formulas, and no waiting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskdistill.evaluation import health


@given(st.integers(0, 999), st.integers(2, 30), st.integers(2, 30), st.booleans())
@settings(max_examples=40, deadline=None)
def test_ranks_are_their_definitions(seed: int, n: int, width: int, centre: bool) -> None:
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + 0.5
    a = x.double().numpy()
    a = a - a.mean(axis=0) if centre else a
    values = np.linalg.svd(a, compute_uv=False)
    p = values / values.sum() + 1e-7
    rank = float(health.effective_rank(x, centre=centre))
    assert rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-3)
    ratio = float(health.participation_ratio(x, centre=centre))
    assert ratio == pytest.approx((values**2).sum() ** 2 / (values**4).sum(), rel=1e-3)
    assert 1 - 1e-3 <= ratio <= rank * 1.001 <= min(n, width) * 1.002


def test_ranks_of_known_matrices() -> None:
    directions = torch.linalg.qr(torch.randn(64, 10))[0].T
    x = torch.randn(5000, 10) @ directions
    assert float(health.effective_rank(x)) == pytest.approx(10, rel=0.02)
    assert float(health.participation_ratio(x)) == pytest.approx(10, rel=0.02)
    one = torch.randn(500, 1) * torch.randn(64)
    assert float(health.effective_rank(one)) == pytest.approx(1, abs=0.01)
    shifted = x + 1000 * directions[0]
    assert float(health.effective_rank(shifted)) < 3, "one direction outshines all others"
    assert float(health.effective_rank(shifted, centre=True)) == pytest.approx(10, rel=0.03)
    for scale in (1e-12, 1e12):
        assert float(health.participation_ratio(scale * x)) == pytest.approx(10, rel=0.02)


def test_spread_is_its_definition() -> None:
    for shift in (0.0, 1.0, 10.0):
        x = torch.randn(50, 12) + shift
        mean = (x / x.norm(dim=1, keepdim=True)).mean(dim=0)
        assert float(health.feature_spread(x)) == pytest.approx(
            math.sqrt(1 - float(mean.norm()) ** 2), abs=1e-5
        )
    x[0, 0] = math.nan


def test_entropy_and_divergence() -> None:
    p = torch.randn(40, 17).mul(3).softmax(dim=1)
    stats = pytest.importorskip("scipy.stats")
    assert float(health.teacher_entropy(p)) == pytest.approx(
        stats.entropy(p.numpy(), axis=1).mean(), rel=1e-5
    )
    uniform = np.full((40, 17), 1 / 17)
    assert float(health.kl_to_uniform(p)) == pytest.approx(
        stats.entropy(p.numpy(), uniform, axis=1).mean(), rel=1e-4
    )
    one_hot = F.one_hot(torch.arange(8), 8).float()
    assert float(health.teacher_entropy(one_hot)) == 0.0
    assert float(health.kl_to_uniform(one_hot)) == pytest.approx(math.log(8))
    assert float(health.kl_to_uniform(one_hot.mean(dim=0, keepdim=True))) == pytest.approx(
        0, abs=1e-6
    )


def test_usage_of_prototypes() -> None:
    collapsed = F.one_hot(torch.zeros(32, dtype=torch.int64), 8).float()
    assert [float(v) for v in health.prototype_usage(collapsed)] == pytest.approx([1 / 8, 1 / 8])
    even = F.one_hot(torch.arange(32) % 8, 8).float()
    assert [float(v) for v in health.prototype_usage(even)] == pytest.approx([1.0, 1.0])
    half = F.one_hot(torch.arange(32) % 4, 8).float()
    assert [float(v) for v in health.prototype_usage(half)] == pytest.approx([0.5, 0.5])
    uniform = torch.full((32, 8), 1 / 8)
    assert float(health.prototype_usage(uniform).perplexity) == pytest.approx(1.0)
    assert float(health.prototype_usage(uniform).share) == 1 / 8, "one first choice for all"


@given(st.integers(0, 999), st.integers(2, 40), st.integers(1, 50))
@settings(max_examples=30, deadline=None)
def test_alignment_and_uniformity_are_the_papers(seed: int, n: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, n, 6, generator=generator)
    u, v = F.normalize(x, dim=1), F.normalize(y, dim=1)
    pairs = torch.pdist(u.double())
    uniformity = float((-2 * pairs**2).exp().mean().log())
    assert float(health.uniformity(x, chunk=chunk)) == pytest.approx(uniformity, abs=1e-4)
    for power in (1.0, 2.0):
        wanted = float((u - v).norm(dim=1).pow(power).mean())
        assert float(health.alignment(x, y, power=power)) == pytest.approx(wanted, rel=1e-5)


def test_uniformity_of_known_spheres() -> None:
    assert float(health.uniformity(torch.ones(10, 3))) == pytest.approx(0, abs=1e-6)
    sphere = torch.randn(3000, 256)
    assert float(health.uniformity(sphere)) == pytest.approx(-4, abs=0.1), "all at right angles"


FEATURES = (
    health.effective_rank, health.participation_ratio, health.feature_spread, health.uniformity
)  # fmt: skip
ASSIGNMENTS = (health.teacher_entropy, health.kl_to_uniform, health.prototype_usage)


@pytest.mark.parametrize("measure", FEATURES)
def test_bad_features(measure: object) -> None:
    assert callable(measure)
    with pytest.raises(ValueError, match=r"\(n, D\)"):
        measure(torch.rand(5))
    with pytest.raises(ValueError, match=r"\(n, D\)"):
        measure(torch.rand(0, 5))
    with pytest.raises(ValueError, match="diverged"):
        measure(torch.full((4, 5), float("nan")))


@pytest.mark.parametrize("measure", ASSIGNMENTS)
def test_bad_assignments(measure: object) -> None:
    assert callable(measure)
    with pytest.raises(ValueError, match=r"\(B, K\)"):
        measure(torch.rand(5))
    for bad in (torch.randn(4, 9), torch.ones(4, 9), torch.full((4, 9), float("nan"))):
        with pytest.raises(ValueError, match="rows that sum to 1"):
            measure(bad)


def test_pairs_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="same images"):
        health.alignment(torch.rand(4, 3), torch.rand(5, 3))
    with pytest.raises(ValueError, match="at least two"):
        health.uniformity(torch.rand(1, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    x = torch.randn(64, 8)
    p = (3 * torch.randn(64, 8)).softmax(dim=1)
    for measure in FEATURES:
        assert float(measure(x.to(dtype))) == pytest.approx(float(measure(x)), rel=0.02)
    for entropy in (health.teacher_entropy, health.kl_to_uniform):
        assert float(entropy(p.to(dtype))) == pytest.approx(float(entropy(p)), rel=0.03)


def on_meta(*shape: int) -> Tensor:
    """A tensor without values: reading one raises, as waiting for one would."""
    return torch.empty(*shape, device="meta")


def test_nothing_is_read() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(on_meta(1).sum())
    for measure in FEATURES:
        assert measure(on_meta(20, 8)).device.type == "meta"
    assert health.alignment(on_meta(20, 8), on_meta(20, 8)).shape == ()
    for assignment in ASSIGNMENTS:
        result = assignment(on_meta(20, 8))
        for value in result if isinstance(result, tuple) else (result,):
            assert value.shape == ()
