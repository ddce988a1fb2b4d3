"""The head and the losses against their definitions, and against DINOv2's own.

DINOv2's numbers were obtained by running the loss classes of facebookresearch/dinov2 at commit
b8931f7bf91576930313be2c6d6af376033b35f0 on the tensors below, in float32 on a CPU.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import maskdistill as md
from maskdistill.objectives import (
    LOSSES,
    KoLeoLoss,
    MSNLoss,
    Objective,
    PatchLoss,
    StudentOutput,
    TeacherOutput,
    WeightedSum,
    build_objective,
    mean_scores,
    parse_objective,
    sinkhorn_knopp,
)

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


# --- Losses between patches, and of a batch


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).float()


def hidden() -> Tensor:
    """27 hidden patches in six views of 16, none in the third."""
    mask = torch.from_numpy(np.random.RandomState(1).rand(6, 16) < 0.3)
    mask[2] = False
    return mask


def test_the_patch_loss_is_dinov2s() -> None:
    loss, mask = PatchLoss(24), hidden()
    expected = [
        (14.817315101623535, 1.619791030883789),
        (16.67702865600586, 1.6023539304733276),
        (17.326065063476562, 1.5563088655471802),
    ]
    for step, (value, slope) in enumerate(expected):
        teacher = 0.1 * drawn(10 + step, 27, 24)
        student = drawn(20 + step, 27, 24).requires_grad_()
        found = loss(student, loss.targets(teacher, 0.07), mask)
        loss.update_center(teacher)
        (gradient,) = torch.autograd.grad(found, student)
        assert float(found.detach()) == pytest.approx(value, rel=1e-6)
        assert float(gradient.norm()) == pytest.approx(slope, rel=1e-6)
    assert float(loss.center.norm()) == pytest.approx(0.01449083723127842, rel=1e-5)
    balanced = PatchLoss(24, centering="sinkhorn_knopp").targets(0.1 * drawn(10, 27, 24), 0.07)
    assert float(balanced.norm()) == pytest.approx(1.805743932723999, rel=1e-5)


def test_views_without_a_hidden_patch_count_and_break_nothing() -> None:
    loss, mask = PatchLoss(24), hidden()
    student, teacher = drawn(0, 27, 24), loss.targets(drawn(1, 27, 24), 0.07)
    kept = mask[mask.any(dim=1)]
    assert float(loss(student, teacher, mask)) == pytest.approx(
        float(loss(student, teacher, kept)) * 5 / 6
    )
    nothing = torch.zeros(0, 24, requires_grad=True)
    none = loss(nothing, loss.targets(nothing, 0.07), torch.zeros_like(mask))
    none.backward()  # type: ignore[no-untyped-call]
    assert float(none.detach()) == 0
    before = loss.center.clone()
    loss.update_center(torch.zeros(0, 24))
    assert torch.equal(loss.center, before)
    assert sinkhorn_knopp(torch.zeros(0, 24), 0.07).shape == (0, 24)
    with pytest.raises(ValueError, match="hides 27 patches, but scores of 26"):
        loss(student[1:], teacher[1:], mask)


def test_koleo_is_dinov2s_and_safe() -> None:
    features = drawn(0, 8, 32).requires_grad_()
    loss = KoLeoLoss()
    found = loss(features)
    (gradient,) = torch.autograd.grad(found, features)
    assert float(found.detach()) == pytest.approx(-0.2854997217655182, rel=1e-5)
    assert float(gradient.norm()) == pytest.approx(0.05475803464651108, rel=1e-5)
    for few in (torch.ones(4, 8), drawn(1, 1, 8), torch.zeros(3, 8)):  # twins, one image, nothing
        few.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(few), few)
        assert torch.isfinite(gradient).all()
    views = StudentOutput(drawn(2, 6, 4), drawn(3, 6, 4), views=3, global_views=2)
    first, second, _ = views.features.chunk(3)
    assert float(loss.compare(views, None)) == pytest.approx(float(loss(first) + loss(second)))


def test_msn_sharpens_and_spreads() -> None:
    loss = MSNLoss(K)
    teacher = TeacherOutput(scores(1, GLOBALS * BATCH), scores(1, 1), temp=0.04)
    student = StudentOutput(scores(0, VIEWS * BATCH), scores(0, 1), VIEWS, GLOBALS)
    targets = loss.prepare(teacher)
    plain = torch.softmax(teacher.logits / 0.1, dim=-1) ** 4
    torch.testing.assert_close(targets, plain / plain.sum(dim=1, keepdim=True))
    mean = torch.softmax(student.logits / 0.1, dim=-1).mean(dim=0)
    spread = math.log(K) + float((mean * mean.log()).sum())
    expected = float(loss(student.logits, targets, VIEWS)) + spread
    assert float(loss.compare(student, targets)) == pytest.approx(expected, rel=1e-5)
    balanced = MSNLoss(K, balanced=True).prepare(teacher)
    assert balanced.sum(dim=0).std() < targets.sum(dim=0).std()


def test_the_mean_of_scores_needs_no_scores() -> None:
    head, tokens = md.DINOHead(16, K, hidden_dim=32, bottleneck_dim=8), torch.randn(50, 16)
    torch.testing.assert_close(mean_scores(head, tokens), head(tokens).mean(dim=0, keepdim=True))
    linear = nn.Linear(16, K)
    torch.testing.assert_close(
        mean_scores(linear, tokens), linear(tokens).mean(dim=0, keepdim=True)
    )


class Settings:
    out_dim, student_temp, center_momentum, centering = K, 0.1, 0.9, "center"


def test_objectives_as_text() -> None:
    assert parse_objective(" dino+ 2 * ibot ") == {"dino": 1.0, "ibot": 2.0}
    assert isinstance(build_objective("dino", Settings), md.DINOLoss)
    objective = build_objective("dino+ibot+koleo", Settings)
    assert isinstance(objective, WeightedSum)
    assert [weight for _, weight in objective.terms().values()] == [1.0, 1.0, 0.1]
    assert set(objective.state_dict()) == {"losses.dino.center", "losses.ibot.center"}
    for wrong in ("dini", "dino+dino", "", "x*dino", "-1*dino", "nan*dino", "dino+"):
        with pytest.raises(ValueError, match=r"objective is a sum|weight of dino"):
            parse_objective(wrong)
    with pytest.raises(ValueError, match="weights must be of the losses"):
        WeightedSum({"koleo": KoLeoLoss()}, {"kolea": 1.0})


@pytest.mark.parametrize("name", LOSSES)
def test_losses_compute_in_float32_under_autocast(name: str) -> None:
    loss = build_objective(name, Settings).terms()
    ((own, _),) = loss.values()
    mask = torch.zeros(GLOBALS * BATCH, 9, dtype=torch.bool)
    mask[:, :2] = True
    rows = int(mask.sum())

    def value(of: Objective, kind: torch.dtype, autocast: bool) -> Tensor:
        def given(seed: int, n: int) -> Tensor:
            return scores(seed, n).to(torch.bfloat16).to(kind)

        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            targets = of.prepare(
                TeacherOutput(given(1, GLOBALS * BATCH), given(2, GLOBALS * BATCH), 0.04, 0.07,
                              given(3, rows), given(4, 1))
            )  # fmt: skip
            student = StudentOutput(
                given(5, VIEWS * BATCH), given(6, VIEWS * BATCH), VIEWS, GLOBALS, given(7, rows),
                mask,
            )  # fmt: skip
            return of.compare(student, targets)

    plain = value(own, torch.float32, False)
    for kind in (torch.float32, torch.bfloat16):
        under = value(own, kind, True)
        assert under.dtype == torch.float32
        assert torch.equal(under, plain)
