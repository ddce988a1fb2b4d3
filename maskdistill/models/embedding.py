"""One embedding per image, of whatever a model returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from maskdistill.models.probing import has_class_token, model_name, prefix_tokens


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
