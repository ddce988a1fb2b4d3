"""What a preset is: a policy, how it is applied, the objective it belongs to, and its paper."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from maskdistill.masking.base import Masker
from maskdistill.masking.guided import (
    AttentionGuidedMasker,
    AttentionHintMasker,
    ClusterMasker,
    DPPMasker,
    LearnedMasker,
    PartMasker,
    SignalMasker,
)
from maskdistill.masking.ratios import Linear, Quadratic, Ratio, Scalar, Stratified, Uniform
from maskdistill.masking.rectangles import (
    BlockMasker,
    MultiBlockMasker,
    SingleBlockMasker,
    SquaresMasker,
)
from maskdistill.masking.uniform import (
    BernoulliMasker,
    Color,
    ColorNoiseMasker,
    GridMasker,
    RandomMasker,
)
from maskdistill.models.tokens import Application
from maskdistill.policies import Cell, ViewPolicy


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

    def check_crops(self, crops: Sequence[Tensor]) -> None:
        """Refuse crops that the method does not know, besides those that no policy takes."""
        if not self.local_views and len(crops) > self.global_crops:
            raise ValueError(
                f"{self.title} has {self.global_crops} view(s) of an image; got {len(crops)}. "
                "For more views, use its masker in a policy of your own: "
                f"ViewPolicy(student_global={self.student_global!r})."
            )
        super().check_crops(crops)

    def __str__(self) -> str:
        maskers = self.maskers

        def cell(masker: Cell) -> str:
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
        accepted = inspect.signature(ALL[self.name]).parameters
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


IBOT_RATIO = Uniform(0.1, 0.5)
"""iBOT's and AttMask's ratio: 0.3, and up to 0.2 more or less."""


def dino() -> Preset:
    """Mask nothing: the baseline.

    >>> import maskdistill as md
    >>> md.presets.dino() == md.ViewPolicy.none()
    True

    Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", 2021.
    """
    return Preset(
        name="dino",
        title="DINO",
        apply="token",
        objectives=("dino",),
        objective="cross-entropy between the class tokens of different views",
        paper=Paper(
            "Emerging Properties in Self-Supervised Vision Transformers",
            "Caron et al.",
            "ICCV 2021",
            "2104.14294",
            "https://github.com/facebookresearch/dino/tree/7c446df5b9f45747937fb0d72314eb9f7b66930a",
        ),
        hides="Nothing. It is here as the baseline of those that hide something.",
        defaults={
            "crops": "2 global of scale 0.4 to 1, 8 local of scale 0.05 to 0.4",
            "pairs": "the student's views against the teacher's global ones, never a view with "
            "itself",
        },
        differences=(),
        evidence=(
            "ViT-S/16 on ImageNet: 74.5 % k-NN, 77.0 % linear (the authors' README).",
        ),
    )  # fmt: skip


def asymmetric(ratio: Ratio = 0.3) -> Preset:
    """Mask the student's global views at random, and nothing else: our reconstruction.

    >>> import maskdistill as md
    >>> md.presets.asymmetric() == md.AsymmetricMaskPolicy(md.RandomMasker(0.3))
    True

    Args:
        ratio: share of patches to hide. The paper's could not be read; 0.3 is our choice.

    Source: Seong and Han, "Rethinking Random Masking in Self-Distillation on ViT", 2025.
    """
    return Preset(
        student_global=RandomMasker(ratio),
        name="asymmetric",
        title="Asymmetric masking (our reconstruction)",
        apply="token",
        objectives=("dino",),
        objective="cross-entropy between the class tokens of different views",
        paper=Paper(
            "Rethinking Random Masking in Self-Distillation on ViT",
            "Seong and Han",
            "2025",
            "2506.10582",
        ),
        hides="Patches drawn uniformly, in the student's global views, both of them. The student's "
        "local views and the teacher's global views stay clean.",
        defaults={
            "who": "the student's global views (abstract, and a figure that shows both masked)",
            "model and data": "a tiny DINO on mini-ImageNet (abstract)",
            "ratio, patch size, crops, schedule": "not readable to us",
            "token, drop or pixels": "not readable to us; the figure shows a masked image",
        },
        differences=(
            "Only the abstract, the beginning of the introduction and a figure's caption could be "
            "read, and no code was found. The ratio 0.3, the mask token and DINO's loss alone are "
            "our reading.",
        ),
        evidence=(
            "For: the abstract reports finer attention maps and better downstream results than "
            "without masks; the tables could not be read.",
            "Against: iBOT's appendix B calls clean local views beside masked global ones unstable "
            "in training when every image is masked, and lays it to the mismatch between the two. "
            "Its remedy is to leave a random part of the images whole: `.sometimes(0.5)`.",
        ),
        arguments={"ratio": ratio},
    )


def ibot(ratio: Ratio = IBOT_RATIO, p: Scalar = 0.5) -> Preset:
    """Mask blocks of half of the student's global views, as iBOT does.

    >>> import maskdistill as md
    >>> md.presets.ibot().student_global
    BlockMasker(Uniform(0.1, 0.5), min_patches=None, exact=False).sometimes(0.5)

    Args:
        ratio: share of patches to hide in a masked view; by default uniform in 0.1 to 0.5.
        p: probability that a view is masked; a schedule can begin with none.

    Source: Zhou et al., "iBOT: Image BERT Pre-Training with Online Tokenizer", 2022.
    """
    return Preset(
        student_global=BlockMasker(ratio, min_patches=None, exact=False).sometimes(p),
        name="ibot",
        title="iBOT",
        apply="token",
        objectives=("dino", "ibot"),
        objective="cross-entropy between class tokens of different views, and of hidden patches "
        "with the teacher's of the same view",
        paper=Paper(
            "iBOT: Image BERT Pre-Training with Online Tokenizer",
            "Zhou et al.",
            "ICLR 2022",
            "2111.07832",
            "https://github.com/bytedance/ibot/tree/da316d82636a7a7356835ef224b13d5f3ace0489",
        ),
        hides="Each of the student's global views is whole or masked, half of them each. A masked "
        "one draws a ratio, and hides rectangles of random shape until no further one fits.",
        defaults={
            "ratio": "uniform in 0.1 to 0.5 for half of the views, 0 for the others",
            "least area of a rectangle": "the square of a third of the shorter side, rounded down: "
            "16 patches on 14x14",
            "aspect": "0.3 to 1 / 0.3, log-uniform",
            "begins": "at epoch 0 (at epoch 50 for Swin)",
            "patch loss": "mean over a view's hidden patches, then over views; weight 1, as the "
            "class token's",
            "crops": "2 global of scale 0.25 to 1, 10 local of scale 0.05 to 0.25 (ViT-S/16)",
        },
        differences=(ROUNDS_DOWN,),
        evidence=(
            "ViT-S/16, 800 epochs on ImageNet: 75.2 % k-NN, 77.9 % linear (the authors' README).",
            "Blocks and random patches are close: ViT-B 77.1 and 77.3 % k-NN, ViT-L 78.0 and 77.7 "
            "% (the authors' README; the random ones with a larger ratio).",
            "The ratio matters little between 0.05 and 0.4, and varying it helps (appendix E).",
            "Masking every global view beside clean local ones was unstable in training "
            "(appendix B).",
            "Short training with small batches can end below plain DINO: 65.4 against 67.5 % k-NN, "
            "ViT-S/16, 100 epochs, batch 128 (benchmarks of the lightly library).",
        ),
        arguments={"ratio": ratio, "p": p},
    )


def dinov2(low: Scalar = 0.1, high: Scalar = 0.5, share: float = 0.5) -> Preset:
    """Mask blocks of a fixed share of the student's global views, with evenly spread ratios.

    >>> import maskdistill as md
    >>> md.presets.dinov2().student_global
    BlockMasker(Stratified(0.1, 0.5, share=0.5), exact=False)

    Args:
        low: least ratio of a masked view.
        high: greatest ratio.
        share: share of the batch's views that are masked.

    Source: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2023.
    """
    return Preset(
        student_global=BlockMasker(Stratified(low, high, share=share), exact=False),
        name="dinov2",
        title="DINOv2",
        apply="token",
        objectives=("dino", "ibot", "koleo"),
        objective="cross-entropy of class tokens across views and of hidden patches within a view; "
        "class tokens of a batch are spread",
        paper=Paper(
            "DINOv2: Learning Robust Visual Features without Supervision",
            "Oquab et al.",
            "2023",
            "2304.07193",
            "https://github.com/facebookresearch/dinov2/tree/"
            "b8931f7bf91576930313be2c6d6af376033b35f0",
        ),
        hides="Rectangles, in half of the student's global views. The ratios of a batch are spread "
        "evenly: the range is cut into as many parts as views are masked, and each part gives one "
        "ratio. So a batch hides about the same number of patches in every step.",
        defaults={
            "mask_sample_probability": "0.5 of the batch's global crops",
            "mask_ratio_min_max": "0.1 to 0.5, one uniform draw from each part",
            "least area of a rectangle": "4 patches",
            "greatest area": "half of the grid, which no ratio up to 0.5 reaches",
            "aspect": "0.3 to 1 / 0.3, log-uniform",
            "patch loss": "mean over a view's hidden patches, then over views",
        },
        differences=(
            ROUNDS_DOWN,
            "The cap of half of the grid on a rectangle's area is left out, since it would depend "
            "on the grid; `BlockMasker(..., max_patches=98)` sets it. It can matter only for "
            "ratios above 0.5.",
        ),
        evidence=(
            "ViT-L/16, the short ImageNet configuration: 81.6 % k-NN, 82.9 % linear (the authors' "
            "README).",
        ),
        arguments={"low": low, "high": high, "share": share},
    )


def dinov3(
    low: Scalar = 0.1, high: Scalar = 0.5, share: float = 0.5, rolled: bool = False
) -> Preset:
    """Mask as DINOv2 does, with exact counts.

    >>> import maskdistill as md
    >>> md.presets.dinov3().student_global
    BlockMasker(Stratified(0.1, 0.5, share=0.5, jitter=False))

    Args:
        low: least ratio; the lowest that is drawn lies one part of the range above.
        high: greatest ratio.
        share: share of the batch's views that are masked.
        rolled: shift each mask around the grid's edges by a random offset.

    Source: Siméoni et al., "DINOv3", 2025.
    """
    masker: Masker = BlockMasker(Stratified(low, high, share=share, jitter=False))
    return Preset(
        student_global=masker.rolled() if rolled else masker,
        name="dinov3",
        title="DINOv3",
        apply="token",
        objectives=("dino", "ibot", "koleo", "gram"),
        objective="as DINOv2's, and in a later stage likenesses of patches are held to those of an "
        "earlier teacher",
        paper=Paper(
            "DINOv3",
            "Siméoni et al.",
            "2025",
            "2508.10104",
            "https://github.com/facebookresearch/dinov3/tree/"
            "6876159a11b4df116f30f667f8c9888617df0751",
        ),
        hides="Rectangles, as in DINOv2, completed by random patches to exactly the ratio. The "
        "ratios of a batch are the upper ends of the parts of the range, without a draw.",
        defaults={
            "mask_sample_probability": "0.5 of the batch's global crops",
            "mask_ratio_min_max": "0.1 to 0.5, the upper end of each part",
            "mask_random_circular_shift": "false in all configurations that were published",
            "least area of a rectangle": "4 patches",
            "aspect": "0.3 to 1 / 0.3, log-uniform",
        },
        differences=(
            ROUNDS_DOWN,
            "The cap of half of the grid on a rectangle's area is left out, as in `dinov2`.",
        ),
        evidence=(
            "ViT-L on ImageNet-1k: 82.2 % k-NN, 83.3 % linear (comment in the authors' "
            "configuration).",
        ),
        arguments={"low": low, "high": high, "share": share, "rolled": rolled},
    )  # fmt: skip


def msn(ratio: float = 0.15) -> Preset:
    """Drop random patches of the student's global views, the same for the whole batch.

    >>> import maskdistill as md
    >>> md.presets.msn().student_global
    RandomMasker(0.15).shared()

    Args:
        ratio: share of patches to drop.

    Source: Assran et al., "Masked Siamese Networks for Label-Efficient Learning", 2022.
    """
    return Preset(
        student_global=RandomMasker(ratio).shared(),
        name="msn",
        title="MSN",
        apply="drop",
        objectives=("prototypes",),
        objective="cross-entropy of class tokens' assignments to learned prototypes, and even use "
        "of them",
        paper=Paper(
            "Masked Siamese Networks for Label-Efficient Learning",
            "Assran et al.",
            "ECCV 2022",
            "2204.07141",
            "https://github.com/facebookresearch/msn/tree/4388dc1eadbe3042b85d3296d41b9b207656e043",
        ),
        hides="Patches drawn uniformly, in the student's global views, and dropped. One mask is "
        "drawn for the whole batch. The small focal views and the teacher's view stay clean.",
        defaults={
            "patch_drop": "0.15 (ViT-S/16)",
            "views": "1 masked anchor of 224 px (scale 0.3 to 1), 10 clean focal views of 96 px "
            "(0.05 to 0.3), 1 clean target",
            "prototypes": "1024",
        },
        differences=(
            "There the teacher has a view of its own that the student never sees, and one global "
            "view is masked. Here both global views are masked for the student and clean for the "
            "teacher, as in DINO; all that are drawn together share the one mask.",
            "The number of hidden patches is rounded to the nearest; the authors' code rounds the "
            "number of visible ones down. On 14x14 it drops 30, this drops 29.",
        ),
        evidence=(
            "ImageNet with few labels: 72.4 % with 5,000 of them (base model), 75.7 % with 1 % "
            "(abstract).",
            "ImageNette, k-NN, ViT-S: 82.8 %, MAE 61.0 % (benchmarks of the lightly library).",
        ),
        arguments={"ratio": ratio},
    )


_ATTMASK = Paper(
    "What to Hide from Your Students: Attention-Guided Masked Image Modeling",
    "Kakogeorgiou et al.",
    "ECCV 2022",
    "2203.12719",
    "https://github.com/gkakogeorgiou/attmask/tree/9f62061fb3afd42c09dd4b7cc6b8fa38013df018",
)
_ATTMASK_DEFAULTS = {
    "attention": "of the teacher's last block, class token to patches, mean over heads, on the "
    "same clean global view",
    "ratio": "0.3, up to 0.2 more or less, one draw per batch",
    "masked views": "each with probability 0.5",
}
_ATTMASK_DIFFERENCES = (
    "The ratio is drawn for each view; the authors draw it once for the whole batch.",
    ROUNDS_DOWN,
)


def _attmask(
    name: str,
    masker: Masker,
    p: Scalar,
    hides: str,
    evidence: tuple[str, ...],
    arguments: dict[str, object],
    defaults: dict[str, str] | None = None,
    differences: tuple[str, ...] = (),
) -> Preset:
    return Preset(
        student_global=masker.sometimes(p),
        name=name,
        title=f"AttMask-{name.removeprefix('attmask_').capitalize()}",
        apply="token",
        objectives=("dino", "ibot"),
        objective="iBOT's two; the paper also uses the class tokens' alone",
        paper=_ATTMASK,
        hides=hides,
        defaults=_ATTMASK_DEFAULTS | (defaults or {}),
        differences=_ATTMASK_DIFFERENCES + differences,
        evidence=evidence,
        arguments={**arguments, "p": p},
    )


def attmask_high(ratio: Ratio = IBOT_RATIO, p: Scalar = 0.5) -> Preset:
    """Mask what the teacher attends to most.

    >>> import maskdistill as md
    >>> md.presets.attmask_high().student_global
    AttentionGuidedMasker(Uniform(0.1, 0.5)).sometimes(0.5)

    Args:
        ratio: share of patches to hide in a masked view; by default uniform in 0.1 to 0.5.
        p: probability that a view is masked.

    Source: Kakogeorgiou et al., "What to Hide from Your Students", 2022.
    """
    return _attmask(
        "attmask_high",
        AttentionGuidedMasker(ratio),
        p,
        "The patches to which the teacher's class token attends most, in half of the student's "
        "global views. Given the attention nothing but the ratio is random.",
        (
            "ViT-S/16, 100 epochs on ImageNet: 72.5 % k-NN, 75.7 % linear (the authors' README).",
            "On a fifth of ImageNet: 49.7 % k-NN, 57.9 % linear (the authors' README).",
        ),
        {"ratio": ratio},
    )


def attmask_hint(
    ratio: Ratio = IBOT_RATIO, hint: Ratio = IBOT_RATIO, pool: float = 0.1, p: Scalar = 0.5
) -> Preset:
    """Mask what the teacher attends to most, but show a few of the very foremost patches.

    >>> import maskdistill as md
    >>> md.presets.attmask_hint().student_global
    AttentionHintMasker(Uniform(0.1, 0.5), hint=Uniform(0.1, 0.5), exact=False).sometimes(0.5)

    Args:
        ratio: share of patches to hide in a masked view, before the hints are shown; by default
            uniform in 0.1 to 0.5.
        hint: share of the foremost patches that are shown; by default the same.
        pool: share of the grid that counts as foremost.
        p: probability that a view is masked.

    Source: Kakogeorgiou et al., "What to Hide from Your Students", 2022.
    """
    return _attmask(
        "attmask_hint",
        AttentionHintMasker(ratio, hint=hint, pool=pool, exact=False),
        p,
        "As AttMask-High, but some patches among the tenth that is attended to most are shown "
        "after all, so that a hint of the object remains. Fewer are hidden than the ratio says.",
        (
            "ViT-S/16, 100 epochs on ImageNet: 72.8 % k-NN, 76.1 % linear (the authors' README).",
            "On a fifth of ImageNet, AttMask-High is ahead: 49.5 % k-NN, 57.5 % linear (the "
            "authors' README).",
        ),
        {"ratio": ratio, "hint": hint, "pool": pool},
        {
            "foremost patches": "a tenth of the grid (`show_max`)",
            "hints": "a second draw of the ratio, as a share of that tenth",
        },
        ("The share of hints is drawn for each view as well; the authors draw it once per batch.",),
    )


def attmask_low(ratio: Ratio = IBOT_RATIO, p: Scalar = 0.5) -> Preset:
    """Mask what the teacher attends to least: the paper's counter-example.

    >>> import maskdistill as md
    >>> md.presets.attmask_low().student_global
    AttentionGuidedMasker(Uniform(0.1, 0.5), hide='least').sometimes(0.5)

    Args:
        ratio: share of patches to hide in a masked view; by default uniform in 0.1 to 0.5.
        p: probability that a view is masked.

    Source: Kakogeorgiou et al., "What to Hide from Your Students", 2022.
    """
    return _attmask(
        "attmask_low",
        AttentionGuidedMasker(ratio, hide="least"),
        p,
        "The patches to which the teacher's class token attends least, so that the object stays "
        "visible. The paper has it to show the contrary of AttMask-High.",
        (),
        {"ratio": ratio},
    )


def mst(ratio: Ratio = 1 / 8, p: Ratio = 0.5) -> Preset:
    """Mask some of the patches that the teacher attends to least.

    >>> import maskdistill as md
    >>> md.presets.mst().student_global
    AttentionGuidedMasker(0.125, hide='least') & BernoulliMasker(0.5)

    Args:
        ratio: share of patches that may be hidden. The default is unverified.
        p: probability that each of them is. The default is our choice.

    Source: Li et al., "MST: Masked Self-Supervised Transformer for Visual Representation", 2021.
    """
    return Preset(
        student_global=AttentionGuidedMasker(ratio, hide="least") & BernoulliMasker(p),
        name="mst",
        title="MST",
        apply="token",
        objectives=("dino", "pixels"),
        objective="cross-entropy between class tokens of different views, and a decoder that "
        "restores the image",
        paper=Paper(
            "MST: Masked Self-Supervised Transformer for Visual Representation",
            "Li et al.",
            "NeurIPS 2021",
            "2106.05656",
        ),
        hides="Patches of low attention, in the student's global views, each by a coin toss of its "
        "own, so that what matters in the foreground stays.",
        defaults={
            "which patches": "those of low response in the teacher's self-attention",
            "share of them, and probability": "unverified: an eighth is from second hand, 0.5 is "
            "our choice",
        },
        differences=(
            "No code of the authors was found: how the threshold on the attention is set could "
            "not be checked. Here it is a rank, the least attended share.",
        ),
        evidence=(
            "DeiT-S, 300 epochs on ImageNet: 76.9 % linear, 1.0 % more than DINO (abstract).",
        ),
        arguments={"ratio": ratio, "p": p},
    )  # fmt: skip


def milan(ratio: float = 0.75) -> Preset:
    """Show patches in proportion to another network's attention, and drop the rest.

    >>> import maskdistill as md
    >>> md.presets.milan().student_global
    ~AttentionGuidedMasker(0.25, temperature=1.0)

    Args:
        ratio: share of patches to drop.

    Source: Hou et al., "MILAN: Masked Image Pretraining on Language Assisted Representation", 2022.
    """
    return Preset(
        student_global=~AttentionGuidedMasker(round(1 - ratio, 12), temperature=1.0),
        global_crops=1,
        name="milan",
        title="MILAN",
        apply="drop",
        objectives=("latent",),
        objective="regression of CLIP's image features",
        paper=Paper(
            "MILAN: Masked Image Pretraining on Language Assisted Representation",
            "Hou et al.",
            "2022",
            "2208.06049",
            "https://github.com/zejiangh/MILAN/tree/7dcfe0ff0861fdb2915cb51a8d01a727a1c9c7e2",
        ),
        hides="All but a quarter of the patches, which is drawn without replacement in proportion "
        "to the attention of CLIP's class token: what matters is mostly seen, and seldom all of "
        "it.",
        defaults={
            "mask_ratio": "0.75",
            "attention": "of the last layer of CLIP's image encoder",
        },
        differences=(
            KEEPS_147,
            "Pass CLIP's attention as `attention`; with a teacher's own it is another method.",
        ),
        arguments={"ratio": ratio},
        local_views=False,
    )


HPM_SHARE = Linear(0, 0.5)
"""HPM's share of hidden patches that follow the predicted loss."""
SEMMAE_WHOLE = Quadratic(0, 1)
"""SemMAE's way from parts to wholes."""


