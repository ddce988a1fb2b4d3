"""Images: mini-ImageNet in the forms people have it, built-in scenes, and augmentation."""

from maskdistill.data.augment import Crops, MultiCrop, normalize, resize_for_evaluation
from maskdistill.data.loading import BatchStream, CropDataset, crop_loader, derive_seed
from maskdistill.data.scenes import Scenes
from maskdistill.data.sources import (
    DamagedDataError,
    DamagedImageWarning,
    DataSplits,
    ImageDataset,
    open_data,
)

__all__ = [
    "BatchStream",
    "CropDataset",
    "Crops",
    "DamagedDataError",
    "DamagedImageWarning",
    "DataSplits",
    "ImageDataset",
    "MultiCrop",
    "Scenes",
    "crop_loader",
    "derive_seed",
    "normalize",
    "open_data",
    "resize_for_evaluation",
]
