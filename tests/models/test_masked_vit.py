"""MaskedViT on real timm models: nothing changes without a mask, and a mask hides."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import timm
import torch
from torch import nn

import maskdistill as md
from maskdistill.masking.mask import PatchMask
from tests.models import families

# One of each kind: class token, registers, distillation token, rotary embedding, mixed rotary
# embedding, neither class token nor position embedding for the prefix.
MODELS = [
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_mixed_224",
    "vit_base_patch16_siglip_224",
]
SIZE, PATCH = 32, 8
# The oldest timm that is supported does not have all of them.
MODELS = [name for name in MODELS if timm.is_model(name)]
every_model = pytest.mark.parametrize("name", MODELS)
every_application = pytest.mark.parametrize("apply", ["token", "drop", "pixel"])


def build(name: str = MODELS[0], **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        name, img_size=SIZE, patch_size=PATCH, num_classes=0, dynamic_img_size=True, depth=2,
        **kwargs,
    )  # fmt: skip
    # timm starts some weights at zero and layer scales near it: a difference could hide there.
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
        elif "gamma" in name:
            nn.init.ones_(parameter)
    return model.eval()


def images(size: tuple[int, int] = (SIZE, SIZE), n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(1))


def mask_for(vit: md.MaskedViT, x: torch.Tensor, ratio: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return md.RandomMasker(ratio)(len(x), vit.grid(*x.shape[2:]), generator=generator)


def repaint(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Change the pixels of hidden patches, and of no others."""
    other = torch.randn_like(x) * 3
    shown = md.mask_pixels(torch.ones_like(x), mask, PATCH)
    return torch.where(shown.bool(), x, other)


@every_model
@every_application
@torch.no_grad()
def test_without_a_mask_nothing_changes(name: str, apply: str) -> None:
    model, x = build(name), images()
    keys, expected = list(model.state_dict()), model(x)
    features = model.forward_features(x)
    vit = md.MaskedViT(model, apply)  # type: ignore[arg-type]
    assert torch.equal(vit(x), expected)
    assert torch.equal(vit.forward_features(x), features)
    vit(x, mask_for(vit, x))
    assert torch.equal(vit(x), expected), "a mask must not outlive its forward"
    assert list(model.state_dict()) == keys
    assert vit.unwrap() is model
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys


@every_model
@every_application
@torch.no_grad()
def test_hidden_pixels_do_not_matter_and_visible_ones_do(name: str, apply: str) -> None:
    vit, x = md.MaskedViT(build(name), apply), images()  # type: ignore[arg-type]
    mask = mask_for(vit, x)
    torch.testing.assert_close(vit(repaint(x, mask), mask), vit(x, mask))
    assert not torch.allclose(vit(repaint(x, ~mask), mask), vit(x, mask), atol=1e-3)
    assert not torch.allclose(vit(x), vit(x, mask), atol=1e-3)