def adios(network: Callable[[Tensor], Tensor], ratio: Ratio = 1 / 6) -> Preset:
    """Mask what a network, trained against the encoder, says.

    >>> import maskdistill as md
    >>> def brightness(images):                       # stands for the mask network
    ...     return images.mean(dim=1, keepdim=True)
    >>> preset = md.presets.adios(brightness)
    >>> preset.apply, sorted(preset.needs)
    ('pixel', ['images'])

    Args:
        network: images ``(B, C, h, w)`` to scores ``(B, N)`` or a map ``(B, 1, h', w')``.
        ratio: share of patches to hide; a sixth is the mean share of one of the paper's six masks.

    Source: Shi et al., "Adversarial Masking for Self-Supervised Learning", 2022.
    """
    return Preset(
        student_global=LearnedMasker(ratio, network),
        name="adios",
        title="ADIOS",
        apply="pixel",
        objectives=("siamese",),
        objective="SimCLR's, BYOL's or SimSiam's between a masked and a clean view, which the mask "
        "network maximises",
        paper=Paper(
            "Adversarial Masking for Self-Supervised Learning",
            "Shi et al.",
            "ICML 2022",
            "2201.13100",
            "https://github.com/YugeTen/adios/tree/21c6f23f74656046f93105989874c7bac62cefa6",
        ),
        hides="The patches with the highest scores of a network that is trained to make the "
        "encoder's task hard.",
        defaults={
            "masks": "6 per image, a soft partition of the pixels by softmax; every one is used in "
            "each step (ADIOS), or one at random (ADIOS-s)",
            "network": "a U-Net",
            "against all or nothing": "a penalty on masks that hide little or much",
            "ViT-Tiny": "300 epochs of a small ImageNet-100, batch 128",
        },
        differences=(
            "The preset draws hard masks of whole patches with a fixed ratio; the authors multiply "
            "pixels by soft masks, which gradients of the mask network pass through.",
            "One mask per view, not six.",
            "The authors mask one of two views, and both pass through one encoder; here both "
            "global views are masked for the student and clean for the teacher.",
            "Training the mask network is not part of a preset: `examples/adios_scenes.py` does "
            "it, with soft masks.",
        ),
        arguments={"network": network, "ratio": ratio},
        local_views=False,
    )


