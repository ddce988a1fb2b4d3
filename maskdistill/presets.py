"""Published methods as values: a policy, how its masks are applied, the objectives, the paper.

A method is one function below; its ``ratio`` is the share of patches that it hides. What its
authors set, what differs here and what was measured stand on its card, docs/methods/NAME.md.
"""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec

from torch import Tensor

from maskdistill.masking import (
    AttentionGuidedMasker,
    AttentionHintMasker,
    BernoulliMasker,
    BlockMasker,
    ClusterMasker,
    ColorNoiseMasker,
    DPPMasker,
    GridMasker,
    LearnedMasker,
    Linear,
    Masker,
    MultiBlockMasker,
    PartMasker,
    Quadratic,
    RandomMasker,
    SignalMasker,
    SingleBlockMasker,
    SquaresMasker,
    Stratified,
    Uniform,
)
from maskdistill.masking.ratios import Ratio, Scalar
from maskdistill.masking.uniform import Color
from maskdistill.models.tokens import Application
from maskdistill.objectives import LOSSES
from maskdistill.policies import Cell, ViewPolicy

P = ParamSpec("P")


@dataclass(frozen=True)
class Paper:
    """Where a method was published; its title stands on the method's card.

    >>> import maskdistill as md
    >>> paper = md.presets.mae().paper
    >>> print(paper, paper.url)
    He et al., CVPR 2022, arXiv 2111.06377 https://arxiv.org/abs/2111.06377

    Attributes:
        authors: short, as "He et al.".
        venue: with its year, as "CVPR 2022"; the year alone for what was not published elsewhere.
        arxiv: the paper's number there.
    """

    authors: str
    venue: str
    arxiv: str

    @property
    def url(self) -> str:
        """The paper's page."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    def __str__(self) -> str:
        return f"{self.authors}, {self.venue}, arXiv {self.arxiv}"


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

    A preset is a ``ViewPolicy`` and is called like one; two are equal if they mask the same.

    Attributes:
        title: the method's name.
        apply: how the hidden patches are taken from the network, for ``MaskedViT``.
        objectives: the losses that the masks were published with, as short words: ``"dino"``
            between class tokens of different views, ``"ibot"`` on hidden patches of the same view,
            ``"koleo"``, ``"msn"``, ``"gram"``, ``"clusters"``, ``"latent"``, ``"pixels"``,
            ``"tokens"``, ``"clip"``, ``"siamese"``.
        objective: the same in a sentence.
        paper: where it was published.
        teacher: whether there is a second network that gives the targets.
        local_views: whether there are local views besides the global ones.
        name: of the function in ``maskdistill.presets`` that builds it.
        arguments: what that function was given, by name.
    """

    title: str
    apply: Application
    objectives: tuple[str, ...]
    objective: str
    paper: Paper
    teacher: bool = True
    local_views: bool = True
    name: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trainable(self) -> str:
        """The objective as `maskdistill.objectives.build_objective` takes it.

        Without the losses that this library has not; ``"dino"`` where nothing of it is here.

        >>> import maskdistill as md
        >>> md.presets.dinov2().trainable, md.presets.mst().trainable
        ('dino+ibot+koleo', 'dino')
        """
        return "+".join(name for name in self.objectives if name in LOSSES) or "dino"

    @property
    def untrained(self) -> tuple[str, ...]:
        """The losses of ``objectives`` that this library has not."""
        return tuple(name for name in self.objectives if name not in LOSSES)

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
        lines = [f"{self.title}: {self.paper}", ""]
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
        if ALL[self.name](**self.arguments) != self:  # changed since, by dataclasses.replace
            return super().__repr__()
        accepted = inspect.signature(ALL[self.name]).parameters
        given = [
            repr(value)
            if accepted[name].default is inspect.Parameter.empty
            else f"{name}={value!r}"
            for name, value in self.arguments.items()
            if value != accepted[name].default
        ]
        return f"presets.{self.name}({', '.join(given)})"


ALL: dict[str, Callable[..., Preset]] = {}
"""Every preset's function by its name: self-distillation, then latent targets, then pixels."""


def method(build: Callable[P, Preset]) -> Callable[P, Preset]:
    """List a function among the presets; what it builds knows the call that built it."""

    @functools.wraps(build)
    def built(*args: P.args, **kwargs: P.kwargs) -> Preset:
        preset = build(*args, **kwargs)
        call = inspect.signature(build).bind(*args, **kwargs)
        call.apply_defaults()
        return replace(preset, name=build.__name__, arguments=dict(call.arguments))

    ALL[build.__name__] = built
    return built


