"""Presets whose masks follow the image by other means than attention: losses, parts, networks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from maskdistill.masking.guided import SignalMasker
from maskdistill.masking.learned import LearnedMasker
from maskdistill.masking.parts import PartMasker
from maskdistill.masking.ratios import Ratio
from maskdistill.masking.schedules import Linear, Quadratic, Scalar
from maskdistill.masking.similarity import DPPMasker
from maskdistill.presets.preset import KEEPS_147, Paper, Preset, restoring

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
