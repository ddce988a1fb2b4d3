"""How a mask changes the input: a learned token, a dropped token, or filled pixels."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from maskdistill.masking.mask import check_mask, patch_grid

Grid: TypeAlias = tuple[int, int]
"""Rows and columns, or (height, width)."""
Application: TypeAlias = Literal["token", "drop", "pixel"]
"""``token``: a learned token replaces the patch embedding, before the position embedding (iBOT).
``drop``: the token is removed, after the position embedding (MAE, MSN). ``pixel``: the patch is
filled in the image."""
Fill: TypeAlias = Literal["zero", "mean", "noise", "blur"]
APPLICATIONS: tuple[str, ...] = get_args(Application)
FILLS: tuple[str, ...] = get_args(Fill)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a setting that is none of its choices.

    Raises:
        ValueError: names the choices.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")


# --- Pixels


def mask_pixels(
    images: Tensor,
    mask: Tensor,
    patch_size: int | tuple[int, int],
    fill: Fill = "zero",
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill the hidden patches of images; works in front of any network at all.

    >>> images, mask = torch.ones(1, 3, 4, 4), torch.tensor([[True, False, False, False]])
    >>> mask_pixels(images, mask, patch_size=2)[0, 0]
    tensor([[0., 0., 1., 1.],
            [0., 0., 1., 1.],
            [1., 1., 1., 1.],
            [1., 1., 1., 1.]])
    >>> soft = torch.tensor([[0.5, 0.0, 0.0, 1.0]])
    >>> mask_pixels(images, soft, patch_size=2)[0, 0]
    tensor([[0.5000, 0.5000, 1.0000, 1.0000],
            [0.5000, 0.5000, 1.0000, 1.0000],
            [1.0000, 1.0000, 0.0000, 0.0000],
            [1.0000, 1.0000, 0.0000, 0.0000]])

    A soft mask m gives images * (1 - m) + filling * m, and passes gradients on to the network that
    made it (ADIOS: Shi et al., 2022, with ``"zero"``).

    Args:
        images: ``(B, C, H, W)`` floats.
        mask: ``(B, N)`` bool, True = hidden, row-major over the patch grid; or a soft one, floats
            in [0, 1] with 1 = hidden: ``(B, N)``, or ``(B, 1, H, W)`` with a value per pixel.
        patch_size: pixels per patch, one int or (height, width).
        fill: ``"zero"`` writes 0, which after the usual normalisation is the mean colour of the
            data set, not black; ``"mean"`` each image's mean colour; ``"noise"`` normal noise with
            each image's mean and standard deviation per channel; ``"blur"`` the image averaged
            over three patches in each direction.
        generator: source of the noise; None is torch's global generator.

    Returns:
        ``(B, C, H, W)`` of the images' dtype; visible patches are untouched.

    Raises:
        ValueError: misshapen images or mask, patches that do not divide the image, unknown fill, or
            a soft mask outside [0, 1], which is checked on the CPU only: to look at an accelerator
            would make the host wait.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images must be (B, C, H, W) floats; got {tuple(images.shape)} {images.dtype}."
        )
    grid = patch_grid((images.shape[2], images.shape[3]), patch_size)
    soft = isinstance(mask, Tensor) and mask.is_floating_point()
    if soft:
        _check_soft_mask(mask, images, grid)
    else:
        check_mask(mask, images.shape[0], grid)
    size = (images.shape[2] // grid[0], images.shape[3] // grid[1])
    hidden = mask
    if mask.ndim == 2:
        hidden = rearrange(mask, "b (h w) -> b 1 h w", h=grid[0])
        hidden = hidden.repeat_interleave(size[0], dim=2).repeat_interleave(size[1], dim=3)
    filling = _filling(images, size, fill, generator)
    if not soft:
        return torch.where(hidden, filling, images)
    hidden = hidden.to(images.dtype)
    return images * (1 - hidden) + filling * hidden


def _check_soft_mask(mask: Tensor, images: Tensor, grid: tuple[int, int]) -> None:
    batch, _, height, width = images.shape
    patches = grid[0] * grid[1]
    if tuple(mask.shape) not in ((batch, patches), (batch, 1, height, width)):
        raise ValueError(
            f"a soft mask must be (B, N) = ({batch}, {patches}) or (B, 1, H, W) = "
            f"({batch}, 1, {height}, {width}); got {tuple(mask.shape)}."
        )
    if mask.device.type != "cpu" or torch.compiler.is_compiling() or not mask.numel():
        return
    low, high = (float(value) for value in mask.detach().aminmax())
    if not -0.01 <= low <= high <= 1.01:  # forgives rounding, also of bfloat16; refuses NaN
        raise ValueError(
            f"a soft mask must lie in [0, 1], 1 where all is hidden; got values from {low:g} to "
            f"{high:g}. Put logits through sigmoid or softmax first."
        )


def _filling(
    images: Tensor, size: tuple[int, int], fill: Fill, generator: torch.Generator | None
) -> Tensor:
    match fill:
        case "zero":
            return images.new_zeros(())
        case "mean":
            return images.mean(dim=(2, 3), keepdim=True)
        case "noise":
            device = images.device if generator is None else generator.device
            noise = torch.randn(
                images.shape, generator=generator, device=device, dtype=images.dtype
            ).to(images.device)
            std, mean = torch.std_mean(images, dim=(2, 3), keepdim=True)
            return mean + std * noise
        case "blur":
            window = (2 * size[0] + 1, 2 * size[1] + 1)
            return F.avg_pool2d(images, window, 1, size, count_include_pad=False)
    raise ValueError(f"fill must be one of {', '.join(FILLS)}; got {fill!r}.")


def fill_patches(
    images: Tensor, mask: Tensor, grid: Grid, patch_size: Grid, filling: Fill
) -> Tensor:
    """Fill hidden patches, leaving alone what lies beyond the last whole patch.

    A model whose patches do not divide its images leaves that rest out (SigLIP: 384 pixels in
    patches of 14).
    """
    rows, columns = grid[0] * patch_size[0], grid[1] * patch_size[1]
    if (rows, columns) == tuple(images.shape[-2:]):
        return mask_pixels(images, mask, patch_size, filling)
    filled = images.clone()
    inside = images[..., :rows, :columns]
    filled[..., :rows, :columns] = mask_pixels(inside, mask, patch_size, filling)
    return filled


# --- Tokens


def replace_tokens(tokens: Tensor, mask: Tensor, mask_token: Tensor) -> Tensor:
    """Put the mask token where patches are hidden: ``(B, N, D)``, ``(B, N)``, ``(D,)``.

    Zhou et al., 2022 (iBOT); the position embedding is added afterwards, by the model.
    """
    return torch.where(mask[..., None], mask_token.to(tokens.dtype), tokens)


def visible_indices(mask: Tensor, count: int | None = None) -> Tensor:
    """Return the indices of the visible patches of each row, ascending: ``(B, N_visible)`` int64.

    >>> visible_indices(torch.tensor([[True, False, False], [False, True, False]]))
    tensor([[1, 2],
            [0, 2]])

    Args:
        mask: ``(B, N)`` bool, True = hidden; every row must hide the same number of patches.
        count: that number of hidden patches, where it is known. None counts them, which makes the
            host wait for an accelerator and breaks a compiled graph.

    Raises:
        ValueError: rows that hide different numbers of patches, or another number than given
            (checked on the CPU, or when counting), or rows that hide all.
    """
    patches = mask.shape[1]
    if count is None:
        counts = mask.sum(dim=1)
        least, count = (int(counts.min()), int(counts.max())) if len(counts) else (0, 0)
        if least != count:
            raise ValueError(
                f"dropping tokens needs the same number of hidden patches in every row, but rows "
                f"hide from {least} to {count}. Use masker.exactly(ratio), or apply='token'."
            )
    elif mask.device.type == "cpu" and not torch.compiler.is_compiling():
        counted = mask.sum(dim=1)
        if bool((counted != count).any()):
            raise ValueError(
                f"count={count} was given, but the rows of the mask hide from "
                f"{int(counted.min())} to {int(counted.max())} patches."
            )
    if not 0 <= count <= patches:
        raise ValueError(f"count must be from 0 to {patches - 1}; got {count}.")
    if count == patches:
        raise ValueError(
            "dropping would leave no patch at all: the mask hides every one. Use a smaller ratio."
        )
    # A stable sort of False < True lists the visible patches first, in order.
    return mask.to(torch.uint8).argsort(dim=1, stable=True)[:, : patches - count]


def drop_tokens(tokens: Tensor, keep: Tensor, prefix: int = 0) -> Tensor:
    """Keep the prefix tokens and the patches in ``keep``: ``(B, P + N, D)`` to ``(B, P + K, D)``.

    Args:
        tokens: prefix tokens, then patch tokens.
        keep: ``(B, K)`` indices among the patches, as ``visible_indices`` gives them.
        prefix: number of prefix tokens, P.
    """
    index = keep[..., None].expand(-1, -1, tokens.shape[-1])
    kept = tokens[:, prefix:].gather(1, index)
    return torch.cat([tokens[:, :prefix], kept], dim=1) if prefix else kept


class _Tie(torch.autograd.Function):
    """Hands tokens on, and a gradient of zero to the mask token that none of them used.

    A copy rather than a view, since models may add to it in place. Of the mask token only the shape
    is kept, since an optimiser may change its value.
    """

    @staticmethod
    def forward(tokens: Tensor, mask_token: Tensor) -> Tensor:
        return tokens.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        token = inputs[1]
        ctx.shape, ctx.kind = token.shape, {"dtype": token.dtype, "device": token.device}

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.zeros(ctx.shape, **ctx.kind)


def tied(tokens: Tensor, mask_token: Tensor) -> Tensor:
    """Return the tokens, and see to it that an unused mask token gets a gradient of zero.

    Data-parallel training expects a gradient of every parameter in every step, also in one that
    masks nothing. Where nothing else learns, the tokens come back as they are: a gradient would
    only make the whole network keep its activations.
    """
    if not tokens.requires_grad:
        return tokens
    copy: Tensor = _Tie.apply(tokens, mask_token)
    return copy


# --- Where the tokens are


@dataclass(frozen=True)
class Layout:
    """Where patch tokens lie in the output of a module.

    Attributes:
        axes: ``"b n d"``, ``"b h w d"`` or ``"b d h w"``.
        in_tuple: whether the tokens are the first of a tuple, as in XCiT or MViTv2.
        tokens_per_patch: rows and columns of tokens in one patch of the mask: (1, 1) in a ViT,
            (8, 8) in a Swin, whose stem is finer than its last stage; None where patches and
            tokens are not aligned.
    """

    axes: str
    in_tuple: bool = False
    tokens_per_patch: Grid | None = (1, 1)

    def tokens(self, output: Any) -> Tensor:
        """Return the tensor of tokens in the output."""
        tokens: Tensor = output[0] if self.in_tuple else output
        return tokens

    def width(self, output: Any) -> int:
        """Return the tokens' width, D."""
        return int(self.tokens(output).shape[1 if self.axes == "b d h w" else -1])

    def map(self, output: Any, function: Callable[[Tensor], Tensor]) -> Any:
        """Return the output with its tokens put through a function."""
        changed = function(self.tokens(output))
        return (changed, *output[1:]) if self.in_tuple else changed

    def replace(self, output: Any, mask: Tensor, mask_token: Tensor, grid: Grid) -> Any:
        """Return the output with the mask token where patches are hidden.

        Args:
            output: what the module returned, in this layout.
            mask: ``(B, N)`` bool over the patch grid.
            mask_token: ``(D,)``.
            grid: patch rows and columns of this very input.

        Raises:
            ValueError: an output whose token grid is not a multiple of the patch grid.
        """
        size = self._token_grid(self.tokens(output), grid)
        hidden = mask if size == grid else upsample(mask, grid, size)

        def replaced(tokens: Tensor) -> Tensor:
            if self.axes == "b n d":
                return replace_tokens(tokens, hidden, mask_token)
            flat = rearrange(tokens, f"{self.axes} -> b (h w) d")
            flat = replace_tokens(flat, hidden, mask_token)
            return rearrange(flat, f"b (h w) d -> {self.axes}", h=size[0])

        return self.map(output, replaced)

    def _token_grid(self, tokens: Tensor, grid: Grid) -> Grid:
        if self.axes == "b h w d":
            return tokens.shape[1], tokens.shape[2]
        if self.axes == "b d h w":
            return tokens.shape[2], tokens.shape[3]
        if self.tokens_per_patch is None:
            found = _grid_of(tokens.shape[1], grid)
        else:
            found = (grid[0] * self.tokens_per_patch[0], grid[1] * self.tokens_per_patch[1])
        if found is None or found[0] * found[1] != tokens.shape[1]:
            raise ValueError(
                f"the model made {tokens.shape[1]} tokens of an image with a grid of "
                f"{grid[0]}x{grid[1]} patches, which does not fit its stem. Wrap the model again "
                "if its input size was changed, or use apply='pixel'."
            )
        return found


