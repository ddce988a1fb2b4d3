"""Common corruptions of images at five published severities, and the accuracy under them.

Eight of the fifteen corruptions of Hendrycks and Dietterich (2019), and three of their four extra
ones, with torch and Pillow alone. Snow, frost and spatter need pictures or OpenCV, motion blur
needs ImageMagick; they, fog, and glass, zoom and elastic distortion are not here.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as TF

from maskdistill.evaluation.features import accuracy, check_pixels, generator_of
from maskdistill.evaluation.probes import Classifier
from maskdistill.evaluation.robustness import occluded_features
from maskdistill.models import MaskedViT
from maskdistill.models.tokens import check_choice

SeverityTable: TypeAlias = Literal["cifar", "tiny-imagenet", "imagenet"]
"""The severities of CIFAR-10-C (32 pixels), Tiny-ImageNet-C (64) and ImageNet-C (224)."""
_TABLES: tuple[SeverityTable, ...] = get_args(SeverityTable)

CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "brightness", "contrast",
    "pixelate", "jpeg_compression",
)  # fmt: skip
"""Those of the benchmark's fifteen that are here."""
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "saturate")
"""Those of the four that the paper sets apart for choosing settings that are here."""
_LEAST_SIDE = 16  # pixels; the widest blur reaches over 10 to each side, and mirrors the edge

_Severity: TypeAlias = float | tuple[float, float]
# What the authors' scripts set for severities 1 to 5: on CIFAR-10, Tiny ImageNet and ImageNet.
_SEVERITIES: dict[str, dict[SeverityTable, tuple[_Severity, ...]]] = {
    "gaussian_noise": {  # standard deviation, of values from 0 to 1
        "cifar": (0.04, 0.06, 0.08, 0.09, 0.10),
        "tiny-imagenet": (0.04, 0.08, 0.12, 0.15, 0.18),
        "imagenet": (0.08, 0.12, 0.18, 0.26, 0.38),
    },
    "shot_noise": {  # photons of a white pixel
        "cifar": (500, 250, 100, 75, 50),
        "tiny-imagenet": (250, 100, 50, 30, 15),
        "imagenet": (60, 25, 12, 5, 3),
    },
    "impulse_noise": {  # share of values that are replaced
        "cifar": (0.01, 0.02, 0.03, 0.05, 0.07),
        "tiny-imagenet": (0.01, 0.02, 0.05, 0.08, 0.14),
        "imagenet": (0.03, 0.06, 0.09, 0.17, 0.27),
    },
    "speckle_noise": {  # standard deviation, as a share of the value
        "cifar": (0.06, 0.10, 0.12, 0.16, 0.20),
        "tiny-imagenet": (0.15, 0.20, 0.25, 0.30, 0.35),
        "imagenet": (0.15, 0.20, 0.35, 0.45, 0.60),
    },
    "gaussian_blur": {  # standard deviation in pixels
        "cifar": (0.4, 0.6, 0.7, 0.8, 1.0),
        "tiny-imagenet": (0.5, 0.75, 1.0, 1.25, 1.5),
        "imagenet": (1.0, 2.0, 3.0, 4.0, 6.0),
    },
    "defocus_blur": {  # radius of the disc in pixels, standard deviation that softens its edge
        "cifar": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        "tiny-imagenet": ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
        "imagenet": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    },
    "brightness": {  # added to the value of HSV
        "cifar": (0.05, 0.10, 0.15, 0.20, 0.30),
        "tiny-imagenet": (0.1, 0.2, 0.3, 0.4, 0.5),
        "imagenet": (0.1, 0.2, 0.3, 0.4, 0.5),
    },
    "contrast": {  # factor on the distance from each channel's mean
        "cifar": (0.75, 0.50, 0.40, 0.30, 0.15),
        "tiny-imagenet": (0.4, 0.3, 0.2, 0.1, 0.05),
        "imagenet": (0.4, 0.3, 0.2, 0.1, 0.05),
    },
    "saturate": {  # factor on the saturation of HSV, and what is added to it
        "cifar": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
        "tiny-imagenet": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (30, 0.2)),
        "imagenet": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    },
    "pixelate": {  # factor on the size, down and up again
        "cifar": (0.95, 0.90, 0.85, 0.75, 0.65),
        "tiny-imagenet": (0.9, 0.8, 0.7, 0.6, 0.5),
        "imagenet": (0.6, 0.5, 0.4, 0.3, 0.25),
    },
    "jpeg_compression": {  # Pillow's quality
        "cifar": (80, 65, 58, 50, 40),
        "tiny-imagenet": (65, 58, 50, 40, 25),
        "imagenet": (25, 18, 15, 10, 7),
    },
}


