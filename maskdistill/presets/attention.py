"""Presets whose masks follow the attention of another network."""

from __future__ import annotations

from maskdistill.masking.base import Masker
from maskdistill.masking.guided import AttentionGuidedMasker, AttentionHintMasker
from maskdistill.masking.ratios import Ratio
from maskdistill.masking.schedules import Scalar
from maskdistill.masking.uniform import BernoulliMasker
from maskdistill.presets.distillation import IBOT_RATIO
from maskdistill.presets.preset import KEEPS_147, ROUNDS_DOWN, Paper, Preset

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
