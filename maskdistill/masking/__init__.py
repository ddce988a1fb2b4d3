"""What is hidden: maskers, their algebra, and the ratios and schedules they take."""

from maskdistill.masking.base import ExactMasker, Masker, Mixture, ScoreMasker
from maskdistill.masking.context import MaskContext
from maskdistill.masking.geometry import SceneMasker, carry_signal
from maskdistill.masking.guided import (
    AttentionGuidedMasker,
    AttentionHintMasker,
    ClusterMasker,
    DPPMasker,
    LearnedMasker,
    PartMasker,
    SignalMasker,
)
from maskdistill.masking.mask import PatchMask
from maskdistill.masking.parsing import parse_masker
from maskdistill.masking.ratios import Cosine, Linear, Quadratic, Steps, Stratified, Uniform, WarmUp
from maskdistill.masking.rectangles import (
    BlockMasker,
    MultiBlockMasker,
    SingleBlockMasker,
    SquaresMasker,
)
from maskdistill.masking.uniform import (
    BernoulliMasker,
    CheckerboardMasker,
    ColorNoiseMasker,
    GridMasker,
    NoMasker,
    RandomMasker,
)

__all__ = [
    "AttentionGuidedMasker",
    "AttentionHintMasker",
    "BernoulliMasker",
    "BlockMasker",
    "CheckerboardMasker",
    "ClusterMasker",
    "ColorNoiseMasker",
    "Cosine",
    "DPPMasker",
    "ExactMasker",
    "GridMasker",
    "LearnedMasker",
    "Linear",
    "MaskContext",
    "Masker",
    "Mixture",
    "MultiBlockMasker",
    "NoMasker",
    "PartMasker",
    "PatchMask",
    "Quadratic",
    "RandomMasker",
    "SceneMasker",
    "ScoreMasker",
    "SignalMasker",
    "SingleBlockMasker",
    "SquaresMasker",
    "Steps",
    "Stratified",
    "Uniform",
    "WarmUp",
    "carry_signal",
    "parse_masker",
]