_DINO = "cross-entropy between the class tokens of different views"
IBOT_RATIO = Uniform(0.1, 0.5)
"""iBOT's and AttMask's ratio: 0.3, and up to 0.2 more or less."""
HPM_SHARE = Linear(0, 0.5)
"""HPM's share of hidden patches that follow the predicted loss."""
SEMMAE_WHOLE = Quadratic(0, 1)
"""SemMAE's way from parts to wholes."""


# --- Self-distillation: a teacher, two global views, local ones beside them


@method
def dino() -> Preset:
    """Mask nothing: the baseline, equal to ``ViewPolicy.none()``."""
    return Preset(
        title="DINO",
        apply="token",
        objectives=("dino",),
        objective=_DINO,
        paper=Paper("Caron et al.", "ICCV 2021", "2104.14294"),
    )


@method
def asymmetric(ratio: Ratio = 0.3) -> Preset:
    """Mask the student's global views at random, and nothing else: our reconstruction.

    >>> import maskdistill as md
    >>> md.presets.asymmetric() == md.AsymmetricMaskPolicy(md.RandomMasker(0.3))
    True

    Args:
        ratio: share of patches to hide. The paper's could not be read; 0.3 is our choice.
    """
    return Preset(
        student_global=RandomMasker(ratio),
        title="Asymmetric masking (our reconstruction)",
        apply="token",
        objectives=("dino",),
        objective=_DINO,
        paper=Paper("Seong and Han", "2025", "2506.10582"),
    )


@method
def ibot(ratio: Ratio = IBOT_RATIO, p: Scalar = 0.5, global_crops: int = 2) -> Preset:
    """Mask blocks of half of the student's global views, as iBOT does.

    Args:
        ratio: share of patches to hide in a masked view; by default uniform in 0.1 to 0.5.
        p: probability that a view is masked; a schedule can begin with none.
        global_crops: number of global views; this library's trainer takes two.
    """
    return Preset(
        student_global=BlockMasker(ratio, min_patches=None, exact=False).sometimes(p),
        global_crops=global_crops,
        title="iBOT",
        apply="token",
        objectives=("dino", "ibot"),
        objective="cross-entropy between class tokens of different views, and of hidden patches "
        "with the teacher's of the same view",
        paper=Paper("Zhou et al.", "ICLR 2022", "2111.07832"),
    )


@method
def dinov2(low: Scalar = 0.1, high: Scalar = 0.5, share: float = 0.5) -> Preset:
    """Mask blocks of a fixed share of the student's global views, with evenly spread ratios.

    Args:
        low: least ratio of a masked view.
        high: greatest ratio.
        share: share of the batch's views that are masked.
    """
    return Preset(
        student_global=BlockMasker(Stratified(low, high, share=share), exact=False),
        title="DINOv2",
        apply="token",
        objectives=("dino", "ibot", "koleo"),
        objective="cross-entropy of class tokens across views and of hidden patches within a view; "
        "class tokens of a batch are spread",
        paper=Paper("Oquab et al.", "2023", "2304.07193"),
    )


@method
def dinov3(
    low: Scalar = 0.1, high: Scalar = 0.5, share: float = 0.5, rolled: bool = False
) -> Preset:
    """Mask as DINOv2 does, with exact counts.

    Args:
        low: least ratio; the lowest that is drawn lies one part of the range above.
        high: greatest ratio.
        share: share of the batch's views that are masked.
        rolled: shift each mask around the grid's edges by a random offset.
    """
    masker: Masker = BlockMasker(Stratified(low, high, share=share, jitter=False))
    return Preset(
        student_global=masker.rolled() if rolled else masker,
        title="DINOv3",
        apply="token",
        objectives=("dino", "ibot", "koleo", "gram"),
        objective="as DINOv2's, and in a later stage likenesses of patches are held to those of an "
        "earlier teacher",
        paper=Paper("Siméoni et al.", "2025", "2508.10104"),
    )


def _attmask(title: str, masker: Masker) -> Preset:
    return Preset(
        student_global=masker,
        title=title,
        apply="token",
        objectives=("dino", "ibot"),
        objective="iBOT's two; the paper also uses the class tokens' alone",
        paper=Paper("Kakogeorgiou et al.", "ECCV 2022", "2203.12719"),
    )


@method
def attmask_high(ratio: Ratio = IBOT_RATIO, p: Scalar = 0.5) -> Preset:
    """Mask what the teacher attends to most.

    Args:
        ratio: share of patches to hide in a masked view; by default uniform in 0.1 to 0.5.
        p: probability that a view is masked.
    """
    return _attmask("AttMask-High", AttentionGuidedMasker(ratio).sometimes(p))


