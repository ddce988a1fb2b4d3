"""How a policy draws for its views: what is known of each, and one draw for all of one size."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from maskdistill.masking.base import Masker
from maskdistill.masking.geometry import carry_signal, check_boxes, patch_grid

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


PatchSize: TypeAlias = int | tuple[int, int]
Signal: TypeAlias = Tensor | Sequence[Tensor]

Memory: TypeAlias = MutableMapping[Hashable, Tensor]


@dataclass(frozen=True)
class ViewMasks:
    """The masks of one step, one entry per view.

    Attributes:
        student: for each crop, ``(B, N_v)`` bool with True = hidden, or None where it is clean.
        teacher: the same for the teacher's views, which are the global crops.
        student_counts: for each crop, the hidden patches of every row where they are known without
            asking the device, else None; 0 for a clean crop.
        teacher_counts: the same for the teacher's views.
    """

    student: list[Tensor | None]
    teacher: list[Tensor | None]
    student_counts: list[int | None]
    teacher_counts: list[int | None]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ViewMasks:
        """Return the masks on a device: for masks that were drawn in a data loader."""
        return self._each(lambda mask: mask.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ViewMasks:
        """Return the masks in pinned memory; a ``DataLoader(pin_memory=True)`` calls this."""
        return self._each(lambda mask: mask.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> ViewMasks:
        def changed(masks: list[Tensor | None]) -> list[Tensor | None]:
            return [None if mask is None else change(mask) for mask in masks]

        return replace(self, student=changed(self.student), teacher=changed(self.teacher))


@dataclass(frozen=True, eq=False)
class ViewPolicy:
    """Decides which views are masked, for whom, and by which masker.

    >>> import maskdistill as md
    >>> policy = md.ViewPolicy(student_global=md.RandomMasker(0.3))
    >>> print(policy)
              global views        local views
    student   RandomMasker(0.3)   clean
    teacher   clean               not seen
    >>> crops = [torch.zeros(4, 3, 64, 64)] * 2 + [torch.zeros(4, 3, 32, 32)] * 6
    >>> masks = policy(crops, patch_size=8)
    >>> [None if m is None else tuple(m.shape) for m in masks.student[:3]], masks.teacher
    ([(4, 64), (4, 64), None], [None, None])

    Args:
        student_global: masks the student's global views; None leaves them clean.
        student_local: masks the student's local views.
        teacher_global: masks the teacher's views, which are the global ones.
        global_crops: number of global crops; they come first among the crops.

    Each masker draws anew for each role and view, all views of one size in one draw.

    Raises:
        ValueError: the teacher's masker asks for a signal that only the teacher's forward gives, or
            ``global_crops`` is less than 1.
        TypeError: something that is no masker.
    """

    student_global: Masker | None = None
    student_local: Masker | None = None
    teacher_global: Masker | None = None
    global_crops: int = 2

    def __post_init__(self) -> None:
        for name in ("student_global", "student_local", "teacher_global"):
            masker = getattr(self, name)
            if masker is not None and not isinstance(masker, Masker):
                raise TypeError(f"{name} must be a masker or None; got {masker!r}.")
        if not isinstance(self.global_crops, int) or self.global_crops < 1:
            raise ValueError(f"global_crops must be an int >= 1; got {self.global_crops!r}.")
        given = self.teacher_global.needs - OF_EVERY_VIEW if self.teacher_global else None
        if given:
            raise ValueError(
                f"teacher_global={self.teacher_global!r} needs the signal(s) {sorted(given)}, "
                "which it cannot get: the teacher's masks are drawn before the teacher has run. "
                "Use it for the student, or choose a masker without signals."
            )

    # --- The published placement, and the ablations that a reader of the paper asks for.

    @staticmethod
    def none(*, global_crops: int = 2) -> ViewPolicy:
        """Mask nothing: plain DINO (Caron et al., 2021)."""
        return ViewPolicy(global_crops=global_crops)

    @staticmethod
    def asymmetric(masker: Masker, *, global_crops: int = 2) -> ViewPolicy:
        """Mask the student's global views only (arXiv 2506.10582)."""
        return ViewPolicy(student_global=masker, global_crops=global_crops)

    @staticmethod
    def symmetric(masker: Masker, *, global_crops: int = 2) -> ViewPolicy:
        """Mask the global views of both, each with a draw of its own; local views stay clean."""
        return ViewPolicy(student_global=masker, teacher_global=masker, global_crops=global_crops)

    @staticmethod
    def student_all_views(masker: Masker, *, global_crops: int = 2) -> ViewPolicy:
        """Mask all of the student's views, local ones too."""
        return ViewPolicy(student_global=masker, student_local=masker, global_crops=global_crops)

    @staticmethod
    def local_only(masker: Masker, *, global_crops: int = 2) -> ViewPolicy:
        """Mask the student's local views only."""
        return ViewPolicy(student_local=masker, global_crops=global_crops)

    @staticmethod
    def teacher_only(masker: Masker, *, global_crops: int = 2) -> ViewPolicy:
        """Mask the teacher's views only."""
        return ViewPolicy(teacher_global=masker, global_crops=global_crops)

    # --- Drawing

    @property
    def needs(self) -> frozenset[str]:
        """Names of all signals that the policy's maskers need."""
        maskers = (self.student_global, self.student_local, self.teacher_global)
        return frozenset().union(*(m.needs for m in maskers if m is not None))

    @property
    def masks_student(self) -> bool:
        """Whether any of the student's views is masked."""
        return self.student_global is not None or self.student_local is not None

    def __call__(
        self,
        crops: Sequence[Tensor],
        patch_size: PatchSize,
        *,
        generator: torch.Generator | None = None,
        progress: float = 0.0,
        boxes: Tensor | None = None,
        flipped: Tensor | None = None,
        **signals: Signal,
    ) -> ViewMasks:
        """Draw the masks of all views, the teacher's first.

        Args:
            crops: the student's views, ``(B, C, H, W)`` each, global crops first.
            patch_size: pixels per patch, one int or (height, width).
            generator: source of every random number; None is torch's global generator.
            progress: how far training has come, in [0, 1].
            boxes: ``(B, V, 4)``, where each of the V crops lies in its image: left, top, right and
                bottom as shares of its width and height. Only maskers that know geometry, and
                guided masks of local views, need it.
            flipped: ``(B, V)`` bool, whether each crop was mirrored after cutting.
            **signals: what guided maskers need, one tensor per global crop, or one of all global
                crops after each other: ``attention`` is the teacher's, ``(B, N)`` or
                ``(B, heads, N)`` for each, on the same crops. Onto local views they are carried by
                place. A masker's ``images`` are the crops themselves.

        Returns:
            The masks, in the order of the crops and on their device.

        Raises:
            ValueError: too few crops, patches that do not divide a crop, or a missing signal.
        """
        memory: Memory = {}
        teacher, teacher_counts = self.teacher_masks(
            crops, patch_size, generator=generator, progress=progress, boxes=boxes,
            flipped=flipped, memory=memory,
        )  # fmt: skip
        student, student_counts = self.student_masks(
            crops, patch_size, generator=generator, progress=progress, boxes=boxes,
            flipped=flipped, memory=memory, **signals,
        )  # fmt: skip
        return ViewMasks(student, teacher, student_counts, teacher_counts)

    def teacher_masks(
        self,
        crops: Sequence[Tensor],
        patch_size: PatchSize,
        *,
        generator: torch.Generator | None = None,
        progress: float = 0.0,
        boxes: Tensor | None = None,
        flipped: Tensor | None = None,
        memory: Memory | None = None,
    ) -> tuple[list[Tensor | None], list[int | None]]:
        """Draw the teacher's masks alone, and their counts, for a step that runs it first.

        ``memory``, an empty dict that then goes to ``student_masks`` too, lets maskers that relate
        views relate the roles as well.
        """
        memory = {} if memory is None else memory
        whole = range(len(self._split(crops)[0]))
        known = known_of(crops, places_of(crops, boxes, flipped), whole)
        return draw(self.teacher_global, known, patch_size, generator, progress, memory)

    def student_masks(
        self,
        crops: Sequence[Tensor],
        patch_size: PatchSize,
        *,
        generator: torch.Generator | None = None,
        progress: float = 0.0,
        boxes: Tensor | None = None,
        flipped: Tensor | None = None,
        memory: Memory | None = None,
        **signals: Signal,
    ) -> tuple[list[Tensor | None], list[int | None]]:
        """Draw the student's masks alone, and their counts; they may read the teacher's signals."""
        memory = {} if memory is None else memory
        places = places_of(crops, boxes, flipped)
        whole, local = self._split(crops)
        sizes = [view.shape[0] for view in whole]
        given = {name: one_per_view(name, signal, sizes) for name, signal in signals.items()}
        first = range(len(whole))
        known = {**known_of(crops, places, first), **given}
        masks, counts = draw(self.student_global, known, patch_size, generator, progress, memory)
        rest = range(len(whole), len(crops))
        known = known_of(crops, places, rest)
        if self.student_local is not None and local:
            for name in self.student_local.needs & given.keys():
                known[name] = carried(name, given[name], crops, places, rest, patch_size)
        more, more_counts = draw(self.student_local, known, patch_size, generator, progress, memory)
        return masks + more, counts + more_counts

    def _split(self, crops: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        if isinstance(crops, Tensor) or len(crops) < self.global_crops:
            came = "a single tensor" if isinstance(crops, Tensor) else f"{len(crops)} crop(s)"
            raise ValueError(
                f"crops must be a list of at least {self.global_crops} tensors (B, C, H, W), "
                f"global crops first; got {came}."
            )
        for crop in crops:
            if crop.ndim != 4:
                raise ValueError(f"each crop must be (B, C, H, W); got {tuple(crop.shape)}.")
        if len({len(crop) for crop in crops}) > 1:
            raise ValueError(
                "all crops must be of the same images, in the same order; got batches of "
                f"{[len(crop) for crop in crops]}."
            )
        return crops[: self.global_crops], crops[self.global_crops :]

    # --- Printing and comparing

    def __str__(self) -> str:
        def cell(masker: Masker | None) -> str:
            return "clean" if masker is None else repr(masker)

        rows = [
            ("", "global views", "local views"),
            ("student", cell(self.student_global), cell(self.student_local)),
            ("teacher", cell(self.teacher_global), "not seen"),
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ("   ".join(text.ljust(w) for text, w in zip(r, widths, strict=True)) for r in rows)
        return "\n".join(line.rstrip() for line in lines)

    def __repr__(self) -> str:
        more = f", global_crops={self.global_crops}" if self.global_crops != 2 else ""
        return (
            f"ViewPolicy(student_global={self.student_global!r}, "
            f"student_local={self.student_local!r}, teacher_global={self.teacher_global!r}{more})"
        )

    def _key(self) -> tuple[Any, ...]:
        return (self.student_global, self.student_local, self.teacher_global, self.global_crops)

    def __eq__(self, other: object) -> bool:
        # AsymmetricMaskPolicy(m) is a ViewPolicy(student_global=m), and equals it.
        return self._key() == other._key() if isinstance(other, ViewPolicy) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())


class AsymmetricMaskPolicy(ViewPolicy):
    """Masks the student's global views only: its local views and the teacher's stay clean.

    >>> import maskdistill as md
    >>> policy = md.AsymmetricMaskPolicy(md.RandomMasker(0.3))
    >>> policy == md.ViewPolicy(student_global=md.RandomMasker(0.3))
    True

    Args:
        masker: masks the student's global views.
        global_crops: number of global crops.

    The placement of "Rethinking Random Masking in Self-Distillation on ViT" (Seong and Han, arXiv
    2506.10582, 2025), and of iBOT and DINOv2. The paper's ratio and way of applying the mask could
    not be verified: the masker is yours to choose, and ours is a reconstruction.
    """

    def __init__(self, masker: Masker, *, global_crops: int = 2) -> None:
        if not isinstance(masker, Masker):
            hint = (
                "md.parse_masker reads text"
                if isinstance(masker, str)
                else ("for no mask at all use ViewPolicy.none()")
            )
            raise TypeError(f"masker must be a masker; got {masker!r}; {hint}.")
        super().__init__(student_global=masker, global_crops=global_crops)


POLICIES: Mapping[str, Callable[[Masker], ViewPolicy]] = {
    "none": lambda masker: ViewPolicy.none(),
    "asymmetric": AsymmetricMaskPolicy,
    "symmetric": ViewPolicy.symmetric,
    "student-all-views": ViewPolicy.student_all_views,
    "local-only": ViewPolicy.local_only,
    "teacher-only": ViewPolicy.teacher_only,
}
"""The named placements, for command lines; in code call the constructors."""
