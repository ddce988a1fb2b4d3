"""Fresh backbones by name, from timm."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from maskdistill.masking.mask import PatchMask, patch_grid
from maskdistill.models.masked_vit import MaskedViT
from maskdistill.models.probing import SIZE_ARGUMENTS, empty_image


def create_backbone(
    name: str,
    image_size: int,
    patch_size: int,
    *,
    local_size: int | None = None,
    depth: int | None = None,
    drop_path: float = 0.0,
) -> nn.Module:
    """Build a randomly initialised timm model that takes the crops of DINO and gives embeddings.

    >>> create_backbone("vit_tiny_patch16_224", 64, 8)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 192])

    The class token starts as a truncated normal of 0.02, as in facebookresearch/dino (timm's starts
    at 1e-6).

    Args:
        name: of a timm model.
        image_size: pixels of a side of the images that the position embedding is made for.
        patch_size: pixels of a side of a patch of the stem.
        local_size: pixels of a side of the smaller crops that it must take as well; None is half
            the image, in whole patches.
        depth: number of blocks; None is the model's own.
        drop_path: greatest rate of stochastic depth, rising linearly over the blocks.

    Raises:
        ValueError: timm knows no such model, or it does not take these settings.
    """
    import timm

    arguments = backbone_arguments(name, image_size, patch_size, depth, local_size)
    try:
        model: nn.Module = timm.create_model(**arguments, drop_path_rate=drop_path)
    except TypeError as error:
        if drop_path:
            raise ValueError(f"{name} has no stochastic depth; set drop_path=0.") from error
        model = timm.create_model(**arguments)
    token = getattr(model, "cls_token", None)
    if isinstance(token, nn.Parameter):
        nn.init.trunc_normal_(token, std=0.02)
    return model.train()


def backbone_arguments(
    name: str,
    image_size: int,
    patch_size: int,
    depth: int | None = None,
    local_size: int | None = None,
) -> dict[str, Any]:
    """Return the arguments with which ``timm.create_model`` builds a backbone for training.

    >>> backbone_arguments("vit_tiny_patch16_224", 64, 8)["img_size"]
    64

    Families differ in what lets them take crops of several sizes (``dynamic_img_size``,
    ``strict_img_size``, or nothing at all); each is tried on the meta device, which costs no
    memory, and the first that works is taken.

    Raises:
        ValueError: timm knows no such model, or it does not take these settings.
    """
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"timm knows no model {name!r}.{hint} timm.list_models() lists them all.")
    wanted: dict[str, Any] = {"img_size": image_size, "patch_size": patch_size}
    if depth is not None:
        wanted["depth"] = depth
    error: Exception | None = None
    for arguments in _variants(name, wanted):
        try:
            _try(dict(arguments), image_size, local_size, patch_size)
        except (TypeError, AssertionError, RuntimeError, ValueError) as problem:
            # The most telling one: a family that took the arguments, but not the images.
            if error is None or (isinstance(problem, ValueError) > isinstance(error, ValueError)):
                error = problem
            continue
        return arguments
    small = "smaller ones" if local_size is None else f"{local_size}x{local_size}"
    raise ValueError(
        f"{name} cannot be built for images of {image_size}x{image_size} and {small} in patches of "
        f"{patch_size}: {str(error).rstrip('.')}. Models of timm's VisionTransformer and Eva "
        "families can; maskdistill.models.supported_models() says what each takes."
    ) from error


def _variants(name: str, wanted: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for sizes in SIZE_ARGUMENTS:
        yield {"model_name": name, **wanted, "num_classes": 0, **sizes}
    for left_out in ({"patch_size"}, {"img_size"}, {"img_size", "patch_size"}):
        kept = {key: value for key, value in wanted.items() if key not in left_out}
        for sizes in SIZE_ARGUMENTS:
            yield {"model_name": name, **kept, "num_classes": 0, **sizes}


def _try(
    arguments: dict[str, Any], image_size: int, local_size: int | None, patch_size: int
) -> None:
    model = build_on_meta(arguments.pop("model_name"), **arguments).eval()
    with torch.no_grad():
        vit = MaskedViT(model, "pixel", image_size=(image_size, image_size))
        if "patch_size" not in arguments and patch_size not in _strides(vit):
            raise ValueError(f"its patches are of {vit.patch_size[0]}x{vit.patch_size[1]} pixels.")
        patch = max(vit.patch_size)
        small = local_size or max(1, round(image_size / patch / 2)) * patch
        for size in (image_size, small):
            patch_grid((size, size), vit.patch_size)
            embedding = vit(empty_image(model, (size, size)))
            if embedding.ndim != 2:
                raise ValueError(
                    f"it gives {tuple(embedding.shape)} instead of one embedding per image (B, D)."
                )


def build_on_meta(name: str, **arguments: Any) -> nn.Module:
    """Build a timm model without memory for its weights, where this timm can."""
    import timm

    model: nn.Module
    try:
        with torch.device("meta"):
            model = timm.create_model(name, **arguments)
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        with torch.random.fork_rng(devices=[]):  # an older timm reads numbers while it builds
            model = timm.create_model(name, **arguments)
    return model


def _strides(vit: MaskedViT) -> set[int]:
    """Return the pixels per token that a model works with, from its stem to its last stage."""
    info = getattr(vit.backbone, "feature_info", None) or ()
    return {*vit.patch_size, *(stage.get("reduction", 0) for stage in info)}


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
    >>> vit, = md.models.supported_models("vit_tiny_patch16_224")
    >>> vit.token, vit.drop, vit.attention, vit.sizes_by
    (True, True, 'class', 'dynamic_img_size')
    >>> swin, = md.models.supported_models("swin_tiny_patch4_window7_224")
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
            embedding = vit.embed(image, PatchMask(mask, mask.shape[1] // 2))
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
