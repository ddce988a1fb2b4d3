"""The recipe for lightly: its diffs, and their lines in loops made of lightly's own parts.

The lines under test are taken from the diffs that the example applies and the docs show. With a
clone of lightly at the recipe's commit, the examples themselves are run too:

    MASKDISTILL_LIGHTLY=CLONE pytest tests/recipes/test_recipe_lightly.py
"""

from __future__ import annotations

import copy
import os
import re
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import maskdistill as md

lightly_loss = pytest.importorskip("lightly.loss", reason="needs lightly")
from lightly.models.modules import (  # noqa: E402
    DINOProjectionHead,
    MaskedVisionTransformerTIMM,
)
from lightly.models.utils import deactivate_requires_grad, update_momentum  # noqa: E402

ROOT = Path(__file__).parents[2]
CLONE = Path(os.environ.get("MASKDISTILL_LIGHTLY") or "no-clone").resolve()
CASES = [
    ("dino", "token", None, 5), ("dino", "drop", None, 5), ("dino", "pixel", None, 4),
    ("dino-ddp", "token", None, 5), ("dino-ddp", "drop", None, 5),
    ("ibot", "token", None, 3), ("ibot", "pixel", None, 4),
    ("ibot", "token", "AttentionGuidedMasker(0.4)", 5),
    ("dinov2", "token", None, 3), ("dinov2", "pixel", None, 4),
    ("dinov2", "token", "AttentionGuidedMasker(0.4)", 5),
]  # fmt: skip
# lightly's heads use it, and lightly 1.6 runs with torch that says so.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm:FutureWarning")
with_clone = pytest.mark.skipif(
    not (CLONE / "examples").is_dir(), reason="MASKDISTILL_LIGHTLY names no clone of lightly"
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import recipe_lightly

    return recipe_lightly


def hunks(diff: str) -> list[list[str]]:
    return [part.splitlines() for part in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]]


def added(diff: str) -> str:
    """Return all added lines, as code that runs on its own after what it needs."""
    lines = [[line[1:] for line in hunk if line[0] == "+"] for hunk in hunks(diff)]
    return "\n".join(textwrap.dedent("\n".join(piece)) for piece in lines)


def masker_of(text: str | None) -> md.Masker | None:
    return md.parse_masker(text) if text else None


# --- The diffs


def test_at_most_five_lines_change(script: types.ModuleType) -> None:
    for example, apply, masker, count in CASES:
        diff = script.recipe(example, apply, masker_of(masker))
        assert added(diff).count("\n") + 1 == count <= 5