def hpm(ratio: Ratio = 0.75, share: Scalar = HPM_SHARE) -> Preset:
    """Drop patches that are hard to predict, more and more of them, among random ones.

    >>> import maskdistill as md
    >>> md.presets.hpm().student_global
    SignalMasker(0.75, 'loss', share=Linear(0, 0.5))

    Args:
        ratio: share of patches to drop.
        share: share of them that have the highest predicted loss, by default from 0 to one half;
            the others are random.

    Source: Wang et al., "Hard Patches Mining for Masked Image Modeling", 2023.
    """
    return restoring(
        "hpm",
        "HPM",
        SignalMasker(ratio, "loss", share=share),
        Paper(
            "Hard Patches Mining for Masked Image Modeling",
            "Wang et al.",
            "CVPR 2023",
            "2304.05919",
            "https://github.com/Haochen-Wang409/HPM/tree/c15ae9077160b7940957f1423071d84044e41c8b",
        ),
        "The patches whose loss a second network predicts to be highest, and random ones. The "
        "share of the hard ones grows from none to one half.",
        {
            "mask_ratio": "0.75",
            "hard patches": "from 0 to 0.5 of the hidden ones, linear in epochs",
            "predicted loss": "by a moving average of the network; it learns which of two patches "
            "is harder",
        },
        (
            "The share grows with progress; the authors' grows in steps, epoch by epoch.",
            "Pass the predicted loss as `loss`: predicting it is not part of a preset.",
            KEEPS_147,
        ),
        (
            "ViT-B/16 fine-tuned on ImageNet: 83.0 % after 200 epochs, MAE 82.2; 84.2 % after 800, "
            "MAE 83.6 after 1600. ADE20K after 200 epochs: 42.1 mIoU, MAE 40.5 (the authors' "
            "README).",
        ),
        arguments={"ratio": ratio, "share": share},
        objective="squared error of the hidden patches' pixels, and the prediction of that error",
    )