@method
def attmask_hint(
    ratio: Ratio = IBOT_RATIO, hint: Ratio = IBOT_RATIO, pool: float = 0.1, p: Scalar = 0.5
) -> Preset:
    """Mask what the teacher attends to most, but show a few of the very foremost patches.

    Args:
        ratio: share of patches to hide in a masked view, before the hints are shown; by default
            uniform in 0.1 to 0.5.
        hint: share of the foremost patches that are shown; by default the same.
        pool: share of the grid that counts as foremost.
        p: probability that a view is masked.
    """
    masker = AttentionHintMasker(ratio, hint=hint, pool=pool, exact=False)
    return _attmask("AttMask-Hint", masker.sometimes(p))


@method
def attmask_low(ratio: Ratio = IBOT_RATIO, p: Scalar = 0.5) -> Preset:
    """Mask what the teacher attends to least: the paper's counter-example.

    Args:
        ratio: share of patches to hide in a masked view; by default uniform in 0.1 to 0.5.
        p: probability that a view is masked.
    """
    return _attmask("AttMask-Low", AttentionGuidedMasker(ratio, hide="least").sometimes(p))


@method
def mst(ratio: Ratio = 1 / 8, p: Ratio = 0.5) -> Preset:
    """Mask some of the patches that the teacher attends to least.

    Args:
        ratio: share of patches that may be hidden. The default is unverified.
        p: probability that each of them is. The default is our choice.
    """
    return Preset(
        student_global=AttentionGuidedMasker(ratio, hide="least") & BernoulliMasker(p),
        title="MST",
        apply="token",
        objectives=("dino", "pixels"),
        objective="cross-entropy between class tokens of different views, and a decoder that "
        "restores the image",
        paper=Paper("Li et al.", "NeurIPS 2021", "2106.05656"),
    )


@method
def msn(ratio: float = 0.15, global_crops: int = 2) -> Preset:
    """Drop random patches of the student's global views, the same for the whole batch.

    Args:
        ratio: share of patches to drop.
        global_crops: number of global views; this library's trainer takes two.
    """
    return Preset(
        student_global=RandomMasker(ratio).shared(),
        global_crops=global_crops,
        title="MSN",
        apply="drop",
        objectives=("msn",),
        objective="cross-entropy of class tokens' assignments to learned prototypes, and even use "
        "of them",
        paper=Paper("Assran et al.", "ECCV 2022", "2204.07141"),
    )


@method
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
    """
    return Preset(
        student_global=LearnedMasker(ratio, network),
        title="ADIOS",
        apply="pixel",
        objectives=("siamese",),
        objective="SimCLR's, BYOL's or SimSiam's between a masked and a clean view, which the mask "
        "network maximises",
        paper=Paper("Shi et al.", "ICML 2022", "2201.13100"),
        local_views=False,
    )


# --- Latent targets: one view of an image, most of it dropped


def _one_view(
    title: str,
    masker: Masker,
    paper: Paper,
    objective: str = "squared error of the hidden patches' pixels",
    *,
    objectives: tuple[str, ...] = ("pixels",),
    apply: Application = "drop",
    teacher: bool = False,
) -> Preset:
    """Build a preset of one view, by default with MAE's task and no teacher."""
    return Preset(
        student_global=masker,
        global_crops=1,
        title=title,
        apply=apply,
        objectives=objectives,
        objective=objective,
        paper=paper,
        teacher=teacher,
        local_views=False,
    )


@method
def capi(ratio: Ratio = 0.65) -> Preset:
    """Show one block, shifted around the edges, and drop the rest."""
    return _one_view(
        "CAPI",
        SingleBlockMasker(ratio, inverse=True).rolled(),
        Paper("Darcet et al.", "2025", "2502.08769"),
        "cross-entropy of hidden patches with the teacher's assignment to clusters",
        objectives=("clusters",),
        teacher=True,
    )


@method
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
    """
    masker: Masker = MultiBlockMasker()
    return _one_view(
        "I-JEPA",
        masker if ratio is None else masker.exactly(ratio),
        Paper("Assran et al.", "CVPR 2023", "2301.08243"),
        "squared error of the teacher's features of the target blocks",
        objectives=("latent",),
        teacher=True,
    )


@method
def data2vec2(ratio: Ratio = 0.8) -> Preset:
    """Show a few squares and drop the rest; several masks serve each image.

    >>> import maskdistill as md
    >>> preset = md.presets.data2vec2()
    >>> preset.student_global.several(16, batch=4, grid=(14, 14)).shape
    torch.Size([4, 16, 196])
    """
    return _one_view(
        "data2vec 2.0",
        SquaresMasker(ratio, inverse=True),
        Paper("Baevski et al.", "ICML 2023", "2212.07525"),
        "squared error of the teacher's features, averaged over its layers, at the hidden patches",
        objectives=("latent",),
        teacher=True,
    )


@method
def milan(ratio: float = 0.75) -> Preset:
    """Show patches in proportion to another network's attention, and drop the rest."""
    return _one_view(
        "MILAN",
        ~AttentionGuidedMasker(round(1 - ratio, 12), temperature=1.0),
        Paper("Hou et al.", "2022", "2208.06049"),
        "regression of CLIP's image features",
        objectives=("latent",),
        teacher=True,
    )


