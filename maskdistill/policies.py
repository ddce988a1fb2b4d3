"""Who sees what: the table of {student, teacher} x {global, local} views, as a value."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from maskdistill.masking.base import Masker
from maskdistill.masking.geometry import carry_signal, check_boxes
from maskdistill.masking.mask import PatchMask, patch_grid

PatchSize: TypeAlias = int | tuple[int, int]
Signal: TypeAlias = Tensor | Sequence[Tensor]
Cell: TypeAlias = Masker | Sequence[Masker | None] | None
"""What masks the views of one kind: nothing, one masker for all of them, or one for each."""

OF_EVERY_VIEW = frozenset({"images", "boxes", "flipped"})
"""The signals that a policy knows of every view by itself. All others come from outside, per global
view: the teacher sees no other views, and runs before the student's masks are drawn."""

_CELLS = ("student_global", "student_local", "teacher_global")


@dataclass(frozen=True, eq=False)
class ViewMasks:
    """The masks of one step, one entry per view.

    Attributes:
        student_masks: for each crop its mask and hidden count, or None where it is clean.
        teacher_masks: the same for the teacher's views, which are the global crops.
    """

    student_masks: tuple[PatchMask | None, ...]
    teacher_masks: tuple[PatchMask | None, ...]

    @property
    def student(self) -> list[Tensor | None]:
        """For each crop ``(B, N_v)`` bool, True = hidden, or None where it is clean."""
        return [None if each is None else each.mask for each in self.student_masks]

    @property
    def teacher(self) -> list[Tensor | None]:
        """The same for the teacher's views."""
        return [None if each is None else each.mask for each in self.teacher_masks]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ViewMasks:
        """Return the masks on a device: for masks that were drawn in a data loader."""
        return self._each(lambda mask: mask.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ViewMasks:
        """Return the masks in pinned memory; a ``DataLoader(pin_memory=True)`` calls this."""
        return self._each(lambda mask: mask.pin_memory())

    def _each(self, change: Callable[[PatchMask], PatchMask]) -> ViewMasks:
        roles = (self.student_masks, self.teacher_masks)
        return ViewMasks(*(tuple(m if m is None else change(m) for m in role) for role in roles))


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

    Each cell of the table takes one masker for all its views, or a sequence with a masker or None
    for each: random on the first global view, blocks on the second.

    >>> print(md.ViewPolicy(student_global=[md.RandomMasker(0.3), md.BlockMasker(0.4)]))
              global views                           local views
    student   [RandomMasker(0.3), BlockMasker(0.4)]   clean
    teacher   clean                                  not seen

    Args:
        student_global: masks the student's global views; None leaves them clean.
        student_local: masks the student's local views.
        teacher_global: masks the teacher's views, which are the global ones.
        global_crops: number of global crops; they come first among the crops.

    Each masker draws anew for each role and view, all its views of one size in one draw.

    Raises:
        ValueError: the teacher's masker asks for a signal that only the teacher's forward gives, a
            sequence of another length than there are global crops, or ``global_crops`` below 1.
            A sequence for local views is compared with the crops when masks are drawn.
        TypeError: something that is no masker.
    """

    student_global: Cell = None
    student_local: Cell = None
    teacher_global: Cell = None
    global_crops: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.global_crops, int) or self.global_crops < 1:
            raise ValueError(f"global_crops must be an int >= 1; got {self.global_crops!r}.")
        for name in _CELLS:
            object.__setattr__(self, name, _as_cell(name, getattr(self, name)))
        for name in ("student_global", "teacher_global"):
            entries = _spread(name, getattr(self, name), self.global_crops, "global crops")
            if len(set(entries)) == 1:  # one masker for each view is one for all of them
                object.__setattr__(self, name, entries[0])
        for masker in _maskers_of(self.teacher_global):
            needed = masker.needs - OF_EVERY_VIEW
            if needed:
                raise ValueError(
                    f"teacher_global={masker!r} needs the signal(s) {sorted(needed)}, which it "
                    "cannot get: the teacher's masks are drawn before the teacher has run. Use it "
                    "for the student, or choose a masker without signals."
                )

    # --- The published placement, and the ablations that a reader of the paper asks for.

    @staticmethod
    def none(*, global_crops: int = 2) -> ViewPolicy:
        """Mask nothing: plain DINO (Caron et al., 2021)."""
        return ViewPolicy(global_crops=global_crops)

    @staticmethod
    def asymmetric(masker: Cell, *, global_crops: int = 2) -> ViewPolicy:
        """Mask the student's global views only (arXiv 2506.10582)."""
        return ViewPolicy(student_global=masker, global_crops=global_crops)

    @staticmethod
    def symmetric(masker: Cell, *, global_crops: int = 2) -> ViewPolicy:
        """Mask the global views of both, each with a draw of its own; local views stay clean."""
        return ViewPolicy(student_global=masker, teacher_global=masker, global_crops=global_crops)

    @staticmethod
    def student_all_views(masker: Masker, *, global_crops: int = 2) -> ViewPolicy:
        """Mask all of the student's views, local ones too."""
        return ViewPolicy(student_global=masker, student_local=masker, global_crops=global_crops)

    @staticmethod
    def local_only(masker: Cell, *, global_crops: int = 2) -> ViewPolicy:
        """Mask the student's local views only."""
        return ViewPolicy(student_local=masker, global_crops=global_crops)

    @staticmethod
    def teacher_only(masker: Cell, *, global_crops: int = 2) -> ViewPolicy:
        """Mask the teacher's views only."""
        return ViewPolicy(teacher_global=masker, global_crops=global_crops)

    # --- What it consists of

    @property
    def maskers(self) -> tuple[Masker, ...]:
        """The different maskers of the table."""
        return tuple(dict.fromkeys(m for name in _CELLS for m in _maskers_of(getattr(self, name))))

    @property
    def needs(self) -> frozenset[str]:
        """Names of all signals that the policy's maskers need."""
        return frozenset().union(*(masker.needs for masker in self.maskers))

    @property
    def masks_student(self) -> bool:
        """Whether any of the student's views is masked."""
        return self.student_global is not None or self.student_local is not None

    def by_view(self, role: str, views: int) -> list[Masker | None]:
        """Return the masker of each view of a role, global views first.

        >>> import maskdistill as md
        >>> md.AsymmetricMaskPolicy(md.RandomMasker(0.3)).by_view("student", views=3)
        [RandomMasker(0.3), RandomMasker(0.3), None]

        Args:
            role: ``"student"`` or ``"teacher"``.
            views: number of the role's views.

        Raises:
            ValueError: a cell that lists maskers for another number of views.
        """
        if role == "teacher":
            return _spread("teacher_global", self.teacher_global, views, "global crops")
        local = views - self.global_crops
        return [
            *_spread("student_global", self.student_global, self.global_crops, "global crops"),
            *_spread("student_local", self.student_local, local, "local crops"),
        ]

    # --- Drawing

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
        draw = self.begin(
            crops,
            patch_size,
            generator=generator,
            progress=progress,
            boxes=boxes,
            flipped=flipped,
        )
        teacher = draw.teacher()
        return ViewMasks(draw.student(**signals), teacher)

    def begin(
        self,
        crops: Sequence[Tensor],
        patch_size: PatchSize,
        *,
        generator: torch.Generator | None = None,
        progress: float = 0.0,
        boxes: Tensor | None = None,
        flipped: Tensor | None = None,
    ) -> StepDraw:
        """Return the draw of one step: the teacher's masks now, the student's when it has run.

        >>> import maskdistill as md
        >>> policy = md.AsymmetricMaskPolicy(md.AttentionGuidedMasker(0.5))
        >>> draw = policy.begin([torch.zeros(4, 3, 64, 64)] * 2, patch_size=8)
        >>> draw.teacher()
        (None, None)
        >>> attention = torch.rand(8, 64)  # what the teacher's forward gave
        >>> [mask.count for mask in draw.student(attention=attention)]
        [32, 32]

        Arguments and errors are those of the call.
        """
        self.check_crops(crops)
        places = _checked_places(crops, boxes, flipped)
        return StepDraw(self, crops, patch_size, generator, progress, places)

    def check_crops(self, crops: Sequence[Tensor]) -> None:
        """Refuse crops that the policy cannot mask.

        Raises:
            ValueError: too few crops, misshapen ones, or crops of different batches.
        """
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

    # --- Printing and comparing

    def __str__(self) -> str:
        def shown(cell: Cell) -> str:
            return "clean" if cell is None else _repr(cell)

        rows = [
            ("", "global views", "local views"),
            ("student", shown(self.student_global), shown(self.student_local)),
            ("teacher", shown(self.teacher_global), "not seen"),
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ("   ".join(text.ljust(w) for text, w in zip(r, widths, strict=True)) for r in rows)
        return "\n".join(line.rstrip() for line in lines)

    def __repr__(self) -> str:
        cells = ", ".join(f"{name}={_repr(getattr(self, name))}" for name in _CELLS)
        more = f", global_crops={self.global_crops}" if self.global_crops != 2 else ""
        return f"ViewPolicy({cells}{more})"

    def _key(self) -> tuple[Hashable, ...]:
        return (*(getattr(self, name) for name in _CELLS), self.global_crops)

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
        masker: masks the student's global views; a sequence has one masker or None for each.
        global_crops: number of global crops.

    The placement of "Rethinking Random Masking in Self-Distillation on ViT" (Seong and Han, arXiv
    2506.10582, 2025), and of iBOT and DINOv2. The paper's ratio and way of applying the mask could
    not be verified: the masker is yours to choose, and ours is a reconstruction.
    """

    def __init__(self, masker: Masker | Sequence[Masker | None], *, global_crops: int = 2) -> None:
        if masker is None or isinstance(masker, str):
            hint = (
                "md.parse_masker reads text"
                if isinstance(masker, str)
                else "for no mask at all use ViewPolicy.none()"
            )
            raise TypeError(f"masker must be a masker; got {masker!r}; {hint}.")
        super().__init__(student_global=masker, global_crops=global_crops)


POLICIES: Mapping[str, Callable[..., ViewPolicy]] = {
    "none": lambda masker: ViewPolicy.none(),
    "asymmetric": AsymmetricMaskPolicy,
    "symmetric": ViewPolicy.symmetric,
    "student-all-views": ViewPolicy.student_all_views,
    "local-only": ViewPolicy.local_only,
    "teacher-only": ViewPolicy.teacher_only,
}
"""The named placements, for command lines; in code call the constructors."""


class StepDraw:
    """The draw of one step: what is known of its crops, and what was drawn for them so far.

    ``ViewPolicy.begin`` makes it. Masks that relate views or roles are drawn once and remembered
    here. Call ``teacher`` first, then ``student``, each once: that is the order of random numbers.
    """

    def __init__(
        self,
        policy: ViewPolicy,
        crops: Sequence[Tensor],
        patch_size: PatchSize,
        generator: torch.Generator | None,
        progress: float,
        places: tuple[Tensor, Tensor] | None,
    ) -> None:
        self._policy, self._crops = policy, crops
        self._patch_size, self._generator, self._progress = patch_size, generator, progress
        self._memory: dict[Hashable, Tensor] = {}
        self._known: dict[str, Sequence[Tensor]] = {"images": crops}
        if places is not None:
            self._known["boxes"] = places[0].unbind(dim=1)
            self._known["flipped"] = places[1].unbind(dim=1)

    def teacher(self) -> tuple[PatchMask | None, ...]:
        """Draw the masks of the teacher's views, the global crops."""
        views = self._policy.global_crops
        return self._draw(self._policy.by_view("teacher", views), 0, self._known)

    def student(self, **signals: Signal) -> tuple[PatchMask | None, ...]:
        """Draw the masks of all crops for the student.

        Args:
            **signals: what guided maskers need, as in a call of the policy.
        """
        seen = self._policy.global_crops
        sizes = [len(crop) for crop in self._crops[:seen]]
        given = {name: _one_per_view(name, signal, sizes) for name, signal in signals.items()}
        maskers = self._policy.by_view("student", len(self._crops))
        whole = self._draw(maskers[:seen], 0, {**self._known, **given})
        local = maskers[seen:]
        for name in frozenset().union(*(m.needs for m in local if m is not None)) & given.keys():
            given[name] = self._carried(name, given[name])
        return whole + self._draw(local, seen, {**self._known, **given})

    def _draw(
        self, maskers: Sequence[Masker | None], first: int, known: Mapping[str, Sequence[Tensor]]
    ) -> tuple[PatchMask | None, ...]:
        """Draw for consecutive views, from ``first`` on: one call for all of one masker and size.

        Args:
            maskers: one per view.
            first: index of the first view among the crops.
            known: signals, one tensor per crop.
        """
        groups: dict[tuple[Masker, tuple[int, int]], list[int]] = {}
        for view, masker in enumerate(maskers, start=first):
            grid = self._grid(view)
            if masker is not None:
                groups.setdefault((masker, grid), []).append(view)
        masks: list[PatchMask | None] = [None] * len(maskers)
        for (masker, grid), views in groups.items():
            missing = sorted(masker.needs - known.keys())
            if missing:
                came = sorted(known.keys() - {"images"})
                raise ValueError(
                    f"{masker!r} needs the signal(s) {missing}, but "
                    f"{f'only {came}' if came else 'none'} came. Pass {missing[0]}=... to the "
                    "policy."
                )
            sizes = [len(self._crops[view]) for view in views]
            drawn = masker(
                sum(sizes),
                grid,
                generator=self._generator,
                device=self._crops[views[0]].device,
                progress=self._progress,
                views=len(views),
                memory=self._memory,
                **{name: torch.cat([known[name][v] for v in views]) for name in masker.needs},
            )
            count = masker.fixed_count(grid, self._progress)
            for view, mask in zip(views, drawn.split(sizes), strict=True):
                masks[view - first] = PatchMask(mask, count)
        return tuple(masks)

    def _grid(self, view: int) -> tuple[int, int]:
        height, width = self._crops[view].shape[2:]
        return patch_grid((height, width), self._patch_size)

    def _carried(self, name: str, signal: Sequence[Tensor]) -> list[Tensor]:
        """Carry a signal of the global views onto the local ones; one entry per crop."""
        if "boxes" not in self._known:
            raise ValueError(
                f"the local views' masks need the signal {name!r}, which is known on the global "
                "views only. Pass boxes= and flipped=, where each crop lies in its image, and it "
                "is carried."
            )
        boxes, flipped, seen = self._known["boxes"], self._known["flipped"], len(signal)
        grids = [self._grid(view) for view in range(len(self._crops))]
        sources = torch.stack(list(boxes[:seen]), dim=1), torch.stack(list(flipped[:seen]), dim=1)
        local = [
            carry_signal(signal, grids[:seen], *sources, boxes[v], flipped[v], grids[v])
            for v in range(seen, len(self._crops))
        ]
        return [*signal, *local]


# --- Cells of the table


def _as_cell(name: str, cell: Cell) -> Masker | tuple[Masker | None, ...] | None:
    """Return a cell as a masker, None or a tuple of these."""
    if cell is None or isinstance(cell, Masker):
        return cell
    entries = tuple(cell) if isinstance(cell, (list, tuple)) else ()
    if not entries or not all(m is None or isinstance(m, Masker) for m in entries):
        raise TypeError(
            f"{name} must be a masker, None, or a list with one of these per view; got {cell!r}."
        )
    return entries


def _maskers_of(cell: Cell) -> tuple[Masker, ...]:
    entries = (cell,) if cell is None or isinstance(cell, Masker) else cell
    return tuple(masker for masker in entries if masker is not None)


def _spread(name: str, cell: Cell, views: int, kind: str) -> list[Masker | None]:
    """Return the masker of each view."""
    if cell is None or isinstance(cell, Masker):
        return [cell] * views
    if len(cell) != views:
        raise ValueError(
            f"{name} must have one masker or None for each of the {views} {kind}; got "
            f"{len(cell)}: {_repr(cell)}. One masker alone serves all of them."
        )
    return list(cell)


def _repr(cell: Cell) -> str:
    if cell is None or isinstance(cell, Masker):
        return repr(cell)
    return f"[{', '.join(map(repr, cell))}]"


# --- What is known of the crops


def _checked_places(
    crops: Sequence[Tensor], boxes: Tensor | None, flipped: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Return where the crops lie, ``(B, V, 4)`` and ``(B, V)``, on their device, if known."""
    if boxes is None and flipped is None:
        return None
    if not isinstance(boxes, Tensor) or not isinstance(flipped, Tensor):
        raise ValueError(
            "boxes and flipped go together: pass both as tensors, (B, V, 4) and (B, V), or neither."
        )
    wanted = (len(crops[0]), len(crops))
    if tuple(boxes.shape) != (*wanted, 4) or tuple(flipped.shape) != wanted:
        raise ValueError(
            f"boxes must be (B, V, 4) and flipped (B, V) with B={wanted[0]} and V={wanted[1]} "
            f"crops; got {tuple(boxes.shape)} and {tuple(flipped.shape)}."
        )
    check_boxes(boxes)
    device = crops[0].device
    later = device.type != "cpu"  # from an accelerator to the CPU one has to wait
    return boxes.to(device, non_blocking=later), flipped.to(device, non_blocking=later)


def _one_per_view(name: str, signal: Signal, sizes: list[int]) -> Sequence[Tensor]:
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
