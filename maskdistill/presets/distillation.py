"""Presets of self-distillation: two networks, several views, targets without pixels."""

from __future__ import annotations

from maskdistill.masking.base import Masker
from maskdistill.masking.blocks import BlockMasker
from maskdistill.masking.ratios import Ratio, Stratified, Uniform
from maskdistill.masking.schedules import Scalar
from maskdistill.masking.uniform import RandomMasker
from maskdistill.presets.preset import ROUNDS_DOWN, Paper, Preset

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
