"""The networks: a mask-taking adapter around any ViT, and the multi-crop wrapper."""

from maskdistill.models.adapter import MaskedViT
from maskdistill.models.attention import AttentionRecord
from maskdistill.models.create import backbone_arguments, create_backbone
from maskdistill.models.multicrop import MultiCropOutput, MultiCropWrapper

__all__ = [
    "AttentionRecord",
    "MaskedViT",
    "MultiCropOutput",
    "MultiCropWrapper",
    "backbone_arguments",
    "create_backbone",
]
