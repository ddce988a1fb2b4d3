"""What a network returns, of whatever kind: one embedding per image, and tokens of its patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskdistill.models.probing import has_class_token, model_name, prefix_tokens


class Tokens(NamedTuple):
    """What a network makes of images, token by token.

    Attributes:
        embedding: ``(B, D)``, as ``MaskedViT.embed`` gives it.
        prefix: ``(B, P, D)``, class and register tokens; P may be 0.
        patches: ``(B, N, D)``, row-major; only the visible ones, ``(B, M, D)``, where tokens were
            dropped.
        visible: ``(B, M)`` int64, which patches those are, ascending; None where none was dropped.
        grid: rows and columns of a map of tokens; None of a plain sequence.
    """

    embedding: Tensor
    prefix: Tensor
    patches: Tensor
    visible: Tensor | None = None
    grid: tuple[int, int] | None = None


def split_tokens(output: Any, model: Any) -> tuple[Tensor, Tensor, tuple[int, int] | None]:
    """Return prefix tokens, patch tokens and, of a map, the grid, of a model's features.

    Raises:
        ValueError: features without tokens of patches.
    """
    if isinstance(output, Mapping):
        if output.get("x_norm_patchtokens") is not None:  # DINOv2's own
            named = [output.get("x_norm_clstoken"), output.get("x_norm_regtokens")]
            prefix = [t[:, None] if t.ndim == 2 else t for t in named if t is not None]
            patches: Tensor = output["x_norm_patchtokens"]
            return torch.cat([patches[:, :0], *prefix], dim=1), patches, None
        if output.get("last_hidden_state") is not None:
            return split_tokens(output["last_hidden_state"], model)
    if isinstance(output, (tuple, list)) and output:
        return split_tokens(output[0], model)
    if isinstance(output, Tensor) and output.ndim == 3:
        count = prefix_tokens(model)
        return output[:, :count], output[:, count:], None
    if isinstance(output, Tensor) and output.ndim == 4:
        width = getattr(model, "num_features", None)
        if output.shape[1] == width or output.shape[-1] != width:
            output = output.permute(0, 2, 3, 1)
        flat = output.flatten(1, 2)
        return flat[:, :0], flat, (output.shape[1], output.shape[2])
    came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ValueError(
        f"{model_name(model)} returns {came}, in which there are no tokens (B, N, D) of patches. "
        "Build it without pooling, or use a loss that needs the embedding alone."
    )


def pooled(output: Any, model: Any) -> Tensor:
    """Return ``(B, D)`` of a model's output: what DINO takes as the image's embedding.

    An output that is one vector per image stays as it is: timm has pooled it, by class token, mean
    or attention. Of tokens ``(B, N, D)`` it is the class token, where there is one, else the mean
    of the patches; of a map, the mean over its places; of several outputs, the first (a Hugging
    Face ``last_hidden_state``, the class token of a distilled DeiT, ``x_norm_clstoken`` of DINOv2).

    Raises:
        ValueError: an output in which there is no embedding.
    """
    if isinstance(output, Mapping):
        for key in ("x_norm_clstoken", "last_hidden_state"):
            if output.get(key) is not None:
                return pooled(output[key], model)
    if isinstance(output, (tuple, list)) and output:
        return pooled(output[0], model)
    if isinstance(output, Tensor):
        if output.ndim == 2:
            return output
        if output.ndim == 3:
            prefix = prefix_tokens(model)
            return output[:, 0] if has_class_token(model) else output[:, prefix:].mean(dim=1)
        if output.ndim == 4:
            width = getattr(model, "num_features", None)
            channels_first = output.shape[1] == width or output.shape[-1] != width
            return output.mean(dim=(2, 3) if channels_first else (1, 2))
    came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ValueError(
        f"{model_name(model)} returns {came}, in which there is no embedding (B, D) of an image. "
        "Build it with pooling, or without its head."
    )
