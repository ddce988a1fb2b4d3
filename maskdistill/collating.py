"""Masks for other people's loops: as DINOv2's collated entries, and drawn in the data loader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate

from maskdistill.policies import OF_EVERY_VIEW, PatchSize, ViewMasks, ViewPolicy


def collated_masks(
    masks: ViewMasks | Tensor | Sequence[Tensor | None], upperbound: int | None = None
) -> dict[str, Tensor | int]:
    """Return masks as the entries of a batch that DINOv2's and DINOv3's training code reads.

    >>> import maskdistill as md
    >>> crops = [torch.zeros(4, 3, 224, 224)] * 2 + [torch.zeros(4, 3, 98, 98)] * 8
    >>> masks = md.AsymmetricMaskPolicy(md.RandomMasker(0.3))(crops, patch_size=14)
    >>> for name, value in collated_masks(masks).items():
    ...     print(name, value if isinstance(value, int) else (tuple(value.shape), value.dtype))
    collated_masks ((8, 256), torch.bool)
    mask_indices_list ((616,), torch.int64)
    masks_weight ((616,), torch.float32)
    upperbound 616
    n_masked_patches ((1,), torch.int64)

    Rows are crop after crop: all images of the first global crop, then all of the second.
    ``mask_indices_list`` holds the places of hidden patches among the patches of all rows,
    ``masks_weight`` one over the number that their row hides, and ``n_masked_patches`` how many
    there are. All lie on the masks' device; an accelerator's host waits once for their number.

    Args:
        masks: what a policy returned, whose student's global masks are taken; or these masks
            themselves, a list with one ``(B, N)`` bool per global crop, None where nothing is
            hidden; or one tensor ``(V * B, N)`` of all crops, crop after crop.
        upperbound: rows of the buffer for hidden patches that DINOv2 hands to its head; None takes
            just as many as there are. DINOv3 passes it on and makes no use of it. The same number
            in every step gives the head an input of one shape, as a compiled head or a CUDA graph
            needs, and keeps FSDP's memory steady. Where a masker hides the same number in each
            row, that is ``V * B * masker.fixed_count(grid)``; elsewhere a row hides at most N
            times the greatest ratio.

    Raises:
        ValueError: no mask at all, masks of different grids, a dtype other than bool, masks that
            such code has no place for (of local crops, of the teacher's), or an upper bound below
            the number of hidden patches.

    Oquab et al., "DINOv2", 2023; Siméoni et al., "DINOv3", 2025: ``data/collate.py`` in both.
    """
    hidden = _joined(masks)
    indices = hidden.flatten().nonzero().flatten()
    count = len(indices)
    if upperbound is None:
        upperbound = count
    elif not isinstance(upperbound, int) or upperbound < count:
        raise ValueError(
            f"upperbound must be an int no less than the number of hidden patches, {count} here; "
            f"got {upperbound!r}. Take rows * N times the greatest ratio, or None for just as many."
        )
    weights = 1 / hidden.sum(dim=1).clamp(min=1)
    return {
        "collated_masks": hidden,
        "mask_indices_list": indices,
        "masks_weight": weights[indices // max(hidden.shape[1], 1)],
        "upperbound": upperbound,
        "n_masked_patches": torch.full((1,), count, dtype=torch.long, device=hidden.device),
    }


def _joined(masks: ViewMasks | Tensor | Sequence[Tensor | None]) -> Tensor:
    """Return the masks of all global crops as one tensor ``(V * B, N)``, crop after crop."""
    if isinstance(masks, ViewMasks):
        global_crops = len(masks.teacher)
        _refuse_masks_of_other_views(masks.student[global_crops:], masks.teacher)
        masks = masks.student[:global_crops]
    if isinstance(masks, Tensor):
        masks = [masks]
    given = [mask for mask in masks if mask is not None]
    if not given:
        raise ValueError(
            "there is no mask among these, so the number of patches is not known. For a batch "
            "without masks give one tensor, torch.zeros(rows, N, dtype=torch.bool)."
        )
    for mask in given:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 2:
            came = f"{tuple(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else repr(mask)
            raise ValueError(f"masks must be (B, N) bool, True = hidden; got {came}.")
        if mask.shape != given[0].shape:
            raise ValueError(
                "all masks must be of one batch and one grid, those of the global crops; got "
                f"{tuple(given[0].shape)} and {tuple(mask.shape)}. Leave local crops out: "
                "masks.student[:2]."
            )
    clean = torch.zeros_like(given[0])
    return torch.cat([clean if mask is None else mask for mask in masks])


def _refuse_masks_of_other_views(local: Sequence[object], teacher: Sequence[object]) -> None:
    for name, cells in (("the student's local views", local), ("the teacher's views", teacher)):
        if any(cell is not None for cell in cells):
            raise ValueError(
                f"{name} are masked, but DINOv2's code takes masks of the student's global views "
                "only, and the others would be lost. Use AsymmetricMaskPolicy(masker), or "
                "pass masks.student[:2]."
            )


class MaskCollate:
    """Collates samples and draws their masks: a ``DataLoader``'s ``collate_fn``.

    >>> import maskdistill as md
    >>> policy = md.AsymmetricMaskPolicy(md.RandomMasker(0.3))
    >>> sample = ([torch.zeros(3, 64, 64)] * 2 + [torch.zeros(3, 32, 32)] * 6, 7)
    >>> crops, labels, masks = MaskCollate(policy, patch_size=8)([sample] * 4)
    >>> crops[0].shape, labels, masks.student[0].shape, masks.student[2]
    (torch.Size([4, 3, 64, 64]), tensor([7, 7, 7, 7]), torch.Size([4, 64]), None)

    The batch comes with its masks, a ``ViewMasks``:

    - samples ``([crops], label)``, and more items: a batch ``(crops, labels, masks)``;
    - samples ``[crops]``, or ``data.Crops``, which hold their boxes: ``(crops, masks)``;
    - samples that are dicts with ``"crops"``: the same dict, with ``"masks"``. DINOv2's
      ``{"global_crops": ..., "local_crops": ...}`` will do too, alone or before a label.

    Random numbers come from torch's global generator alone. A ``DataLoader`` seeds it anew in each
    worker and each epoch, so workers and epochs differ, and a run repeats if ``torch.manual_seed``
    or the loader's ``generator`` does and the number of workers stays. Seed each of several
    processes differently, or all draw the same masks.

    Args:
        policy: who sees which mask. It must not need what only a network can tell.
        patch_size: pixels per patch, one int or (height, width).
        collate: makes a batch of samples; None is torch's ``default_collate``.
        key: where the crops are, in samples that are dicts.
        collated: return a dict as DINOv2's and DINOv3's collate functions do, with
            ``collated_global_crops``, ``collated_local_crops`` and the entries of
            ``collated_masks``. Their own function may be the ``collate``, and then keeps all else
            that it returns.
        upperbound: for ``collated_masks``, the same in each batch.

    Raises:
        ValueError: a policy that needs signals from a network, such as attention; a policy that
            DINOv2's dict has no place for; in a call, samples without crops, or without the boxes
            that the policy needs.
    """

    def __init__(
        self,
        policy: ViewPolicy,
        patch_size: PatchSize,
        collate: Callable[[list[Any]], Any] | None = None,
        *,
        key: str = "crops",
        collated: bool = False,
        upperbound: int | None = None,
    ) -> None:
        if not isinstance(policy, ViewPolicy):
            raise ValueError(
                f"policy must be a ViewPolicy; got {policy!r}. A masker becomes one by "
                "AsymmetricMaskPolicy(masker)."
            )
        of_a_network = policy.needs - OF_EVERY_VIEW
        if of_a_network:
            raise ValueError(
                f"{policy!r} needs the signal(s) {sorted(of_a_network)}, which a data loader "
                "cannot give, for they come from a network. Draw these masks in the training "
                f"step: policy(crops, patch_size, {min(of_a_network)}=...)."
            )
        if collated:
            _refuse_masks_of_other_views([policy.student_local], [policy.teacher_global])
        elif upperbound is not None:
            raise ValueError("upperbound is for collated=True, which is not set.")
        self.policy = policy
        self.patch_size = patch_size
        self.collate = default_collate if collate is None else collate
        self.key = key
        self.collated = collated
        self.upperbound = upperbound
        # Memory that workers share: those that run already learn of progress too.
        self._progress = torch.zeros((), dtype=torch.float64).share_memory_()

    @property
    def progress(self) -> float:
        """How far training has come, in [0, 1], for schedules; to be set before each epoch.

        Workers see what the main process sets, persistent ones too.
        """
        return float(self._progress)

    @progress.setter
    def progress(self, value: float) -> None:
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"progress must lie in [0, 1]; got {value!r}.")
        self._progress.fill_(value)

    def __call__(self, samples: Sequence[Any]) -> Any:
        """Return the batch of these samples, with masks."""
        batch = self.collate(list(samples))
        crops, boxes, flipped = _find_crops(batch, self.key, self.policy.global_crops)
        if boxes is None and self.policy.needs - {"images"}:
            raise ValueError(
                f"{self.policy!r} needs to know where crops lie in their images, which these "
                "samples do not tell. Let them be maskdistill.data.Crops, as MultiCrop makes them, "
                'or dicts with "boxes" (V, 4) and "flipped" (V,).'
            )
        local: Sequence[Tensor] = ()
        if self.collated:
            count = self.policy.global_crops
            crops, local = crops[:count], crops[count:]
            boxes, flipped = (None if p is None else p[:, :count] for p in (boxes, flipped))
        masks = self.policy(
            crops, self.patch_size, boxes=boxes, flipped=flipped, progress=self.progress
        )
        if self.collated:
            entries = collated_masks(masks, self.upperbound)
            return {**_collated_crops(batch, crops, local, entries), **entries}
        if isinstance(batch, Mapping):
            if "collated_masks" in batch:
                raise ValueError(
                    "the collate function returns collated masks of its own; give collated=True, "
                    "which replaces them."
                )
            return {**batch, "masks": masks}
        return (batch, masks) if _is_crops(batch) else (*batch, masks)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy made by plain pickle or copy.deepcopy shares its progress with nobody yet.
        self.__dict__.update(state)
        self._progress.share_memory_()


def _collated_crops(
    batch: Any, crops: Sequence[Tensor], local: Sequence[Tensor], entries: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what stands beside the entries of masks: of DINOv2's own batch all that it has."""
    if isinstance(batch, Mapping) and "collated_global_crops" in batch:
        ours, theirs = entries["collated_masks"], batch.get("collated_masks")
        if isinstance(theirs, Tensor) and theirs.shape != ours.shape:
            raise ValueError(
                f"the collate function made masks of shape {tuple(theirs.shape)}, but the policy "
                f"{tuple(ours.shape)}, (rows, N). Check patch_size; distillation into several "
                "students at once, with a batch for each, is not supported."
            )
        return dict(batch)
    images = {"collated_global_crops": torch.cat(list(crops))}
    return {**images, "collated_local_crops": torch.cat(list(local))} if local else images


class _Found(NamedTuple):
    """The crops of a batch, one ``(B, C, H, W)`` per view, and where they lie if it tells."""

    crops: Sequence[Tensor]
    boxes: Tensor | None = None
    flipped: Tensor | None = None


def _find_crops(batch: Any, key: str, global_crops: int) -> _Found:
    if isinstance(batch, Mapping):
        if "collated_global_crops" in batch:
            return _Found(batch["collated_global_crops"].chunk(global_crops))
        if key in batch:
            found = _find_crops(batch[key], key, global_crops)
            if found.boxes is not None:
                return found
            return _Found(found.crops, batch.get("boxes"), batch.get("flipped"))
        if "global_crops" in batch:
            return _Found([*batch["global_crops"], *batch.get("local_crops", ())])
        raise ValueError(
            f"samples that are dicts must have their crops under {key!r}, a list; got the keys "
            f"{sorted(map(str, batch))}. Give key='...'."
        )
    if _has_boxes(batch):
        return _Found(batch.images, batch.boxes, batch.flipped)
    if _is_crops(batch):
        return _Found(batch)
    if isinstance(batch, (list, tuple)) and len(batch) and not isinstance(batch[0], Tensor):
        return _find_crops(batch[0], key, global_crops)
    raise ValueError(
        "samples must be a list of crops (C, H, W), or have one as their first item, as "
        f"([crops], label); got a batch of {type(batch).__name__}. A multi-crop transform makes "
        "such samples, and another shape can be brought into this one by collate=..."
    )


def _is_crops(batch: Any) -> bool:
    """Return whether a batch is crops and nothing else."""
    if _has_boxes(batch) or not isinstance(batch, (list, tuple)):
        return _has_boxes(batch)
    return len(batch) > 0 and all(isinstance(crop, Tensor) and crop.ndim == 4 for crop in batch)


def _has_boxes(batch: Any) -> bool:
    """Return whether a batch is a ``data.Crops`` or its like, without importing that room."""
    return all(hasattr(batch, name) for name in ("images", "boxes", "flipped"))
