"""The networks: a mask-taking adapter around any ViT, and the multi-crop wrapper."""

from maskdistill.models.attention import AttentionRecord
from maskdistill.models.backbones import (
    ModelSupport,
    create_backbone,
    supported_models,
)
from maskdistill.models.masked_vit import MaskedViT
from maskdistill.models.multicrop import MultiCropOutput, MultiCropWrapper
from maskdistill.models.outputs import Tokens
from maskdistill.models.weights import LoadedWeights, load_weights

__all__ = [
    "AttentionRecord",
    "LoadedWeights",
    "MaskedViT",
    "ModelSupport",
    "MultiCropOutput",
    "MultiCropWrapper",
    "Tokens",
    "create_backbone",
    "load_weights",
    "supported_models",
]
