"""What the features and the attention are worth."""

from maskdistill.evaluation.attention import (
    AttentionJaccard,
    PerImage,
    PointingGame,
    attention_jaccard,
    jaccard_per_image,
    keep_mass,
    pointing_game,
)
from maskdistill.evaluation.attention_report import (
    AttentionQuality,
    AttentionScores,
    CentreScores,
    attention_quality,
    attention_scores,
    reinitialised,
)
from maskdistill.evaluation.attention_statistics import (
    attention_distances,
    attention_entropy,
    attention_spread,
    head_diversity,
    mean_attention_distance,
)
from maskdistill.evaluation.backbones import (
    load_backbone,
)
from maskdistill.evaluation.backgrounds import (
    BackgroundAccuracies,
    Backgrounds,
    background_challenge,
    open_backgrounds,
)
from maskdistill.evaluation.boxes import (
    CentreBox,
    attention_boxes,
    box_iou,
    centre_box,
    centre_box_corloc,
    centre_box_jaccard,
    component_at,
    connected_components,
    corloc,
    corloc_per_image,
    in_pixels,
    largest_component,
    mask_boxes,
)
from maskdistill.evaluation.classifiers import (
    Classifier,
    knn_classifier,
    linear_classifier,
)
from maskdistill.evaluation.corruptions import (
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    CorruptionTable,
    corrupt,
    corruption_table,
    mean_corruption_error,
    severity_table,
)
from maskdistill.evaluation.discovery import (
    Discovery,
    last_keys,
    lost,
    reading_keys,
    token_cut,
)
from maskdistill.evaluation.features import (
    balanced_indices,
    extract_features,
    raw_pixels,
)
from maskdistill.evaluation.fewshot import (
    RAVI_TEST_CLASSES,
    FewShot,
    few_shot,
    rows_of_classes,
)
from maskdistill.evaluation.knn import (
    knn_accuracies,
    knn_accuracy,
)
from maskdistill.evaluation.linear import (
    LinearClassifier,
    LinearProbe,
    LogisticRegression,
    linear_probe,
    logistic_regression,
)
from maskdistill.evaluation.mask_data import (
    MaskData,
    open_masks,
)
from maskdistill.evaluation.pixels import (
    evaluation_images,
)
from maskdistill.evaluation.robustness import (
    OcclusionCurve,
    attention_maps,
    occlude,
    occluded_features,
    occlusion_curve,
    occlusion_mask,
)
from maskdistill.evaluation.shuffling import (
    shuffle_curve,
    shuffle_patches,
)
from maskdistill.evaluation.stability import (
    AttentionStability,
    attention_stability,
    compare_attention,
    occlusion_stability,
)
from maskdistill.health import (
    PrototypeUsage,
    alignment,
    effective_rank,
    feature_spread,
    kl_to_uniform,
    participation_ratio,
    prototype_usage,
    teacher_entropy,
    uniformity,
)
from maskdistill.models.probing import evaluating

__all__ = [
    "CORRUPTIONS",
    "EXTRA_CORRUPTIONS",
    "RAVI_TEST_CLASSES",
    "AttentionJaccard",
    "AttentionQuality",
    "AttentionScores",
    "AttentionStability",
    "BackgroundAccuracies",
    "Backgrounds",
    "CentreBox",
    "CentreScores",
    "Classifier",
    "CorruptionTable",
    "Discovery",
    "FewShot",
    "LinearClassifier",
    "LinearProbe",
    "LogisticRegression",
    "MaskData",
    "OcclusionCurve",
    "PerImage",
    "PointingGame",
    "PrototypeUsage",
    "alignment",
    "attention_boxes",
    "attention_distances",
    "attention_entropy",
    "attention_jaccard",
    "attention_maps",
    "attention_quality",
    "attention_scores",
    "attention_spread",
    "attention_stability",
    "background_challenge",
    "balanced_indices",
    "box_iou",
    "centre_box",
    "centre_box_corloc",
    "centre_box_jaccard",
    "compare_attention",
    "component_at",
    "connected_components",
    "corloc",
    "corloc_per_image",
    "corrupt",
    "corruption_table",
    "effective_rank",
    "evaluating",
    "evaluation_images",
    "extract_features",
    "feature_spread",
    "few_shot",
    "head_diversity",
    "in_pixels",
    "jaccard_per_image",
    "keep_mass",
    "kl_to_uniform",
    "knn_accuracies",
    "knn_accuracy",
    "knn_classifier",
    "largest_component",
    "last_keys",
    "linear_classifier",
    "linear_probe",
    "load_backbone",
    "logistic_regression",
    "lost",
    "mask_boxes",
    "mean_attention_distance",
    "mean_corruption_error",
    "occlude",
    "occluded_features",
    "occlusion_curve",
    "occlusion_mask",
    "occlusion_stability",
    "open_backgrounds",
    "open_masks",
    "participation_ratio",
    "pointing_game",
    "prototype_usage",
    "raw_pixels",
    "reading_keys",
    "reinitialised",
    "rows_of_classes",
    "severity_table",
    "shuffle_curve",
    "shuffle_patches",
    "teacher_entropy",
    "token_cut",
    "uniformity",
]
