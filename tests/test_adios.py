"""The ADIOS example: a mask network trained against the encoder, and what it is good for after."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import maskdistill as md

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = [
    "--scenes", "22", "--image-size", "16", "--patch-size", "4", "--width", "32", "--depth", "1",
    "--epochs", "1", "--batch-size", "6", "--masks", "2",
]  # fmt: skip


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import adios_scenes

    return adios_scenes


@pytest.fixture
def tiny(script: ModuleType) -> Any:
    return script.Settings(image_size=16, patch_size=4, width=32, depth=1, masks=3)


@pytest.fixture
def views() -> list[torch.Tensor]:
    return [torch.randn(8, 3, 16, 16) for _ in range(2)]


def summary_of(script: ModuleType, out: Path, *arguments: str) -> dict[str, Any]:
    assert script.main([*TINY, *arguments, "--out", str(out)]) == 0
    content: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return content


def test_the_whole_script(script: ModuleType, tmp_path: Path) -> None:
    summary = summary_of(script, tmp_path / "first")
    assert 0 <= summary["knn"] <= 1
    losses, overlaps = summary["loss_of_each_mask"], summary["jaccard_of_each_mask"]
    assert len(losses) == len(overlaps) == 2
    assert losses[summary["chosen_mask"]] == max(losses)
    assert len(summary["jaccard_of_each_mask_random_init"]) == 2
    assert 0 < summary["jaccard_rectangles"] < 1
    with Image.open(tmp_path / "first" / "masks.png") as picture:
        assert picture.width > picture.height > 100

    again = summary_of(script, tmp_path / "again")
    for one in (summary, again):
        del one["training_seconds"], one["settings"]
    assert again == summary
    assert script.main([*TINY, "--out", str(tmp_path / "first")]) == 2  # holds a run


@pytest.mark.parametrize("mask", ["random", "none"])
def test_the_baselines(script: ModuleType, tmp_path: Path, mask: str) -> None:
    summary = summary_of(script, tmp_path / "run", "--mask", mask)
    assert len(summary["loss_of_each_mask"]) == (2 if mask == "random" else 1)
    assert "chosen_mask" not in summary
    assert not (tmp_path / "run" / "masks.png").exists()


def test_images_of_yours(script: ModuleType, tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    for kind in ("a", "b"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for i in range(6):
            pixels = noise.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / kind / f"{i}.png")
    summary = summary_of(
        script, tmp_path / "run", "--data", str(tmp_path / "data"), "--curriculum", "easy-to-hard"
    )
    assert "jaccard_rectangles" not in summary  # no object masks
    assert (tmp_path / "run" / "masks.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "1"], "ratio must lie in"),
        (["--patch-size", "5"], "of patch_size=5, and width"),
        (["--masks", "1"], "masks must be an int >= 2"),
        (["--lr", "nan"], "lr must be a number > 0"),
        (["--mask", "none", "--curriculum", "partner"], "--mask none has none"),
        (["--batch-size", "64"], "do not fill one batch"),
        (["--data", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refuses(
    script: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    try:
        code = script.main([*TINY, *arguments, "--out", str(tmp_path / "run")])
    except SystemExit as stop:  # tyro's own way to refuse settings, in a box
        code = stop.code
    assert code == 2
    assert message in re.sub(r"[│\s]+", " ", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_masks_share_out_each_pixel(script: ModuleType, views: list[torch.Tensor]) -> None:
    masks = script.MaskNetwork(masks=3)(views[0])
    assert masks.shape == (8, 3, 16, 16)
    assert masks.min() >= 0
    torch.testing.assert_close(masks.sum(dim=1), torch.ones(8, 16, 16))


def test_the_contrastive_loss_is_simclrs(script: ModuleType) -> None:
    a, b = torch.randn(4, 5), torch.randn(4, 5)
    z = torch.cat([a, b])
    z = z / z.norm(dim=1, keepdim=True)
    terms = []
    for i in range(8):
        others = [float(z[i] @ z[j]) / 0.2 for j in range(8) if j != i]
        positive = float(z[i] @ z[(i + 4) % 8]) / 0.2
        terms.append(math.log(sum(math.exp(s) for s in others)) - positive)
    loss = script.contrastive_loss(a, b, 0.2)
    assert float(loss) == pytest.approx(sum(terms) / 8, rel=1e-5)


def test_losses_are_of_each_mask(script: ModuleType, tiny: Any, views: list[torch.Tensor]) -> None:
    """Mask k of image b hides image b, and its loss is entry k."""
    encoder = script.make_encoder(tiny)
    masks = torch.rand(3, 8, 1, 16, 16)
    together = script.masked_losses(encoder, views, masks.flatten(0, 1), tiny)
    first = encoder(views[0])
    for k in range(3):
        alone = script.contrastive_loss(first, encoder(views[1] * (1 - masks[k])), 0.2)
        torch.testing.assert_close(together[k], alone)


@pytest.mark.parametrize(("kappa", "sign"), [(-1.0, 1), (1.0, -1)])
def test_the_mask_network_gets_its_way(
    script: ModuleType, tiny: Any, views: list[torch.Tensor], kappa: float, sign: int
) -> None:
    """With the encoder frozen, an adversary raises the encoder's loss, and a partner lowers it."""
    tiny = dataclasses.replace(tiny, alpha=0.0)
    encoder, network = script.make_encoder(tiny), script.MaskNetwork(3)
    before = copy.deepcopy(encoder.state_dict())
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)

    def loss() -> float:
        with torch.no_grad():
            masks = script.soft_masks(network, views[1])
            return float(script.masked_losses(encoder, views, masks, tiny).sum())

    start, objectives = loss(), []
    for _ in range(12):
        masks = script.soft_masks(network, views[1])
        objectives.append(float(script.mask_step(encoder, optimizer, views, masks, kappa, tiny)))
    assert objectives[-1] < objectives[0]  # what it minimises
    assert sign * (loss() - start) > 0
    after = encoder.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.requires_grad and p.grad is None for p in encoder.parameters())


