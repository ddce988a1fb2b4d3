"""What is hidden: maskers, their algebra, and the ratios and schedules they take."""

from maskdistill.masking.base import Masker, Mixture
from maskdistill.masking.blocks import BlockMasker
from maskdistill.masking.context import MaskContext
from maskdistill.masking.guided import AttentionGuidedMasker
from maskdistill.masking.parsing import parse_masker
from maskdistill.masking.ratios import Cosine, Linear, Stratified, Uniform
from maskdistill.masking.scores import ScoreMasker
from maskdistill.masking.uniform import NoMasker, RandomMasker

__all__ = [
    "AttentionGuidedMasker",
    "BlockMasker",
    "Cosine",
    "Linear",
    "MaskContext",
    "Masker",
    "Mixture",
    "NoMasker",
    "RandomMasker",
    "ScoreMasker",
    "Stratified",
    "Uniform",
    "parse_masker",
]