def test_the_docs_show_the_diffs_that_are_applied(script: types.ModuleType) -> None:
    page = (ROOT / "docs" / "recipes" / "lightly.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```diff\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    s = script
    assert shown == [s.DINO, s.DINO_PIXEL, s.IBOT, s.PIXELS, s.ATTENTION]
    drops = next(line for line in script.recipe("dino", "drop").splitlines() if "drop" in line)
    assert f"`{drops[1:]}`" in page
    assert script.COMMIT in page


def test_what_cannot_be_is_refused(script: types.ModuleType) -> None:
    with pytest.raises(ValueError, match="example must be one of dino, dino-ddp, ibot, dinov2"):
        script.recipe("mae")
    with pytest.raises(ValueError, match="dropped patches have no output"):
        script.recipe("dinov2", "drop")
    with pytest.raises(ValueError, match="apply must be one of token, drop for dino-ddp"):
        script.recipe("dino-ddp", "pixel")
    with pytest.raises(ValueError, match="needs attention, which the dino example does not"):
        script.recipe("dino", masker=md.AttentionGuidedMasker(0.4))


# --- Their lines in a loop of lightly's parts


def views(batch: int = 4) -> list[Tensor]:
    return [torch.randn(batch, 3, size, size) for size in (32, 32, 16, 16)]


def bare_vit(*_: Any, **__: Any) -> Any:
    """Stand in for ``torch.hub.load``, which the example calls for a ViT."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=16, depth=2, num_heads=3, num_classes=0,
        dynamic_img_size=True,
    )  # fmt: skip


class Model(nn.Module):
    """A student and its teacher, as lightly's documentation builds them."""

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.student_backbone = backbone
        self.student_head = DINOProjectionHead(width, 64, 32, 64)
        self.teacher_backbone = copy.deepcopy(backbone)
        self.teacher_head = DINOProjectionHead(width, 64, 32, 64)
        deactivate_requires_grad(self.teacher_backbone)
        deactivate_requires_grad(self.teacher_head)
        self.criterion = lightly_loss.DINOLoss(output_dim=64)

    def forward(self, x: Tensor) -> Tensor:
        return self.student_head(self.student_backbone(x))

    def forward_teacher(self, x: Tensor) -> Tensor:
        return self.teacher_head(self.teacher_backbone(x))


def dino(diff: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Model, str]:
    """Return the model that the diff's first lines build, and its lines for the step."""
    monkeypatch.setattr("torch.hub.load", bare_vit)
    start, step = added(diff).split("with model.", 1)
    space: dict[str, Any] = {"torch": torch}
    exec(start, space)
    return Model(space["backbone"], space["input_dim"]), f"with model.{step}"


def students(step: str, model: Model, crops: list[Tensor]) -> list[Tensor]:
    space: dict[str, Any] = {"md": md, "model": model, "views": crops}
    exec(step, space)
    return space["student_out"]


@pytest.mark.parametrize("apply", ["token", "drop"])
def test_only_the_students_global_views_are_masked(
    script: types.ModuleType, monkeypatch: pytest.MonkeyPatch, apply: str
) -> None:
    model, step = dino(script.recipe("dino", apply), monkeypatch)
    model.eval()
    crops = views()
    plain = [model(view) for view in crops]
    bare = copy.deepcopy(model.student_backbone).unwrap()
    assert torch.equal(bare(crops[0]), model.student_backbone(crops[0]))
    masked = students(step, model, crops)
    same = [torch.equal(a, b) for a, b in zip(plain, masked, strict=True)]
    assert same == [False, False, True, True]
    teacher = [model.forward_teacher(view) for view in crops[:2]]
    expected = [model.teacher_head(model.teacher_backbone.backbone(view)) for view in crops[:2]]
    assert all(torch.equal(a, b) for a, b in zip(teacher, expected, strict=True))


@pytest.mark.parametrize("apply", ["token", "drop"])
def test_a_step_of_lightlys_parts(
    script: types.ModuleType, monkeypatch: pytest.MonkeyPatch, apply: str
) -> None:
    model, step = dino(script.recipe("dino", apply), monkeypatch)
    keys = set(model.student_backbone.state_dict())
    assert keys - set(bare_vit().state_dict()) == ({"mask_token"} if apply == "token" else set())
    assert set(bare_vit().state_dict()) <= keys
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    crops = views()
    loss = model.criterion(
        [model.forward_teacher(view) for view in crops[:2]], students(step, model, crops), epoch=0
    )
    loss.backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not without
    optimizer.step()
    update_momentum(model.student_backbone, model.teacher_backbone, m=0.75)
    if apply == "token":
        student, teacher = (
            getattr(model, f"{role}_backbone").mask_token for role in ("student", "teacher")
        )
        assert student.norm() > 0
        torch.testing.assert_close(teacher.data, student.data / 4)


def test_the_resnets_pixels(script: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    line = next(line for line in added(script.DINO_PIXEL).splitlines() if "backbone =" in line)
    net = [nn.Conv2d(3, 8, 32, stride=32), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    space: dict[str, Any] = {
        "nn": nn, "md": md, "resnet": nn.Sequential(*net, nn.Linear(8, 2)),
    }  # fmt: skip
    exec(line, space)
    backbone, crops = space["backbone"].eval(), [torch.rand(2, 3, 128, 128) for _ in range(2)]
    crops += [torch.rand(2, 3, 64, 64)]
    model = types.SimpleNamespace(
        student_backbone=backbone, forward=lambda x: backbone(x).flatten(start_dim=1)
    )
    step = added(script.DINO_PIXEL).split("with model.", 1)[1]
    masked = students(f"with model.{step}", model, crops)  # type: ignore[arg-type]
    same = [torch.equal(a, model.forward(view)) for a, view in zip(masked, crops, strict=True)]
    assert same == [False, False, True]
    assert set(backbone.state_dict()) == set(nn.Sequential(*net).state_dict())


# --- iBOT's and DINOv2's masks, in lightly's own masked ViT


def lightlys_vit() -> Any:
    vit = bare_vit()
    return MaskedVisionTransformerTIMM(
        vit, weight_initialization="skip", antialias=False, pos_embed_initialization="skip"
    ).eval()


def block_mask(diff: str, **known: Any) -> tuple[dict[str, Any], Tensor]:
    space: dict[str, Any] = {"torch": torch, "epoch": 0, "epochs": 1, **known}
    exec(added(diff), space)
    return space, space["block_mask"]


def test_lightlys_mask_token_takes_our_masks(script: types.ModuleType) -> None:
    vit = lightlys_vit()
    images = torch.randn(4, 3, 32, 32)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    _, found = block_mask(script.recipe("ibot"), B=4, H=2, W=2, mask=mask)
    assert found.flatten(1).any(dim=1).sum() == 2
    mask[:, 1:] = found.flatten(start_dim=1)
    vit.encode(images, mask=mask).square().sum().backward()
    assert vit.mask_token.grad.norm() > 0
    ours = md.MaskedViT(vit.vit)  # the same model, weights and mask: the same features
    same = ours.forward_features(images, mask[:, 1:])
    torch.testing.assert_close(same, vit.encode(images, mask=mask), atol=1e-5, rtol=1e-5)


def test_masks_follow_the_teachers_attention(script: types.ModuleType) -> None:
    teacher = lightlys_vit()
    before = copy.deepcopy(teacher.state_dict())
    images = torch.randn(4, 3, 32, 32)
    diff = script.recipe("ibot", masker=md.AttentionGuidedMasker(0.25))
    model = types.SimpleNamespace(teacher_backbone=teacher)
    features = teacher.encode(images)
    space, found = block_mask(diff, B=4, H=2, W=2, model=model, global_views=images)
    top = space["teacher"].attention(images).mean(dim=1).argmax(dim=1)
    assert torch.equal(found.flatten(1).int().argmax(dim=1), top)
    assert teacher.state_dict().keys() == before.keys()
    assert torch.equal(teacher.encode(images), features)


# --- The examples themselves


@with_clone
@pytest.mark.parametrize(("example", "apply", "masker", "count"), CASES)
def test_git_applies_the_diff(
    script: types.ModuleType, example: str, apply: str, masker: str | None, count: int
) -> None:
    before = (CLONE / script.FILES[example]).read_text(encoding="utf-8")
    diff = script.recipe(example, apply, masker_of(masker))
    after = script.patched(CLONE, example, diff)
    compile(after, example, "exec")
    for hunk in hunks(diff):
        old, new = ("".join(f"{x[1:]}\n" for x in hunk if x[0] != sign) for sign in "+-")
        assert before.count(old) == after.count(new) == 1
    assert len(after.splitlines()) - len(before.splitlines()) == sum(
        (line[0] == "+") - (line[0] == "-") for hunk in hunks(diff) for line in hunk
    )
    with pytest.raises(ValueError, match=r"(?s)does not fit.*check out commit e8d317f"):
        script.patched(CLONE, "dino" if example != "dino" else "ibot", diff)


@with_clone
@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("example", "apply", "masker"), [case[:3] for case in CASES if case[0] != "dino-ddp"]
)
def test_the_example_trains(
    script: types.ModuleType, capsys: pytest.CaptureFixture[str], example: str, apply: str,
    masker: str | None,
) -> None:  # fmt: skip
    text = script.patched(CLONE, example, script.recipe(example, apply, masker_of(masker)))
    script.run(text, epochs=1, steps=2, batch=2, blocks=1)
    assert re.search(r"epoch: 00, loss: \d+\.\d+", capsys.readouterr().out)


@with_clone
@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("apply", ["token", "drop", "pixel"])
def test_masks_that_hide_nothing_change_nothing(
    script: types.ModuleType, capsys: pytest.CaptureFixture[str], apply: str
) -> None:
    plain = (CLONE / script.FILES["dino"]).read_text(encoding="utf-8")
    clean = script.patched(CLONE, "dino", script.recipe("dino", apply, md.NoMasker()))
    if apply != "pixel":
        plain = re.sub(
            r"^# ((backbone = torch|input_dim = b).*)$", r"\1", plain, flags=re.MULTILINE
        )
        assert "\nbackbone = torch.hub.load" in plain
    printed = []
    for text in (plain, clean):
        script.run(text, epochs=2, steps=1, batch=2, blocks=1)
        printed.append(capsys.readouterr().out)
    assert "epoch: 01, loss: " in printed[0]
    assert printed[0] == printed[1]
