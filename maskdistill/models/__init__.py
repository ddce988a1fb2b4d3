"""The networks: a mask-taking adapter around any ViT, and the multi-crop wrapper."""

from maskdistill.models.adapter import MaskedViT
from maskdistill.models.attention import AttentionRecord, Query
from maskdistill.models.create import backbone_arguments, create_backbone
from maskdistill.models.multicrop import MultiCropOutput, MultiCropWrapper
from maskdistill.models.support import ModelSupport, supported_models
from maskdistill.models.weights import LoadedWeights, load_weights

__all__ = [
    "AttentionRecord",
    "LoadedWeights",
    "MaskedViT",
    "ModelSupport",
    "MultiCropOutput",
    "MultiCropWrapper",
    "Query",
    "backbone_arguments",
    "create_backbone",
    "load_weights",
    "supported_models",
]
