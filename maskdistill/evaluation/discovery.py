"""Object discovery without training: LOST and TokenCut on the keys of the last attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maskdistill.evaluation.attention import check_attention, check_masks, keep_mass
from maskdistill.models import MaskedViT
from maskdistill.models.probing import evaluating, model_name, prefix_tokens

AREAS = tuple(i / 20 for i in range(1, 21))
"""Shares of the image that centred boxes are tried with."""


class CentreBox(NamedTuple):
    """What a fixed box in the middle of every image scores.

    Attributes:
        score: of the best of the boxes that were tried, in [0, 1].
        area: that box's share of the image.
    """

    score: float
    area: float


def box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return intersection over union of boxes, pair by pair with broadcasting.

    >>> box_iou(torch.tensor([0, 0, 2, 2]), torch.tensor([[0, 0, 2, 1], [5, 5, 6, 6]]))
    tensor([0.5000, 0.0000])

    Args:
        first: ``(..., 4)``: left, top, right, bottom; right and bottom are outside.
        second: the same.

    Returns:
        ``(...)`` in [0, 1]; 0 where both boxes are empty.
    """
    first, second = first.double(), second.double()
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    intersection = (high - low).clamp(min=0).prod(dim=-1)
    union = _area(first) + _area(second) - intersection
    return (intersection / union.clamp(min=torch.finfo(torch.float64).tiny)).float()


def mask_boxes(masks: Tensor) -> Tensor:
    """Return the tight box around each mask.

    >>> mask_boxes(torch.tensor([[[False, True, True], [False, False, True]]]))
    tensor([[1, 0, 3, 2]])

    Args:
        masks: ``(..., H, W)`` bool.

    Returns:
        ``(..., 4)`` int64: left, top, right, bottom; right and bottom are outside, so a box of one
        pixel has a width of 1.

    Raises:
        ValueError: no bool masks, or an empty one.
    """
    if masks.ndim < 2 or masks.dtype != torch.bool:
        raise ValueError(f"masks must be (..., H, W) bool; got {tuple(masks.shape)} {masks.dtype}.")
    rows, columns = masks.any(dim=-1), masks.any(dim=-2)
    if not rows.any(dim=-1).all():
        raise ValueError("every mask must mark something; at least one is empty.")
    (top, bottom), (left, right) = _ends(rows), _ends(columns)
    return torch.stack([left, top, right, bottom], dim=-1)


def connected_components(masks: Tensor) -> Tensor:
    """Number the connected parts of each mask; neighbours share a side, not a corner.

    >>> connected_components(torch.tensor([[[True, False, True], [True, False, False]]]))
    tensor([[[1, 0, 3],
             [1, 0, 0]]])

    Args:
        masks: ``(B, H, W)`` bool.

    Returns:
        ``(B, H, W)`` int64: 0 outside, else 1 + the place of the part's first cell in reading
        order, so numbers have gaps.
    """
    batch, height, width = masks.shape
    cells = height * width
    start = torch.arange(cells, device=masks.device).view(1, height, width).expand_as(masks)
    labels = torch.where(masks, start, cells)
    while True:
        # The least label of a cell and its neighbours; then that of the cell that it names, which
        # lies in the same part. So labels travel in leaps, and a few rounds suffice.
        edged = F.pad(labels, (1, 1, 1, 1), value=cells)
        around = (edged[:, :-2, 1:-1], edged[:, 2:, 1:-1], edged[:, 1:-1, :-2], edged[:, 1:-1, 2:])
        least = torch.stack([labels, *around]).amin(dim=0)
        least = torch.where(masks, least, cells).flatten(1)
        named = F.pad(least, (0, 1), value=cells).gather(1, least)
        named = named.view(batch, height, width)
        if torch.equal(named, labels):
            return (labels + 1).masked_fill(~masks, 0)
        labels = named


def largest_component(masks: Tensor) -> Tensor:
    """Keep the largest connected part of each mask, the first in reading order of equals.

    >>> largest_component(torch.tensor([[[True, False, True, True]]]))
    tensor([[[False, False,  True,  True]]])

    Args:
        masks: ``(B, H, W)`` bool; an empty one stays empty.
    """
    labels = connected_components(masks).flatten(1)
    sizes = labels.new_zeros(len(labels), masks[0].numel() + 1)
    sizes.scatter_add_(1, labels, (labels > 0).long())
    largest = sizes.argmax(dim=1, keepdim=True)
    return ((labels == largest) & (labels > 0)).view_as(masks)