class CorruptionTable(NamedTuple):
    """Accuracy under each corruption at each severity.

    Attributes:
        accuracies: by corruption, the top-1 accuracy at each severity in [0, 1].
        severities: from 1 to 5, in the order of the accuracies.
        clean: accuracy on the images as they are.
        mean: over corruptions and severities.
        retention: that mean as a share of the clean accuracy; NaN where that is 0.
        table: whose severities these are.
    """

    accuracies: dict[str, tuple[float, ...]]
    severities: tuple[int, ...]
    clean: float
    mean: float
    retention: float
    table: SeverityTable


def severity_table(image_size: tuple[int, int]) -> SeverityTable:
    """Return whose severities fit images of this height and width best, by their area.

    >>> severity_table((48, 48)), severity_table((96, 96)), severity_table((224, 224))
    ('tiny-imagenet', 'tiny-imagenet', 'imagenet')

    The boundaries lie at the geometric means of 32, 64 and 224 pixels: 45.3 and 119.7.
    """
    area = image_size[0] * image_size[1]
    return "cifar" if area < 32 * 64 else "tiny-imagenet" if area < 64 * 224 else "imagenet"


@torch.no_grad()
def corrupt(
    images: Tensor,
    name: str,
    severity: int,
    *,
    table: SeverityTable | None = None,
    seed: int = 0,
    first: int = 0,
) -> Tensor:
    """Corrupt images as ImageNet-C and its smaller kin do.

    >>> images = torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)
    >>> corrupt(images, "brightness", 2)[0, 0, 0, 0]
    tensor(179, dtype=torch.uint8)

    Hendrycks and Dietterich, 2019, with the severities of the authors' scripts. Apply it after the
    images have the model's size, as there. All corruptions are computed on the CPU; values are
    rounded to the nearest level, where the originals cut off what follows the point.

    Args:
        images: ``(B, 3, H, W)`` uint8, of at least 16x16 pixels.
        name: one of `CORRUPTIONS` or `EXTRA_CORRUPTIONS`.
        severity: from 1 to 5.
        table: whose severities; None goes by the size, see `severity_table`.
        seed: of the noise.
        first: number of the first of these images in its data set: each image's noise depends on
            the seed and its number alone, not on the batch.

    Returns:
        The same shape, dtype and device.

    Raises:
        ValueError: an unknown name, severity or table, or images that are too small or no pixels.
    """
    check_pixels(images)
    check_choice("name", name, CORRUPTIONS + EXTRA_CORRUPTIONS)
    if severity not in range(1, 6):
        raise ValueError(f"severity must be an int from 1 to 5; got {severity!r}.")
    if min(images.shape[2:]) < _LEAST_SIDE:
        raise ValueError(
            f"images must be at least {_LEAST_SIDE}x{_LEAST_SIDE} pixels to be corrupted; got "
            f"{images.shape[2]}x{images.shape[3]}."
        )
    if table is None:
        table = severity_table((images.shape[2], images.shape[3]))
    check_choice("table", table, _TABLES)
    setting = _SEVERITIES[name][table][severity - 1]
    strength, second = setting if isinstance(setting, tuple) else (setting, 0.0)
    pixels = images.cpu()
    if name in _BY_PILLOW:
        pictures = [TF.to_pil_image(image) for image in pixels]
        changed = torch.stack(
            [TF.pil_to_tensor(_BY_PILLOW[name](picture, strength)) for picture in pictures]
        )
        return changed.to(images.device)
    values = pixels.float() / 255
    if name in _NOISES:
        noisy = [
            _NOISES[name](image, strength, generator_of(seed, name, severity, first + i))
            for i, image in enumerate(values)
        ]
        values = torch.stack(noisy)
    elif name == "gaussian_blur":
        values = _gaussian_blur(values, strength)
    elif name == "defocus_blur":
        values = _defocus_blur(values, strength, second)
    elif name == "brightness":
        values = _brighten(values, strength)
    elif name == "contrast":
        mean = values.mean(dim=(2, 3), keepdim=True)
        values = (values - mean) * strength + mean
    else:
        values = _saturate(values, strength, second)
    return (255 * values.clamp(0, 1)).round().to(torch.uint8).to(images.device)


