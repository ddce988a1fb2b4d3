"""What is hidden: maskers, their algebra, and the ratios and schedules they take."""

from maskdistill.masking.algebra import Mixture
from maskdistill.masking.base import Masker
from maskdistill.masking.blocks import BlockMasker
from maskdistill.masking.context import MaskContext
from maskdistill.masking.geometry import SceneMasker, carry_signal
from maskdistill.masking.guided import AttentionGuidedMasker, AttentionHintMasker, SignalMasker
from maskdistill.masking.learned import LearnedMasker
from maskdistill.masking.multiblock import MultiBlockMasker
from maskdistill.masking.noise import ColorNoiseMasker
from maskdistill.masking.parsing import parse_masker
from maskdistill.masking.parts import PartMasker
from maskdistill.masking.ratios import Stratified, Uniform
from maskdistill.masking.rectangles import SingleBlockMasker, SquaresMasker
from maskdistill.masking.regular import CheckerboardMasker, GridMasker
from maskdistill.masking.schedules import Cosine, Linear, Quadratic, Steps, WarmUp
from maskdistill.masking.scores import ExactMasker, ScoreMasker
from maskdistill.masking.similarity import ClusterMasker, DPPMasker
from maskdistill.masking.uniform import BernoulliMasker, NoMasker, RandomMasker

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
