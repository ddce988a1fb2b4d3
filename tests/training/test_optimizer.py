"""The easily missed parts of DINO's optimiser."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maskdistill.models import create_backbone
from maskdistill.training.config import cosine_with_warmup, linear_by_epoch
from maskdistill.training.step import (
    clip_gradients,
    freeze_gradients,
    parameter_groups,
    update_average,
)


def test_biases_and_norms_alone_are_spared() -> None:
    model = create_backbone("vit_tiny_patch16_224", 32, 8, depth=1)
    model.norm.requires_grad_(False)  # type: ignore[operator, union-attr]
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, spared = ([names[id(p)] for p in g["params"]] for g in parameter_groups(model))
    assert {"pos_embed", "cls_token", "blocks.0.attn.qkv.weight"} <= set(decayed)
    assert all(name.endswith("bias") or "norm" in name for name in spared)
    assert not any(name.startswith("norm.") for name in decayed + spared), "frozen: in neither"
    decayed, spared = (
        [names[id(p)] for p in g["params"]] for g in parameter_groups(model, decay_tokens=False)
    )
    assert {"pos_embed", "cls_token"} <= set(spared)


def test_clipping_each_or_all() -> None:
    def gradients() -> list[torch.Tensor]:
        return [torch.full((4,), 5.0), torch.full((4,), 0.5), torch.zeros(2)]

    each = gradients()
    total = clip_gradients(each, 3.0, "per_parameter")
    assert float(total) == pytest.approx((100 + 1) ** 0.5)
    assert [float(g.norm()) for g in each] == pytest.approx([3.0, 1.0, 0.0])
    together = gradients()
    clip_gradients(together, 3.0, "global")
    scale = 3 / 101**0.5
    assert [float(g.norm()) for g in together] == pytest.approx([10 * scale, scale, 0.0])
    untouched = gradients()
    clip_gradients(untouched, 0.0, "per_parameter")
    assert all(torch.equal(a, b) for a, b in zip(untouched, gradients(), strict=True))


def test_frozen_parameters_are_not_even_decayed() -> None:
    model = nn.ModuleDict({"last_layer": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    before = model["last_layer"].weight.detach().clone()
    sum(layer(torch.ones(1, 2)).sum() for layer in model.values()).backward()  # type: ignore[union-attr]
    freeze_gradients(model, "last_layer")
    optimizer.step()
    assert torch.equal(model["last_layer"].weight, before)
    assert model["last_layer"].weight not in optimizer.state
    assert model["other"].weight in optimizer.state


def test_average() -> None:
    average, current = [torch.ones(3), torch.zeros(2)], [torch.zeros(3), torch.ones(2)]
    update_average(average, current, 0.9)
    torch.testing.assert_close(average, [torch.full((3,), 0.9), torch.full((2,), 0.1)])


def test_schedules_at_their_ends() -> None:
    values = [cosine_with_warmup(s, 100, 1.0, 0.1, warmup=10) for s in range(100)]
    assert values[0] == 0
    assert values[9] == values[10] == 1
    assert values[-1] == pytest.approx(0.1, abs=1e-3)
    assert values[10:] == sorted(values[10:], reverse=True)
    assert cosine_with_warmup(0, 10, 0.04, 0.4) == pytest.approx(0.04)
    assert cosine_with_warmup(0, 5, 1.0, 0.0, warmup=5) == 0, "warm-up as long as the run"
    assert [linear_by_epoch(e, 2, 0.04, 0.07) for e in range(3)] == [0.04, 0.07, 0.07]
    assert linear_by_epoch(0, 1, 0.04, 0.07) == 0.04
    assert linear_by_epoch(0, 0, 0.04, 0.07) == 0.07