def component_at(masks: Tensor, cells: Tensor) -> Tensor:
    """Keep the connected part of each mask that holds a cell.

    >>> component_at(torch.tensor([[[True, False, True, True]]]), torch.tensor([0]))
    tensor([[[ True, False, False, False]]])

    Args:
        masks: ``(B, H, W)`` bool.
        cells: ``(B,)``, places in reading order; a cell outside its mask is alone.
    """
    alone = torch.zeros_like(masks).flatten(1).scatter(1, cells[:, None], True).view_as(masks)
    labels = connected_components(masks | alone).flatten(1)
    part = (labels == labels.gather(1, cells[:, None])).view_as(masks)
    inside = masks.flatten(1).gather(1, cells[:, None])[:, :, None]
    return torch.where(inside, part, alone)


def attention_boxes(
    attention: Tensor,
    grid: tuple[int, int],
    image_size: tuple[int, int],
    *,
    mass: float = 0.6,
) -> Tensor:
    """Return the box of what each head attends to.

    >>> attention = torch.tensor([[[0.7, 0.1, 0.1, 0.1]]])  # one image, one head, 2x2 patches
    >>> attention_boxes(attention, (2, 2), (32, 32))
    tensor([[[ 0.,  0., 16., 16.]]])

    The patches that hold the mass, of these the largest connected part, and the box around it (the
    baseline "DINO-seg" of Siméoni et al., 2021).

    Args:
        attention: ``(B, heads, N)``.
        grid: patch rows and columns.
        image_size: pixels (height, width).
        mass: share of the attention to keep.

    Returns:
        ``(B, heads, 4)``, in pixels.
    """
    check_attention(attention, grid)
    kept = rearrange(keep_mass(attention, mass), "b m (h w) -> (b m) h w", h=grid[0])
    if not kept.flatten(1).any(dim=1).all():
        raise ValueError("attention must have mass in every head; at least one head has none.")
    boxes = in_pixels(mask_boxes(largest_component(kept)), grid, image_size)
    return boxes.view(*attention.shape[:2], 4)