@every_model
@torch.no_grad()
def test_dropping_is_attending_to_nothing_hidden(name: str) -> None:
    """Tokens that were never there: equal to masking their keys in every block."""
    model = build(name)
    vit, x = md.MaskedViT(model, "drop"), images()
    mask = mask_for(vit, x)
    dropped = vit.forward_features(x, mask)
    prefix = vit.prefix_tokens
    assert dropped.shape[1] == prefix + int((~mask[0]).sum())
    if "attn_mask" not in inspect.signature(model.forward_features).parameters:
        pytest.skip("this timm cannot mask keys, so there is nothing to compare with")
    visible = torch.cat([torch.ones(len(x), prefix, dtype=torch.bool), ~mask], dim=1)
    keys_masked = model.forward_features(x, attn_mask=visible[:, None, None, :])
    expected = keys_masked[visible].reshape(len(x), -1, dropped.shape[-1])
    torch.testing.assert_close(dropped, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_the_token_goes_in_before_the_position_embedding() -> None:
    model = build()
    vit, x = md.MaskedViT(model), images()
    assert vit.mask_token is not None
    nn.init.normal_(vit.mask_token)
    mask = mask_for(vit, x)
    tokens = model.patch_embed(x).flatten(1, 2)
    tokens[mask] = vit.mask_token[0, 0]
    tokens = torch.cat([model.cls_token.expand(len(x), -1, -1), tokens], dim=1) + model.pos_embed
    expected = model.norm(model.blocks(tokens))[:, 0]
    torch.testing.assert_close(vit(x, mask), expected)


@every_application
@torch.no_grad()
def test_other_sizes_and_oblong_images(apply: str) -> None:
    vit = md.MaskedViT(build(), apply)  # type: ignore[arg-type]
    for size in ((16, 16), (16, 40), (48, 24)):
        x = images(size)
        mask = mask_for(vit, x)
        torch.testing.assert_close(vit(repaint(x, mask), mask), vit(x, mask))


@every_application
def test_gradients(apply: str) -> None:
    vit, x = md.MaskedViT(build(), apply), images()  # type: ignore[arg-type]
    vit(x, mask_for(vit, x)).square().sum().backward()
    grads = {name: p.grad for name, p in vit.named_parameters()}
    assert all(g is not None for g in grads.values()), [n for n, g in grads.items() if g is None]
    if apply == "token":
        assert grads["mask_token"] is not None
        assert grads["mask_token"].abs().sum() > 0


@pytest.mark.parametrize("name", [n for n in MODELS if "siglip" not in n])
@torch.no_grad()
def test_attention_is_the_softmax_of_queries_and_keys(name: str) -> None:
    model = build(name)
    vit, x = md.MaskedViT(model), images()
    before = vit(x)
    attention = vit.attention(x)
    heads = model.blocks[-1].attn.num_heads
    assert attention.shape == (2, heads, 16)
    assert torch.equal(vit(x), before), "recording must leave nothing behind"

    caught: list[torch.Tensor] = []
    real = nn.functional.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: object) -> torch.Tensor:
        caught.append((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1))
        return real(q, k, v, **kwargs)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", spy)
        model(x)
    expected = caught[-1][:, :, 0, vit.prefix_tokens :]
    torch.testing.assert_close(attention, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(attention, attention.mean(dim=-1, keepdim=True), rtol=0.05)


@torch.no_grad()
def test_recording_a_forward() -> None:
    vit, x = md.MaskedViT(build()), images()
    with vit.record_attention() as record:
        with pytest.raises(RuntimeError, match="nothing was recorded"):
            _ = record.attention
        output = vit(x)
    torch.testing.assert_close(output, vit(x))
    assert torch.equal(record.attention, vit.attention(x))
    assert vit.backbone.blocks[-1].attn.fused_attn  # type: ignore[union-attr, index]


@every_application
@torch.no_grad()
def test_copies_are_independent(apply: str) -> None:
    vit, x = md.MaskedViT(build(), apply), images()  # type: ignore[arg-type]
    vit.attention(x)
    twin, mask = copy.deepcopy(vit), mask_for(vit, x)
    assert torch.equal(twin(x, mask), vit(x, mask))
    assert torch.equal(twin.attention(x), vit.attention(x))
    nn.init.zeros_(vit.backbone.cls_token)  # type: ignore[arg-type]
    assert not torch.equal(twin(x, mask), vit(x, mask))
    twin.unwrap()
    assert torch.equal(vit(repaint(x, mask), mask), vit(x, mask))


@pytest.mark.parametrize(
    ("name", "apply"),
    [
        ("vit_tiny_patch16_224", "token"),
        ("eva02_tiny_patch14_224", "drop"),  # its rotary embedding is dropped as well
        ("vit_tiny_patch16_224", "pixel"),
    ],
)
@torch.no_grad()
def test_compiles_without_a_graph_break(name: str, apply: str) -> None:
    vit, x = md.MaskedViT(build(name), apply), images()  # type: ignore[arg-type]
    torch._dynamo.reset()
    compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), vit(x))
    for ratio in (0.5, 0.5):
        mask = mask_for(vit, x, ratio)
        counted = PatchMask(mask, int(mask[0].sum()))
        torch.testing.assert_close(compiled(x, counted), vit(x, mask), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_pixels_work_with_any_network() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.stem(x).mean(dim=(2, 3))

    vit, x = md.MaskedViT(Network(), "pixel", patch_size=8, fill="mean"), images()
    mask = mask_for(vit, x)
    expected = vit.backbone(md.mask_pixels(x, mask, 8, "mean"))
    assert torch.equal(vit(x, mask), expected)


def test_what_cannot_work_is_refused_at_once() -> None:
    resnet = timm.create_model("resnet10t", num_classes=0)
    with pytest.raises(ValueError, match=r"ResNet.*no patch embedding.*apply='pixel'"):
        md.MaskedViT(resnet)
    with pytest.raises(ValueError, match=r"ResNet.*cannot drop tokens.*patch_drop.*'pixel'"):
        md.MaskedViT(resnet, "drop")
    with pytest.raises(ValueError, match="no module 'tokens'"):
        md.MaskedViT(build(), patch_embed="tokens")
    with pytest.raises(ValueError, match="no grid of patches of 8x8"):
        md.MaskedViT(build(), patch_embed="blocks.0.norm1", patch_size=8)
    with pytest.raises(ValueError, match="patch_drop_rate"):
        md.MaskedViT(build(patch_drop_rate=0.3), "drop")
    with pytest.raises(ValueError, match="apply must be one of token, drop, pixel"):
        md.MaskedViT(build(), "tokens")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fill must be one of"):
        md.MaskedViT(build(), "pixel", fill="black")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="already"):
        md.MaskedViT(md.MaskedViT(build()))
    with pytest.raises(ValueError, match=r"torch\.nn\.Module"):
        md.MaskedViT("vit_tiny_patch16_224")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no class token"):
        md.MaskedViT(build("vit_base_patch16_siglip_224")).attention(images(), "class")


