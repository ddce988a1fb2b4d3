"""Composable masking strategies for self-distillation of Vision Transformers."""

from maskdistill.applying import mask_pixels
from maskdistill.masking import (
    AttentionGuidedMasker,
    BlockMasker,
    Cosine,
    Linear,
    MaskContext,
    Masker,
    Mixture,
    NoMasker,
    RandomMasker,
    Stratified,
    Uniform,
    parse_masker,
)
from maskdistill.models import MaskedViT, MultiCropWrapper
from maskdistill.objectives import DINOHead, DINOLoss
from maskdistill.views import AsymmetricMaskPolicy, ViewMasks, ViewPolicy

__version__ = "0.1.0"

__all__ = [
    "AsymmetricMaskPolicy",
    "AttentionGuidedMasker",
    "BlockMasker",
    "Cosine",
    "DINOHead",
    "DINOLoss",
    "Linear",
    "MaskContext",
    "MaskedViT",
    "Masker",
    "Mixture",
    "MultiCropWrapper",
    "NoMasker",
    "RandomMasker",
    "Stratified",
    "Uniform",
    "ViewMasks",
    "ViewPolicy",
    "mask_pixels",
    "parse_masker",
]
