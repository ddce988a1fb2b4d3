"""Object discovery without training: LOST and TokenCut on the keys of the last attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskdistill.evaluation.boxes import component_at, mask_boxes
from maskdistill.models import MaskedViT
from maskdistill.models.probing import evaluating, model_name, prefix_tokens

_TIED = 1e-6
"""By how much, relatively, values of an eigenvector may differ and count as one."""


class Discovery(NamedTuple):
    """The object that was found in each image.

    Attributes:
        boxes: ``(B, 4)`` int64: left, top, right, bottom, in patches; right and bottom are outside.
            ``in_pixels`` makes pixels of them.
        masks: ``(B, H, W)`` bool over the patch grid, True on the object.
        seeds: ``(B,)`` int64, the patch that the object grew from, in reading order.
    """

    boxes: Tensor
    masks: Tensor
    seeds: Tensor


@torch.no_grad()
def last_keys(vit: nn.Module, images: Tensor) -> Tensor:
    """Return the keys of the last attention, of all heads side by side.

    >>> import maskdistill as md
    >>> vit = md.MaskedViT(md.create_backbone("vit_tiny_patch16_224", 32, 8, depth=2))
    >>> last_keys(vit, torch.zeros(4, 3, 32, 32)).shape
    torch.Size([4, 16, 192])

    What the projection gives, before any normalisation or rotary embedding of the keys, as LOST and
    TokenCut take it.

    Args:
        vit: a ``MaskedViT``, or a ViT of timm; runs in evaluation mode.
        images: ``(B, 3, H, W)``, normalised.

    Returns:
        ``(B, N, heads * d)``, of the patches alone.

    Raises:
        ValueError: a model without ``blocks[-1].attn`` that has keys.
    """
    with evaluating(vit), reading_keys(vit) as keys:
        vit(images)
    return keys()


@contextmanager
def reading_keys(vit: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """Yield a function that returns the last keys of the latest forward inside the context.

    >>> with reading_keys(vit) as keys:  # doctest: +SKIP
    ...     features = vit(images)
    ...     boxes = lost(keys(), (14, 14)).boxes
    """
    model: Any = vit.backbone if isinstance(vit, MaskedViT) else vit
    name = model_name(model)
    try:
        attention = model.blocks[-1].attn
    except (AttributeError, IndexError, TypeError, KeyError):
        attention = None
    project = _key_projection(attention)
    if project is None:
        raise ValueError(
            f"{name} has no keys to read: its last block has no attn.qkv or attn.k_proj. Choose a "
            "plain ViT of timm."
        )
    seen: list[Tensor] = []

    def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen[:] = [project(inputs[0])]

    def keys() -> Tensor:
        if not seen:
            raise ValueError(
                f"{name}: no forward has gone through its last attention. Run the model inside the "
                "context."
            )
        return seen[0][:, prefix_tokens(model) :].float()

    hook = attention.register_forward_pre_hook(see)
    try:
        yield keys
    finally:
        hook.remove()


def _key_projection(attention: Any) -> Callable[[Tensor], Tensor] | None:
    """Return what makes keys of the tokens that go into an attention of timm."""
    qkv, alone = getattr(attention, "qkv", None), getattr(attention, "k_proj", None)
    if isinstance(qkv, nn.Linear) and qkv.out_features % 3 == 0:
        middle = slice(qkv.out_features // 3, 2 * qkv.out_features // 3)

        # From the weights and not from qkv's output: EVA adds its biases outside of the module.
        def project(tokens: Tensor) -> Tensor:
            bias = getattr(attention, "k_bias", None) if qkv.bias is None else qkv.bias[middle]
            return F.linear(tokens, qkv.weight[middle], bias)

        return project
    return alone if isinstance(alone, nn.Linear) else None


@torch.no_grad()
def lost(keys: Tensor, grid: tuple[int, int], *, k: int = 100, chunk: int = 32) -> Discovery:
    """Find one object per image: patches unlike the others, and what goes with them.

    >>> keys = torch.tensor([[[1.0, 0.2], [1.0, 0.1], [-1.0, 0.3], [1.0, 0.0]]])  # 2x2 patches
    >>> lost(keys, (2, 2), k=1).boxes
    tensor([[0, 1, 1, 2]])

    Two patches are neighbours if the product of their keys is positive. The seed is the patch with
    the fewest neighbours; among the k patches with the fewest, those that are the seed's neighbours
    support it. The object is the connected part, around the seed, of the patches whose products
    with the supporters sum to more than 0 (Siméoni et al., 2021). Of patches with equally many
    neighbours the first in reading order comes first, where the original leaves it open.

    Args:
        keys: ``(B, N, D)``, as ``last_keys`` gives them, not normalised.
        grid: patch rows and columns.
        k: patches that may support the seed; the original's 100 is half of the patches of a 14x14
            grid, and more than all of a small one.
        chunk: images at a time, which bounds the memory by ``chunk * N * N``.

    Raises:
        ValueError: shapes that do not fit, keys that are not finite, or k < 1.
    """
    _check(keys, "keys", grid)
    if k < 1:
        raise ValueError(f"k must be an int >= 1; got {k!r}.")
    return _joined([_lost(part.float(), grid, k) for part in keys.split(chunk)])


def _lost(keys: Tensor, grid: tuple[int, int], k: int) -> Discovery:
    products = keys @ keys.mT
    itself = torch.eye(keys.shape[1], dtype=torch.bool, device=keys.device)
    order = ((products > 0) & ~itself).sum(dim=2).argsort(dim=1, stable=True)
    seeds = order[:, 0]
    to_seed = products.gather(1, seeds[:, None, None].expand(-1, 1, products.shape[2]))[:, 0]
    few = torch.zeros_like(to_seed, dtype=torch.bool).scatter(1, order[:, :k], True)
    supporters = few & (to_seed > 0)
    object_ = (supporters.float().unsqueeze(1) @ products)[:, 0] > 0
    return _object_at(object_, seeds, grid)


@torch.no_grad()
def token_cut(
    features: Tensor,
    grid: tuple[int, int],
    *,
    tau: float = 0.2,
    eps: float = 1e-5,
    chunk: int = 32,
) -> Discovery:
    """Find one object per image by a normalised cut of the graph of its patches.

    >>> features = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, -0.1]]])  # 2x2 patches
    >>> token_cut(features, (2, 2)).boxes
    tensor([[0, 1, 1, 2]])

    Patches whose cosine similarity is above tau are joined by an edge of 1, others by eps. The
    second smallest eigenvector of (D - W) y = lambda D y is cut at its mean; the object is on the
    side of its largest absolute value, the seed, and is the seed's connected part there (Wang et
    al., 2022). Patches with the same neighbours have the same value; of such the first in reading
    order is the seed, and those at the mean are not the object's, where the original leaves both to
    rounding.

    Where no two patches, or all, are joined, there is nothing to cut: any vector is as good, and
    the original's answer is a matter of rounding. The whole image is returned. Where two cuts are
    equally good, as with several patches that are joined to none, rounding decides here as well.

    Args:
        features: ``(B, N, D)``: keys, as ``last_keys`` gives them; made unit length here.
        grid: patch rows and columns.
        tau: least similarity of an edge.
        eps: weight of the other edges, which keeps the graph connected.
        chunk: images at a time, which bounds the memory by ``chunk * N * N`` in float64.

    Raises:
        ValueError: shapes that do not fit, or features that are not finite.
    """
    _check(features, "features", grid)
    return _joined([_token_cut(part, grid, tau, eps) for part in features.split(chunk)])


def _token_cut(features: Tensor, grid: tuple[int, int], tau: float, eps: float) -> Discovery:
    unit = F.normalize(features.float(), dim=-1)
    joined = unit @ unit.mT > tau
    # In float64: the graph is nearly in pieces, and its small eigenvalues differ by about eps.
    weights = torch.where(joined, 1.0, torch.tensor(eps, dtype=torch.float64, device=unit.device))
    scale = weights.sum(dim=2).rsqrt()
    # With y = D^-1/2 z the problem is the symmetric I - D^-1/2 W D^-1/2, the largest of whose
    # complement are its smallest.
    similar = scale[:, :, None] * weights * scale[:, None, :]
    vector = torch.linalg.eigh(similar).eigenvectors[:, :, -2] * scale
    size, away = vector.abs(), vector - vector.mean(dim=1, keepdim=True)
    rounding = _TIED * size.amax(dim=1, keepdim=True)
    # Patches with the same neighbours have the same value, to rounding: the first of them.
    seeds = (size >= size.amax(dim=1, keepdim=True) - rounding).int().argmax(dim=1)
    object_ = away * away.gather(1, seeds[:, None]).sign() > rounding
    edges = joined.sum(dim=(1, 2)) - joined.diagonal(dim1=1, dim2=2).sum(dim=1)
    patches = features.shape[1]
    nothing = (edges == 0) | (edges == patches * (patches - 1))
    return _object_at(object_ | nothing[:, None], seeds.masked_fill(nothing, 0), grid)


def _object_at(marked: Tensor, seeds: Tensor, grid: tuple[int, int]) -> Discovery:
    masks = component_at(marked.unflatten(1, grid), seeds)
    return Discovery(mask_boxes(masks), masks, seeds)


def _joined(parts: list[Discovery]) -> Discovery:
    return Discovery(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _check(features: Tensor, name: str, grid: tuple[int, int]) -> None:
    if features.ndim != 3 or features.shape[1] != grid[0] * grid[1] or not len(features):
        raise ValueError(
            f"{name} must be (B, N, D) with B >= 1 and N = {grid[0] * grid[1]} for a grid of "
            f"{grid[0]}x{grid[1]}, without prefix tokens; got {tuple(features.shape)}."
        )
    if grid[0] * grid[1] < 2:
        raise ValueError("an image of one patch has no object to find; choose smaller patches.")
    if not torch.isfinite(features).all():
        raise ValueError(f"{name} hold NaN or infinite numbers; has training diverged?")