def upsample(mask: Tensor, grid: Grid, size: Grid) -> Tensor:
    """Bring a mask from the patch grid to a finer grid of tokens.

    A token is hidden where its centre lies in a hidden patch (SimMIM does so for Swin).

    >>> upsample(torch.tensor([[True, False]]), (1, 2), (2, 4)).reshape(2, 4)
    tensor([[ True,  True, False, False],
            [ True,  True, False, False]])

    Args:
        mask: ``(B, N)`` bool over ``grid``.
        grid: rows and columns of patches.
        size: rows and columns of tokens.
    """
    cells = rearrange(mask, "b (h w) -> b h w", h=grid[0])
    for dim, (patches, tokens) in enumerate(zip(grid, size, strict=True), start=1):
        if tokens % patches == 0:
            cells = cells.repeat_interleave(tokens // patches, dim=dim)
        else:
            centres = (2 * torch.arange(tokens, device=mask.device) + 1) * patches
            cells = cells.index_select(dim, centres // (2 * tokens))
    return cells.flatten(1)


def find_layout(output: Any, grid: Grid) -> Layout | None:
    """Recognise the layout of patch tokens in a module's output, or return None.

    Args:
        output: what the module returned for one image.
        grid: patch rows and columns of that image; there may be more tokens than patches.
    """
    in_tuple = isinstance(output, (tuple, list)) and len(output) > 0
    tokens = output[0] if in_tuple else output
    if not isinstance(tokens, Tensor):
        return None
    shape = tuple(tokens.shape)
    if len(shape) == 3:
        size = _grid_of(shape[1], grid)
        return None if size is None else Layout("b n d", in_tuple, _ratio(size, grid))
    if len(shape) != 4:
        return None
    # Channels last, or first: the two axes with the proportions of the patch grid are the rows
    # and columns. An exact match wins over mere proportions.
    for fits in (operator.eq, _alike):
        for axes, size in (("b h w d", shape[1:3]), ("b d h w", shape[2:4])):
            if fits(size, grid):
                return Layout(axes, in_tuple, _ratio(size, grid))
    return None


def _alike(size: tuple[int, ...], grid: Grid) -> bool:
    """Whether a token grid covers the same image: as many tokens per patch in both directions."""
    return size[0] * grid[1] == size[1] * grid[0] and size[0] > grid[0]


def _grid_of(tokens: int, grid: Grid) -> Grid | None:
    """Return the token grid with the proportions of the patch grid, or None."""
    rows = math.isqrt(tokens * grid[0] // grid[1]) if grid[1] else 0
    if rows and tokens % rows == 0 and rows * grid[1] == tokens // rows * grid[0]:
        return rows, tokens // rows
    return None


def _ratio(size: tuple[int, ...], grid: Grid) -> Grid | None:
    if size[0] % grid[0] or size[1] % grid[1]:
        return None
    return size[0] // grid[0], size[1] // grid[1]


# --- The running forward


class Request:
    """What the running forward asks of the hooks: one object, which wrapper and hooks share.

    torch.compile sees it from both sides; through a method bound to the wrapper, torch 2.6 reads a
    mask that is out of date.

    Attributes:
        mask: ``(B, N)`` of the running forward, or None.
        keep: ``(B, K)`` indices of the patch tokens that are kept, or None.
        grid: patch rows and columns of the running forward's images.
        tokens: number of patch tokens before any is dropped.
        class_only: whether the class token is all that is wanted.
        recorders: of the attention, while they are recording.
        batch, patches: for a recorder: images, and patches that are seen of each.
        per_patch: rows and columns of the model's own patches in one of the mask.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.keep: Tensor | None = None
        self.grid: Grid = (0, 0)
        self.tokens = 0
        self.class_only = False
        self.recorders: list[Any] = []
        self.batch = self.patches = 0
        self.per_patch: Grid = (1, 1)

    def clear(self) -> None:
        """Forget the mask."""
        self.mask = self.keep = None
        if self.recorders:
            self.batch = self.patches = 0