def semmae(ratio: Ratio = 0.75, whole: Scalar = SEMMAE_WHOLE) -> Preset:
    """Drop a share of every part of the object at first, and whole parts at the end.

    >>> import maskdistill as md
    >>> md.presets.semmae().student_global
    PartMasker(0.75)

    Args:
        ratio: share of patches to drop.
        whole: from 0, within parts, to 1, whole parts; by default with the square of progress.

    Source: Li et al., "SemMAE: Semantic-Guided Masking for Learning Masked Autoencoders", 2022.
    """
    return restoring(
        "semmae",
        "SemMAE",
        PartMasker(ratio, whole=whole),
        Paper(
            "SemMAE: Semantic-Guided Masking for Learning Masked Autoencoders",
            "Li et al.",
            "NeurIPS 2022",
            "2206.10207",
            "https://github.com/ucasligang/SemMAE/tree/95b39ffe2a56a20d861a7394003cf01131cd09d7",
        ),
        "Patches by the part of the image that they belong to: at first the same share of every "
        "part, at the end whole parts in random order.",
        {
            "mask_ratio": "0.75",
            "parts": "7 per image, found beforehand by a part learner built on iBOT",
            "curriculum": "from parts to wholes with the square of progress, over 800 epochs",
        },
        (
            "Pass the parts as `parts`: finding them is not part of a preset.",
            "Where rounding leaves too many candidates in all, random ones are shown.",
            KEEPS_147,
        ),
        ("ViT-B/16, 800 epochs, fine-tuned on ImageNet: 83.35 % (the authors' README).",),
        arguments={"ratio": ratio, "whole": whole},
    )