@torch.no_grad()
def corruption_table(
    vit: MaskedViT,
    classify: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    names: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    table: SeverityTable | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> CorruptionTable:
    """Measure the accuracy under common corruptions.

    >>> classify = knn_classifier(train_features, train_labels)  # doctest: +SKIP
    >>> table = corruption_table(vit, classify, images, labels)  # doctest: +SKIP
    >>> table.accuracies["contrast"], table.mean, table.retention  # doctest: +SKIP
    ((0.61, 0.55, 0.46, 0.31, 0.18), 0.43, 0.62)

    Args:
        vit: a model; any network wrapped with ``apply="pixel"`` will do.
        classify: from features to labels, fitted on *clean* images.
        images: ``(n, 3, H, W)`` uint8, as `evaluation_images` gives them.
        labels: ``(n,)``.
        names: which corruptions.
        severities: which of 1 to 5.
        table: whose severities; None goes by the size, see `severity_table`.
        seed: of the noise.
        batch_size: images per forward; no matter for the result.

    Raises:
        ValueError: labels that do not match, no corruption or severity, and what `corrupt` refuses.
    """
    check_pixels(images, labels)
    names, severities = tuple(names), tuple(severities)
    if not names or not severities:
        raise ValueError("give at least one corruption and one severity to measure.")
    used = table or severity_table((images.shape[2], images.shape[3]))
    for name in names:  # what is wrong is said before the first forward
        for severity in severities:
            corrupt(images[:1], name, severity, table=used)

    def accuracy_under(name: str, severity: int) -> float:
        features = [
            occluded_features(
                vit,
                corrupt(
                    images[start : start + batch_size], name, severity,
                    table=used, seed=seed, first=start,
                ),
                batch_size=batch_size,
            )
            for start in range(0, len(images), batch_size)
        ]  # fmt: skip
        return accuracy(classify(torch.cat(features)), labels)

    clean = accuracy(classify(occluded_features(vit, images, batch_size=batch_size)), labels)
    found = {
        name: tuple(accuracy_under(name, severity) for severity in severities) for name in names
    }
    mean = sum(sum(row) for row in found.values()) / (len(found) * len(severities))
    retention = mean / clean if clean else float("nan")
    return CorruptionTable(found, severities, clean, mean, retention, used)


def mean_corruption_error(model: CorruptionTable, baseline: CorruptionTable) -> float:
    """Return the error under corruptions relative to a baseline's: 1 is as bad, 0 is perfect.

    >>> a = CorruptionTable({"contrast": (0.8, 0.6)}, (1, 2), 0.9, 0.7, 0.78, "imagenet")
    >>> b = CorruptionTable({"contrast": (0.6, 0.2)}, (1, 2), 0.8, 0.4, 0.50, "imagenet")
    >>> round(mean_corruption_error(a, b), 3)
    0.5

    Per corruption, the sum of errors over severities, divided by the baseline's; then the mean over
    corruptions (Hendrycks and Dietterich, 2019, with AlexNet as the baseline; the published mCE is
    over all fifteen corruptions and does not compare).

    Raises:
        ValueError: tables of other corruptions or severities, or a baseline without errors.
    """
    if (set(model.accuracies), model.severities, model.table) != (
        set(baseline.accuracies), baseline.severities, baseline.table,
    ):  # fmt: skip
        raise ValueError(
            "both tables must be of the same corruptions and severities; measure the baseline with "
            "the same arguments as the model."
        )
    ratios = []
    for name, row in model.accuracies.items():
        error, reference = (sum(1 - value for value in r) for r in (row, baseline.accuracies[name]))
        if not reference:
            raise ValueError(f"the baseline makes no error under {name}, so none can be relative.")
        ratios.append(error / reference)
    return sum(ratios) / len(ratios)


# --- How each is computed; values lie in [0, 1]


def _gaussian_noise(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    return image + strength * torch.randn(image.shape, generator=generator)


def _shot_noise(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    return torch.poisson(image * strength, generator=generator) / strength


def _speckle_noise(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    return image + image * strength * torch.randn(image.shape, generator=generator)


def _impulse_noise(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Salt and pepper, half of each, in each channel by itself."""
    hit = torch.rand(image.shape, generator=generator) < strength
    salt = torch.rand(image.shape, generator=generator) < 0.5
    return torch.where(hit, salt.to(image.dtype), image)


_NOISES: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "speckle_noise": _speckle_noise,
}


def _bell(sigma: float, radius: int) -> Tensor:
    ticks = torch.arange(-radius, radius + 1, dtype=torch.float64)
    bell = (-(ticks**2) / (2 * sigma**2)).exp()
    return (bell / bell.sum()).float()


def _filtered(images: Tensor, kernel: Tensor, mode: str) -> Tensor:
    """Filter each channel by a kernel ``(h, w)`` of odd sides."""
    rows, columns = kernel.shape[0] // 2, kernel.shape[1] // 2
    flat = rearrange(images, "b c h w -> (b c) 1 h w")
    flat = F.conv2d(F.pad(flat, (columns, columns, rows, rows), mode=mode), kernel[None, None])
    return rearrange(flat, "(b c) 1 h w -> b c h w", b=len(images))


def _gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    bell = _bell(sigma, int(4 * sigma + 0.5))
    return _filtered(_filtered(images, bell[:, None], "replicate"), bell[None], "replicate")


def _defocus_blur(images: Tensor, radius: float, soften: float) -> Tensor:
    reach = 8 if radius <= 8 else int(radius)
    ticks = torch.arange(-reach, reach + 1)
    disc = (ticks[:, None] ** 2 + ticks**2 <= radius**2).float()[None, None]
    bell = _bell(soften, 1 if radius <= 8 else 2)
    soft = _filtered(disc / disc.sum(), bell[:, None] * bell, "reflect")
    return _filtered(images, soft[0, 0], "reflect")


def _brighten(images: Tensor, strength: float) -> Tensor:
    """Raise the value of HSV; hue and saturation stay, so all channels have one factor."""
    value = images.amax(dim=1, keepdim=True)
    raised = (value + strength).clamp(max=1)
    return torch.where(value > 0, images * raised / value.clamp_min(1e-6), raised)


def _saturate(images: Tensor, factor: float, shift: float) -> Tensor:
    """Change the saturation of HSV; grey has the hue of red there, and takes it on."""
    value, low = images.amax(dim=1, keepdim=True), images.amin(dim=1, keepdim=True)
    depth = value - low
    saturation = depth / value.clamp_min(1e-6)
    changed = (saturation * factor + shift).clamp(0, 1)
    red = torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1)
    below = torch.where(depth > 0, (value - images) / depth.clamp_min(1e-6), red)
    return value * (1 - changed * below)


def _pixelate(picture: Image.Image, factor: float) -> Image.Image:
    width, height = picture.size
    small = picture.resize((int(width * factor), int(height * factor)), Image.Resampling.BOX)
    return small.resize((width, height), Image.Resampling.BOX)


def _compress(picture: Image.Image, quality: float) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=int(quality))
    return Image.open(file).convert("RGB")


_BY_PILLOW: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "pixelate": _pixelate,
    "jpeg_compression": _compress,
}
