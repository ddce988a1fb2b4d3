"""What the last attention looks at, recorded while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maskdistill.models.probing import has_class_token, model_name, prefix_tokens
from maskdistill.models.tokens import Request

Query: TypeAlias = Literal["class", "pool", "register", "mean"]
"""Whose attention: the class token's; the query's of an attention pooling; the mean over the
register tokens; or the mean over all patches."""
QUERIES: tuple[str, ...] = get_args(Query)

# Attention of channels to channels: DaViT, EdgeNeXt, XCiT.
_OVER_CHANNELS = ("ChannelAttention", "CrossCovarianceAttn", "XCA")
# Blocks in which a class token alone asks, after the others: CaiT, XCiT, VOLO.
_CLASS_BLOCKS = ("blocks_token_only", "cls_attn_blocks", "post_network")


class AttentionRecord:
    """Holds what the last recorded forward attended to."""

    def __init__(self) -> None:
        self._attention: Tensor | None = None

    @property
    def attention(self) -> Tensor:
        """``(B, heads, N)`` attention to the patches.

        Raises:
            RuntimeError: no forward has run inside the recording context.
        """
        if self._attention is None:
            raise RuntimeError(
                "nothing was recorded: run the model inside the record_attention() context."
            )
        return self._attention


class LastAttention:
    """Finds a model's last attention and records what it looks at, on request.

    Fused attention never forms its weights. Where timm passes the softmax through ``attn_drop``, a
    hook reads it there, whatever the family does to queries and keys before (rotary embedding,
    normalisation, biases), and the last block alone runs unfused while recording. Elsewhere the
    calls of softmax or of fused attention inside that one module are looked at.

    Args:
        model: the wrapped model.
        request: says how many patches the running forward sees.
        query: whose attention; None takes the class token's where there is one, else that of an
            attention pooling, else the mean over the patches.

    Raises:
        ValueError: no such query, or no attention to read.
    """

    def __init__(self, model: nn.Module, request: Request, query: Query | None = None) -> None:
        self.name = model_name(model)
        self.request = request
        self.query, scope = _scope(model, query, self.name)
        self.has_class_token = has_class_token(model)
        self._prefixes = {0, 1, prefix_tokens(model)}
        self._module: Any = _attention_in(scope, model, self.query)
        if self._module is None:
            raise ValueError(
                f"{self.name}: no attention was found, so it cannot be recorded. Choose a "
                "transformer, or a masker that needs no attention."
            )
        self._records: list[AttentionRecord] = []
        drop = getattr(self._module, "attn_drop", None)
        if isinstance(drop, nn.Module):
            self._hooks = [drop.register_forward_pre_hook(self._read_dropout)]
        else:
            self._hooks = [
                self._module.register_forward_pre_hook(self._enter),
                self._module.register_forward_hook(self._leave, always_call=True),
            ]
        self._spy: _Spy | None = None

    def remove(self) -> None:
        """Take the hooks away again."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def recording(self) -> Iterator[AttentionRecord]:
        """Yield a record that every forward inside the context overwrites."""
        record = AttentionRecord()
        fused = getattr(self._module, "fused_attn", None)
        if fused:
            self._module.fused_attn = False
        self._records.append(record)
        self.request.recorders.append(self)
        try:
            yield record
        finally:
            self._stop_spying()  # an interrupt may have skipped it
            self.request.recorders.remove(self)
            self._records.remove(record)
            if fused:
                self._module.fused_attn = fused

    def check_recorded(self) -> None:
        """Refuse a forward in which no attention weights appeared.

        Raises:
            ValueError: attention without a softmax over patches (factorised or linear).
        """
        if self._records and self._records[-1]._attention is None:
            raise ValueError(
                f"{self.name}: its last attention has no softmax over patches that could be seen. "
                "Choose a plain ViT, or a masker that needs no attention."
            )

    def _keep(self, weights: Tensor) -> None:
        attention = self._of_query(weights)
        for record in self._records:
            record._attention = attention

    def _read_dropout(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # Before dropout: (B, heads, queries, keys), rows that sum to 1.
        if self._records:
            self._keep(inputs[0])

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if self._records:
            self._spy = _Spy()
            self._spy.__enter__()  # type: ignore[no-untyped-call]

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        seen = self._stop_spying()
        if self._records and seen:
            self._keep(seen[-1])

    def _stop_spying(self) -> list[Tensor]:
        spy, self._spy = self._spy, None
        if spy is None:
            return []
        spy.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return spy.seen

    def _of_query(self, weights: Tensor) -> Tensor:
        """Return (B, heads, N) of softmax weights (B, heads, queries, keys)."""
        patches, batch = self.request.patches, self.request.batch
        if not batch:
            raise ValueError(
                f"{self.name}: while attention is recorded, call the MaskedViT itself and not the "
                "model that it wraps."
            )
        if weights.ndim == 3 and weights.shape[0] % batch == 0:  # SAM: heads along the batch
            weights = weights.unflatten(0, (batch, -1))
        if weights.ndim == 5 and weights.shape[2] == 1:  # NesT: one block at the end
            weights = weights.squeeze(2)
        rows, columns = self.request.per_patch
        prefix = weights.shape[-1] - patches
        if prefix not in self._prefixes:  # a mask of patches coarser than the model's
            prefix = weights.shape[-1] - patches * rows * columns
        fits = weights.ndim == 4 and weights.shape[0] == batch and prefix in self._prefixes
        if self.query in ("mean", "register"):
            fits = fits and weights.shape[-2] == weights.shape[-1]
        if not fits:
            raise ValueError(
                f"{self.name}: its last attention has the weights {tuple(weights.shape)} for "
                f"{batch} images of {patches} patches, so it looks at windows, pooled tokens or "
                "channels rather than at all patches. Choose a plain ViT, or a masker that needs "
                "no attention."
            )
        attention = self._rows(weights, prefix)[..., prefix:]
        if attention.shape[-1] != patches:  # a coarser patch gets the sum of its tokens
            grid = (self.request.grid[0], rows, self.request.grid[1], columns)
            attention = attention.unflatten(-1, grid).sum(dim=(-3, -1)).flatten(-2)
        return attention

    def _rows(self, weights: Tensor, prefix: int) -> Tensor:
        """Return (B, heads, keys): the query's row, or the mean over its rows."""
        if self.query == "class":
            return weights[:, :, 0]
        if self.query == "pool":
            return weights.mean(dim=2)
        if self.query == "mean":
            return weights[:, :, prefix:].mean(dim=2)
        first = 1 if self.has_class_token else 0
        if prefix <= first:
            raise ValueError(
                f"{self.name} has no register tokens. Use query='class', 'mean' or None."
            )
        return weights[:, :, first:prefix].mean(dim=2)


def _scope(model: nn.Module, query: Query | None, name: str) -> tuple[Query, nn.Module]:
    """Return whose attention to take, and the part of the model that has it."""
    if query is not None and query not in QUERIES:
        raise ValueError(f"query must be one of {', '.join(QUERIES)}, or None; got {query!r}.")
    pool = getattr(model, "attn_pool", None)
    class_token = has_class_token(model)
    if query is None:
        query = "class" if class_token else "pool" if isinstance(pool, nn.Module) else "mean"
    if query == "pool":
        if not isinstance(pool, nn.Module):
            raise ValueError(f"{name} has no attention pooling. Use query=None.")
        return query, pool
    if query == "class":
        if not class_token:
            raise ValueError(
                f"{name} has no class token, so it has no class-token attention. Use query=None, "
                "which takes the attention pooling's or the mean over the patches."
            )
        for attribute in _CLASS_BLOCKS:
            if isinstance(getattr(model, attribute, None), nn.Module):
                return query, getattr(model, attribute)
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, (nn.Sequential, nn.ModuleList)) and len(blocks):
        return query, blocks[-1]
    return query, model


def _attention_in(scope: nn.Module, model: nn.Module, query: Query) -> nn.Module | None:
    """Return the last attention in the scope: one with an ``attn_drop``, or called an attention."""
    pool = getattr(model, "attn_pool", None)
    pooling = set(pool.modules()) if isinstance(pool, nn.Module) and query != "pool" else set()
    found = None
    for module in scope.modules():
        kind = type(module).__name__
        if kind.startswith(_OVER_CHANNELS):
            continue
        named = "Attention" in kind or "Attn" in kind
        if (named or isinstance(getattr(module, "attn_drop", None), nn.Module)) and (
            module not in pooling
        ):
            found = module
    return found


class _Spy(TorchFunctionMode):
    """Sees the attention weights of whatever runs inside: softmax, or fused attention."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        output = func(*args, **kwargs)
        if func in (torch.Tensor.softmax, torch.softmax, F.softmax):
            self.seen.append(output)
        elif func is F.scaled_dot_product_attention:
            self.seen.append(_weights(*args, **kwargs))
        return output


def _weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the weights that fused attention does not form."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * scale) @ key.transpose(-2, -1)
    if attn_mask is not None:
        mask = attn_mask
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    return scores.softmax(dim=-1)
