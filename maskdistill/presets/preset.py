"""What a preset is: a policy, how it is applied, the objective it belongs to, and its paper."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from maskdistill.applying import Application
from maskdistill.masking.base import Masker
from maskdistill.views import ViewPolicy


@dataclass(frozen=True)
class Paper:
    """Where a method was published.

    Attributes:
        title: of the paper.
        authors: short, as "Zhou et al.".
        venue: with its year, as "ICLR 2022".
        arxiv: the paper's number there.
        code: the authors' repository that was read for the preset, at the commit that was read, or
            the empty string where none was found.
    """

    title: str
    authors: str
    venue: str
    arxiv: str
    code: str = ""

    @property
    def short(self) -> str:
        """Authors, venue and number in one line."""
        return f"{self.authors}, {self.venue}, arXiv {self.arxiv}"

    def __str__(self) -> str:
        return f'{self.authors}, "{self.title}", {self.venue}, arXiv {self.arxiv}'


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Preset(ViewPolicy):
    """A published method's masks: a policy that also says how to apply it, and to what end.

    >>> import maskdistill as md
    >>> preset = md.presets.mae()
    >>> print(preset)
    MAE: He et al., CVPR 2022, arXiv 2111.06377
               the view
    student    masked
    teacher    none
    masker     RandomMasker(0.75)
    apply      drop
    objective  pixels: squared error of the hidden patches' pixels
    >>> preset
    presets.mae()
    >>> preset == md.ViewPolicy(student_global=md.RandomMasker(0.75), global_crops=1)
    True

    It is a ``ViewPolicy`` and is called like one; two of them are equal if they mask the same. The
    objective is named, not built: a preset says what is hidden, from whom, and how.

    Attributes:
        name: of the function in ``maskdistill.presets`` that builds it.
        title: the method's name.
        apply: how the hidden patches are taken from the network, for ``MaskedViT``.
        objectives: the losses that the masks were published with, as short words: ``"dino"``
            between class tokens of different views, ``"ibot"`` on hidden patches of the same view,
            ``"koleo"``, ``"gram"``, ``"prototypes"``, ``"clusters"``, ``"latent"``, ``"pixels"``,
            ``"tokens"``, ``"clip"``, ``"siamese"``.
        objective: the same in a sentence.
        paper: where it was published.
        hides: what is hidden, in a paragraph.
        defaults: the settings of the paper or of the authors' code, by name.
        differences: what is done otherwise here on purpose, a sentence each.
        evidence: what was measured, for and against, with its source.
        arguments: what it was built with, by name.
        teacher: whether there is a second network that gives the targets.
        local_views: whether there are local views besides the global ones.
    """

    name: str
    title: str
    apply: Application
    objectives: tuple[str, ...]
    objective: str
    paper: Paper
    hides: str
    defaults: Mapping[str, str]
    differences: tuple[str, ...]
    evidence: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    teacher: bool = True
    local_views: bool = True

    @property
    def maskers(self) -> tuple[Masker, ...]:
        """The different maskers of the policy."""
        cells = (self.student_global, self.student_local, self.teacher_global)
        return tuple(dict.fromkeys(masker for masker in cells if masker is not None))

    def _split(self, crops: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        if not self.local_views and len(crops) > self.global_crops:
            raise ValueError(
                f"{self.title} has {self.global_crops} view(s) of an image; got {len(crops)}. "
                "For more views, use its masker in a policy of your own: "
                f"ViewPolicy(student_global={self.student_global!r})."
            )
        return super()._split(crops)

    def __str__(self) -> str:
        maskers = self.maskers

        def cell(masker: Masker | None) -> str:
            if masker is None:
                return "clean"
            return "masked" if len(maskers) == 1 else repr(masker)

        views = "global views" if self.global_crops > 1 else "the view"
        table = [
            ("", views, "local views"),
            ("student", cell(self.student_global), cell(self.student_local)),
            ("teacher", cell(self.teacher_global) if self.teacher else "none", "not seen"),
        ]
        if not self.local_views:
            table = [(*row[:2], "") for row in table]
        width = max(len(row[1]) for row in table)
        lines = [f"{self.title}: {self.paper.short}", ""]
        lines += [f"{role:<9}  {one:<{width}}  {two}".rstrip() for role, one, two in table]
        facts = [("masker", repr(maskers[0]))] if len(maskers) == 1 else []
        facts += [("apply", self.apply)] if maskers else []
        facts.append(("objective", f"{' + '.join(self.objectives)}: {self.objective}"))
        lines.append("")
        for name, fact in facts:
            wrapped = textwrap.wrap(fact, 65, break_long_words=False, break_on_hyphens=False)
            lines += [f"{name:<9}  {wrapped[0]}", *(f"{'':<9}  {more}" for more in wrapped[1:])]
        return "\n".join(lines)

    def __repr__(self) -> str:
        from maskdistill import presets

        accepted = inspect.signature(presets.ALL[self.name]).parameters
        given = [
            repr(value)
            if accepted[name].default is inspect.Parameter.empty
            else f"{name}={value!r}"
            for name, value in self.arguments.items()
            if value != accepted[name].default
        ]
        return f"presets.{self.name}({', '.join(given)})"


ROUNDS_DOWN = (
    "The number of hidden patches is rounded to the nearest; the authors' code rounds it down."
)
KEEPS_147 = (
    "The number of hidden patches is rounded to the nearest; the authors' code rounds the number "
    "of visible ones down. On 14x14 both hide 147."
)


def restoring(
    name: str,
    title: str,
    masker: Masker,
    paper: Paper,
    hides: str,
    defaults: Mapping[str, str],
    differences: tuple[str, ...],
    evidence: tuple[str, ...] = (),
    *,
    arguments: Mapping[str, Any],
    apply: Application = "drop",
    objectives: tuple[str, ...] = ("pixels",),
    objective: str = "squared error of the hidden patches' pixels",
) -> Preset:
    """Build a preset with one view and one network, which restores."""
    return Preset(
        student_global=masker,
        global_crops=1,
        name=name,
        title=title,
        apply=apply,
        objectives=objectives,
        objective=objective,
        paper=paper,
        hides=hides,
        defaults=defaults,
        differences=differences,
        evidence=evidence,
        arguments=arguments,
        teacher=False,
        local_views=False,
    )
