"""How a policy draws for its views: what is known of each, and one draw for all of one size."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from maskdistill.applying import patch_grid
from maskdistill.masking.base import Masker
from maskdistill.masking.geometry import carry_signal, check_boxes

OF_EVERY_VIEW = frozenset({"images", "boxes", "flipped"})
"""The signals that a policy knows of every view by itself. All others come from outside, per global
view: the teacher sees no other views, and runs before the student's masks are drawn."""


def one_per_view(
    name: str, signal: Tensor | Sequence[Tensor], sizes: list[int]
) -> Sequence[Tensor]:
    """Return a signal as one tensor per global view."""
    if name in OF_EVERY_VIEW:
        raise ValueError(f"{name} are the crops themselves; do not pass them again.")
    listed = isinstance(signal, (list, tuple)) and all(isinstance(s, Tensor) for s in signal)
    if not isinstance(signal, Tensor) and not listed:
        raise ValueError(
            f"{name}={signal!r} is no argument of a policy and no signal, for a signal is a tensor "
            "or a list of tensors, one per global crop."
        )
    if isinstance(signal, Tensor):
        if len(signal) == sum(sizes):
            parts: Sequence[Tensor] = signal.split(sizes)
            return parts
        came = f"one tensor of {len(signal)} images"
    elif len(signal) == len(sizes):
        return signal
    else:
        came = f"{len(signal)} tensor(s)"
    raise ValueError(
        f"signal {name!r} must be a list with one tensor per global crop ({len(sizes)}), or one "
        f"tensor of all their {sum(sizes)} images, crop by crop; got {came}."
    )


def places_of(
    crops: Sequence[Tensor], boxes: Tensor | None, flipped: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Check where the crops lie, if that is known."""
    if boxes is None and flipped is None:
        return None
    if not isinstance(boxes, Tensor) or not isinstance(flipped, Tensor):
        raise ValueError(
            "boxes and flipped go together: pass both as tensors, (B, V, 4) and (B, V), or neither."
        )
    batch = len(crops[0]) if len(crops) else 0
    wanted = (batch, len(crops))
    if tuple(boxes.shape) != (*wanted, 4) or tuple(flipped.shape) != wanted:
        raise ValueError(
            f"boxes must be (B, V, 4) and flipped (B, V) with B={batch} and V={len(crops)} crops; "
            f"got {tuple(boxes.shape)} and {tuple(flipped.shape)}."
        )
    check_boxes(boxes)
    device = crops[0].device
    later = device.type != "cpu"  # from an accelerator to the CPU one has to wait
    return boxes.to(device, non_blocking=later), flipped.to(device, non_blocking=later)


def known_of(
    crops: Sequence[Tensor], places: tuple[Tensor, Tensor] | None, views: range
) -> dict[str, Sequence[Tensor]]:
    """Return what the policy itself knows of some views."""
    known: dict[str, Sequence[Tensor]] = {"images": [crops[v] for v in views]}
    if places is not None:
        known["boxes"] = [places[0][:, v] for v in views]
        known["flipped"] = [places[1][:, v] for v in views]
    return known


def carried(
    name: str,
    signal: Sequence[Tensor],
    crops: Sequence[Tensor],
    places: tuple[Tensor, Tensor] | None,
    views: range,
    patch_size: int | tuple[int, int],
) -> list[Tensor]:
    """Carry a signal of the global views onto local ones."""
    if places is None:
        raise ValueError(
            f"the local views' masks need the signal {name!r}, which is known on the global views "
            "only. Pass boxes= and flipped=, where each crop lies in its image, and it is carried."
        )
    grids = [patch_grid((crop.shape[2], crop.shape[3]), patch_size) for crop in crops]
    boxes, flipped = places
    seen = len(signal)
    return [
        carry_signal(
            signal, grids[:seen], boxes[:, :seen], flipped[:, :seen], boxes[:, v], flipped[:, v],
            grids[v],
        )
        for v in views
    ]  # fmt: skip


def draw(
    masker: Masker | None,
    known: Mapping[str, Sequence[Tensor]],
    patch_size: int | tuple[int, int],
    generator: torch.Generator | None,
    progress: float,
    memory: MutableMapping[Hashable, Tensor],
) -> tuple[list[Tensor | None], list[int | None]]:
    """Draw for views of one role and kind: all views of one size in one call."""
    views = known["images"]
    grids = [patch_grid((view.shape[2], view.shape[3]), patch_size) for view in views]
    masks: list[Tensor | None] = [None] * len(views)
    if masker is None:
        return masks, [0] * len(views)
    missing = sorted(masker.needs - known.keys())
    if missing:
        came = sorted(known.keys() - {"images"})
        raise ValueError(
            f"{masker!r} needs the signal(s) {missing}, but {f'only {came}' if came else 'none'} "
            f"came. Pass {missing[0]}=... to the policy."
        )
    signals = {name: known[name] for name in masker.needs}
    for grid in dict.fromkeys(grids):
        group = [i for i, other in enumerate(grids) if other == grid]
        sizes = [views[i].shape[0] for i in group]
        drawn = masker(
            sum(sizes),
            grid,
            generator=generator,
            device=views[group[0]].device,
            progress=progress,
            views=len(group),
            memory=memory,
            **{name: torch.cat([signal[i] for i in group]) for name, signal in signals.items()},
        )
        for i, mask in zip(group, drawn.split(sizes), strict=True):
            masks[i] = mask
    return masks, [masker.fixed_count(grid, progress) for grid in grids]
