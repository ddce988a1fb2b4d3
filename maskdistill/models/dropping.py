"""How tokens are dropped, family by family, where that is sound; else why it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from maskdistill.models.probing import (
    NO_ONE_PLACE,
    USUAL_SIZE,
    Call,
    call_of,
    model_name,
    multiple,
    patch_size_of,
    stated_size,
    stem_of,
    submodule,
    whole_patches,
)
from maskdistill.models.tokens import Grid, Request, drop_tokens, upsample, visible_indices

# Why the tokens of these kinds of models cannot be dropped.
_REASONS = {
    "its attention runs in windows, which need the whole grid of tokens": (
        "SwinTransformer", "SwinTransformerV2", "SwinTransformerV2Cr", "VisionTransformerSAM",
        "HieraDet", "Nest", "GlobalContextVit", "MaxxVit", "TinyVit", "DaVit", "Twins",
    ),
    "it pools or convolves its tokens as a grid, which needs all of them": (
        "PoolingVisionTransformer", "MultiScaleVit", "PyramidVisionTransformerV2", "Levit",
        "LevitDistilled", "CoaT", "Visformer", "EfficientFormer", "EfficientFormerV2",
        "EfficientVit", "EfficientVitLarge", "EfficientVitMsra", "MetaFormer", "NextViT", "ByobNet",
    ),
    "it hands its tokens on as a whole grid": (
        "Qwen3VitClassifier", "Gemma4VitClassifier", "DeepseekVitClassifier",
    ),
    "its blocks mix neighbouring patches by convolution": ("Xcit",),
    "its outlook attention slides over the whole grid": ("VOLO",),
    "its attention by position is laid out for the whole grid": ("ConVit",),
    "its layers mix a fixed number of tokens": ("MlpMixer",),
    "each of its patch tokens is bound to the pixel tokens of that patch": ("TNT",),
    NO_ONE_PLACE["CrossVit"]: ("CrossVit",),
}  # fmt: skip


def find_dropping(
    model: nn.Module,
    request: Request,
    *,
    first_block: str | None,
    patch_embed: str | None,
    patch_size: Grid,
    image_size: Grid | None,
) -> Dropping:
    """Return how tokens are dropped in this model.

    Raises:
        ValueError: a model in which that is not sound, with the reason.
    """
    found = stem_of(model, patch_embed)
    stem = found[1] if found else None
    size = image_size or stated_size(model, stem) or USUAL_SIZE
    own = patch_size_of(model, stem, size) or patch_size
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if "Hiera" in kinds:
        return HieraDropping(model, request, whole_patches(size, patch_size))
    per_patch = multiple(patch_size, own, model_name(model))
    grid = whole_patches(size, own)
    dropping: Dropping
    if first_block is not None:
        dropping = BlockDropping(model, request, first_block, grid, size)
    else:
        for reason, refused in _REASONS.items():
            if not kinds.isdisjoint(refused):
                raise _refusal(model, reason)
        if not kinds.isdisjoint(("Beit", "VisionTransformerRelPos", "Cait")):
            dropping = BlockDropping(model, request, "blocks", grid, size)
        elif not hasattr(model, "patch_drop"):
            raise _refusal(
                model,
                "it has no patch_drop slot, and it is not known whether its layers work without "
                "the whole grid (if they do, name the first: first_block='path.to.module')",
            )
        elif "NaFlexVit" in kinds:
            dropping = NaFlexDropping(model, request)
        else:
            dropping = SlotDropping(model, request)
            dropping.measure(grid, size)
    dropping.tokens_per_patch = per_patch
    return dropping


# --- The ways to drop


class Dropping:
    """Drops tokens in one model; ``run`` is how a masked forward goes.

    Args:
        model: the wrapped model.
        request: the mask of the running forward.
    """

    def __init__(self, model: nn.Module, request: Request) -> None:
        self.model = model
        self.request = request
        self.tokens_per_patch: Grid = (1, 1)

    def kept(self, mask: Tensor, grid: Grid, count: int | None) -> Tensor:
        """Return the indices of the tokens that are kept, for a mask over the patch grid."""
        rows, columns = self.tokens_per_patch
        if (rows, columns) != (1, 1):
            mask = upsample(mask, grid, (grid[0] * rows, grid[1] * columns))
            count = None if count is None else count * rows * columns
        return visible_indices(mask, count)

    def run(self, call: Callable[..., Any], images: Tensor, *given: Any, **arguments: Any) -> Any:
        """Call the model, or a method of its own, while tokens are dropped."""
        return call(images, *given, **arguments)

    def remove(self) -> None:
        """Take the hooks away again."""


class SlotDropping(Dropping):
    """Fills timm's own ``patch_drop``: VisionTransformer, Eva, NaFlexVit and their kin."""

    def __init__(self, model: nn.Module, request: Request) -> None:
        super().__init__(model, request)
        slot: Any = model.patch_drop
        if isinstance(slot, _DropSlot):
            raise ValueError(
                f"{model_name(model)} is wrapped with apply='drop' already; unwrap() that first."
            )
        if slot is not None and not isinstance(slot, nn.Identity):
            raise ValueError(
                f"{model_name(model)} was built with patch_drop_rate > 0, which apply='drop' would "
                "replace in silence. Build it with patch_drop_rate=0."
            )
        # Eva leaves the slot None and expects the kept indices as well, for its rotary embedding.
        self._old: list[Any] = [slot]  # a list, so that deepcopy keeps the identity of None
        self.slot = _DropSlot(request, int(getattr(model, "num_prefix_tokens", 0)), slot is None)
        model.patch_drop = self.slot

    def measure(self, grid: Grid, size: Grid) -> None:
        """Count the tokens before the patches in what comes into the slot; refuse the unsound."""
        try:
            call = call_of(self.model, self.slot, size)
            self.slot.prefix = _prefix_of(call, grid, self.model, "patch_drop")
        except ValueError:
            self.remove()
            raise

    def remove(self) -> None:
        """Put back what was in the slot."""
        if self.model.patch_drop is self.slot:
            self.model.patch_drop = self._old[0]