@every_application
def test_masks_that_do_not_fit(apply: str) -> None:
    vit, x = md.MaskedViT(build(), apply), images()  # type: ignore[arg-type]
    good = mask_for(vit, x)
    for bad, message in (
        (good.float(), "bool tensor"),
        (good[:1], r"got \(1, 16\)"),
        (good[:, :9], r"grid of 4x4.*got \(2, 9\)"),
        (good.reshape(2, 4, 4), r"got \(2, 4, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            vit(x, bad)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="33x33 pixels"):
        vit(images((33, 33)), good)
    assert torch.equal(vit(x), vit.backbone(x)), "a refused mask leaves nothing behind"


def test_unequal_rows_cannot_be_dropped() -> None:
    vit, x = md.MaskedViT(build(), "drop"), images()
    mask = mask_for(vit, x)
    mask[0] = False
    with pytest.raises(ValueError, match="same number of hidden patches"):
        vit(x, mask)


# --- In anybody's code


class WithMaskToken(nn.Module):
    """A ViT that has a mask token already, at its top as DINOv2's or further in."""

    def __init__(self, top: bool) -> None:
        super().__init__()
        self.vit = build()
        self.patch_size = PATCH
        if top:
            self.mask_token = nn.Parameter(torch.full((1, 192), 0.5))
        else:
            self.embeddings = nn.Module()
            self.embeddings.mask_token = nn.Parameter(torch.full((1, 1, 192), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.vit(x)
        return output


@pytest.mark.parametrize("top", [True, False])
def test_a_models_own_mask_token_is_used_and_no_key_is_added(top: bool) -> None:
    model, x = WithMaskToken(top), images()
    keys = set(model.state_dict())
    vit = md.MaskedViT(model, patch_embed="vit.patch_embed", image_size=(SIZE, SIZE))
    assert set(vit.state_dict()) == keys
    own = model.mask_token if top else model.embeddings.mask_token
    assert vit.mask_token is own
    vit(x, mask_for(vit, x)).sum().backward()
    assert own.grad is not None
    other = {**WithMaskToken(top).state_dict()}
    name = "mask_token" if top else "embeddings.mask_token"
    other[name] = torch.full_like(own, 2.0)
    vit.load_state_dict(other)
    assert bool((own == 2).all())
    twin = copy.deepcopy(vit)
    assert twin.mask_token is not vit.mask_token
    assert set(twin.state_dict()) == keys
    assert len(list(twin.parameters())) == len(list(model.parameters()))


def test_state_dicts_have_the_wrapped_models_keys() -> None:
    model = build()
    keys = list(model.state_dict())
    vit = md.MaskedViT(model)
    assert list(vit.state_dict()) == ["mask_token", *keys]
    assert list(md.MaskedViT(build(), "drop").state_dict()) == keys
    net = nn.ModuleDict({"backbone": vit, "head": nn.Linear(2, 2)})
    assert set(net.state_dict()) == {f"backbone.{key}" for key in ["mask_token", *keys]} | {
        "head.weight", "head.bias"
    }  # fmt: skip
    assert not any(net.load_state_dict(net.state_dict()))
    torch.manual_seed(5)
    plain = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    given = dict(plain)
    with torch.no_grad():
        assert vit.mask_token is not None
        vit.mask_token.fill_(3.0)
    vit.load_state_dict(plain)
    assert plain == given, "the given dict stays as it is"
    assert bool((vit.mask_token == 3).all()), "a mask token that is missing keeps its value"
    assert torch.equal(model.pos_embed, plain["pos_embed"])
    with pytest.raises(RuntimeError, match="Unexpected key"):
        vit.load_state_dict({**plain, "unknown": torch.zeros(1)})
    plain.pop("pos_embed")
    with pytest.raises(RuntimeError, match="Missing key"):
        vit.load_state_dict(plain)


@every_application
def test_masking_follows_the_forwards(apply: str) -> None:
    vit = md.MaskedViT(build(), apply)  # type: ignore[arg-type]
    crops = [images(n=3) for _ in range(2)] + [images((16, 16), 3) for _ in range(3)]
    masks = md.AsymmetricMaskPolicy(md.RandomMasker(0.5))(crops, vit.patch_size)
    both = torch.cat([mask for mask in masks.student if mask is not None])
    wanted = vit(torch.cat(crops[:2]), both), vit(torch.cat(crops[2:]))
    with vit.masking(masks.student_masks):
        assert torch.equal(vit(torch.cat(crops[:2])), wanted[0])
        assert torch.equal(vit(torch.cat(crops[2:])), wanted[1]), "local crops are clean"
    with vit.masking(masks.student):
        one_by_one = torch.cat([vit.embed(crop) for crop in crops])
    torch.testing.assert_close(one_by_one, torch.cat(wanted))
    with vit.masking([None, None]):
        assert torch.equal(vit(crops[0]), vit.backbone(crops[0])), "and none need come"
    if apply != "drop":
        some = [None, masks.student[1]]
        with vit.masking(some):
            joined = vit(torch.cat(crops[:2]))
        torch.testing.assert_close(joined[:3], vit.backbone(crops[0]))
        torch.testing.assert_close(joined[3:], vit(crops[1], masks.student[1]))


def test_masking_refuses_what_does_not_fit() -> None:
    vit, x = md.MaskedViT(build()), images(n=2)
    mask = mask_for(vit, x)
    with pytest.raises(ValueError, match="3 images came inside"), vit.masking([mask, mask]):
        vit(images(n=3))
    with pytest.raises(ValueError, match="left for 1 crops"), vit.masking([mask]):
        vit(torch.cat([x, x]))
    with (
        pytest.raises(RuntimeError, match="2 crops, but the forwards inside took only 1"),
        vit.masking([mask, mask]),
    ):
        vit(x)
    with pytest.raises(ZeroDivisionError), vit.masking([mask]):
        _ = 1 / 0
    with (
        pytest.raises(RuntimeError, match="running already"),
        vit.masking([mask]),
        vit.masking([mask]),
    ):
        pass
    assert torch.equal(vit(x), vit.backbone(x)), "nothing is left behind"
    for bad, message in (
        (mask, "takes a list"),
        ([mask, 3], "each entry must be"),
        ([mask, mask[:1]], "one batch size"),
    ):
        with pytest.raises(ValueError, match=message), vit.masking(bad):  # type: ignore[arg-type]
            pass


def test_a_step_without_masks_leaves_the_token_a_gradient_of_zero() -> None:
    vit, x = md.MaskedViT(build()), images()
    vit.train()
    assert torch.equal(vit(x), vit.backbone(x))
    vit(x).sum().backward()
    assert vit.mask_token is not None
    assert vit.mask_token.grad is not None
    assert not vit.mask_token.grad.any()
    vit.mask_token.grad = None
    vit.mask_token.requires_grad_(False)
    vit(x).sum().backward()
    assert vit.mask_token.grad is None


def test_attributes_and_copies() -> None:
    model = build()
    vit, x = md.MaskedViT(model), images()
    assert vit.embed_dim == 192
    assert vit.blocks is model.blocks
    with pytest.raises(AttributeError, match="unheard_of"):
        _ = vit.unheard_of
    mask = mask_for(vit, x)
    for apply in ("token", "drop", "pixel"):
        # Beit's position bias is replaced while dropping, which a copy must have of its own.
        model = copy.deepcopy(families.build("beit_base_patch16_224"))
        vit = md.MaskedViT(model, apply)  # type: ignore[arg-type]
        twin = copy.deepcopy(vit)
        assert torch.equal(twin(x, mask), vit(x, mask))
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.mul_(2)
        assert not torch.allclose(twin(x, mask), vit(x, mask)), "the copy has weights of its own"
        assert torch.equal(twin(x), twin.backbone(x))


def test_embedding_of_whatever_comes() -> None:
    x = images()
    tokens = build(global_pool="")
    assert torch.equal(md.MaskedViT(tokens, "pixel").embed(x), tokens(x)[:, 0])
    mean = build("vit_base_patch16_siglip_224", global_pool="")
    assert torch.equal(md.MaskedViT(mean, "pixel").embed(x), mean(x).mean(dim=1))
    classifier = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, patch_size=PATCH,
                                   depth=1).eval()  # fmt: skip
    before = classifier.forward_head(classifier.forward_features(x), pre_logits=True)
    assert torch.equal(md.MaskedViT(classifier, "pixel").embed(x), before)


def test_other_channels_and_patch_sizes() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=(32, 24), patch_size=(8, 4), in_chans=5, depth=1,
        num_classes=0,
    )  # fmt: skip
    for apply in ("token", "drop", "pixel"):
        vit = md.MaskedViT(model, apply)  # type: ignore[arg-type]
        x = torch.randn(2, 5, 32, 24)
        assert vit.patch_size == (8, 4)
        assert vit.grid(32, 24) == (4, 6)
        mask = md.RandomMasker(0.5)(2, (4, 6))
        hidden = ~md.mask_pixels(torch.ones_like(x), mask, (8, 4)).bool()
        torch.testing.assert_close(vit(torch.where(hidden, 9 * x, x), mask), vit(x, mask))
        vit.unwrap()


# --- Tokens


@torch.no_grad()
def test_tokens_say_which_patches_they_are() -> None:
    pixels = images()
    mask = md.RandomMasker(0.5)(len(pixels), (4, 4))
    for apply in ("token", "drop", "pixel"):
        vit = md.MaskedViT(build(), apply).eval()
        tokens = vit.tokens(pixels, mask)
        whole = vit.forward_features(pixels, mask)
        assert torch.equal(torch.cat([tokens.prefix, tokens.patches], dim=1), whole)
        torch.testing.assert_close(tokens.embedding, vit.embed(pixels, mask))
        if apply != "drop":
            assert tokens.visible is None
            continue
        assert tokens.visible is not None
        shown = torch.ones_like(mask).scatter(1, tokens.visible, False)
        assert torch.equal(shown, mask)
        assert vit.tokens(pixels).visible is None


@torch.no_grad()
def test_tokens_of_other_kinds_of_models() -> None:
    pixels = torch.randn(2, 3, 64, 64)
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=2, num_classes=0
    )
    tokens = md.MaskedViT(swin).eval().tokens(pixels, md.RandomMasker(0.5)(2, (2, 2)))
    assert (tokens.grid, tokens.patches.shape, tokens.prefix.shape[1]) == ((2, 2), (2, 4, 768), 0)
    torch.testing.assert_close(tokens.embedding, tokens.patches.mean(dim=1))

    class Dict(torch.nn.Module):
        """DINOv2's own model returns a dict."""

        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = torch.nn.Conv2d(3, 8, 16, 16)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            tokens = self.patch_embed(x).flatten(2).transpose(1, 2)
            return {
                "x_norm_clstoken": tokens.mean(dim=1),
                "x_norm_regtokens": tokens[:, :2],
                "x_norm_patchtokens": tokens,
            }

    tokens = md.MaskedViT(Dict(), "pixel", patch_size=16).tokens(pixels)
    assert (tokens.prefix.shape, tokens.patches.shape) == ((2, 3, 8), (2, 16, 8))
    pooling = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 16, 16), torch.nn.Flatten())
    with pytest.raises(ValueError, match="no tokens .* of patches"):
        md.MaskedViT(pooling, "pixel", patch_size=16).tokens(pixels)


