"""Composable masking strategies for self-distillation of Vision Transformers.

Here are the names that every user needs; ``md.masking``, ``md.models`` and ``md.collating`` have
the others.
"""

from maskdistill import collating, masking, models, objectives, policies, presets
from maskdistill.collating import MaskCollate
from maskdistill.masking import (
    AttentionGuidedMasker,
    BlockMasker,
    Linear,
    Masker,
    Mixture,
    NoMasker,
    RandomMasker,
    SceneMasker,
    SignalMasker,
    Stratified,
    Uniform,
    parse_masker,
)
from maskdistill.models import MaskedViT, MultiCropWrapper, create_backbone, load_weights
from maskdistill.models.tokens import mask_pixels
from maskdistill.objectives import DINOHead, DINOLoss
from maskdistill.policies import AsymmetricMaskPolicy, ViewMasks, ViewPolicy

__version__ = "0.1.0"

__all__ = [
    "AsymmetricMaskPolicy",
    "AttentionGuidedMasker",
    "BlockMasker",
    "DINOHead",
    "DINOLoss",
    "Linear",
    "MaskCollate",
    "MaskedViT",
    "Masker",
    "Mixture",
    "MultiCropWrapper",
    "NoMasker",
    "RandomMasker",
    "SceneMasker",
    "SignalMasker",
    "Stratified",
    "Uniform",
    "ViewMasks",
    "ViewPolicy",
    "collating",
    "create_backbone",
    "load_weights",
    "mask_pixels",
    "masking",
    "models",
    "objectives",
    "parse_masker",
    "policies",
    "presets",
]
