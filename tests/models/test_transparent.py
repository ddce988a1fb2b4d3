"""MaskedViT out of the way of anybody's code: attributes, keys, optimisers, errors, odd states."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

import maskdistill as md
from maskdistill.masking.mask import PatchMask


def small(name: str = "vit_tiny_patch16_224", **arguments: Any) -> nn.Module:
    settings = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
    model: nn.Module = timm.create_model(name, **{"num_classes": 0, **settings, **arguments})
    return model.eval()


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MASK = md.RandomMasker(0.5)(2, (4, 4), generator=torch.Generator().manual_seed(0))


def test_attributes_are_written_to_the_wrapped_model() -> None:
    """facebookresearch/dino's MultiCropWrapper takes heads away so."""
    vit = md.MaskedViT(small(num_classes=7), "pixel")
    vit.fc, vit.head = nn.Identity(), nn.Identity()
    assert vit(X).shape == (2, 24)
    assert isinstance(vit.backbone.head, nn.Identity)
    vit.fill = "mean"
    assert vit.fill == "mean"
    assert not hasattr(vit.backbone, "fill")
    vit.head = nn.Linear(24, 3)
    assert vit(X).shape == (2, 3)
    assert len(vit.state_dict()) == len(list(vit.parameters()))


class Student(md.MaskedViT):
    """With a module of its own."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__(vit)
        self.projector = nn.Linear(2, 2)


class Nested(nn.Module):
    """Has a child that is called as the wrapper's."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = small()
        self.patch_size = 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.backbone(x)
        return features


def test_keys_of_subclasses_and_namesakes() -> None:
    student = Student(small())
    assert "projector.weight" in student.state_dict()
    assert not any(student.load_state_dict(student.state_dict()))
    nested = md.MaskedViT(Nested(), patch_embed="backbone.patch_embed", image_size=(32, 32))
    assert "backbone.cls_token" in nested.state_dict()
    assert not any(nested.load_state_dict(nested.state_dict()))


def test_a_mask_token_for_something_else_is_refused() -> None:
    model = small()
    model.mask_token = nn.Parameter(torch.zeros(1, 1, 99))  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"mask_token \(1, 1, 99\).*width of 24.*encoder alone"):
        md.MaskedViT(model)


def test_a_shared_mask_token_stays_shared() -> None:
    model = small()
    model.mask_token = nn.Parameter(torch.zeros(1, 24))  # type: ignore[assignment]
    vit = md.MaskedViT(model)
    state = {key: torch.full_like(value, 3.0) for key, value in vit.state_dict().items()}
    vit.load_state_dict(state, assign=True)
    assert vit.mask_token is model.mask_token
    assert bool((vit.mask_token == 3).all())


def test_timms_optimiser_rules_hold() -> None:
    model = small()
    vit = md.MaskedViT(copy.deepcopy(model))

    def rules(net: nn.Module, setting: str, **arguments: Any) -> dict[str, float]:
        groups = create_optimizer_v2(net, opt="adamw", lr=1.0, **arguments).param_groups
        of = {id(p): group[setting] for group in groups for p in group["params"]}
        names = net.named_parameters()
        return {name.removeprefix("backbone."): of[id(p)] for name, p in names}

    for setting, arguments in (
        ("weight_decay", {"weight_decay": 0.1}),
        ("lr_scale", {"layer_decay": 0.5}),
    ):
        plain, wrapped = rules(model, setting, **arguments), rules(vit, setting, **arguments)
        token = wrapped.pop("mask_token")
        assert wrapped == plain
        assert token == (0.1 if setting == "weight_decay" else plain["patch_embed.proj.weight"])


def test_what_is_compiled_already_is_refused() -> None:
    for compiled in (torch.compile(small(), backend="eager"), small()):
        if not hasattr(compiled, "_orig_mod"):
            compiled.compile(backend="eager")
        with pytest.raises(ValueError, match="wrap first, then compile"):
            md.MaskedViT(compiled)


def test_an_unwrapped_wrapper_does_not_ignore_masks() -> None:
    for apply in ("token", "drop"):
        model = small()
        old = md.MaskedViT(model, apply)  # type: ignore[arg-type]
        old.unwrap()
        with pytest.raises(RuntimeError, match="was unwrapped"):
            old(X, MASK)
        new = md.MaskedViT(model, apply)  # type: ignore[arg-type]
        masked = new(X, MASK)
        old.unwrap()
        assert torch.equal(new(X, MASK), masked)
    with pytest.raises(ValueError, match="unwrap\\(\\) that first"):
        md.MaskedViT(new.backbone, "drop")


def test_checkpointed_blocks() -> None:
    masked = {}
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = small()
        model.set_grad_checkpointing(checkpointing)  # type: ignore[operator]
        vit = md.MaskedViT(model, "drop").train()
        vit(X, MASK).square().sum().backward()
        masked[checkpointing] = model.patch_embed.proj.weight.grad  # type: ignore[union-attr]
    torch.testing.assert_close(masked[True], masked[False])
    beit = small("beit_base_patch16_224")
    beit.set_grad_checkpointing(True)  # type: ignore[operator]
    vit = md.MaskedViT(beit, "drop")
    with pytest.raises(ValueError, match="gradient checkpointing"):
        vit(X, MASK)
    with torch.no_grad():
        assert vit(X, MASK).shape == (2, 24)


@pytest.mark.skipif(not timm.is_model("naflexvit_base_patch16_gap"), reason="an older timm")
def test_naflex_trains_with_clean_views() -> None:
    """It adds positions in place, to what the zero gradient's function returned."""
    model = timm.create_model("naflexvit_base_patch16_gap", num_classes=0, patch_size=8, depth=1,
                              embed_dim=24, num_heads=2)  # fmt: skip
    vit = md.MaskedViT(model).train()
    (vit(X, MASK).sum() + vit(X).sum()).backward()
    assert vit.mask_token is not None
    assert vit.mask_token.grad is not None