def cl_mae(network: Callable[[Tensor], Tensor], ratio: Ratio = 0.75) -> Preset:
    """Drop what a network says that is first the encoder's partner, then its adversary.

    >>> import maskdistill as md
    >>> def brightness(images):                       # stands for the mask network
    ...     return images.mean(dim=1, keepdim=True)
    >>> preset = md.presets.cl_mae(brightness)
    >>> preset.apply, sorted(preset.needs)
    ('drop', ['images'])

    Args:
        network: images ``(B, C, h, w)`` to scores ``(B, N)`` or a map ``(B, 1, h', w')``; the
            highest are hidden.
        ratio: share of patches to drop.

    Source: Madan et al., "CL-MAE: Curriculum-Learned Masked Autoencoders", 2024.
    """
    return restoring(
        "cl_mae",
        "CL-MAE",
        LearnedMasker(ratio, network),
        Paper(
            "CL-MAE: Curriculum-Learned Masked Autoencoders",
            "Madan et al.",
            "WACV 2024",
            "2308.16572",
        ),
        "The patches with the highest scores of a network that learns with the encoder: at first "
        "to help it restore the image, at the end to hinder it, so that the task goes from easy to "
        "hard.",
        {
            "mask_ratio": "0.75",
            "curriculum": "the encoder's loss counts from +1 to -1 in the mask network's",
            "network": "5 blocks, then a score for each patch",
            "further losses": "towards scores spread around one half, towards the ratio, and "
            "towards different masks for different images",
        },
        (
            "The curriculum lies in how the network is trained and not in the masker, so it is not "
            "part of the preset: `examples/adios_scenes.py --curriculum easy-to-hard` does that.",
            "The highest scores are hidden; the authors' network scores what to keep.",
            KEEPS_147,
        ),
        arguments={"network": network, "ratio": ratio},
    )


def dppmask(ratio: Ratio = 0.75) -> Preset:
    """Drop so many patches that those left differ from each other.

    >>> import maskdistill as md
    >>> md.presets.dppmask().student_global
    DPPMasker(0.75)

    Args:
        ratio: share of patches to drop.

    Source: Xu et al., "DPPMask: Masked Image Modeling with Determinantal Point Processes", 2023.
    """
    return restoring(
        "dppmask",
        "DPPMask",
        DPPMasker(ratio),
        Paper(
            "DPPMask: Masked Image Modeling with Determinantal Point Processes",
            "Xu et al.",
            "2023",
            "2303.12736",
        ),
        "All but patches that differ from each other: a determinantal point process draws the "
        "visible ones, so that a small object is not hidden altogether.",
        {
            "frameworks": "MAE and iBOT; the preset is MAE's, with MAE's ratio",
            "kernel and sampler": "unverified",
        },
        (
            "The authors' kernel and sampler were not read: the width of the kernel and the way of "
            "drawing one patch after the other are our choice.",
        ),
        (
            "Better than random masks in MAE and iBOT, at low and high ratios, and in the "
            "backgrounds challenge (abstract).",
        ),
        arguments={"ratio": ratio},
    )


