"""Fresh backbones by name, from timm."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from maskdistill.applying import patch_grid
from maskdistill.models.adapter import MaskedViT
from maskdistill.models.probing import empty_image
from maskdistill.models.sizes import SIZE_ARGUMENTS


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
        "families can; maskdistill.supported_models() says what each takes."
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