class NaFlexDropping(SlotDropping):
    """NaFlexVit looks into its slot in training mode only, and then expects kept indices."""

    def __init__(self, model: nn.Module, request: Request) -> None:
        super().__init__(model, request)
        self.remove()

    def run(self, call: Callable[..., Any], images: Tensor, *given: Any, **arguments: Any) -> Any:
        """Call the model, its own flag but not its children's in training mode, the slot filled."""
        training = self.model.training
        self.model.training, self.model.patch_drop = True, self.slot
        try:
            return super().run(call, images, *given, **arguments)
        finally:
            self.model.training = training
            self.remove()


class BlockDropping(Dropping):
    """Drops tokens as they enter the first block, and the rows and columns of position biases."""

    def __init__(
        self, model: nn.Module, request: Request, path: str, grid: Grid, size: Grid
    ) -> None:
        super().__init__(model, request)
        block = submodule(model, path)
        if block is None:
            raise ValueError(
                f"{model_name(model)} has no module {path!r}. Give the module into which all "
                "tokens go first as first_block='path.to.module', for example 'blocks.0'."
            )
        if isinstance(block, (nn.ModuleList, nn.Sequential)):
            block = block[0]
        self.prefix = _prefix_of(call_of(model, block, size), grid, model, repr(path))
        biases = _biases(model)
        self._hook = block.register_forward_pre_hook(self._drop, with_kwargs=True)
        self._biases = [_KeptBias(*bias, request, self.prefix) for bias in biases]

    def remove(self) -> None:
        """Take the hooks away again."""
        self._hook.remove()
        for bias in self._biases:
            bias.remove()

    def run(self, call: Callable[..., Any], images: Tensor, *given: Any, **arguments: Any) -> Any:
        """Call the model, unless a backward would run its blocks again when the mask is gone."""
        if torch.is_grad_enabled() and any(
            getattr(module, "grad_checkpointing", False)
            or (module.training and getattr(module, "gradient_checkpointing", False))
            for module in self.model.modules()
        ):
            raise ValueError(
                f"{model_name(self.model)} drops tokens inside its blocks, which gradient "
                "checkpointing would run again without the mask. Switch that off, or use "
                "apply='token'."
            )
        return super().run(call, images, *given, **arguments)

    def _drop(self, module: nn.Module, inputs: Any, named: Any) -> Any:
        if self.request.keep is None:
            return None
        if inputs:
            return (_dropped(inputs[0], self.request, self.prefix), *inputs[1:]), named
        first = next(iter(named))
        return inputs, {**named, first: _dropped(named[first], self.request, self.prefix)}


class HieraDropping(Dropping):
    """Drops whole mask units of a Hiera, in the order into which it unrolls them.

    Its own ``mask=`` does the same through a boolean index, which makes the host wait for an
    accelerator and does not compile, and its ``forward`` then leaves out the pooling.
    """

    def __init__(self, model: nn.Module, request: Request, grid: Grid) -> None:
        super().__init__(model, request)
        units = tuple(getattr(model, "mask_spatial_shape", ()))
        if units != grid:
            raise ValueError(
                f"{model_name(model)} drops whole mask units, {'x'.join(map(str, units))} of them, "
                f"but the masks have a grid of {grid[0]}x{grid[1]}. Leave patch_size to the model."
            )
        self._units = grid[0] * grid[1]
        self._hook = model.unroll.register_forward_hook(self._drop)  # type: ignore[union-attr, operator]

    def remove(self) -> None:
        """Take the hook away again."""
        self._hook.remove()

    def _drop(self, module: nn.Module, inputs: Any, tokens: Tensor) -> Tensor | None:
        keep = self.request.keep
        if keep is None:
            return None
        units = rearrange(tokens, "b (s u) d -> (b s) u d", u=self._units)
        places = units.shape[0] // len(keep)  # tokens of one unit
        kept = drop_tokens(units, keep.repeat_interleave(places, dim=0))
        return rearrange(kept, "(b s) u d -> b (s u) d", s=places)