def capi(ratio: Ratio = 0.65) -> Preset:
    """Show one block, shifted around the edges, and drop the rest.

    >>> import maskdistill as md
    >>> md.presets.capi().student_global
    SingleBlockMasker(0.65, inverse=True).rolled()

    Args:
        ratio: share of patches to drop.

    Source: Darcet et al., "Cluster and Predict Latents Patches for Improved Masked Image
    Modeling", 2025.
    """
    return Preset(
        student_global=SingleBlockMasker(ratio, inverse=True).rolled(),
        global_crops=1,
        name="capi",
        title="CAPI",
        apply="drop",
        objectives=("clusters",),
        objective="cross-entropy of hidden patches with the teacher's assignment to clusters",
        paper=Paper(
            "Cluster and Predict Latents Patches for Improved Masked Image Modeling",
            "Darcet et al.",
            "2025",
            "2502.08769",
            "https://github.com/facebookresearch/capi/tree/98b4fa17ee8eec8810c17022df9a27a44845368b",
        ),
        hides="All but one rectangle of the grid, which is then shifted around the edges by a "
        "random offset, so that no place is hidden more often than another. The hidden patches are "
        "dropped and predicted by a separate network that looks at the visible ones.",
        defaults={
            "mask_ratio": "0.65",
            "aspect": "0.5 to 2, log-uniform as far as the grid admits",
            "shift": "on, for both axes",
            "predicted patches": "0.05 of the hidden ones (`prediction_subsampling`)",
            "crops": "1 of scale 0.6 to 1",
        },
        differences=(ROUNDS_DOWN + " On 14x14 both hide 127.",),
        arguments={"ratio": ratio},
        local_views=False,
    )


def ijepa(ratio: float | None = 0.6) -> Preset:
    """Show a large block less four smaller ones, which are to be predicted.

    >>> import maskdistill as md
    >>> md.presets.ijepa().student_global
    MultiBlockMasker().exactly(0.6)
    >>> md.presets.ijepa(None).student_global
    MultiBlockMasker()

    Args:
        ratio: trim or top up each mask at random to this share, so that every row hides the same
            number and its tokens can be dropped; 0.6 is about what the masks hide on average. None
            leaves them as they are drawn.

    Source: Assran et al., "Self-Supervised Learning from Images with a Joint-Embedding Predictive
    Architecture", 2023.
    """
    masker: Masker = MultiBlockMasker()
    return Preset(
        student_global=masker if ratio is None else masker.exactly(ratio),
        global_crops=1,
        name="ijepa",
        title="I-JEPA",
        apply="drop",
        objectives=("latent",),
        objective="squared error of the teacher's features of the target blocks",
        paper=Paper(
            "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture",
            "Assran et al.",
            "CVPR 2023",
            "2301.08243",
            "https://github.com/facebookresearch/ijepa/tree/"
            "52c1ae95d05f743e000e8f10a1f3a79b10cff048",
        ),
        hides="All but the context: a large square block less four target blocks, which may "
        "overlap each other. The context is encoded, the targets are predicted one by one; "
        "`MultiBlockMasker().draw_blocks(...)` returns them with the context.",
        defaults={
            "targets": "4 blocks of scale 0.15 to 0.2, aspect 0.75 to 1.5",
            "context": "1 square block of scale 0.85 to 1, without the targets",
            "least context": "more than 10 patches (`min_keep`), else it is drawn again",
        },
        differences=(
            "Blocks reach the last row and column. The authors draw a block's place with an "
            "exclusive upper end, so that it never does; on 14x14 their context block is always "
            "the upper left 13x13. Not reproduced.",
            "A block's scale and aspect are independent. The authors use one random number for "
            "both, so that larger targets are always the taller ones. Not reproduced.",
            "Every image has block sizes of its own. The authors draw them once per batch.",
            "Rows are made equally long at random places, so that tokens can be dropped. The "
            "authors cut longer rows to the shortest of the batch, at the lower right. "
            "`ijepa(None)` leaves the masks as they are drawn, 37 to 85 % hidden.",
            "A context that is too small is drawn anew 20 times and then the best is taken; the "
            "authors then give up the targets one after the other.",
        ),
        evidence=(
            "The form of the mask decides: with 1 % of ImageNet's labels, ViT-B/16 after 300 "
            "epochs gives 54.2 % with these blocks, 20.2 % with one block, 17.6 % with random "
            "patches, 15.5 % with rasterised quadrants (the paper's table 6).",
        ),
        arguments={"ratio": ratio},
        local_views=False,
    )


def data2vec2(ratio: Ratio = 0.8) -> Preset:
    """Show a few squares and drop the rest; several masks serve each image.

    >>> import maskdistill as md
    >>> preset = md.presets.data2vec2()
    >>> preset.student_global
    SquaresMasker(0.8, inverse=True)
    >>> preset.student_global.several(16, batch=4, grid=(14, 14)).shape
    torch.Size([4, 16, 196])

    Args:
        ratio: share of patches to drop.

    Source: Baevski et al., "Efficient Self-supervised Learning with Contextualized Target
    Representations for Vision, Speech and Language", 2023.
    """
    return Preset(
        student_global=SquaresMasker(ratio, inverse=True),
        global_crops=1,
        name="data2vec2",
        title="data2vec 2.0",
        apply="drop",
        objectives=("latent",),
        objective="squared error of the teacher's features, averaged over its layers, at the "
        "hidden patches",
        paper=Paper(
            "Efficient Self-supervised Learning with Contextualized Target Representations for "
            "Vision, Speech and Language",
            "Baevski et al.",
            "ICML 2023",
            "2212.07525",
            "https://github.com/facebookresearch/fairseq/tree/"
            "3d262bb25690e4eb2e7d3c1309b1e9c406ca4b99",
        ),
        hides="All but the patches of some squares of 3 x 3 at random places, which may overlap. "
        "Single patches are then shown or hidden at random until the number is exact. One pass of "
        "the teacher serves 16 masks of the same image.",
        defaults={
            "mask_prob": "0.8",
            "squares": "3 x 3, 5 of them on 14x14",
            "mask_prob_adjust": "0.07 of the grid is drawn in excess, since squares overlap",
            "clone_batch": "16 masks per image: `.several(16, ...)`",
        },
        differences=(
            ROUNDS_DOWN + " On 14x14 both show 39.",
            "Any grid will do; the authors' code takes square ones.",
            "The noise that the authors put in the place of hidden patches before their "
            "convolutional decoder is the decoder's affair, and not here.",
        ),
        evidence=(
            "Matches MAE on ImageNet in a sixteenth of the time for training (abstract: 16.4 "
            "times), by all of its measures together, of which the masks are one.",
        ),
        arguments={"ratio": ratio},
        local_views=False,
    )


