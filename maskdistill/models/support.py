"""What each model of timm takes, found by running it on the meta device."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from maskdistill.models.adapter import MaskedViT
from maskdistill.models.create import build_on_meta
from maskdistill.models.probing import empty_image
from maskdistill.models.sizes import SIZE_ARGUMENTS

# timm's modules with transformers in them; its other models are convolutional networks.
FAMILIES = (
    "beit", "cait", "coat", "convit", "crossvit", "davit", "deepseek_vit", "deit",
    "efficientformer", "efficientformer_v2", "efficientvit_mit", "efficientvit_msra", "eva",
    "gcvit", "gemma4_vit", "hiera", "hieradet_sam2", "levit", "maxxvit", "metaformer",
    "mobilevit", "mvitv2", "naflexvit", "nest", "nextvit", "pit", "pvt_v2", "qwen3_vit",
    "swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr", "tiny_vit", "tnt",
    "twins", "visformer", "vision_transformer", "vision_transformer_hybrid",
    "vision_transformer_relpos", "vision_transformer_sam", "vitamin", "volo", "xcit",
)  # fmt: skip


@dataclass(frozen=True)
class ModelSupport:
    """What one model of timm takes.

    Attributes:
        name: timm's name of the model.
        family: timm's module, such as ``"swin_transformer"``.
        image_size: (height, width) that it is built for.
        patch_size: pixels per patch of the mask, (height, width).
        token: whether hidden patches can be replaced by a mask token.
        drop: whether tokens can be dropped.
        attention: whose attention is recorded: ``"class"``, ``"pool"`` or ``"mean"``; None if none.
        sizes: whether it takes images of another size; ``sizes_by`` says how.
        sizes_by: the argument of ``timm.create_model`` that lets it, ``""`` where none is needed.
        reasons: for what it does not take, the sentence with which it is refused.
    """

    name: str
    family: str
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    token: bool
    drop: bool
    attention: str | None
    sizes: bool
    sizes_by: str
    reasons: dict[str, str] = field(default_factory=dict, compare=False, repr=False)


def supported_models(pattern: str = "*") -> list[ModelSupport]:
    """Return what each transformer of timm takes, by running it on the meta device.

    >>> import maskdistill as md
    >>> vit, = md.supported_models("vit_tiny_patch16_224")
    >>> vit.token, vit.drop, vit.attention, vit.sizes_by
    (True, True, 'class', 'dynamic_img_size')
    >>> swin, = md.supported_models("swin_tiny_patch4_window7_224")
    >>> swin.token, swin.drop, swin.patch_size
    (True, False, (32, 32))
    >>> print(swin.reasons["drop"])
    SwinTransformer (swin_tiny_patch4_window7_224) cannot drop tokens: its attention runs in windows, which need the whole grid of tokens. Use apply='token', or 'pixel'.

    Pixels can be masked in front of every model. Nothing is downloaded and no weights are made, but
    each model runs a few times: about a second each, and there are some 600.

    Args:
        pattern: which names, as in a shell (``"vit_*"``).

    Raises:
        ValueError: no transformer of timm matches.
    """  # noqa: E501
    names = transformer_names(pattern)
    if not names:
        raise ValueError(
            f"no transformer of timm matches {pattern!r}; timm.list_models({pattern!r}) lists all "
            "models of that name."
        )
    return [support_of(name) for name in names]


def transformer_names(pattern: str = "*") -> list[str]:
    """Return timm's names of its transformers that match a pattern."""
    import timm

    return [
        name
        for family in FAMILIES
        for name in timm.list_models(module=family)
        if fnmatch.fnmatchcase(name, pattern)
    ]


def family_of(name: str) -> str:
    """Return timm's module of a transformer."""
    from timm.models import is_model_in_modules

    return next(family for family in FAMILIES if is_model_in_modules(name, [family]))


def support_of(name: str) -> ModelSupport:
    """Return what one model of timm takes. Only refusals of ours count as such."""
    reasons: dict[str, str] = {}
    model = _build(name)
    pixel = MaskedViT(model, "pixel")
    patch = pixel.patch_size
    image = empty_image(model, pixel._built_for or (224, 224))
    size = (image.shape[2], image.shape[3])
    _check_embedding(pixel.embed(image), name)
    attention = None
    try:
        pixel.attention(image)
        attention = next(iter(pixel._attention.values())).query
    except ValueError as error:
        reasons["attention"] = str(error)
    pixel.unwrap()
    token = _masked(model, "token", image, reasons)
    drop = _masked(model, "drop", image, reasons)
    other = (_smaller(size[0], patch[0]), _smaller(size[1], patch[1]))
    sizes_by = None
    for arguments in SIZE_ARGUMENTS:
        try:
            vit = MaskedViT(_build(name, **arguments), "token" if token else "pixel")
        except TypeError:  # an argument that this family does not know
            continue
        small = empty_image(vit.backbone, other)
        try:
            embedding = vit.embed(small, _mask(vit, small))
        except ValueError as error:
            reasons["sizes"] = str(error)
            continue
        _check_embedding(embedding, name)
        sizes_by = next(iter(arguments), "")
        reasons.pop("sizes", None)
        break
    return ModelSupport(
        name=name,
        family=family_of(name),
        image_size=size,
        patch_size=patch,
        token=token,
        drop=drop,
        attention=attention,
        sizes=sizes_by is not None,
        sizes_by=sizes_by or "",
        reasons=reasons,
    )


def _smaller(pixels: int, patch: int) -> int:
    """Return the side of a local crop: 96 for 224."""
    return max(2, round(0.43 * pixels / patch)) * patch


def _build(name: str, **arguments: Any) -> nn.Module:
    return build_on_meta(name, num_classes=0, **arguments).eval()


def _masked(model: nn.Module, apply: Any, image: Tensor, reasons: dict[str, str]) -> bool:
    try:
        vit = MaskedViT(model, apply)
        mask = _mask(vit, image)
        with torch.no_grad():
            embedding = vit.embed(image, mask, visible=mask.shape[1] - mask.shape[1] // 2)
    except ValueError as error:
        reasons[apply] = str(error)
        return False
    vit.unwrap()
    _check_embedding(embedding, vit.name)
    return True


def _mask(vit: MaskedViT, image: Tensor) -> Tensor:
    rows, columns = vit.grid(image.shape[2], image.shape[3])
    return torch.zeros(len(image), rows * columns, dtype=torch.bool, device=image.device)


def _check_embedding(embedding: Tensor, name: str) -> None:
    if embedding.ndim != 2:
        raise ValueError(f"{name} gives an embedding {tuple(embedding.shape)}, not (B, D).")
