"""Masks into any ViT, without touching it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from maskdistill.masking.mask import PatchMask, check_mask, patch_grid, with_count
from maskdistill.models.attention import AttentionRecord, LastAttention, Query
from maskdistill.models.dropping import Dropping, find_dropping
from maskdistill.models.outputs import Tokens, pooled, split_tokens
from maskdistill.models.probing import (
    USUAL_SIZE,
    explain_size_error,
    find_stem,
    mask_patch_size,
    model_name,
    overlaps,
    pair,
    patch_size_of,
    prefix_tokens,
    stated_size,
    stem_of,
    whole_patches,
)
from maskdistill.models.speed import LastBlock
from maskdistill.models.tokens import (
    APPLICATIONS,
    FILLS,
    Application,
    Fill,
    Request,
    check_choice,
    fill_patches,
    tied,
)
from maskdistill.models.transparent import TOKEN, Transparent


class MaskedViT(Transparent):
    """Wraps a ViT so that it takes a mask; without one it is bit-equal to the wrapped model.

    >>> import timm, torch, maskdistill as md
    >>> vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True)
    >>> vit = md.MaskedViT(vit, apply="token")
    >>> mask = md.RandomMasker(0.3)(8, vit.grid(224, 224))
    >>> vit(torch.zeros(8, 3, 224, 224), mask).shape
    torch.Size([8, 192])

    The weights of the wrapped model are never touched: it is hooked, not rebuilt, and lives on as
    ``.backbone``. State dicts have its own keys, and ``mask_token`` besides; attributes that this
    class does not have are the wrapped model's. ``unwrap()`` takes the hooks away again.

    Any model of timm can be wrapped, and others with one place where patch tokens appear;
    ``supported_models()`` says what each takes. In hierarchical models (Swin, PVT, Hiera) the mask
    lies on the coarsest grid, and is brought to the finer one of the stem. Where the filters of a
    stem reach over their patch, the pixels of hidden patches are set to zero as well, so that
    nothing of them is seen.

    Args:
        vit: a ViT of timm, or another model with one patch embedding.
        apply: ``"token"`` replaces hidden patch embeddings by a learned token (``mask_token``,
            zeros at first, as in iBOT; the model's own where it has one), before the position
            embedding; ``"drop"`` removes the tokens, after it; ``"pixel"`` fills the patches in the
            image, in front of any network.
        fill: for ``"pixel"``: ``"zero"``, ``"mean"``, ``"noise"`` or ``"blur"``.
        patch_embed: dotted path of the module whose output are the patch tokens; None looks for it.
        first_block: for ``"drop"`` in models that are not timm's: dotted path of the module into
            which all tokens go first, such as ``"blocks.0"``. All that follows must work without
            the whole grid.
        patch_size: pixels per patch of the mask; None is the model's own.
        image_size: (height, width) of the dry run that finds the layout, where the model does not
            say.

    Attributes:
        backbone: the wrapped model.
        mask_token: the learned token with ``apply="token"``, ``(1, 1, D)``, else None. A model's
            own keeps its shape.
        patch_size: pixels per patch of the mask, (height, width).
        prefix_tokens: class and register tokens before the patches.

    Raises:
        ValueError: what cannot work, at once and in a sentence: no patch embedding, an unknown
            layout, tokens that cannot be dropped, an unknown ``apply`` or ``fill``.
    """

    def __init__(
        self,
        vit: nn.Module,
        apply: Application = "token",
        *,
        fill: Fill = "zero",
        patch_embed: str | None = None,
        first_block: str | None = None,
        patch_size: int | tuple[int, int] | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        _check_model(vit)
        check_choice("apply", apply, APPLICATIONS)
        check_choice("fill", fill, FILLS)
        super().__init__(vit)
        self.mask_token: nn.Parameter | None
        self.apply_mask = apply
        self.fill: Fill = fill
        self.name = model_name(vit)
        self.prefix_tokens = prefix_tokens(vit)
        self._request = Request()
        self._waiting: _MaskQueue | None = None
        self._attention: dict[Query | None, LastAttention] = {}
        self._dropping: Dropping | None = None
        self._hook: Any = None
        self._last_block = LastBlock(vit, self._request) if LastBlock.suits(vit) else None
        self._blanks = False  # whether pixels of hidden patches are set to zero besides
        given = None if patch_size is None else pair(patch_size)
        image_size = None if image_size is None else pair(image_size)
        found = stem_of(vit, patch_embed)
        stem = found[1] if found else None
        if patch_embed is not None and stem is None:
            raise ValueError(f"{self.name} has no module {patch_embed!r} (patch_embed=...).")
        self._built_for = image_size or stated_size(vit, stem)
        if apply == "token":
            self._hook_stem(patch_embed, given, image_size)
        else:
            self.patch_size = given or mask_patch_size(vit, stem, self._built_for)
        if given is not None:
            own = patch_size_of(vit, stem, self._built_for or USUAL_SIZE) or given
            if given[0] % own[0] == given[1] % own[1] == 0:
                self._request.per_patch = (given[0] // own[0], given[1] // own[1])
        if apply == "drop":
            self._blanks = stem is not None and overlaps(vit, stem)
            self._dropping = find_dropping(
                vit,
                self._request,
                first_block=first_block,
                patch_embed=patch_embed,
                patch_size=self.patch_size,
                image_size=image_size,
            )
        self._is_wrapped = True
        self._is_open = True

    def forward(
        self,
        images: Tensor,
        mask: Tensor | PatchMask | None = None,
        **arguments: Any,
    ) -> Any:
        """Return what the wrapped model returns for the images, masked.

        Args:
            images: ``(B, C, H, W)``.
            mask: ``(B, N)`` bool, True = hidden, or None, which leaves the model as it is. For
                ``"drop"`` the hidden patches of a row are counted, which makes the host wait for an
                accelerator and breaks a compiled graph, unless a ``PatchMask`` tells the count, as
                those of a policy do.
            arguments: for the wrapped model, as they are.

        Raises:
            ValueError: a mask that does not fit the images, rows that differ in a drop, or images
                of a size that the model does not take.
        """
        return self._run("forward", images, mask, arguments)

    def forward_features(
        self,
        images: Tensor,
        mask: Tensor | PatchMask | None = None,
        **arguments: Any,
    ) -> Any:
        """Return what the wrapped model's ``forward_features`` returns: all tokens, normalised."""
        return self._run("forward_features", images, mask, arguments)

    def forward_intermediates(
        self, images: Tensor, *given: Any, mask: Tensor | PatchMask | None = None, **arguments: Any
    ) -> Any:
        """Return what timm's ``forward_intermediates`` does, with its arguments, masked.

        After a drop there is no map of tokens, so ask for sequences: ``output_fmt="NLC"``.
        """
        return self._run("forward_intermediates", images, mask, arguments, given)

    def get_intermediate_layers(
        self, images: Tensor, *given: Any, mask: Tensor | PatchMask | None = None, **arguments: Any
    ) -> Any:
        """Return what the model's ``get_intermediate_layers`` does, with its arguments, masked."""
        return self._run("get_intermediate_layers", images, mask, arguments, given)

    def embed(
        self,
        images: Tensor,
        mask: Tensor | PatchMask | None = None,
        *,
        class_only: bool = False,
        **arguments: Any,
    ) -> Tensor:
        """Return one embedding per image, ``(B, D)``: what DINO's head takes, of any model.

        Of a model without a classifier (timm: ``num_classes=0``) it is the output, pooled already;
        of one with a classifier, what goes into it; else the class token, or the patches' mean.

        ``class_only`` leaves out of the last block what the class token does not need, where the
        model is a plain ViT: the same embedding to rounding. That block's patch tokens are then
        meaningless to a hook of your own.
        """
        backbone: Any = self.backbone
        # Checkpointed blocks run again in the backward pass, and must then do the same.
        again = torch.is_grad_enabled() and getattr(backbone, "grad_checkpointing", False)
        self._request.class_only = class_only and not again
        try:
            if getattr(backbone, "num_classes", 0) and hasattr(backbone, "forward_head"):
                tokens = self.forward_features(images, mask, **arguments)
                return pooled(backbone.forward_head(tokens, pre_logits=True), backbone)
            return pooled(self(images, mask, **arguments), backbone)
        finally:
            self._request.class_only = False

    def tokens(
        self, images: Tensor, mask: Tensor | PatchMask | None = None, **arguments: Any
    ) -> Tokens:
        """Return all that the last layer gives: embedding, class and register tokens, patches.

        >>> import timm, torch, maskdistill as md
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, num_classes=0)
        >>> mask = md.RandomMasker(0.5)(2, (4, 4))
        >>> tokens = md.MaskedViT(vit, "drop").tokens(torch.zeros(2, 3, 64, 64), mask)
        >>> tokens.prefix.shape, tokens.patches.shape, tokens.visible.shape
        (torch.Size([2, 1, 192]), torch.Size([2, 8, 192]), torch.Size([2, 8]))

        Hierarchical models give those of their last grid.

        Args:
            images: ``(B, C, H, W)``.
            mask: as in the call.
            arguments: for the wrapped model.

        Raises:
            ValueError: an output in which there are no tokens of patches.
        """
        backbone: Any = self.backbone
        if hasattr(backbone, "forward_features"):
            output = self.forward_features(images, mask, **arguments)
        else:
            output = self(images, mask, **arguments)
        if hasattr(backbone, "forward_head"):
            embedding = pooled(backbone.forward_head(output, pre_logits=True), backbone)
        else:
            embedding = pooled(output, backbone)
        prefix, patches, size = split_tokens(output, backbone)
        visible = None
        if self._dropping is not None and mask is not None:
            given, count = (mask.mask, mask.count) if isinstance(mask, PatchMask) else (mask, None)
            grid = self.grid(images.shape[-2], images.shape[-1])
            visible = self._dropping.kept(given, grid, count)
        if visible is not None and visible.shape[1] != patches.shape[1]:
            raise ValueError(
                f"{self.name} gives {patches.shape[1]} tokens of {visible.shape[1]} visible ones; "
                "its patch tokens cannot be told apart."
            )
        return Tokens(embedding, prefix, patches, visible, size)

    @contextmanager
    def masking(self, masks: Sequence[Tensor | PatchMask | None]) -> Iterator[None]:
        """Mask the forwards inside, in anybody's code that calls the model without masks.

        >>> with vit.masking(masks.student):  # doctest: +SKIP
        ...     out = student(crops)  # calls the wrapped model, once per crop or per size

        Each forward takes the masks of its crops, in their order: with B images per crop, a forward
        with 3 B images takes three. Clean crops among masked ones in one forward get a mask that
        hides nothing.

        Args:
            masks: one per crop, ``(B, N)`` bool, ``PatchMask`` or None, as ``ViewMasks.student``
                and ``ViewMasks.student_masks`` are.

        Raises:
            ValueError: a forward with more crops than masks are left, or with part of a crop.
            RuntimeError: at the end, crops for which no forward came.
        """
        if self._waiting is not None:
            raise RuntimeError("masking() is running already; leave that block first.")
        self._waiting = _MaskQueue(masks)
        try:
            yield
            self._waiting.check_done()
        finally:
            self._waiting = None

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the patch grid (rows, columns) of images of this many pixels.

        Raises:
            ValueError: patches that do not divide the image; but at the size that the model was
                built for, its stem leaves out the rest (SigLIP: 384 pixels in patches of 14).
        """
        if (height, width) == self._built_for:
            return whole_patches((height, width), self.patch_size)
        return patch_grid((height, width), self.patch_size)

    def attention(self, images: Tensor, query: Query | None = None) -> Tensor:
        """Return the attention to the patches in the last block.

        Args:
            images: ``(B, C, H, W)``.
            query: whose attention: ``"class"``, ``"pool"``, ``"register"`` or ``"mean"``; None is
                the class token's where there is one, else the attention pooling's, else the mean
                over the patches'.

        Returns:
            ``(B, heads, N)`` softmax weights without the prefix tokens' columns, so a row sums to
            at most 1.

        Raises:
            ValueError: a model whose last attention does not look at all patches, or a query that
                it does not have.
        """
        with torch.no_grad(), self.record_attention(query) as record:
            self(images)
        return record.attention

    @contextmanager
    def record_attention(self, query: Query | None = None) -> Iterator[AttentionRecord]:
        """Record the last block's attention of the forwards inside the context.

        >>> with vit.record_attention() as record:  # doctest: +SKIP
        ...     features = vit(images)
        >>> record.attention.shape  # doctest: +SKIP
        torch.Size([8, 3, 196])

        Only inside, and only in that block, attention runs unfused; features agree to about 1e-6.
        """
        if query not in self._attention:
            self._attention[query] = LastAttention(self.backbone, self._request, query)
        with self._attention[query].recording() as record:
            yield record

    def unwrap(self) -> nn.Module:
        """Take the hooks away and return the wrapped model as it was given."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        for part in (*self._attention.values(), self._dropping, self._last_block):
            if part is not None:
                part.remove()
        self._attention = {}
        self._is_wrapped = False
        return self.backbone

    def extra_repr(self) -> str:
        """Describe the application."""
        fill = f", fill={self.fill!r}" if self.apply_mask == "pixel" else ""
        return f"apply={self.apply_mask!r}{fill}, patch_size={self.patch_size}"

    def _run(
        self,
        method: str,
        images: Tensor,
        mask: Tensor | PatchMask | None,
        arguments: dict[str, Any],
        given: tuple[Any, ...] = (),
    ) -> Any:
        images = self._begin(images, mask)
        try:
            call = self.backbone if method == "forward" else getattr(self.backbone, method)
            if self._request.keep is not None and self._dropping is not None:
                output = self._dropping.run(call, images, *given, **arguments)
            else:
                output = call(images, *given, **arguments)
            for recorder in self._request.recorders:
                recorder.check_recorded()
            return output
        except (AssertionError, IndexError, RuntimeError) as error:
            if torch.compiler.is_compiling() or not isinstance(images, Tensor):
                raise
            self._request.clear()
            explain_size_error(error, self.backbone, self._built_for, tuple(images.shape[-2:]))
            raise
        finally:
            self._request.clear()

    def _begin(self, images: Tensor, given: Tensor | PatchMask | None) -> Tensor:
        request = self._request
        if not isinstance(images, Tensor) or images.ndim != 4:
            if given is None and self._waiting is None and not request.recorders:
                return images
            came = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images must be a (B, C, H, W) tensor; got {came}.")
        if self._waiting is not None:
            if given is not None:
                raise ValueError("a mask was given inside masking(); use the one or the other.")
            given = self._waiting.take(images.shape[0])
        if request.recorders:
            request.grid = rows, columns = self.grid(images.shape[-2], images.shape[-1])
            request.batch, request.patches = images.shape[0], rows * columns
        if given is None:
            return images
        if not self._is_wrapped:
            raise RuntimeError("this wrapper was unwrapped; wrap the model again to mask it.")
        grid = self.grid(images.shape[-2], images.shape[-1])
        mask, count = (given.mask, given.count) if isinstance(given, PatchMask) else (given, None)
        check_mask(mask, images.shape[0], grid)
        if mask.device != images.device:
            raise ValueError(f"the mask is on {mask.device}, the images on {images.device}.")
        if self.apply_mask == "pixel":
            return fill_patches(images, mask, grid, self.patch_size, self.fill)
        if self._blanks:
            images = fill_patches(images, mask, grid, self.patch_size, "zero")
        if self._dropping is not None:
            rows, columns = self._dropping.tokens_per_patch
            request.tokens = mask.shape[1] * rows * columns
            request.keep = self._dropping.kept(mask, grid, count)
            request.patches = request.keep.shape[1]
        request.mask, request.grid = mask, grid
        return images

    def _hook_stem(
        self,
        path: str | None,
        patch_size: tuple[int, int] | None,
        image_size: tuple[int, int] | None,
    ) -> None:
        stem = find_stem(self.backbone, path, patch_size, image_size)
        self.patch_size = stem.patch_size
        self._layout, self._blanks = stem.layout, stem.overlaps
        own = _own_mask_token(self.backbone, stem.width)
        if own is not None:
            self.share_mask_token(own)
        else:
            parameter = next(self.backbone.parameters(), torch.empty(0))
            self.mask_token = nn.Parameter(
                torch.zeros(1, 1, stem.width, device=parameter.device, dtype=parameter.dtype),
                # A frozen model stays frozen: a token that learns alone would stop DDP.
                requires_grad=any(p.requires_grad for p in self.backbone.parameters()),
            )
        self._hook = stem.module.register_forward_hook(self._replace)

    def _replace(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        request, token = self._request, self.mask_token
        if token is None:
            return None
        if request.mask is not None:
            return self._layout.replace(output, request.mask, token.reshape(-1), request.grid)
        if self.training and token.requires_grad and torch.is_grad_enabled():
            return self._layout.map(output, lambda tokens: tied(tokens, token))
        return None


def _check_model(model: nn.Module) -> None:
    """Refuse what cannot be wrapped.

    Raises:
        ValueError: no module, a wrapper, or a compiled model.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"vit must be a torch.nn.Module, for example timm.create_model(...); got {model!r}."
        )
    if isinstance(model, Transparent):
        raise ValueError("vit is a MaskedViT already; wrap its .backbone instead.")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError("vit is compiled, and might not see its masks: wrap first, then compile.")


def _own_mask_token(model: nn.Module, width: int) -> str | None:
    """Return the name of the mask token that a model has already (DINOv2, Hugging Face), or None.

    Raises:
        ValueError: a token of that name for something else, whose key would be taken.
    """
    for name, parameter in model.named_parameters():
        *owners, last = name.split(".")
        if last != TOKEN or any("decoder" in owner or "predictor" in owner for owner in owners):
            continue
        if parameter.numel() == width:
            return name
        if not owners:
            raise ValueError(
                f"{type(model).__name__} has a mask_token {tuple(parameter.shape)}, but its patch "
                f"tokens have a width of {width}: it is for something else, and leaves no name for "
                "another. Wrap the encoder alone."
            )
    return None


# --- Masks that wait for the forwards inside masking()


class _MaskQueue:
    """Masks of crops to come, handed out forward by forward.

    Args:
        masks: one per crop, ``(B, N)`` bool, ``PatchMask`` or None.
    """

    def __init__(self, masks: Sequence[Tensor | PatchMask | None]) -> None:
        if isinstance(masks, Tensor) or not isinstance(masks, Sequence):
            raise ValueError(
                "masking() takes a list with one mask or None per crop, as policy(...).student is; "
                f"got {type(masks).__name__}. For a single mask, pass it to the call: vit(images, "
                "mask)."
            )
        for mask in masks:
            bare = mask.mask if isinstance(mask, PatchMask) else mask
            if bare is not None and (not isinstance(bare, Tensor) or bare.ndim != 2):
                came = tuple(bare.shape) if isinstance(bare, Tensor) else type(bare).__name__
                raise ValueError(
                    "each entry must be a (B, N) bool tensor, or None where a crop is clean; got "
                    f"{came}."
                )
        self.masks = [None if mask is None else with_count(mask) for mask in masks]
        self._batches = {len(mask) for mask in self.masks if mask is not None}
        if len(self._batches) > 1 or 0 in self._batches:
            raise ValueError(
                "the masks of all crops must be for one batch size of at least 1; got "
                f"{sorted(self._batches)}."
            )
        self.next = 0

    def take(self, rows: int) -> PatchMask | None:
        """Return the mask of a forward with this many images.

        Raises:
            ValueError: a number of images that is no whole number of crops, or more crops than
                masks are left.
        """
        if not self._batches:  # all clean
            return None
        (batch,) = self._batches
        left = len(self.masks) - self.next
        if rows % batch or not rows or rows // batch > left:
            raise ValueError(
                f"a forward with {rows} images came inside masking(), but masks are left for "
                f"{left} crops of {batch} images each. Run the crops in the order of the masks, "
                "each once; crops in one forward are joined along the batch."
            )
        crops = slice(self.next, self.next + rows // batch)
        self.next = crops.stop
        return _joined(self.masks[crops])

    def check_done(self) -> None:
        """Refuse masks that no forward took.

        Raises:
            RuntimeError: crops left over.
        """
        if self._batches and self.next < len(self.masks):
            raise RuntimeError(
                f"masking() was given masks for {len(self.masks)} crops, but the forwards inside "
                f"took only {self.next}. Give it the masks of just the crops that run inside."
            )


def _joined(masks: list[PatchMask | None]) -> PatchMask | None:
    """Join the masks of crops in one forward; clean ones among masked ones hide nothing."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    if len({mask.mask.shape for mask in given}) > 1:
        raise ValueError(
            "crops of one forward must have one patch grid, but their masks are "
            f"{[tuple(mask.mask.shape) for mask in given]}. Run the crops in the order of the "
            "masks."
        )
    clean = PatchMask(torch.zeros_like(given[0].mask), count=0)
    whole = [clean if mask is None else mask for mask in masks]
    counts = {mask.count for mask in whole}
    return PatchMask(torch.cat([m.mask for m in whole]), counts.pop() if len(counts) == 1 else None)
