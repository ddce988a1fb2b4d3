"""What the features and the attention are worth."""

from maskdistill.evaluation.attention import AttentionJaccard, attention_jaccard, keep_mass
from maskdistill.evaluation.features import (
    balanced_indices,
    extract_features,
    raw_pixels,
)
from maskdistill.evaluation.knn import knn_accuracy
from maskdistill.models.probing import evaluating

__all__ = [
    "AttentionJaccard",
    "attention_jaccard",
    "balanced_indices",
    "evaluating",
    "extract_features",
    "keep_mass",
    "knn_accuracy",
    "raw_pixels",
]
