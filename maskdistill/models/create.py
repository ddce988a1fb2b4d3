"""Fresh backbones by name, from timm."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn


def backbone_arguments(
    name: str, image_size: int, patch_size: int, depth: int | None = None
) -> dict[str, Any]:
    """Return the arguments with which ``timm.create_model`` builds a backbone for training.

    >>> backbone_arguments("vit_tiny_patch16_224", 64, 8)["img_size"]
    64
    """
    arguments: dict[str, Any] = {
        "model_name": name,
        "img_size": image_size,
        "patch_size": patch_size,
        "num_classes": 0,
        "dynamic_img_size": True,
    }
    return arguments if depth is None else {**arguments, "depth": depth}


def create_backbone(
    name: str,
    image_size: int,
    patch_size: int,
    *,
    depth: int | None = None,
    drop_path: float = 0.0,
) -> nn.Module:
    """Build a randomly initialised timm ViT that takes crops of any size and gives embeddings.

    >>> create_backbone("vit_tiny_patch16_224", 64, 8)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 192])

    The class token starts as a truncated normal of 0.02, as in facebookresearch/dino (timm's starts
    at 1e-6).

    Args:
        name: of a timm model.
        image_size: pixels of a side of the images that the position embedding is made for.
        patch_size: pixels of a side of a patch.
        depth: number of blocks; None is the model's own.
        drop_path: greatest rate of stochastic depth, rising linearly over the blocks.

    Raises:
        ValueError: timm knows no such model, or it does not take these settings.
    """
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"timm knows no model {name!r}.{hint} timm.list_models() lists them all.")
    arguments = backbone_arguments(name, image_size, patch_size, depth)
    try:
        model = timm.create_model(**arguments, drop_path_rate=drop_path)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(
            f"{name} cannot be built as a ViT with img_size={image_size}, patch_size={patch_size} "
            f"and dynamic_img_size=True: {error}. Choose a model of timm's VisionTransformer or "
            "Eva family."
        ) from error
    token = getattr(model, "cls_token", None)
    if isinstance(token, nn.Parameter):
        nn.init.trunc_normal_(token, std=0.02)
    with torch.no_grad():
        embedding = model.eval()(torch.zeros(1, 3, image_size, image_size))
    model.train()
    if embedding.ndim != 2:
        raise ValueError(
            f"{name} gives {tuple(embedding.shape)} instead of one embedding per image (B, D); "
            "choose a model that pools its tokens."
        )
    return model
