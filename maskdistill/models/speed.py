"""What makes a training step faster and leaves its mathematics alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from maskdistill.models.probing import has_class_token
from maskdistill.models.tokens import Request


class LastBlock:
    """Computes of the last block only what the class token needs.

    After the last attention every token goes its own way, and all but the class token go nowhere
    where that is the embedding: their projection and MLP, three quarters of the block, are left
    out. What stands in their rows afterwards is meaningless.

    Args:
        model: one that ``suits``.
        request: says whether the running forward is one of the embedding alone.
    """

    def __init__(self, model: nn.Module, request: Request) -> None:
        self.request = request
        block: Any = model.blocks[-1]  # type: ignore[index]
        # Everything else broadcasts: the rest of the block adds a row to all rows.
        self._hooks = [
            module.register_forward_pre_hook(self._trim)
            for module in (block.attn.proj, block.norm2)
        ]

    @staticmethod
    def suits(model: Any) -> bool:
        """Say whether a model is known to take its class token from such a block."""
        blocks = getattr(model, "blocks", None)
        if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or not len(blocks):
            return False
        block: Any = blocks[-1]
        return (
            (_home(model), _home(block)) in _KNOWN
            and has_class_token(model)
            and getattr(model, "global_pool", None) in ("token", "")
            and getattr(model, "attn_pool", None) is None
            and isinstance(getattr(block.attn, "proj", None), nn.Linear)
        )

    def _trim(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (inputs[0][:, :1],) if self.request.class_only else None

    def remove(self) -> None:
        """Take the hooks away again."""
        for hook in self._hooks:
            hook.remove()


def _home(module: object) -> str:
    kind = type(module)
    return f"{kind.__module__}.{kind.__name__}"


# Exact classes: a subclass may use its other tokens, as the distilled DeiT does.
_KNOWN = {
    ("timm.models.vision_transformer.VisionTransformer", "timm.models.vision_transformer.Block"),
    ("timm.models.eva.Eva", "timm.models.eva.EvaBlock"),
}


def unfuse_attention(model: nn.Module) -> None:
    """Let timm's attention form its weights, where fused attention is the slower one.

    On CPUs the backward pass of fused attention in bfloat16 takes two to ten times as long as two
    matrix products and a softmax at the sizes of ViTs; in float32 the two are even at 200 tokens,
    and fused attention the slower one below.
    """
    module: Any
    for module in model.modules():
        if getattr(module, "fused_attn", False) is True:
            module.fused_attn = False


def compile_blocks(model: Any, **how: Any) -> None:
    """Compile each block of a model for itself, in place; the keys of its state stay.

    Blocks of one kind share their code, so this takes a fraction of the time that compiling the
    whole model does. Drop path is replaced by one that keeps its probability in a tensor: blocks
    that differ in a plain number are compiled one by one, and after eight torch gives up. A block
    with hooks inside, such as the last one, stays as it is: torch does not look at hooks when it
    decides whether code may be shared.

    Raises:
        ValueError: a model without a list of blocks.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)):
        raise ValueError(
            f"{type(model).__name__} has no list of blocks to compile. Leave out --compile."
        )
    for block in blocks:
        if any(part._forward_hooks or part._forward_pre_hooks for part in block.modules()):
            continue
        for name in _DROP_PATHS:
            drop: Any = getattr(block, name, None)
            if type(drop).__name__ in ("DropPath", "Identity"):
                setattr(block, name, _SharedDropPath(drop, next(block.parameters())))
        block.compile(**how)


_DROP_PATHS = ("drop_path", "drop_path1", "drop_path2")


class _SharedDropPath(nn.Module):
    """Drop path that does not tell a block from another: timm's own, or none.

    Args:
        own: timm's ``DropPath``, or the ``Identity`` that stands for a probability of 0.
        like: a tensor on the block's device.
    """

    keep: Tensor

    def __init__(self, own: nn.Module, like: Tensor) -> None:
        super().__init__()
        self.train(own.training)
        probability = float(getattr(own, "drop_prob", None) or 0.0)
        self.scaled = bool(getattr(own, "scale_by_keep", True))
        keep = torch.tensor(1 - probability, dtype=torch.float32, device=like.device)
        self.register_buffer("keep", keep, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Leave out the residual of some samples, ``(B, ...)``, while training."""
        if not self.training:
            return x
        drawn = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device)
        kept = (drawn < self.keep).to(x.dtype)
        return x * (kept / self.keep.to(x.dtype)) if self.scaled else x * kept
