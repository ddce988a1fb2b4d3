"""Presets that restore what was hidden at random: pixels, or the words of a visual vocabulary."""

from __future__ import annotations

from maskdistill.masking.blocks import BlockMasker
from maskdistill.masking.noise import Color, ColorNoiseMasker
from maskdistill.masking.ratios import Ratio
from maskdistill.masking.regular import GridMasker
from maskdistill.masking.uniform import RandomMasker
from maskdistill.presets.preset import KEEPS_147, Paper, Preset, restoring


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
