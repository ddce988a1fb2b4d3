"""The head and the loss against their definitions."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import maskdistill as md
from maskdistill.objectives import sinkhorn_knopp

VIEWS, GLOBALS, BATCH, K = 6, 2, 8, 32


def scores(seed: int, n: int) -> Tensor:
    return torch.randn(n, K, generator=torch.Generator().manual_seed(seed))


def by_pairs(loss: md.DINOLoss, student: Tensor, teacher: Tensor, temp: float) -> Tensor:
    """The definition: a mean over pairs of different views, one by one."""
    targets = torch.softmax((teacher - loss.center) / temp, dim=-1).chunk(GLOBALS)
    terms = [
        -(t * torch.log_softmax(s / loss.student_temp, dim=-1)).sum(dim=-1).mean()
        for i, t in enumerate(targets)
        for j, s in enumerate(student.chunk(VIEWS))
        if i != j
    ]
    assert len(terms) == GLOBALS * VIEWS - GLOBALS
    return torch.stack(terms).mean()


def test_closed_form_is_the_sum_over_pairs() -> None:
    loss = md.DINOLoss(K)
    loss.center.normal_()
    student, teacher = scores(0, VIEWS * BATCH).requires_grad_(), scores(1, GLOBALS * BATCH)
    closed = loss(student, loss.targets(teacher, 0.04), VIEWS)
    pairs = by_pairs(loss, student, teacher, 0.04)
    torch.testing.assert_close(closed, pairs)
    (ours,) = torch.autograd.grad(closed, student)
    (theirs,) = torch.autograd.grad(pairs, student)
    torch.testing.assert_close(ours, theirs)


def test_only_global_views() -> None:
    loss = md.DINOLoss(K)
    student, teacher = scores(0, 2 * BATCH), scores(1, 2 * BATCH)
    value = loss(student, loss.targets(teacher, 0.04), views=2)
    assert torch.isfinite(value)


def test_center_is_used_before_it_moves_and_is_kept() -> None:
    loss, teacher = md.DINOLoss(K, center_momentum=0.9), scores(1, GLOBALS * BATCH)
    before = loss.targets(teacher, 0.04)
    torch.testing.assert_close(before, torch.softmax(teacher / 0.04, dim=-1))
    loss.update_center(teacher)
    torch.testing.assert_close(loss.center, 0.1 * teacher.mean(dim=0, keepdim=True))
    assert not torch.allclose(loss.targets(teacher, 0.04), before)
    assert list(loss.state_dict()) == ["center"]


def test_uniform_collapse_is_ln_k() -> None:
    loss = md.DINOLoss(K)
    same = torch.zeros(VIEWS * BATCH, K)
    targets = loss.targets(torch.zeros(GLOBALS * BATCH, K), 0.04)
    assert float(loss(same, targets, VIEWS)) == pytest.approx(math.log(K))


def test_sinkhorn_balances_prototypes() -> None:
    lopsided = scores(0, 64) + torch.linspace(0, 3, K)
    plain = torch.softmax(lopsided / 0.1, dim=-1).sum(dim=0)
    balanced = sinkhorn_knopp(lopsided, 0.1, iterations=50)
    torch.testing.assert_close(balanced.sum(dim=1), torch.ones(64))
    torch.testing.assert_close(balanced.sum(dim=0), torch.full((K,), 64 / K), rtol=0.05, atol=0)
    assert plain.std() > 5 * balanced.sum(dim=0).std()
    assert torch.isfinite(sinkhorn_knopp(lopsided * 1e4, 0.01)).all()
    loss = md.DINOLoss(K, centering="sinkhorn_knopp")
    torch.testing.assert_close(loss.targets(lopsided, 0.1), sinkhorn_knopp(lopsided, 0.1))
    with pytest.raises(ValueError, match="centering must be"):
        md.DINOLoss(K, centering="mean")  # type: ignore[arg-type]


def test_head_is_weight_normed_and_unit_length() -> None:
    torch.manual_seed(0)
    head = md.DINOHead(16, K, hidden_dim=32, bottleneck_dim=8)
    x = torch.randn(4, 16)
    bottleneck = nn.functional.normalize(head.mlp(x), dim=-1)
    reference = nn.utils.parametrizations.weight_norm(nn.Linear(8, K, bias=False))
    reference.parametrizations.weight.original0.data.fill_(1)
    reference.parametrizations.weight.original1.data.copy_(head.last_layer.weight_v)
    torch.testing.assert_close(head(x), reference(bottleneck))
    assert head(x).abs().max() <= 1 + 1e-6, "cosines of unit vectors"
    assert not head.last_layer.weight_g.requires_grad
    assert md.DINOHead(16, K, norm_last_layer=False).last_layer.weight_g.requires_grad
    copy.deepcopy(head)(x).sum().backward()


def test_scores_stay_float32_under_autocast() -> None:
    head = md.DINOHead(16, K, hidden_dim=32)
    with torch.autocast("cpu", torch.bfloat16):
        assert head.mlp(torch.randn(4, 16)).dtype == torch.bfloat16
        assert head(torch.randn(4, 16)).dtype == torch.float32
