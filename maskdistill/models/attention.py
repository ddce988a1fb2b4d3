"""The class token's attention in the last block, recorded while the model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class AttentionRecord:
    """Holds what the last recorded forward attended to."""

    def __init__(self) -> None:
        self._attention: Tensor | None = None

    @property
    def attention(self) -> Tensor:
        """``(B, heads, N)`` attention from the class token to the patches.

        Raises:
            RuntimeError: no forward has run inside the recording context.
        """
        if self._attention is None:
            raise RuntimeError(
                "nothing was recorded: run the model inside the record_attention() context."
            )
        return self._attention


class LastAttention:
    """Finds a model's last attention and records its class-token row on request.

    Fused attention never forms its weights, so the last block alone runs unfused while recording;
    there timm passes the softmax through ``attn_drop``, where a hook reads it, whatever the family
    does to queries and keys before (rotary embedding, normalisation, biases).

    Args:
        model: a ViT with a class token and ``attn_drop`` in its attention.
        name: what to call it in errors.
        prefix_tokens: class and register tokens before the patches; the class token is the first.

    Raises:
        ValueError: no class token, or no attention to read.
    """

    def __init__(self, model: nn.Module, name: str, prefix_tokens: int) -> None:
        if getattr(model, "cls_token", None) is None:
            raise ValueError(
                f"{name} has no class token, so it has no class-token attention. Choose a model "
                "with one, or a masker that needs no attention."
            )
        blocks = getattr(model, "blocks", None)
        last: nn.Module = (
            blocks[-1] if isinstance(blocks, (nn.Sequential, nn.ModuleList)) else model
        )
        attentions: list[Any] = [
            m for m in last.modules() if isinstance(getattr(m, "attn_drop", None), nn.Module)
        ]
        if not attentions:
            raise ValueError(
                f"{name}: no attention module with an attn_drop was found, so its attention "
                "cannot be recorded. timm's VisionTransformer and Eva families have one."
            )
        self._module: Any = attentions[-1]
        self._prefix = prefix_tokens
        self._record: AttentionRecord | None = None
        self._hook: Any = self._module.attn_drop.register_forward_pre_hook(self._read)

    def remove(self) -> None:
        """Take the hook away again."""
        self._hook.remove()

    @contextmanager
    def recording(self) -> Iterator[AttentionRecord]:
        """Yield a record that every forward inside the context overwrites."""
        fused = getattr(self._module, "fused_attn", False)
        self._record = record = AttentionRecord()
        self._module.fused_attn = False
        try:
            yield record
        finally:
            self._module.fused_attn = fused
            self._record = None

    def _read(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # Before dropout: (B, heads, queries, keys), rows that sum to 1.
        if self._record is not None:
            self._record._attention = inputs[0][:, :, 0, self._prefix :]
