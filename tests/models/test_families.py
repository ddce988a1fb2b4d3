"""MaskedViT on a model of each family of timm: what it promises, on real numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import maskdistill as md
from tests.models.families import SMALL, build, images

# They take long, and others here have stems and blocks like theirs.
LARGE = {
    "coatnet_nano_rw_224", "tiny_vit_5m_224", "efficientformer_l1", "visformer_tiny",
    "nextvit_small", "mvitv2_base_cls",
}  # fmt: skip
every_family = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long) if name in LARGE else name for name in SMALL],
)

# What they refuse, and the word of the reason that must be given.
NO_TOKEN = {"crossvit_tiny_240": "branches", "tnt_s_legacy_patch16_224": "pixel tokens"}
DROP = [
    name
    for name in SMALL
    if type(build(name)).__name__
    in {"VisionTransformer", "VisionTransformerDistilled", "Eva", "NaFlexVit", "Beit", "Cait",
        "VisionTransformerRelPos", "Hiera"}
]  # fmt: skip
NO_ATTENTION = {
    "hieradet": "windows",
    "davit": "windows",
    "levit": "pooled",
    "coat_lite": "no softmax",
    "efficientvit_b0": "no attention",
    "efficientvit_m0": "windows",
    "nextvit": "no softmax",
    "mobilevit": "windows",
    "crossvit": "patches",
    "mixer": "no attention",
    "convnext": "no attention",
}

NO_STRIDES = ("crossvit_tiny_240", "gcvit_xxtiny", "pit_ti_224", "pit_ti_distilled_224",
              "visformer_tiny")  # fmt: skip


@contextmanager
def wrapped(name: str, apply: str) -> Iterator[md.MaskedViT]:
    vit = md.MaskedViT(build(name), apply)  # type: ignore[arg-type]
    if vit.mask_token is not None:
        with torch.no_grad():
            vit.mask_token.normal_(generator=torch.Generator().manual_seed(3))
    try:
        yield vit.eval()
    finally:
        vit.unwrap()


def half(vit: md.MaskedViT, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return md.RandomMasker(0.5)(len(x), vit.grid(*x.shape[2:]), generator=generator)


def repainted(vit: md.MaskedViT, x: Tensor, mask: Tensor) -> Tensor:
    rows, columns = (n * p for n, p in zip(vit.grid(*x.shape[2:]), vit.patch_size, strict=True))
    shown = torch.ones_like(x)
    shown[..., :rows, :columns] = md.mask_pixels(shown[..., :rows, :columns], mask, vit.patch_size)
    return torch.where(shown.bool(), x, 3 * torch.randn_like(x))


def applications(name: str) -> list[str]:
    return ["pixel"] + ([] if name in NO_TOKEN else ["token"]) + (["drop"] if name in DROP else [])


@every_family
@torch.no_grad()
def test_unmasked_is_bit_equal_and_hidden_pixels_do_not_matter(name: str) -> None:
    model, x = build(name), images(name)
    keys, plain = list(model.state_dict()), model(x)
    for apply in applications(name):
        with wrapped(name, apply) as vit:
            assert torch.equal(vit(x), plain), apply
            mask = half(vit, x)
            masked = vit.embed(x, mask)
            assert masked.shape == (2, vit.embed(x).shape[1])
            torch.testing.assert_close(vit.embed(repainted(vit, x, mask), mask), masked)
            assert not torch.allclose(vit.embed(repainted(vit, x, ~mask), mask), masked, rtol=1e-3)
            assert torch.equal(vit(x), plain), "a mask must not outlive its forward"
            own = [key for key in vit.state_dict() if key != "mask_token"]
            assert own == [key for key in keys if key != "mask_token"]
        assert torch.equal(model(x), plain)
        assert list(model.state_dict()) == keys


@every_family
def test_the_gradient_reaches_the_mask_token(name: str) -> None:
    if name in NO_TOKEN:
        with pytest.raises(ValueError, match=NO_TOKEN[name]):
            md.MaskedViT(build(name))
        return
    x = images(name)
    with wrapped(name, "token") as vit:
        vit.embed(x, half(vit, x)).square().sum().backward()
        assert vit.mask_token is not None
        assert vit.mask_token.grad is not None
        assert vit.mask_token.grad.abs().sum() > 0
        vit.backbone.zero_grad()


class Unseen(TorchFunctionMode):
    """Hides keys from every attention: an oracle for dropping that drops nothing."""

    def __init__(self, visible: Tensor) -> None:
        self.bias = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)[:, None, None]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.softmax, torch.softmax, F.softmax):
            assert args[0].shape[-1] == self.bias.shape[-1]
            return func(args[0] + self.bias, *args[1:], **kwargs)
        if func is F.scaled_dot_product_attention:
            given = kwargs.get("attn_mask")
            kwargs["attn_mask"] = self.bias if given is None else given + self.bias
            return func(*args, **kwargs)
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", [n for n in DROP if n not in ("cait_xxs24_224", "hiera_tiny_224")])
@torch.no_grad()
def test_dropping_is_attending_to_nothing_hidden(name: str) -> None:
    x = images(name)
    with wrapped(name, "drop") as vit:
        mask = half(vit, x)
        # The stem sees its own patches, where its filters overlap as well.
        seen = md.mask_pixels(x, mask, vit.patch_size) if vit._blanks else x
        dropped = vit.forward_features(x, mask)
        whole = vit.forward_features(x)
        prefix = whole.shape[1] - mask.shape[1]
        visible = torch.cat([torch.ones(2, prefix, dtype=torch.bool), ~mask], dim=1)
        with Unseen(visible):
            expected = vit.forward_features(seen)
    assert dropped.shape[1] == prefix + mask.shape[1] - int(mask[0].sum())
    torch.testing.assert_close(
        dropped, expected[visible].reshape(dropped.shape), atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_dropping_in_cait_is_running_on_the_kept_tokens() -> None:
    name = "cait_xxs24_224"
    model: Any = build(name)
    if not hasattr(model, "forward_cls"):
        pytest.skip("an older timm, which has no such part to compare with")
    x = images(name)
    with wrapped(name, "drop") as vit:
        mask = half(vit, x)
        dropped = vit.forward_features(x, mask)
    tokens = model.patch_embed(x) + model.pos_embed
    kept = torch.stack([row[~hidden] for row, hidden in zip(tokens, mask, strict=True)])
    expected = model.norm(model.forward_cls(model.blocks(kept)))
    torch.testing.assert_close(dropped, expected)


@torch.no_grad()
def test_dropping_in_hiera_is_its_own_mask() -> None:
    name = "hiera_tiny_224"
    model: Any = build(name)
    x = images(name)
    with wrapped(name, "drop") as vit:
        mask = half(vit, x)
        torch.testing.assert_close(
            vit.forward_features(x, mask), model.forward_features(x, mask=~mask)
        )
    with pytest.raises(ValueError, match="2x2 of them, but the masks have a grid of 4x4"):
        md.MaskedViT(model, "drop", patch_size=16)


@pytest.mark.parametrize("name", [name for name in SMALL if name not in DROP])
def test_dropping_is_refused_with_a_reason(name: str) -> None:
    with pytest.raises(ValueError, match=r"cannot drop tokens: .*Use apply=") as refusal:
        md.MaskedViT(build(name), "drop")
    assert type(build(name)).__name__ in str(refusal.value)


class Softmaxes(TorchFunctionMode):
    """Sees every softmax."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **dict(kwargs or {}))
        if func in (torch.Tensor.softmax, torch.softmax, F.softmax):
            self.seen.append(output)
        return output


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    fused = [m for m in model.modules() if getattr(m, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]


@every_family
@torch.no_grad()
def test_the_attention_is_the_softmax(name: str) -> None:
    """Against every softmax of a forward in which nothing is fused."""
    model, x = build(name), images(name)
    if "naflexvit_base_patch16_gap" not in SMALL and name in NO_STRIDES:
        pytest.skip("an older timm does not say the strides of this one, so the grid is another")
    refusals = [why for family, why in NO_ATTENTION.items() if name.startswith(family)]
    with wrapped(name, "pixel") as vit:
        if refusals:
            with pytest.raises(ValueError, match=refusals[0]):
                vit.attention(x)
            return
        attention = vit.attention(x)
        rows, columns = vit.grid(*x.shape[2:])
        assert attention.shape[0] == 2
        assert attention.shape[2] == rows * columns
        assert bool((attention >= 0).all())
        assert bool((attention.sum(-1) <= 1 + 1e-5).all())
        (query,) = (recorder.query for recorder in vit._attention.values())
        with unfused(model), Softmaxes() as softmaxes:
            model(x)
    # The last with all patches as keys; after it comes the attention pooling, if any.
    over_patches = [w for w in softmaxes.seen if w.shape[-1] >= rows * columns]
    pooling = getattr(model, "attn_pool", None) is not None and query != "pool"
    last = over_patches[-2 if pooling else -1]
    if last.ndim == 3:
        last = last.unflatten(0, (2, -1))
    last = last.reshape(2, last.shape[1], *last.shape[-2:])[..., -rows * columns :]
    picked = {"class": last[:, :, :1], "pool": last, "mean": last[:, :, -rows * columns :]}[query]
    torch.testing.assert_close(attention, picked.mean(dim=2), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_queries_other_than_the_usual() -> None:
    name = "vit_little_patch16_reg4_gap_256"  # registers, and no class token
    x = images(name)
    with wrapped(name, "pixel") as vit:
        usual, registers = vit.attention(x), vit.attention(x, "register")
        assert not torch.allclose(usual, registers)
        assert torch.equal(usual, vit.attention(x, "mean"))
        with pytest.raises(ValueError, match="has no class token"):
            vit.attention(x, "class")
        with pytest.raises(ValueError, match="no attention pooling"):
            vit.attention(x, "pool")
        with pytest.raises(ValueError, match="query must be one of class, pool, register, mean"):
            vit.attention(x, "cls")  # type: ignore[arg-type]
    with (
        wrapped("vit_tiny_patch16_224", "pixel") as vit,
        pytest.raises(ValueError, match="no register tokens"),
    ):
        vit.attention(images("vit_tiny_patch16_224"), "register")


@pytest.mark.skipif("naflexvit_base_patch16_gap" not in SMALL, reason="an older timm")
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_naflex_drops_in_both_modes(training: bool) -> None:
    name = "naflexvit_base_patch16_gap"
    x = images(name)
    with wrapped(name, "drop") as vit:
        mask = half(vit, x)
        evaluated = vit(x, mask)
        vit.train(training)
        assert torch.equal(vit(x, mask), evaluated), "the model has no dropout"
        assert vit.backbone.training is training
        vit(x)
        vit.eval()


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "beit_base_patch16_224"])
def test_other_sizes_are_refused_in_a_sentence(name: str) -> None:
    ways = {"swin": "_img_size=", "beit": "takes one size only"}
    small = images(name)[..., :32, :16]
    with (
        wrapped(name, "token") as vit,
        pytest.raises(ValueError, match=rf"does not take 32x16.*{ways[name.split('_')[0]]}.*views"),
    ):
        vit(small)


@torch.no_grad()
def test_hierarchical_masks_reach_the_stem() -> None:
    """A patch of the mask covers 8x8 tokens of Swin's stem, on oblong images too."""
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=0, img_size=(64, 96), embed_dim=12,
        depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=2,
    ).eval()  # fmt: skip
    vit = md.MaskedViT(model)
    assert vit.grid(64, 96) == (2, 3)
    assert vit.mask_token is not None
    vit.mask_token.fill_(7.0)
    seen: list[Tensor] = []
    model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    mask = torch.tensor([[True, False, False, False, False, True]])
    vit(torch.randn(1, 3, 64, 96), mask)
    hidden = (seen[0] == 7).all(dim=-1)[0]
    expected = mask.reshape(2, 3).repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert torch.equal(hidden, expected)
    finer = md.MaskedViT(vit.unwrap(), patch_size=16)
    assert finer.grid(64, 96) == (4, 6)