def cluster(ratio: Ratio = 0.5) -> Preset:
    """Drop regions of one look.

    >>> import maskdistill as md
    >>> md.presets.cluster().student_global
    ClusterMasker(0.5)

    Args:
        ratio: share of patches to drop.

    Source: Wei et al., "Efficient Vision-Language Pre-training by Cluster Masking", 2024.
    """
    return Preset(
        student_global=ClusterMasker(ratio),
        global_crops=1,
        name="cluster",
        title="Cluster masking",
        apply="drop",
        objectives=("clip",),
        objective="contrast of images with their captions",
        paper=Paper(
            "Efficient Vision-Language Pre-training by Cluster Masking",
            "Wei et al.",
            "CVPR 2024",
            "2405.08815",
            "https://github.com/Zi-hao-Wei/"
            "Efficient-Vision-Language-Pre-training-by-Cluster-Masking/tree/"
            "6fe5bff58e977c5875eb935ebe7cf327907d18d1",
        ),
        hides="A few random patches, the anchors, and whatever looks like one of them: whole "
        "regions of one colour or texture.",
        defaults={
            "anchors": "0.03 of the patches",
            "likeness": "cosine of the patches' pixels, each patch normalised by itself",
            "target_mask_ratio": "0.5 on average over images",
            "min_mask_ratio": "0.3 for every image, by random patches",
        },
        differences=(
            "Every image hides exactly the ratio, its patches most like an anchor, so that tokens "
            "can be dropped. The authors use one threshold for all images, and an attention mask; "
            "`ClusterMasker(0.5, exact=False)` draws so.",
            "The authors' search for the threshold is not called in their published code, which "
            "uses the target ratio as the threshold instead. Here the threshold is sought.",
            "Patches that fill an image up to the least ratio are drawn uniformly. In the authors' "
            "code the noise for that is applied to the wrong patches, so that the last ones of the "
            "grid are taken. Not reproduced.",
            "The change from pixels to embeddings over training is not here: give "
            '`ClusterMasker(0.5, signal="features")` the embeddings.',
        ),
        arguments={"ratio": ratio},
        teacher=False,
        local_views=False,
    )


def beit(ratio: Ratio = 75 / 196) -> Preset:
    """Mask large blocks of the one view.

    >>> import maskdistill as md
    >>> mask = md.presets.beit().student_global(8, (14, 14))
    >>> bool((mask.sum(dim=1) <= 75).all())
    True

    Args:
        ratio: share of patches to hide at most; the default is 75 of 14x14.

    Source: Bao et al., "BEiT: BERT Pre-Training of Image Transformers", 2022.
    """
    return restoring(
        "beit",
        "BEiT",
        BlockMasker(ratio, min_patches=16, exact=False),
        Paper(
            "BEiT: BERT Pre-Training of Image Transformers",
            "Bao et al.",
            "ICLR 2022",
            "2106.08254",
            "https://github.com/microsoft/unilm/tree/768a3c873f598bb9b4d4dfb9267b099e35f8fe56/beit",
        ),
        "Rectangles of random shape, one after the other, until 75 patches are hidden or no "
        "further rectangle fits. Rectangles lie inside the grid, so its centre is hidden more "
        "often.",
        {
            "number": "75 of 14x14 patches, at most",
            "least area of a rectangle": "16 patches (the class's own default is 4)",
            "aspect": "0.3 to 1 / 0.3, log-uniform",
            "tries": "10 for each rectangle; ten failures end the image",
        },
        ("The number is a ratio, so that other grids hide the same share.",),
        arguments={"ratio": ratio},
        apply="token",
        objectives=("tokens",),
        objective="cross-entropy of the hidden patches' visual words",
    )


_MAE = Paper(
    "Masked Autoencoders Are Scalable Vision Learners",
    "He et al.",
    "CVPR 2022",
    "2111.06377",
    "https://github.com/facebookresearch/mae/tree/efb2a8062c206524e35e47d04501ed4f544c0ae8",
)


def mae(ratio: Ratio = 0.75) -> Preset:
    """Drop most patches at random.

    >>> import maskdistill as md
    >>> md.presets.mae().student_global
    RandomMasker(0.75)

    Args:
        ratio: share of patches to drop.

    Source: He et al., "Masked Autoencoders Are Scalable Vision Learners", 2022.
    """
    return restoring(
        "mae",
        "MAE",
        RandomMasker(ratio),
        _MAE,
        "Three quarters of the patches, drawn uniformly for each image. The encoder sees only the "
        "rest.",
        {"mask_ratio": "0.75", "targets": "pixels, optionally normalised by patch"},
        (KEEPS_147,),
        arguments={"ratio": ratio},
    )


def mae_grid() -> Preset:
    """Drop all but every second patch of every second row: MAE's ablation.

    >>> import maskdistill as md
    >>> md.presets.mae_grid().student_global
    GridMasker()

    Source: He et al., "Masked Autoencoders Are Scalable Vision Learners", 2022.
    """
    return restoring(
        "mae_grid",
        "MAE, grid-wise",
        GridMasker(),
        _MAE,
        "Three of every 2 x 2 patches, always the same ones: an ablation of MAE's, with the "
        "easiest task, since every hidden patch has a visible neighbour.",
        {"cell": "2 x 2 patches, one of them visible", "ratio": "0.75"},
        (
            "The authors' code has no grid-wise masks: this follows the paper's figure. It shows "
            "the upper left patch of each cell.",
        ),
        arguments={},
    )