@torch.no_grad()
@every_application
def test_intermediate_layers_are_masked(apply: str) -> None:
    pixels = images()
    mask = md.RandomMasker(0.5)(len(pixels), (4, 4))
    vit = md.MaskedViT(build(), apply).eval()  # type: ignore[arg-type]
    last, layers = vit.forward_intermediates(
        pixels, 2, mask=mask, output_fmt="NLC", return_prefix_tokens=True
    )
    assert torch.equal(last, vit.forward_features(pixels, mask))
    assert len(layers) == 2
    assert layers[0][0].shape[1] == (8 if apply == "drop" else 16)
    (layer,) = vit.get_intermediate_layers(pixels, n=1, mask=mask, norm=True)
    torch.testing.assert_close(layer, last[:, vit.prefix_tokens :])
    assert torch.equal(
        vit.get_intermediate_layers(pixels)[0], vit.backbone.get_intermediate_layers(pixels)[0]
    )


def test_a_frozen_model_stays_frozen() -> None:
    token = md.MaskedViT(build().requires_grad_(False)).mask_token
    assert token is not None
    assert not token.requires_grad


class Lists(nn.Module):
    """A model that takes a list of crops, and asserts that they are square."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 8, 8)

    def forward(self, crops: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        assert isinstance(crops, list)
        return torch.stack([self.patch_embed(crop).mean(dim=(2, 3)) for crop in crops])


def test_errors_of_the_model_are_its_own() -> None:
    with pytest.raises(ValueError, match="in a dry run.*AssertionError in forward, line [0-9]+"):
        md.MaskedViT(Lists(), patch_size=8)
    vit = md.MaskedViT(Lists(), "pixel", patch_size=8)
    assert vit([torch.zeros(1, 3, 16, 16)]).shape == (1, 1, 8)
    with pytest.raises(RuntimeError, match="expected input"):
        vit([torch.zeros(1, 4, 16, 16)])
