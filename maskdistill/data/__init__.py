"""Images: mini-ImageNet in the forms people have it, built-in scenes, and augmentation."""

from maskdistill.data.crops import Crops, MultiCrop, normalize, resize_for_evaluation
from maskdistill.data.loading import (
    BatchStream,
    CropDataset,
    LoaderError,
    ResidentImages,
    crop_batches,
    crop_loader,
    derive_seed,
)
from maskdistill.data.packing import Packed, pack, pack_shards
from maskdistill.data.scenes import Scenes
from maskdistill.data.shards import ShardError, Shards, open_shards
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
    "LoaderError",
    "MultiCrop",
    "Packed",
    "ResidentImages",
    "Scenes",
    "ShardError",
    "Shards",
    "crop_batches",
    "crop_loader",
    "derive_seed",
    "normalize",
    "open_data",
    "open_shards",
    "pack",
    "pack_shards",
    "resize_for_evaluation",
]