@method
def cluster(ratio: Ratio = 0.5) -> Preset:
    """Drop regions of one look."""
    return _one_view(
        "Cluster masking",
        ClusterMasker(ratio),
        Paper("Wei et al.", "CVPR 2024", "2405.08815"),
        "contrast of images with their captions",
        objectives=("clip",),
    )


# --- Pixels and visual words: one view and one network, which restores


_MAE = Paper("He et al.", "CVPR 2022", "2111.06377")


@method
def beit(ratio: Ratio = 75 / 196) -> Preset:
    """Mask large blocks of the one view.

    Args:
        ratio: share of patches to hide at most; the default is 75 of 14x14.
    """
    return _one_view(
        "BEiT",
        BlockMasker(ratio, min_patches=16, exact=False),
        Paper("Bao et al.", "ICLR 2022", "2106.08254"),
        "cross-entropy of the hidden patches' visual words",
        objectives=("tokens",),
        apply="token",
    )


@method
def mae(ratio: Ratio = 0.75) -> Preset:
    """Drop most patches at random."""
    return _one_view("MAE", RandomMasker(ratio), _MAE)


@method
def mae_grid() -> Preset:
    """Drop all but every second patch of every second row: MAE's ablation."""
    return _one_view("MAE, grid-wise", GridMasker(), _MAE)


@method
def simmim(ratio: Ratio = 0.6, unit: int = 2) -> Preset:
    """Mask random squares of 32 pixels.

    Args:
        ratio: share of the units to hide.
        unit: patches along a side of a unit: 2 for patches of 16 pixels, 8 for Swin's of 4.
    """
    return _one_view(
        "SimMIM",
        RandomMasker(ratio).in_units(unit),
        Paper("Xie et al.", "CVPR 2022", "2111.09886"),
        "absolute error of the hidden patches' pixels",
        apply="token",
    )


@method
def um_mae() -> Preset:
    """Show one random patch of each 2 x 2, and drop the rest."""
    paper = Paper("Li et al.", "2022", "2205.10063")
    return _one_view("UM-MAE", GridMasker(random=True), paper)


@method
def colormae(color: Color = "green", ratio: Ratio = 0.75) -> Preset:
    """Drop patches where noise of one colour is high.

    Args:
        color: ``"green"``, the paper's best, ``"red"``, ``"blue"`` or ``"purple"``.
        ratio: share of patches to drop.
    """
    paper = Paper("Hinojosa et al.", "ECCV 2024", "2407.13036")
    return _one_view("ColorMAE", ColorNoiseMasker(ratio, color), paper)


@method
def hpm(ratio: Ratio = 0.75, share: Scalar = HPM_SHARE) -> Preset:
    """Drop patches that are hard to predict, more and more of them, among random ones.

    Args:
        ratio: share of patches to drop.
        share: share of them that have the highest predicted loss, by default from 0 to one half;
            the others are random.
    """
    return _one_view(
        "HPM",
        SignalMasker(ratio, "loss", share=share),
        Paper("Wang et al.", "CVPR 2023", "2304.05919"),
        "squared error of the hidden patches' pixels, and the prediction of that error",
    )


@method
def semmae(ratio: Ratio = 0.75, whole: Scalar = SEMMAE_WHOLE) -> Preset:
    """Drop a share of every part of the object at first, and whole parts at the end.

    Args:
        ratio: share of patches to drop.
        whole: from 0, within parts, to 1, whole parts; by default with the square of progress.
    """
    paper = Paper("Li et al.", "NeurIPS 2022", "2206.10207")
    return _one_view("SemMAE", PartMasker(ratio, whole=whole), paper)


@method
def cl_mae(network: Callable[[Tensor], Tensor], ratio: Ratio = 0.75) -> Preset:
    """Drop what a network says that is first the encoder's partner, then its adversary.

    Args:
        network: images ``(B, C, h, w)`` to scores ``(B, N)`` or a map ``(B, 1, h', w')``; the
            highest are hidden.
        ratio: share of patches to drop.
    """
    paper = Paper("Madan et al.", "WACV 2024", "2308.16572")
    return _one_view("CL-MAE", LearnedMasker(ratio, network), paper)


@method
def dppmask(ratio: Ratio = 0.75) -> Preset:
    """Drop so many patches that those left differ from each other."""
    paper = Paper("Xu et al.", "2023", "2303.12736")
    return _one_view("DPPMask", DPPMasker(ratio), paper)


NAMES: tuple[str, ...] = tuple(ALL)
"""The names in the same order."""