def test_only_sizes_are_blamed_on_the_size() -> None:
    vit = md.MaskedViT(small(dynamic_img_size=True))
    other = X[..., :16, :16]
    with pytest.raises(RuntimeError, match="Half"):
        vit(other.half())
    with pytest.raises(TypeError, match="foo"):
        vit(other, foo=1)
    with pytest.raises(ValueError, match="does not take 16x16"):
        md.MaskedViT(small())(other)


def test_recordings_nest_and_leave_nothing() -> None:
    vit = md.MaskedViT(small())
    with vit.record_attention() as first, vit.record_attention("mean") as second:
        with vit.record_attention() as third:
            vit(X)
        vit(2 * X)
    assert torch.equal(third.attention, vit.attention(X))
    assert torch.equal(first.attention, vit.attention(2 * X))
    assert torch.equal(second.attention, vit.attention(2 * X, "mean"))
    with vit.record_attention(), pytest.raises(ValueError, match="call the MaskedViT itself"):
        vit.backbone(X)
    pyramid = md.MaskedViT(timm.create_model("mvitv2_tiny", img_size=64, num_classes=0), "pixel")
    images = torch.randn(1, 3, 64, 64)

    def interrupt(*unused: Any) -> None:
        raise KeyboardInterrupt

    pyramid.attention(images)
    hook = pyramid.backbone.stages[-1].blocks[-1].attn.proj.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        pyramid.attention(images)
    hook.remove()
    assert torch._C._len_torch_function_stack() == 0
    assert pyramid.attention(images).shape[2] == 4


def test_attention_over_channels_is_never_taken_for_patches() -> None:
    vit = md.MaskedViT(timm.create_model("davit_tiny", num_classes=0).eval(), "pixel")
    with pytest.raises(ValueError, match="windows"):
        vit.attention(torch.randn(1, 3, 128, 128))  # 16 patches, 32 channels a head


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 0}, "int >= 1"),
        ({"patch_size": (8,)}, "or two of them"),
        ({"patch_embed": "nope", "apply": "drop"}, "no module 'nope'"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        md.MaskedViT(small(), **arguments)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "cait_xxs24_224",
             "vit_small_patch16_dinov3"]
)  # fmt: skip
@pytest.mark.parametrize("apply", ["token", "drop"])
@torch.no_grad()
def test_a_mask_of_coarser_patches(name: str, apply: str) -> None:
    if not timm.is_model(name):
        pytest.skip("an older timm")
    model = small(name, img_size=64, embed_dim=32)
    vit = md.MaskedViT(model, apply, patch_size=16)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 64, 64)
    mask = md.RandomMasker(0.5)(2, vit.grid(64, 64))
    shown = md.mask_pixels(torch.ones_like(x), mask, 16).bool()
    torch.testing.assert_close(vit(torch.where(shown, x, 9 * x), mask), vit(x, mask))
    if apply == "drop":
        prefix = vit.forward_features(x).shape[1] - 64
        assert vit.forward_features(x, mask).shape[1] == prefix + 32
        assert torch.equal(vit(x, PatchMask(mask, 8)), vit(x, mask))
    vit.unwrap()
    fine, coarse = md.MaskedViT(model, "pixel"), md.MaskedViT(model, "pixel", patch_size=16)
    summed = fine.attention(x).unflatten(2, (4, 2, 4, 2)).sum((3, 5)).flatten(2)
    torch.testing.assert_close(coarse.attention(x), summed)
    for size in (12, 20, 4):
        with pytest.raises(ValueError, match="multiple of the 8x8 pixels|no grid of patches"):
            md.MaskedViT(model, apply, patch_size=size)  # type: ignore[arg-type]


def test_multicrop_says_what_it_wants() -> None:
    with pytest.raises(ValueError, match=r"must be a MaskedViT; got VisionTransformer"):
        md.MultiCropWrapper(small(), nn.Identity())  # type: ignore[arg-type]
    net = md.MultiCropWrapper(md.MaskedViT(small()), nn.Identity())
    with pytest.raises(ValueError, match=r"one entry per crop, 1, .* got ViewMasks"):
        net([X], md.ViewMasks((PatchMask(MASK, 8),), (None,)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"one entry per crop, 2, .* got 1"):
        net([X, X], [MASK])


def test_bad_calls() -> None:
    vit = md.MaskedViT(small(), "drop")
    for arguments, message in (
        ((X, md.ViewMasks((PatchMask(MASK, 8),), (None,))), r"got ViewMasks.*student\[i\]"),
        (({"x": X}, MASK), "tensor; got dict"),
    ):
        with pytest.raises(ValueError, match=message):
            vit(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="count=12 was given, but .* from 8 to 8"):
        vit(X, PatchMask(MASK, 12))
    with vit.masking([None]), pytest.raises(ValueError, match="inside masking"):
        vit(X, MASK)
    vit.backbone.patch_embed.strict_img_size = False
    vit.backbone.set_input_size(img_size=(64, 64))
    with pytest.raises(ValueError, match="does not divide|made 64 patch tokens|must be"):
        vit(torch.randn(2, 3, 64, 64), MASK)


def test_wrapped_models_pickle() -> None:
    for apply in ("token", "drop", "pixel"):
        vit = md.MaskedViT(small(), apply)  # type: ignore[arg-type]
        vit.attention(X)
        again = pickle.loads(pickle.dumps(vit))
        assert torch.equal(again(X, MASK), vit(X, MASK))