# --- Checks


def _dropped(tokens: Tensor, request: Request, prefix: int) -> Tensor:
    assert request.keep is not None
    if tokens.shape[1] != prefix + request.tokens:
        raise ValueError(
            f"the model made {tokens.shape[1] - prefix} patch tokens, but the mask is for "
            f"{request.tokens}. Wrap the model again if its patches were changed."
        )
    return drop_tokens(tokens, request.keep, prefix)


def _is_timm(model: nn.Module) -> bool:
    return type(model).__module__.startswith("timm.")


def _refusal(model: nn.Module, reason: str) -> ValueError:
    other = "'pixel'" if type(model).__name__ in NO_ONE_PLACE else "'token', or 'pixel'"
    return ValueError(f"{model_name(model)} cannot drop tokens: {reason}. Use apply={other}.")


def _prefix_of(call: Call, grid: Grid, model: nn.Module, path: str) -> int:
    """Return the number of tokens before the patches in a module's input; refuse the unsound."""
    tokens, *others = (*call.inputs, *call.named.values())
    patches = grid[0] * grid[1]
    where = f"{model_name(model)}: {path}"
    if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[1] < patches:
        came = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(
            f"{where} does not take (B, tokens, D) with {patches} patches, but {came}, so its "
            "tokens cannot be dropped. Use apply='token', or 'pixel'."
        )
    counts = {tokens.shape[1], patches}
    if any(_is_per_token(other, counts, _is_timm(model)) for other in others):
        raise ValueError(
            f"{where} is given something else for each token, such as a rotary position embedding, "
            "so dropping tokens alone is not sound. Use apply='token', or 'pixel'."
        )
    return tokens.shape[1] - patches


def _is_per_token(value: Any, counts: set[int], is_timm: bool) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_is_per_token(item, counts, is_timm) for item in value)
    if not isinstance(value, Tensor) or not counts & set(value.shape):
        return False
    # A position bias (1, heads, tokens, tokens) of timm's is known and taken care of.
    return not (is_timm and value.ndim == 4 and value.shape[2] == value.shape[3])


def _biases(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the owners and names of methods that give a position bias for all pairs of tokens.

    Raises:
        ValueError: a model that is not timm's and has such a bias, in what form is not known.
    """
    found = []
    for module in model.modules():
        table = getattr(module, "relative_position_bias_table", None) is not None
        if table and not _is_timm(module):
            raise _refusal(model, "its position bias is for all pairs of patches")
        if hasattr(module, "get_bias"):  # VisionTransformerRelPos
            found.append((module, "get_bias"))
        elif table:  # Beit
            method = "_get_rel_pos_bias" if hasattr(module, "_get_rel_pos_bias") else "forward"
            found.append((module, method))
    return found


class _KeptBias:
    """Stands in for a method that gives a position bias, and leaves out the hidden patches.

    A plain object in the owner's ``__dict__`` rather than a closure, so that a deep copy of the
    model copies it too.
    """

    def __init__(self, owner: nn.Module, method: str, request: Request, prefix: int) -> None:
        self.owner = owner
        self.method = method
        self.request = request
        self.prefix = prefix
        owner.__dict__[method] = self

    def remove(self) -> None:
        """Give the owner its own method back."""
        self.owner.__dict__.pop(self.method, None)

    def __call__(self) -> Tensor:
        bias: Tensor = getattr(type(self.owner), self.method)(self.owner)
        keep = self.request.keep
        if keep is None:
            return bias
        prefix = torch.arange(self.prefix, device=keep.device).expand(len(keep), -1)
        index = torch.cat([prefix, keep + self.prefix], dim=1)
        square = bias.squeeze(0)[:, index[:, :, None], index[:, None, :]]
        return square.transpose(0, 1).contiguous()


class _DropSlot(nn.Module):
    """Stands in timm's ``patch_drop`` slot; holds no parameters and does nothing without a mask."""

    def __init__(self, request: Request, prefix: int, wants_indices: bool) -> None:
        super().__init__()
        self.request = request
        self.prefix = prefix
        self.wants_indices = wants_indices

    def forward(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """Drop the hidden tokens, returning the kept indices where the model asks for them."""
        keep = self.request.keep
        if keep is not None:
            tokens = _dropped(tokens, self.request, self.prefix)
        return (tokens, keep) if self.wants_indices else tokens
