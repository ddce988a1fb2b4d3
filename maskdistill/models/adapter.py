"""MaskedViT: masks in, features out, around a ViT that stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from maskdistill.applying import (
    APPLICATIONS,
    FILLS,
    Application,
    Fill,
    check_mask,
    drop_tokens,
    mask_pixels,
    patch_grid,
    visible_indices,
)
from maskdistill.models.attention import AttentionRecord, LastAttention
from maskdistill.models.layouts import Layout, find_layout


class MaskedViT(nn.Module):
    """Wraps a ViT so that it takes a mask; without one it is bit-equal to the wrapped model.

    >>> import timm, torch, maskdistill as md
    >>> vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True)
    >>> vit = md.MaskedViT(vit, apply="token")
    >>> mask = md.RandomMasker(0.3)(8, vit.grid(224, 224))
    >>> vit(torch.zeros(8, 3, 224, 224), mask).shape
    torch.Size([8, 192])

    The weights and the state-dict keys of the wrapped model are never touched: it is hooked, not
    rebuilt, and lives on as ``.backbone``. ``unwrap()`` takes the hooks away again.

    Args:
        vit: a timm ``VisionTransformer`` or ``Eva``, or another ViT with one patch embedding.
        apply: ``"token"`` replaces hidden patch embeddings by a learned token (``mask_token``,
            zeros at first, as in iBOT), before the position embedding; ``"drop"`` removes the
            tokens, after it; ``"pixel"`` fills the patches in the image, in front of any network.
        fill: for ``"pixel"``: ``"zero"``, ``"mean"``, ``"noise"`` or ``"blur"``.
        patch_embed: dotted path of the module whose output are the patch tokens.
        patch_size: pixels per patch, where the model does not say (``patch_embed.patch_size``).
        image_size: (height, width) of the dry run that finds the layout, where the model does not
            say.

    Attributes:
        backbone: the wrapped model.
        mask_token: ``(1, 1, D)`` parameter with ``apply="token"``, else None.
        patch_size: pixels per patch, (height, width).
        prefix_tokens: class and register tokens before the patches.

    Raises:
        ValueError: what cannot work, at once and in a sentence: no patch embedding, an unknown
            layout, no slot to drop tokens, an unknown ``apply`` or ``fill``.
    """

    def __init__(
        self,
        vit: nn.Module,
        apply: Application = "token",
        *,
        fill: Fill = "zero",
        patch_embed: str = "patch_embed",
        patch_size: int | tuple[int, int] | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(vit, nn.Module):
            raise ValueError(
                f"vit must be a torch.nn.Module, for example timm.create_model(...); got {vit!r}."
            )
        if isinstance(vit, MaskedViT):
            raise ValueError("vit is a MaskedViT already; wrap its .backbone instead.")
        _check_choice("apply", apply, APPLICATIONS)
        _check_choice("fill", fill, FILLS)
        self.backbone = vit
        self.apply_mask = apply
        self.fill: Fill = fill
        self.name = _model_name(vit)
        self.patch_size = _pair(patch_size or self._find_patch_size(patch_embed))
        self.prefix_tokens = int(getattr(vit, "num_prefix_tokens", 1))
        self.mask_token: nn.Parameter | None = None
        self._request = _Request()
        self._attention: LastAttention | None = None
        self._hook: Any = None
        self._old_slot: list[Any] = []  # a list, so that it is not registered as a child
        if apply == "token":
            self._hook_patch_embed(patch_embed, image_size)
        elif apply == "drop":
            self._fill_drop_slot()

    # --- Forward

    def forward(
        self, images: Tensor, mask: Tensor | None = None, *, visible: int | None = None
    ) -> Tensor:
        """Return what the wrapped model returns for the images, masked.

        Args:
            images: ``(B, C, H, W)``.
            mask: ``(B, N)`` bool, True = hidden, or None, which leaves the model as it is.
            visible: for ``"drop"``: the visible patches of every row, where known. Without it they
                are counted, which makes the host wait for an accelerator and breaks a compiled
                graph.

        Raises:
            ValueError: a mask that does not fit the images, or rows that differ in a drop.
        """
        images = self._begin(images, mask, visible)
        try:
            return self.backbone(images)  # type: ignore[no-any-return]
        finally:
            self._request.clear()

    def forward_features(
        self, images: Tensor, mask: Tensor | None = None, *, visible: int | None = None
    ) -> Tensor:
        """Return what the wrapped model's ``forward_features`` returns: all tokens, normalised."""
        images = self._begin(images, mask, visible)
        try:
            return self.backbone.forward_features(images)  # type: ignore[no-any-return, operator]
        finally:
            self._request.clear()

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the patch grid (rows, columns) of images of this many pixels."""
        return patch_grid((height, width), self.patch_size)

    def attention(self, images: Tensor) -> Tensor:
        """Return the class token's attention to the patches in the last block.

        Args:
            images: ``(B, C, H, W)``.

        Returns:
            ``(B, heads, N)`` softmax weights without the prefix tokens' columns, so a row sums to
            at most 1.

        Raises:
            ValueError: a model without a class token, or whose attention cannot be recorded.
        """
        with torch.no_grad(), self.record_attention() as record:
            self(images)
        return record.attention

    @contextmanager
    def record_attention(self) -> Iterator[AttentionRecord]:
        """Record the last block's class-token attention of the forwards inside the context.

        >>> with vit.record_attention() as record:  # doctest: +SKIP
        ...     features = vit(images)
        >>> record.attention.shape  # doctest: +SKIP
        torch.Size([8, 3, 196])

        Only inside, and only in that block, attention runs unfused; other forwards cost nothing,
        and the features agree with the fused ones to rounding (about 1e-6).
        """
        if self._attention is None:
            self._attention = LastAttention(self.backbone, self.name, self.prefix_tokens)
        with self._attention.recording() as record:
            yield record

    def unwrap(self) -> nn.Module:
        """Take the hooks away and return the wrapped model as it was given."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._attention is not None:
            self._attention.remove()
            self._attention = None
        if self.apply_mask == "drop":
            self.backbone.patch_drop = self._old_slot[0]
        return self.backbone

    def extra_repr(self) -> str:
        """Describe the application."""
        fill = f", fill={self.fill!r}" if self.apply_mask == "pixel" else ""
        return f"apply={self.apply_mask!r}{fill}, patch_size={self.patch_size}"

    def _begin(self, images: Tensor, mask: Tensor | None, visible: int | None) -> Tensor:
        if mask is None:
            return images
        if images.ndim != 4:
            raise ValueError(f"images must be (B, C, H, W); got {tuple(images.shape)}.")
        grid = self.grid(images.shape[-2], images.shape[-1])
        check_mask(mask, images.shape[0], grid)
        if self.apply_mask == "pixel":
            return mask_pixels(images, mask, self.patch_size, self.fill)
        self._request.mask, self._request.visible, self._request.grid = mask, visible, grid
        return images

    # --- Finding the model's hooks, once

    def _find_patch_size(self, path: str) -> int | tuple[int, int]:
        for owner in (_module(self.backbone, path), self.backbone):
            size = getattr(owner, "patch_size", None)
            if isinstance(size, int) or (isinstance(size, (tuple, list)) and len(size) == 2):
                return size  # type: ignore[return-value]
        raise ValueError(
            f"{self.name} does not say its patch size: it has no {path}.patch_size. It may be no "
            "ViT, or keep its patch embedding elsewhere: give patch_embed='path.to.module' or "
            "patch_size=...; with apply='pixel' and a patch_size any network works."
        )

    def _hook_patch_embed(self, path: str, image_size: tuple[int, int] | None) -> None:
        module = _module(self.backbone, path)
        if module is None:
            raise ValueError(
                f"{self.name} has no module {path!r}, so there is no place for a mask token. Give "
                "the module that yields patch tokens as patch_embed='path.to.module', or use "
                "apply='pixel'."
            )
        self._layout, width = self._dry_run(module, path, image_size)
        parameter = next(self.backbone.parameters(), torch.empty(0))
        self.mask_token = nn.Parameter(
            torch.zeros(1, 1, width, device=parameter.device, dtype=parameter.dtype)
        )
        self._hook = module.register_forward_hook(self._replace)

    def _replace(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        request = self._request
        if request.mask is None or self.mask_token is None:
            return None
        return self._layout.replace(output, request.mask, self.mask_token[0, 0], request.grid)

    def _dry_run(
        self, module: nn.Module, path: str, image_size: tuple[int, int] | None
    ) -> tuple[Layout, int]:
        """Run the model on one empty image up to its patch tokens; return layout and width."""
        height, width = image_size or _image_size(self.backbone, module)
        parameter = next(self.backbone.parameters(), torch.empty(0))
        channels = int(getattr(self.backbone, "in_chans", 3) or 3)
        image = torch.zeros(
            1, channels, height, width, device=parameter.device, dtype=parameter.dtype
        )
        try:
            with torch.no_grad():
                output = _output_of(module, self.backbone, image)
        except Exception as error:
            raise ValueError(
                f"{self.name} cannot take an image of {height}x{width} pixels in a dry run: "
                f"{error}. Give image_size=(height, width)."
            ) from error
        layout = find_layout(output, self.grid(height, width))
        if layout is None:
            came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            rows, columns = self.grid(height, width)
            raise ValueError(
                f"{self.name}: {path!r} returns {came} for an image of {height}x{width}, which is "
                f"no {rows}x{columns} grid of patches. Give the module that yields patch tokens as "
                "patch_embed=..., or use apply='pixel'."
            )
        tokens = output[0] if layout.in_tuple else output
        return layout, tokens.shape[1] if layout.axes == "b d h w" else tokens.shape[-1]

    def _fill_drop_slot(self) -> None:
        if not hasattr(self.backbone, "patch_drop"):
            raise ValueError(
                f"{self.name} has no patch_drop slot, so its tokens cannot be dropped. timm's "
                "VisionTransformer and Eva families have one; else use apply='token' or 'pixel'."
            )
        slot: Any = self.backbone.patch_drop
        if slot is not None and not isinstance(slot, nn.Identity):
            raise ValueError(
                f"{self.name} was built with patch_drop_rate > 0, which apply='drop' would replace "
                "in silence. Build it with patch_drop_rate=0."
            )
        # Eva leaves the slot None and expects the kept indices as well, for its rotary embedding.
        self._old_slot.append(slot)
        self.backbone.patch_drop = _DropSlot(self._request, self.prefix_tokens, slot is None)


class _Request:
    """What the hooks read: the mask of the forward that is running, if any.

    An object of its own, so that torch.compile sees one thing from both sides; through a method
    bound to the wrapper, torch 2.6 reads a mask that is out of date.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.visible: int | None = None
        self.grid = (0, 0)

    def clear(self) -> None:
        """Forget the mask."""
        self.mask = self.visible = None


class _DropSlot(nn.Module):
    """Stands in timm's ``patch_drop`` slot; holds no parameters and does nothing without a mask."""

    def __init__(self, request: _Request, prefix_tokens: int, wants_indices: bool) -> None:
        super().__init__()
        self.request = request
        self.prefix_tokens = prefix_tokens
        self.wants_indices = wants_indices

    def forward(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """Drop the hidden tokens, returning the kept indices where the model asks for them."""
        keep = None
        if self.request.mask is not None:
            keep = visible_indices(self.request.mask, self.request.visible)
            tokens = drop_tokens(tokens, keep, self.prefix_tokens)
        return (tokens, keep) if self.wants_indices else tokens


class _FoundError(Exception):
    """Carries the patch tokens out of a dry run, so that the rest of the model need not run."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def _output_of(module: nn.Module, model: nn.Module, image: Tensor) -> Any:
    def stop(module: nn.Module, inputs: Any, output: Any) -> None:
        raise _FoundError(output)

    # A stem with batch norm would otherwise count the empty image in its statistics.
    modes = {child: child.training for child in model.modules()}
    model.eval()
    hook = module.register_forward_hook(stop)
    try:
        model(image)
    except _FoundError as found:
        return found.output
    finally:
        hook.remove()
        for child, training in modes.items():
            child.training = training
    raise ValueError("its forward never calls that module")


def _image_size(model: nn.Module, patch_embed: nn.Module) -> tuple[int, int]:
    size = getattr(patch_embed, "img_size", None)
    if size is None:
        size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (224, 224))[-2:]
    return _pair(size)


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _model_name(model: nn.Module) -> str:
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    kind = type(model).__name__
    return f"{kind} ({architecture})" if architecture else kind


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")