def test_the_encoder_step_leaves_the_masks_alone(
    script: ModuleType, tiny: Any, views: list[torch.Tensor]
) -> None:
    encoder, network = script.make_encoder(tiny), script.MaskNetwork(3)
    masks = script.soft_masks(network, views[1])
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    losses = [script.encoder_step(encoder, optimizer, views, masks, tiny).sum() for _ in range(6)]
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in network.parameters())


def test_the_penalty_wants_equal_shares(
    script: ModuleType, tiny: Any, views: list[torch.Tensor]
) -> None:
    encoder = script.make_encoder(tiny)

    def penalty(*shares: float) -> float:
        masks = torch.tensor(shares).repeat_interleave(8).view(24, 1, 1, 1).expand(24, 1, 16, 16)
        return float(script.mask_objective(encoder, masks, views, 0.0, tiny).detach())

    third = 1 / math.sin(math.pi / 3)
    assert penalty(1 / 3, 1 / 3, 1 / 3) == pytest.approx(3 * third, rel=1e-5)
    assert penalty(0.05, 0.05, 0.9) > 2 * penalty(1 / 3, 1 / 3, 1 / 3)


def test_the_curricula(script: ModuleType) -> None:
    signs = {name: [s.at(p) for p in (0.0, 0.5, 1.0)] for name, s in script.CURRICULA.items()}
    assert signs["adversary"] == [-1.0, -1.0, -1.0]
    assert signs["partner"] == [1.0, 1.0, 1.0]
    assert signs["easy-to-hard"] == [1.0, 0.0, -1.0]


def test_the_network_is_a_masker(script: ModuleType, views: list[torch.Tensor]) -> None:
    from adios_masks import OneMask

    network = script.MaskNetwork(3).eval()
    masker = md.masking.LearnedMasker(0.25, OneMask(network, 2))
    policy = md.AsymmetricMaskPolicy(masker, global_crops=2)
    hidden = policy(views, patch_size=4).student[1]
    assert hidden is not None
    assert hidden.sum(dim=1).tolist() == [4] * 8
    with torch.no_grad():
        scores = torch.nn.functional.avg_pool2d(network(views[1])[:, 2], 4).flatten(1)
    assert (
        scores.masked_fill(~hidden, 2).amin(dim=1) >= scores.masked_fill(hidden, 0).amax(1)
    ).all()