def in_pixels(boxes: Tensor, grid: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """Turn boxes of patches into boxes of pixels, ``(..., 4)`` float32.

    >>> in_pixels(torch.tensor([0, 1, 2, 2]), (2, 2), (32, 64))
    tensor([ 0., 16., 64., 32.])
    """
    (rows, columns), (height, width) = grid, image_size
    scale = [width / columns, height / rows] * 2
    return boxes * torch.tensor(scale, device=boxes.device)


def corloc(predicted: Tensor, truth: Tensor | Sequence[Tensor], *, threshold: float = 0.5) -> float:
    """Return the share of images whose box finds an object (correct localisation).

    >>> predicted = torch.tensor([[0, 0, 8, 8], [0, 0, 8, 8]])
    >>> truth = [torch.tensor([[20, 20, 30, 30], [0, 0, 8, 9]]), torch.tensor([[0, 0, 9, 30]])]
    >>> corloc(predicted, truth)
    0.5

    An image counts if its box and any of its true boxes have an intersection over union of at least
    the threshold (Deselaers et al., 2010; as in LOST and TokenCut).

    Args:
        predicted: ``(B, 4)``: left, top, right, bottom.
        truth: of each image ``(n, 4)`` with n >= 1; or ``(B, 4)``, one box per image.
        threshold: of the intersection over union, in (0, 1].

    Returns:
        In [0, 1].

    Raises:
        ValueError: shapes that do not fit, boxes that are not finite, no images, or an image
            without a true box.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1]; got {threshold!r}.")
    if predicted.ndim != 2 or predicted.shape[1] != 4 or not len(predicted):
        raise ValueError(
            f"predicted must be (B, 4) with B >= 1, one box per image; got "
            f"{tuple(predicted.shape)}."
        )
    boxes = _padded(truth, len(predicted))
    predicted = predicted.cpu().double()
    if not (torch.isfinite(predicted).all() and torch.isfinite(boxes).all()):
        raise ValueError("boxes must be finite numbers; at least one is NaN or infinite.")
    return float((box_iou(predicted[:, None], boxes) >= threshold).any(dim=1).float().mean())


def centre_box(image_size: tuple[int, int], area: float) -> Tensor:
    """Return the box in the middle of an image, of its proportions and a share of its area.

    >>> centre_box((100, 200), 0.25)
    tensor([ 50.,  25., 150.,  75.])

    Args:
        image_size: pixels (height, width).
        area: share of the image, in (0, 1].
    """
    if not 0 < area <= 1:
        raise ValueError(f"area must be in (0, 1], a share of the image; got {area!r}.")
    height, width = image_size
    y, x = height * (1 - area**0.5) / 2, width * (1 - area**0.5) / 2
    return torch.tensor([x, y, width - x, height - y])


def centre_box_corloc(
    truth: Tensor | Sequence[Tensor],
    image_size: tuple[int, int],
    *,
    areas: Sequence[float] = AREAS,
    threshold: float = 0.5,
) -> CentreBox:
    """Return the CorLoc of the best fixed box in the middle: what has to be beaten.

    >>> centre_box_corloc(torch.tensor([[25, 25, 75, 75]]), (100, 100))
    CentreBox(score=1.0, area=0.15)

    The best area is chosen on this very truth, so the baseline is at its strongest.

    Args:
        truth: as in ``corloc``.
        image_size: pixels (height, width) of all images.
        areas: shares of the image to try; the smallest of the best is taken.
        threshold: as in ``corloc``.
    """
    scores = []
    for area in areas:
        box = centre_box(image_size, area)
        scores.append(corloc(box.expand(len(truth), 4), truth, threshold=threshold))
    return _best(scores, areas)


def centre_box_jaccard(
    masks: Tensor, *, areas: Sequence[float] = AREAS, ignore: Tensor | None = None
) -> CentreBox:
    """Return the mean Jaccard of the best fixed box in the middle: what has to be beaten.

    >>> masks = torch.zeros(1, 100, 100, dtype=torch.bool)
    >>> masks[:, 25:75, 25:75] = True
    >>> centre_box_jaccard(masks)
    CentreBox(score=1.0, area=0.25)

    Args:
        masks: ``(B, H, W)`` bool, True on the object.
        areas: shares of the image to try; the smallest of the best is taken.
        ignore: void pixels, as in ``attention_jaccard``.
    """
    check_masks(masks, len(masks), ignore)
    height, width = masks.shape[1:]
    objects = masks if ignore is None else masks & ~ignore
    sizes, scores = objects.sum(dim=(1, 2)), []
    for area in areas:
        left, top, right, bottom = centre_box((height, width), area).round().long().tolist()
        inside = objects[:, top:bottom, left:right].sum(dim=(1, 2))
        covered = (bottom - top) * (right - left)
        if ignore is not None:
            covered = covered - ignore[:, top:bottom, left:right].sum(dim=(1, 2))
        scores.append(float((inside / (sizes + covered - inside)).mean()))
    return _best(scores, areas)


def _best(scores: Sequence[float], areas: Sequence[float]) -> CentreBox:
    best = max(range(len(scores)), key=lambda i: (scores[i], -areas[i]))
    return CentreBox(scores[best], areas[best])


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)


def _ends(marked: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and one past the last place marked along the last dimension."""
    first = marked.int().argmax(dim=-1)  # the first of equals
    last = marked.shape[-1] - marked.flip(-1).int().argmax(dim=-1)
    return first, last


def _padded(truth: Tensor | Sequence[Tensor], images: int) -> Tensor:
    """Return true boxes ``(B, most, 4)`` on the CPU; empty ones, which nothing meets, fill up."""
    if len(truth) != images:
        raise ValueError(f"truth must have the boxes of {images} images; got {len(truth)}.")
    each = [boxes[None] if boxes.ndim == 1 else boxes for boxes in truth]
    for index, boxes in enumerate(each):
        if boxes.ndim != 2 or boxes.shape[1] != 4 or not len(boxes):
            raise ValueError(
                f"the true boxes of image {index} must be (n, 4) with n >= 1; got "
                f"{tuple(boxes.shape)}. Leave images without an object out."
            )
    return torch.nn.utils.rnn.pad_sequence([b.cpu().double() for b in each], batch_first=True)


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
