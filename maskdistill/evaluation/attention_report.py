"""All of a model's attention quality in one table, next to random weights and a centred box."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from maskdistill.data.crops import normalize
from maskdistill.evaluation.attention import (
    attention_entropy,
    attention_jaccard,
    attention_spread,
    head_diversity,
    mean_attention_distance,
    patch_weights,
    pointing_game,
    reading_weights,
)
from maskdistill.evaluation.discovery import (
    attention_boxes,
    centre_box_corloc,
    centre_box_jaccard,
    corloc,
    in_pixels,
    lost,
    mask_boxes,
    reading_keys,
    token_cut,
)
from maskdistill.models import MaskedViT
from maskdistill.models.probing import evaluating


@dataclasses.dataclass(frozen=True)
class AttentionScores:
    """What is measured of one model's last attention; means over images.

    Attributes:
        jaccard_best_head: ``attention_jaccard``, see ``HeadScores``.
        jaccard_mean_over_heads: the same.
        jaccard_head_mean: the same.
        corloc_attention: CorLoc of the box of the head-mean map.
        corloc_lost: CorLoc of LOST's box; None where the model has no keys to read.
        corloc_token_cut: CorLoc of TokenCut's box; None likewise.
        pointing_best_head: ``pointing_game``, see ``HeadScores``.
        pointing_mean_over_heads: the same.
        pointing_head_mean: the same.
        entropy: of a head's map, over ln N; 1 is even.
        head_diversity: Jensen-Shannon divergence between heads, in bits.
        attention_spread: of a head's map around its centre, in pixels.
        attention_distance: mean attention distance of the last block, over heads, in pixels; None
            where its attention cannot be read.
    """

    jaccard_best_head: float
    jaccard_mean_over_heads: float
    jaccard_head_mean: float
    corloc_attention: float
    corloc_lost: float | None
    corloc_token_cut: float | None
    pointing_best_head: float
    pointing_mean_over_heads: float
    pointing_head_mean: float
    entropy: float
    head_diversity: float
    attention_spread: float
    attention_distance: float | None


@dataclasses.dataclass(frozen=True)
class CentreScores:
    """What needs no model: one box in the middle of all images, or their middle point.

    Attributes:
        jaccard: of the best of 20 centred boxes.
        jaccard_area: that box's share of the image.
        corloc: of the best of them for this.
        corloc_area: that box's share of the image.
        pointing: share of images whose middle lies on the object.
    """

    jaccard: float
    jaccard_area: float
    corloc: float
    corloc_area: float
    pointing: float


@dataclasses.dataclass(frozen=True)
class AttentionQuality:
    """A model's scores next to what they have to beat; ``print`` it to read it.

    Attributes:
        model: the model's scores.
        random_init: the same model's with random weights, averaged over seeds.
        random_init_each: the same, of each seed.
        centre: the centred box's.
        images: number of images.
        mass: share of the attention that counted as the object.
        tolerance: pixels, of the pointing game.
    """

    model: AttentionScores
    random_init: AttentionScores
    random_init_each: tuple[AttentionScores, ...]
    centre: CentreScores
    images: int
    mass: float
    tolerance: float

    def __str__(self) -> str:
        """Lay the scores out as a table."""
        centre = {
            "jaccard_head_mean": self.centre.jaccard,
            "corloc_attention": self.centre.corloc,
            "pointing_head_mean": self.centre.pointing,
        }
        head = f"{self.images:,} images"
        lines = [f"{head:<26}{'model':>7}{'random init':>14}{'(of seeds)':>16}{'centre':>8}"]
        for field in dataclasses.fields(AttentionScores):
            name = field.name
            each = [getattr(one, name) for one in self.random_init_each]
            pixels = name in ("attention_spread", "attention_distance")
            ours, theirs = (
                _shown(getattr(one, name), pixels) for one in (self.model, self.random_init)
            )
            seeds = (
                "" if None in each else f"{_shown(min(each), pixels)}-{_shown(max(each), pixels)}"
            )
            title = name.replace("_", " ") + (" (px)" if pixels else "")
            middle = _shown(centre.get(name), pixels)
            lines.append(f"{title:<26}{ours:>7}{theirs:>14}{seeds:>16}{middle:>8}".rstrip())
        return "\n".join(lines)


def _shown(value: float | None, pixels: bool) -> str:
    return "" if value is None else f"{value:.1f}" if pixels else f"{value:.3f}"


def attention_quality(
    vit: MaskedViT,
    images: Tensor,
    masks: Tensor,
    *,
    boxes: Tensor | Sequence[Tensor] | None = None,
    ignore: Tensor | None = None,
    baseline: Literal["random init"] | AttentionQuality = "random init",
    seeds: Sequence[int] = (0, 1),
    mass: float = 0.6,
    tolerance: float = 0,
    discovery: bool = True,
    batch_size: int = 32,
) -> AttentionQuality:
    """Measure a model's last attention against object masks, next to baselines.

    >>> import maskdistill as md
    >>> from maskdistill.data import Scenes
    >>> scenes = Scenes(8, size=32, split="val")
    >>> images = torch.from_numpy(scenes.images).permute(0, 3, 1, 2)
    >>> vit = md.MaskedViT(md.create_backbone("vit_tiny_patch16_224", 32, 8, depth=2))
    >>> quality = attention_quality(vit, images, torch.from_numpy(scenes.masks))
    >>> quality.images, 0 < quality.model.jaccard_best_head < 1
    (8, True)

    Everything is also measured of a copy of the model with new random weights, and of a box in the
    middle of the images: a number means something above these two only. The best centred box is
    chosen on the truth, so it is at its strongest.

    Args:
        vit: runs in evaluation mode, as it is, without masks.
        images: ``(B, 3, H, W)``: uint8 pixels, which are normalised here, or floats, which are
            taken as normalised. They may stay on the CPU; batches go to the model's device.
        masks: ``(B, H, W)`` bool, True on the object, of the very images.
        boxes: true boxes for CorLoc, as in ``corloc``; None is one tight box around each mask.
        ignore: void pixels, as in ``attention_jaccard``.
        baseline: ``"random init"`` measures it; a former result for the same images and the same
            kind of model lends its own, so that several checkpoints share one.
        seeds: of the random weights, one copy each. Their scores differ, so one is not enough to
            say what random weights give.
        mass: share of the attention that counts as the object, for Jaccard and the box.
        tolerance: pixels, of the pointing game.
        discovery: whether to run LOST and TokenCut, which take about as long as a small model.
        batch_size: images per forward.

    Raises:
        ValueError: masks of another size than the images, no images, images without an object, no
            seeds, or a model whose attention cannot be read.
    """
    _check(images, masks)
    _check_baseline(images, seeds, baseline)
    if boxes is None:
        boxes = mask_boxes(masks).float()
    options: dict[str, Any] = {
        "boxes": boxes, "ignore": ignore, "mass": mass, "tolerance": tolerance,
        "discovery": discovery, "batch_size": batch_size,
    }  # fmt: skip
    own = attention_scores(vit, images, masks, **options)
    if isinstance(baseline, AttentionQuality):
        each = baseline.random_init_each
    else:
        each = tuple(
            attention_scores(reinitialised(vit, seed), images, masks, **options) for seed in seeds
        )
    centre = _centre(masks, boxes, ignore, tolerance)
    return AttentionQuality(
        own, _mean(each), each, centre, len(images), float(mass), float(tolerance)
    )


@torch.no_grad()
def attention_scores(
    vit: MaskedViT,
    images: Tensor,
    masks: Tensor,
    *,
    boxes: Tensor | Sequence[Tensor] | None = None,
    ignore: Tensor | None = None,
    mass: float = 0.6,
    tolerance: float = 0,
    discovery: bool = True,
    batch_size: int = 32,
) -> AttentionScores:
    """Measure one model as `attention_quality` does, with its arguments and without baselines.

    >>> attention_scores(vit, images, masks).jaccard_best_head  # doctest: +SKIP
    0.337
    """
    _check(images, masks)
    if boxes is None:
        boxes = mask_boxes(masks).float()
    size = (images.shape[2], images.shape[3])
    grid = vit.grid(*size)
    seen = _look(vit, images, discovery, batch_size)
    jaccard = attention_jaccard(seen.attention, masks, grid, mass=mass, ignore=ignore)
    pointing = pointing_game(seen.attention, masks, grid, tolerance=tolerance)
    mean = seen.attention.mean(dim=1, keepdim=True)
    box = attention_boxes(mean, grid, size, mass=mass)[:, 0]
    lost_, cut = (
        None if found is None else corloc(in_pixels(found, grid, size), boxes)
        for found in (seen.lost, seen.token_cut)
    )
    return AttentionScores(
        *jaccard, corloc(box, boxes), lost_, cut, *pointing, **_statistics(vit, seen, grid)
    )


@torch.no_grad()
def attention_statistics(
    vit: MaskedViT, images: Tensor, *, batch_size: int = 32
) -> dict[str, float | None]:
    """Return the scores of `AttentionScores` that need no object masks, by name."""
    seen = _look(vit, images, False, batch_size)
    return _statistics(vit, seen, vit.grid(images.shape[2], images.shape[3]))


class _Seen(NamedTuple):
    """What one pass over the images reads; what the model does not show is None."""

    attention: Tensor  # (B, heads, N), of the class token in the last block
    distances: Tensor | None  # (B, heads), mean attention distance of its patches
    lost: Tensor | None  # (B, 4) boxes in patches
    token_cut: Tensor | None


def _look(vit: MaskedViT, images: Tensor, discovery: bool, batch_size: int) -> _Seen:
    grid, weight = vit.grid(images.shape[2], images.shape[3]), next(vit.parameters())
    weights: list[Tensor] = []
    read: tuple[list[Tensor], ...] = ([], [], [], [])
    maps, distances, lost_boxes, cut_boxes = read
    with evaluating(vit), vit.record_attention() as record, ExitStack() as stack:
        keys = None
        if discovery:
            with contextlib.suppress(ValueError):  # a model that has no keys in timm's way
                keys = stack.enter_context(reading_keys(vit))
        blocks: Any = getattr(vit.backbone, "blocks", None)
        plain = isinstance(blocks, (nn.Sequential, nn.ModuleList))
        last = getattr(blocks[-1], "attn", None) if plain else None
        stack.enter_context(reading_weights(last, weights.append))
        for part in images.split(batch_size):
            part = part.to(weight.device)
            vit((normalize(part) if part.dtype == torch.uint8 else part).to(weight.dtype))
            maps.append(record.attention.float())
            if weights:
                patches = patch_weights(weights.pop(), grid, vit.prefix_tokens).float()
                distances.append(mean_attention_distance(patches, grid, vit.patch_size))
            if keys is not None:
                found = keys()
                lost_boxes.append(lost(found, grid).boxes)
                cut_boxes.append(token_cut(found, grid).boxes)
    attention, *others = (torch.cat(parts) if parts else None for parts in read)
    assert attention is not None
    return _Seen(attention, *others)


def _statistics(vit: MaskedViT, seen: _Seen, grid: tuple[int, int]) -> dict[str, Any]:
    maps = seen.attention
    return {
        "entropy": float(attention_entropy(maps).mean()),
        "head_diversity": float(head_diversity(maps).mean()),
        "attention_spread": float(attention_spread(maps, grid, vit.patch_size).mean()),
        "attention_distance": None if seen.distances is None else float(seen.distances.mean()),
    }


@torch.no_grad()
def reinitialised(vit: MaskedViT, seed: int = 0) -> MaskedViT:
    """Return a copy of a model with new random weights, as if never trained.

    >>> import maskdistill as md
    >>> vit = md.MaskedViT(md.create_backbone("vit_tiny_patch16_224", 32, 8, depth=2))
    >>> other = reinitialised(vit, seed=1)
    >>> torch.equal(other.pos_embed, vit.pos_embed)
    False

    Every layer resets itself, and then the model, as timm's do; the class token is a truncated
    normal of 0.02, as in facebookresearch/dino. What neither resets stays where it is constant;
    else it becomes a truncated normal of 0.02, or, of one dimension, ones for weights and zeros for
    biases. No global random state is used or changed.

    Args:
        vit: to be copied.
        seed: the same seed gives the same weights, on any device.
    """
    copied = copy.deepcopy(vit)
    device = next(vit.parameters()).device
    model: Any = copied.backbone.cpu()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.fill_(torch.nan)  # what nothing resets is seen by it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        own = getattr(model, "init_weights", None)
        if callable(own):
            own()
        token = getattr(model, "cls_token", None)
        if isinstance(token, nn.Parameter):
            nn.init.trunc_normal_(token, std=0.02)
        for name, weight in model.named_parameters():
            if not weight.isnan().any():
                continue
            old = before[name].flatten()
            if bool((old == old[0]).all()):  # starts so, as biases do
                weight.copy_(before[name])
            elif weight.ndim > 1:
                nn.init.trunc_normal_(weight, std=0.02)
            else:
                weight.fill_(float(name.endswith(("weight", "gamma", "scale"))))
    return copied.to(device)


# --- Parts


def _centre(
    masks: Tensor, boxes: Tensor | Sequence[Tensor], ignore: Tensor | None, tolerance: float
) -> CentreScores:
    jaccard = centre_box_jaccard(masks, ignore=ignore)
    located = centre_box_corloc(boxes, (masks.shape[1], masks.shape[2]))
    middle = torch.ones(len(masks), 1, 1)  # one patch over all, whose middle is the image's
    pointing = pointing_game(middle, masks, (1, 1), tolerance=tolerance)
    return CentreScores(*jaccard, *located, pointing=pointing.head_mean)


def _mean(each: Sequence[AttentionScores]) -> AttentionScores:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(AttentionScores):
        scores = [getattr(one, field.name) for one in each]
        values[field.name] = None if None in scores else sum(scores) / len(scores)
    return AttentionScores(**values)


def _check(images: Tensor, masks: Tensor) -> None:
    if images.ndim != 4 or not len(images) or images.dtype not in (torch.uint8, torch.float32):
        raise ValueError(
            "images must be (B, 3, H, W) uint8, or float32 and normalised, with B >= 1; got "
            f"{tuple(images.shape)} {images.dtype}."
        )
    wanted = (len(images), *images.shape[2:])
    if tuple(masks.shape) != wanted or masks.dtype != torch.bool:
        raise ValueError(
            f"masks must be {wanted} bool, of the very images; got {tuple(masks.shape)} "
            f"{masks.dtype}. Resize images and masks alike; open_masks does."
        )


def _check_baseline(images: Tensor, seeds: Sequence[int], baseline: Any) -> None:
    if isinstance(baseline, AttentionQuality):
        if baseline.images != len(images):
            raise ValueError(
                f"the baseline is of {baseline.images} images, these are {len(images)}; measure it "
                "anew with baseline='random init'."
            )
    elif baseline != "random init":
        raise ValueError(
            f"baseline must be 'random init' or a former AttentionQuality; got {baseline!r}."
        )
    elif not seeds:
        raise ValueError("seeds must name at least one copy with random weights, such as (0, 1).")
