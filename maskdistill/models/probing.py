"""What a model does not say of itself, found out once: stem, layout, patch size, prefix tokens."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskdistill.models.tokens import Grid, Layout, find_layout

# Where patch tokens first appear: timm's families, its wrapped encoders, and Hugging Face.
_STEMS: tuple[str, ...] = (
    "patch_embed",
    "embeds.norm",  # NaFlex: what its embeds return has positions and prefix tokens in it
    "encoder.patch_embed",
    "patch_embed1",
    "patch_embeds.0",
    "embeddings.patch_embeddings",
    "vit.embeddings.patch_embeddings",
    "stem",
)
USUAL_SIZE = (224, 224)  # of the images of a model that does not say
# Models with more than one place where patch tokens appear, and why.
NO_ONE_PLACE = {
    "TNT": "its patch tokens are made of pixel tokens, which go on beside them",
    "CrossVit": "its two branches cut the image into different patches",
}


def model_name(model: nn.Module) -> str:
    """Return what to call a model in errors: its class, and timm's name for it."""
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    kind = type(model).__name__
    return f"{kind} ({architecture})" if architecture else kind


def submodule(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a dotted path, or None."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def pair(size: Any) -> Grid:
    """Return (height, width) of a size given as one number or two.

    Raises:
        ValueError: anything else, or less than 1.
    """
    both = (size, size) if isinstance(size, int) else tuple(size) if _is_pair(size) else ()
    if len(both) != 2 or not all(isinstance(n, int) and n > 0 for n in both):
        raise ValueError(f"a size must be an int >= 1, or two of them; got {size!r}.")
    return both[0], both[1]


def _is_pair(size: Any) -> bool:
    return isinstance(size, (tuple, list)) and len(size) == 2


# --- Tokens before the patches

_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")
_REGISTERS = ("num_register_tokens", "n_storage_tokens")


def prefix_tokens(model: nn.Module) -> int:
    """Return the number of class and register tokens before the patches, as the model says it."""
    count = getattr(model, "num_prefix_tokens", None)
    if isinstance(count, int):
        return count
    extra = 0
    for owner in (model, getattr(model, "config", None)):
        extra = extra or next((int(getattr(owner, n, 0) or 0) for n in _REGISTERS), 0)
    for owner in _owners(model):
        extra += getattr(owner, "distillation_token", None) is not None
    token = _class_token(model)
    if token is None:
        return extra
    # PiT keeps its class and distillation tokens in one (1, 2, D).
    return extra + (int(token.shape[1]) if getattr(token, "ndim", 1) == 3 else 1)


def has_class_token(model: nn.Module) -> bool:
    """Whether the model has a class token, timm's way or Hugging Face's."""
    return _class_token(model) is not None


def _class_token(model: nn.Module) -> Any:
    found = (getattr(owner, name, None) for owner in _owners(model) for name in _CLASS_TOKENS)
    return next((token for token in found if token is not None), None)


def _owners(model: nn.Module) -> list[Any]:
    vision: Any = getattr(model, "vision_model", None)
    return [model, getattr(model, "embeddings", None), getattr(vision, "embeddings", None)]


# --- Sizes that a model states


def stem_of(model: nn.Module, path: str | None) -> tuple[str, nn.Module] | None:
    """Return the path and module of the patch embedding, the given one or the first known one."""
    for candidate in _STEMS if path is None else (path,):
        module = submodule(model, candidate)
        if module is not None:
            return candidate, module
    return None


def patch_size_of(model: nn.Module, stem: nn.Module | None, image_size: Grid) -> Grid | None:
    """Return pixels per patch of the mask, (height, width), as far as the model says it.

    The coarsest grid that the model works on: the patch of a plain ViT, the total stride of a
    hierarchical one (32 in a Swin, so that a mask covers whole tokens of every stage).
    """
    stated = None
    for owner in (stem, model, getattr(model, "config", None)):
        size = getattr(owner, "patch_size", None)
        if isinstance(size, int) or _is_pair(size):
            stated = pair(size)
            break
    strides = [info.get("reduction") for info in getattr(model, "feature_info", None) or ()]
    stride = strides[-1] if strides else None
    if not strides and stated is None and getattr(model, "pretrained_cfg", None):
        stride = 16  # an older timm, which does not say
    if not isinstance(stride, int) or stride < 1 or (stated is not None and stride in stated):
        return stated
    for size in (stride, 16):  # CrossViT's stride is a mean of two
        if image_size[0] % size == 0 and image_size[1] % size == 0:
            return size, size
    return None


def stated_size(model: nn.Module, stem: nn.Module | None) -> Grid | None:
    """Return the image size (height, width) that the model says it was built for, if it does."""
    units: Any = getattr(model, "mask_spatial_shape", None)
    if units is not None and len(units) == 2:  # Hiera says no other size
        stride = model.feature_info[-1]["reduction"]  # type: ignore[index, union-attr]
        return int(units[0] * stride), int(units[1] * stride)
    # The model first: a later stem, as Visformer's, may say the size of its own input.
    for owner in (model, stem, getattr(model, "config", None)):
        for name in ("img_size", "image_size"):
            size = getattr(owner, name, None)
            if isinstance(size, int) or _is_pair(size):
                return _of_whole_patches(pair(size), model, stem)
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    return _of_whole_patches(pair(size[-2:]), model, stem) if size else None


def _of_whole_patches(size: Grid, model: nn.Module, stem: nn.Module | None) -> Grid:
    """Round down to whole patches for a model that takes any size but demands those."""
    patch = getattr(stem, "patch_size", None)
    if not getattr(model, "dynamic_img_size", False) or patch is None:
        return size
    rows, columns = whole_patches(size, pair(patch))
    return rows * pair(patch)[0], columns * pair(patch)[1]


def whole_patches(size: Grid, patch_size: Grid) -> Grid:
    """Return the grid of the patches that fit whole into an image; a convolution leaves the rest.

    Raises:
        ValueError: an image smaller than a patch.
    """
    rows, columns = size[0] // patch_size[0], size[1] // patch_size[1]
    if not rows or not columns:
        raise ValueError(
            f"an image of {size[0]}x{size[1]} pixels is smaller than a patch of "
            f"{patch_size[0]}x{patch_size[1]}; choose larger images or smaller patches."
        )
    return rows, columns


def multiple(patch_size: Grid, own: Grid, name: str) -> Grid:
    """Return how many of the model's own patches a patch of the mask covers, in both directions.

    Raises:
        ValueError: not a whole number.
    """
    if patch_size[0] % own[0] or patch_size[1] % own[1]:
        raise ValueError(
            f"patch_size must be a multiple of the {own[0]}x{own[1]} pixels per patch of {name}, "
            f"so that the mask covers whole tokens; got {patch_size[0]}x{patch_size[1]}."
        )
    return patch_size[0] // own[0], patch_size[1] // own[1]


# --- The stem: where patch tokens appear


def overlaps(model: nn.Module, stem: nn.Module) -> bool:
    """Whether a token of this stem sees pixels of its neighbours' patches.

    Convolutions before the stem count as well: those that the model registers first.
    """
    inside = set(stem.modules())
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and any(
            kernel > stride
            for kernel, stride in zip(module.kernel_size, module.stride, strict=True)
        ):
            return True
        inside.discard(module)
        if not inside:
            break
    return False


@dataclass(frozen=True)
class Stem:
    """The place where patch tokens appear.

    Attributes:
        module: the module that yields them.
        layout: how its output holds the tokens.
        width: the tokens' width.
        patch_size: pixels per patch of the mask.
        overlaps: whether its tokens see pixels of neighbouring patches.
    """

    module: nn.Module
    layout: Layout
    width: int
    patch_size: Grid
    overlaps: bool


def find_stem(
    model: nn.Module, path: str | None, patch_size: Grid | None, image_size: Grid | None
) -> Stem:
    """Find where patch tokens appear, by running the model on one empty image up to there.

    Raises:
        ValueError: no such module, one that never runs, or whose output is no grid of patches.
    """
    name = model_name(model)
    found = stem_of(model, path)
    reason = NO_ONE_PLACE.get(type(model).__name__)
    if reason and path is None:
        raise ValueError(
            f"{name} has no one place for a mask token: {reason}. Use apply='pixel', which fills "
            "the patches in the image."
        )
    if found is None:
        where = f"no module {path!r}" if path else "no patch embedding under a usual name"
        raise ValueError(
            f"{name} has {where}, so there is no place for a mask token. Give the module that "
            "yields patch tokens as patch_embed='path.to.module', or use apply='pixel'."
        )
    where, module = found
    size = image_size or stated_size(model, module) or USUAL_SIZE
    output = call_of(model, module, size).output
    stated = patch_size or patch_size_of(model, module, size)
    candidates = [stated] if stated else []
    if not patch_size:
        candidates += _patch_sizes_from(output, size)
    for candidate in candidates:
        grid = whole_patches(size, candidate)
        layout = find_layout(output, grid)
        if layout is None:
            continue
        if patch_size:
            rows, columns = layout.tokens_per_patch or (0, 0)
            own = (size[0] // (grid[0] * rows or 1), size[1] // (grid[1] * columns or 1))
            if (rows * own[0], columns * own[1]) != patch_size:
                multiple(patch_size, patch_size_of(model, module, size) or own, name)
        width, blurred = layout.width(output), overlaps(model, module)
        return Stem(module, layout, width, candidate, blurred)
    came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    of = f" of {stated[0]}x{stated[1]} pixels" if stated else ""
    raise ValueError(
        f"{name}: {where!r} returns {came} for an image of {size[0]}x{size[1]}, which is no grid "
        f"of patches{of}. Give the module that yields patch tokens as patch_embed=..., the "
        "patches as patch_size=..., or use apply='pixel'."
    )


def _patch_sizes_from(output: Any, size: Grid) -> list[Grid]:
    """Guess pixels per patch from the shape of the tokens of one image."""
    tokens = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(tokens, Tensor) or tokens.ndim != 4:
        return []
    grids = (tokens.shape[1:3], tokens.shape[2:4])
    return [
        (size[0] // rows, size[1] // columns)
        for rows, columns in grids
        if rows and columns and size[0] % rows == 0 and size[1] % columns == 0
    ]


def mask_patch_size(model: nn.Module, stem: nn.Module | None, image_size: Grid | None) -> Grid:
    """Return pixels per patch of the mask, as the model says, or as its tokens show.

    Raises:
        ValueError: neither.
    """
    size = patch_size_of(model, stem, image_size or USUAL_SIZE)
    if size is not None:
        return size
    try:
        return find_stem(model, None, None, None).patch_size
    except ValueError:
        raise ValueError(
            f"{model_name(model)} does not say its patch size, and has no patch embedding that "
            "shows it. Give patch_size=..., the pixels per patch of the mask; with apply='pixel' "
            "any network works."
        ) from None


# --- Dry runs


def empty_image(model: nn.Module, size: tuple[int, int]) -> Tensor:
    """Return one empty image of the model's channels, device and dtype."""
    parameter = next(model.parameters(), torch.empty(0))
    convs = (m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    channels = getattr(model, "in_chans", None) or next(convs, 3)
    return torch.zeros(1, int(channels), *size, device=parameter.device, dtype=parameter.dtype)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and each of its parts back into its own mode after.

    In a dry run, a stem with batch norm would otherwise count an empty image in its statistics.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


class _Stop(BaseException):
    """Ends a dry run where enough is known; no model that handles exceptions takes it for one."""


class Call(NamedTuple):
    """What a module was given, by position and by name, and what it returned."""

    inputs: tuple[Any, ...]
    named: dict[str, Any]
    output: Any


def call_of(model: nn.Module, module: nn.Module, size: Grid) -> Call:
    """Run the model on one empty image up to a module, and return that module's call.

    Raises:
        ValueError: the model does not take such an image, or never calls the module.
    """
    calls: list[Call] = []

    def stop(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
        calls.append(Call(inputs, named, output))
        raise _Stop

    hook = module.register_forward_hook(stop, with_kwargs=True)
    try:
        with evaluating(model), torch.no_grad():
            model(empty_image(model, size))
    except _Stop:
        return calls[0]
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__} in {place.name}, line {place.lineno}: {str(error)[:150]}"
        raise ValueError(
            f"{model_name(model)} cannot take an image of {size[0]}x{size[1]} pixels in a dry run. "
            f"Give image_size=(height, width). ({said})"
        ) from error
    finally:
        hook.remove()
    raise ValueError(
        f"{model_name(model)}: its forward never calls the module where masks should come in. Give "
        "another as patch_embed=... or first_block=..., or use apply='pixel'."
    )


# --- Images of other sizes

# What lets a family take images of several sizes, most usual first; the last needs nothing.
SIZE_ARGUMENTS: tuple[dict[str, Any], ...] = (
    {"dynamic_img_size": True},
    {"strict_img_size": False},
    {},
)


def explain_size_error(
    error: Exception, model: nn.Module, built_for: Grid | None, size: tuple[int, ...]
) -> None:
    """Raise a better error for a forward that failed on images of another size.

    Raises:
        ValueError: the size is another one, and an empty image of that size fails as well; else
            nothing is raised, since the size is not to blame.
    """
    if built_for is None or size == built_for or isinstance(error, torch.OutOfMemoryError):
        return
    if len(size) != 2 or _takes(model, (size[0], size[1])):
        return
    one_size = "give all views one size (local crops as large as global ones)"
    if getattr(model, "dynamic_img_size", False):
        way = "Its sizes must be multiples of its patch"
    elif hasattr(model, "dynamic_img_size"):
        way = f"Build it with dynamic_img_size=True, or {one_size}"
    elif "Swin" in type(model).__name__:
        way = f"Build it with strict_img_size=False, or {one_size}"
    else:
        way = f"Its kind takes one size only: {one_size}, or choose another model"
    raise ValueError(
        f"{model_name(model)} was built for images of {built_for[0]}x{built_for[1]} pixels and "
        f"does not take {'x'.join(map(str, size))}. {way}. (It says: {str(error)[:150]})"
    ) from error


def _takes(model: nn.Module, size: Grid) -> bool:
    try:
        with evaluating(model), torch.no_grad():
            model(empty_image(model, size))
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    return True