def simmim(ratio: Ratio = 0.6, unit: int = 2) -> Preset:
    """Mask random squares of 32 pixels.

    >>> import maskdistill as md
    >>> md.presets.simmim().student_global
    RandomMasker(0.6).in_units(2)

    Args:
        ratio: share of the units to hide.
        unit: patches along a side of a unit: 2 for patches of 16 pixels, 8 for Swin's of 4.

    Source: Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", 2022.
    """
    return restoring(
        "simmim",
        "SimMIM",
        RandomMasker(ratio).in_units(unit),
        Paper(
            "SimMIM: A Simple Framework for Masked Image Modeling",
            "Xie et al.",
            "CVPR 2022",
            "2111.09886",
            "https://github.com/microsoft/SimMIM/tree/d3e29bcac950b83edc34ca33fe4404f38309052c",
        ),
        "Units of 32 x 32 pixels, drawn uniformly: 2 x 2 patches of 16 pixels are hidden together.",
        {"mask_ratio": "0.6", "mask_patch_size": "32 pixels", "image size": "192 pixels"},
        (
            "The number of hidden units is rounded to the nearest; the authors' code rounds it up. "
            "On their 192 pixels both hide 22 of 36 units; on 224 it hides 30 of 49, this hides "
            "29.",
            "The image may be of any shape; the authors' code takes square ones.",
        ),
        arguments={"ratio": ratio, "unit": unit},
        apply="token",
        objective="absolute error of the hidden patches' pixels",
    )


def um_mae() -> Preset:
    """Show one random patch of each 2 x 2, and drop the rest.

    >>> import maskdistill as md
    >>> md.presets.um_mae().student_global
    GridMasker(random=True)

    Source: Li et al., "Uniform Masking: Enabling MAE Pre-training for Pyramid-based Vision
    Transformers with Locality", 2022.
    """
    return restoring(
        "um_mae",
        "UM-MAE",
        GridMasker(random=True),
        Paper(
            "Uniform Masking: Enabling MAE Pre-training for Pyramid-based Vision Transformers with "
            "Locality",
            "Li et al.",
            "2022",
            "2205.10063",
            "https://github.com/implus/UM-MAE/tree/cb7776b075491824626cd93b64d7de62f0cf28c6",
        ),
        "Three random ones of every 2 x 2 patches. What is visible is spread evenly, and packs "
        "into a grid of half the size, which networks with local windows need.",
        {
            "cell": "2 x 2 patches, one of them visible; the ratio must be 0.75",
            "secondary masking": "a quarter of the visible patches become mask tokens",
        },
        (
            "The secondary masking is left out: a policy has one way of applying its masks, and "
            "the paper needs two, dropping and mask tokens.",
            "Which corner of a cell is visible is drawn independently. The authors draw it without "
            "replacement from a list with as many of each, so that theirs are slightly evened out.",
            "Grids of odd sides work, with cut cells at the edge; the authors' code wants even "
            "ones.",
        ),
        (
            "ViT-B, 200 epochs, fine-tuned on ImageNet: 82.88 %, the same as MAE with random "
            "patches; Swin-T 82.04 %, SimMIM 82.20 % in twice the time (the authors' README).",
        ),
        arguments={},
    )


def colormae(color: Color = "green", ratio: Ratio = 0.75) -> Preset:
    """Drop patches where noise of one colour is high.

    >>> import maskdistill as md
    >>> md.presets.colormae().student_global
    ColorNoiseMasker(0.75)
    >>> md.presets.colormae("red").student_global
    ColorNoiseMasker(0.75, color='red')

    Args:
        color: ``"green"``, the paper's best, ``"red"``, ``"blue"`` or ``"purple"``.
        ratio: share of patches to drop.

    Source: Hinojosa et al., "ColorMAE: Exploring data-independent masking strategies in Masked
    AutoEncoders", 2024.
    """
    return restoring(
        "colormae",
        "ColorMAE",
        ColorNoiseMasker(ratio, color),
        Paper(
            "ColorMAE: Exploring data-independent masking strategies in Masked AutoEncoders",
            "Hinojosa et al.",
            "ECCV 2024",
            "2407.13036",
            "https://github.com/carlosh93/ColorMAE/tree/f0ad557d3f37c9298b776da23002c40b9e846470",
        ),
        "Patches where filtered noise is highest: for green noise blobs of one size, evenly "
        "spread; for red larger ones, for blue patches that keep apart.",
        {
            "color": "green",
            "mask_ratio": "0.75",
            "noise": "windows of patterns that were filtered beforehand, random in place and "
            "mirroring",
        },
        (
            "The noise is filtered anew for every image. The authors cut windows from files whose "
            "making is not published: the widths of the filters, 1 and 2 patches, are our choice.",
            "Every image has a window of its own. The authors' code uses one offset and one "
            "mirroring for all images of a batch.",
            "Hidden is where the noise is highest, there where it is lowest: with this noise the "
            "same.",
            "Any grid will do; the authors' code takes square ones.",
            KEEPS_147,
        ),
        (
            "Green, ViT-B/16 fine-tuned on ImageNet: 83.01, 83.61, 83.77 % after 300, 800, 1600 "
            "epochs; ADE20K 45.80 mIoU after 300 and 49.18 after 800 (the authors' README).",
            "2.72 mIoU more than random masks in segmentation (abstract).",
        ),
        arguments={"color": color, "ratio": ratio},
    )


ALL: Mapping[str, Callable[..., Preset]] = {
    factory.__name__: factory
    for factory in (
        dino, asymmetric, ibot, dinov2, dinov3, attmask_high, attmask_hint, attmask_low, mst, msn,
        adios, capi, ijepa, data2vec2, milan, cluster, beit, mae, mae_grid, simmim, um_mae,
        colormae, hpm, semmae, cl_mae, dppmask,
    )
}  # fmt: skip
"""Every preset's function by its name: self-distillation, then latent targets, then pixels."""

NAMES: tuple[str, ...] = tuple(ALL)
"""The names in the same order."""
