"""Embeddings of a data set, from a frozen backbone, and what every classifier of them checks."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from maskdistill.data.crops import MEAN, STD, derive_seed, normalize, resize_for_evaluation
from maskdistill.data.formats.listing import DamagedImageError
from maskdistill.data.writing import write_durably
from maskdistill.models import MaskedViT
from maskdistill.models.probing import evaluating

Images: TypeAlias = Dataset[tuple[Image.Image, int]]
Precision: TypeAlias = Literal["float32", "float16"]
Statistics: TypeAlias = tuple[Sequence[float], Sequence[float]]
Classifier: TypeAlias = Callable[[Tensor], Tensor]
"""A function from features ``(B, D)`` to predicted labels ``(B,)``, fitted on clean images."""

PROTOCOL = "1: bicubic, shorter side to size * 256 / 224, centre; MaskedViT.embed or the call"
"""How an image becomes features; it is part of the cache's key, and changes with what it says."""

_HELD = 32  # batches of features on the device between two waits for it


class _Prepared(Dataset[tuple[Tensor, int]]):
    """A data set of images as uint8 tensors of one size."""

    def __init__(self, images: Images, size: int) -> None:
        self.images, self.size = images, size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return resize_for_evaluation(image, self.size), label

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    images: Images,
    image_size: int,
    *,
    indices: Sequence[int] | None = None,
    batch_size: int = 256,
    workers: int = 0,
    precision: Precision = "float32",
    statistics: Statistics = (MEAN, STD),
    cache: str | os.PathLike[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Embed images, resized and centre-cropped as in DINO's evaluation.

    >>> features, labels = extract_features(backbone, images, 64)  # doctest: +SKIP
    >>> features.shape, labels.shape  # doctest: +SKIP
    (torch.Size([10000, 192]), torch.Size([10000]))

    With ``cache``, features that were computed before are read instead: those of the same weights,
    images, indices, size, precision and statistics, whatever the batch size. It goes by the content
    of the weights, not by a name, so a backbone that was trained on is another one. The images go
    by their ``fingerprint``, a string, where the data set has one, else by its ``labels`` and 64 of
    the chosen images.

    Args:
        backbone: a ``MaskedViT``, or a network that gives ``(B, D)``; runs in evaluation mode, and
            is put back afterwards.
        images: of (RGB image, label) pairs.
        image_size: pixels of a side.
        indices: which images; None is all.
        batch_size: images per forward.
        workers: loader processes.
        precision: ``"float16"`` stores half, and on CUDA also computes under autocast.
        statistics: mean and standard deviation of the three colours, of pixels in [0, 1];
            ImageNet's, unless the backbone was trained with others (``pretrained_cfg`` of a timm
            model says so).
        cache: a folder for features; made if it is not there. None keeps nothing.

    Returns:
        ``(n, D)`` features, float32 or float16, and ``(n,)`` int64 labels, on the CPU.

    Raises:
        ValueError: no images, a network that gives no embeddings, numbers too large for float16,
            or a data set that a cache cannot tell from others.
    """
    if precision not in ("float32", "float16"):
        raise ValueError(f"precision must be 'float32' or 'float16'; got {precision!r}.")
    count = len(images) if indices is None else len(indices)  # type: ignore[arg-type]
    if not count:
        raise ValueError("there are no images to embed; give a data set and indices with some.")
    device = next(backbone.parameters(), torch.empty(0)).device
    half_on_device = precision == "float16" and device.type == "cuda"
    kept: Path | None = None
    if cache is not None:
        colours = [[float(value) for value in values] for values in statistics]
        settings = (PROTOCOL, image_size, precision, half_on_device, colours)
        kept = cache_file(Path(cache), backbone, images, indices, settings)
        found = _read_cache(kept, count)
        if found is not None:
            return found
    chosen = images if indices is None else Subset(images, list(indices))
    loader = DataLoader(
        _Prepared(chosen, image_size),
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    embed = backbone.embed if isinstance(backbone, MaskedViT) else backbone
    usual = statistics == (MEAN, STD)
    mean, std = (torch.tensor(list(v), device=device).view(3, 1, 1) for v in statistics)
    store = torch.float16 if precision == "float16" else torch.float32
    overflow = torch.zeros((), dtype=torch.bool, device=device)
    held: list[Tensor] = []
    features, labels = [], []
    with evaluating(backbone), torch.autocast("cuda", torch.float16, enabled=half_on_device):
        for batch, label in loader:
            pixels = batch.to(device, non_blocking=True)
            inputs = normalize(pixels) if usual else (pixels / 255 - mean) / std
            full = _embeddings(embed(inputs), len(batch))
            held.append(full.to(store))
            overflow |= (held[-1].isinf() & full.isfinite()).any()
            labels.append(label)
            if len(held) == _HELD:  # not after each batch, which would make the host wait
                features.append(torch.cat(held).cpu())
                held = []
    if held:
        features.append(torch.cat(held).cpu())
    if overflow:
        raise ValueError(
            "some features are beyond 65504, the largest number of float16; use "
            "precision='float32'."
        )
    result = torch.cat(features), torch.cat(labels)
    if kept is not None:
        _write_cache(kept, *result)
    return result


def _embeddings(output: object, batch: int) -> Tensor:
    if isinstance(output, Tensor) and output.ndim == 2 and len(output) == batch:
        return output
    came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ValueError(
        f"the backbone must give one embedding per image, ({batch}, D); it gave {came}. Wrap it: "
        "MaskedViT(model), or MaskedViT(model, 'pixel') where there is no patch embedding."
    )


def evaluation_images(
    images: Images,
    image_size: int,
    *,
    indices: Sequence[int] | None = None,
    crop: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return images as a tensor of pixels, resized as in DINO's evaluation, and their labels.

    >>> from maskdistill.data import Scenes
    >>> pixels, labels = evaluation_images(Scenes(12, 48), 32)
    >>> pixels.shape, pixels.dtype, labels.shape
    (torch.Size([12, 3, 32, 32]), torch.uint8, torch.Size([12]))

    Args:
        images: of (RGB image, label) pairs.
        image_size: pixels of a side.
        indices: which images; None is all.
        crop: cut out the centre; False squeezes the whole image into the square.

    Returns:
        ``(n, 3, image_size, image_size)`` uint8, not normalised, and ``(n,)`` int64.

    Raises:
        ValueError: no images.
    """
    chosen = range(len(images)) if indices is None else indices  # type: ignore[arg-type]
    if not len(chosen):
        raise ValueError("there must be at least one image to evaluate; none came.")
    pairs = [images[int(i)] for i in chosen]
    pixels = [resize_for_evaluation(image, image_size, crop=crop) for image, _ in pairs]
    return torch.stack(pixels), torch.tensor([int(label) for _, label in pairs])


def raw_pixels(images: Images, indices: Sequence[int], size: int = 16) -> tuple[Tensor, Tensor]:
    """Return images as flat vectors of their pixels: the floor that features must beat.

    Args:
        images: of (RGB image, label) pairs.
        indices: which images.
        size: pixels of a side after resizing.

    Returns:
        ``(n, 3 * size * size)`` float32 in [-0.5, 0.5], and ``(n,)`` labels.
    """
    pixels, labels = evaluation_images(images, size, indices=indices, crop=False)
    return pixels.flatten(1).float() / 255 - 0.5, labels


def balanced_indices(labels: Sequence[int] | Tensor, limit: int) -> list[int]:
    """Choose at most ``limit`` images, as evenly over the classes as they allow, in a fixed way.

    >>> balanced_indices([0, 0, 0, 1, 1, 1], limit=4)
    [0, 1, 3, 4]
    """
    seen: dict[int, int] = {}
    turns = []
    for index, label in enumerate(torch.as_tensor(labels).tolist()):
        seen[label] = seen.get(label, 0) + 1
        turns.append((seen[label], index))
    return sorted(index for _, index in sorted(turns)[:limit])


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Return the share of predictions that are right, wherever the two tensors lie."""
    return float((predicted == labels.to(predicted.device)).double().mean())


def generator_of(seed: int, *parts: int | str) -> torch.Generator:
    """Return a generator on the CPU for one purpose, the same each time."""
    return torch.Generator().manual_seed(derive_seed(seed, *parts))


# --- What is refused


def check_labelled(name: str, features: Tensor, labels: Tensor) -> None:
    """Refuse features and labels that no classifier should be given.

    >>> check_labelled("train_", torch.zeros(2, 8), torch.tensor([0, 1]))

    Args:
        name: what the arguments' names begin with, for the message.
        features: ``(n, D)``.
        labels: ``(n,)``, whole numbers.

    Raises:
        ValueError: empty, misshapen or non-finite features, or labels that are none.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1] or not features.numel():
        raise ValueError(
            f"{name}features must be (n, D) with n >= 1 labels; got "
            f"{tuple(features.shape)} and {tuple(labels.shape)}."
        )
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"{name}labels must be whole numbers, one class per image; got {labels.dtype}."
        )
    # In parts, so that a large bank does not need a second array of its size.
    finite = torch.stack([torch.isfinite(part).all() for part in features.split(65_536)]).all()
    if not finite:
        raise ValueError(f"{name}features hold NaN or infinite numbers; has training diverged?")


def check_classifiable(features: Tensor, width: int) -> None:
    """Refuse features that a classifier of features of this width cannot take.

    Raises:
        ValueError: says what came.
    """
    if features.ndim != 2 or features.shape[1] != width or not len(features):
        raise ValueError(
            f"the classifier was fitted on features of width {width} and takes (B, {width}) with "
            f"B >= 1; got {tuple(features.shape)}."
        )
    if not torch.isfinite(features).all():
        raise ValueError(
            "the features to classify hold NaN or infinite numbers; has training diverged?"
        )


def check_split(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> None:
    """Refuse training and test features that do not belong together.

    Raises:
        ValueError: what `check_labelled` refuses, other widths, or no class in common.
    """
    check_labelled("train_", train_features, train_labels)
    check_labelled("test_", test_features, test_labels)
    widths = train_features.shape[1], test_features.shape[1]
    if widths[0] != widths[1]:
        raise ValueError(
            f"training features have {widths[0]} dimensions and test features {widths[1]}; both "
            "must be of one backbone."
        )
    here, there = train_labels.unique().cpu(), test_labels.unique().cpu()
    if not torch.isin(there, here).any():
        raise ValueError(
            f"the labels have no class in common: {_first(here)} in training and {_first(there)} "
            "in the test. Are both numbered alike? For new classes use few_shot."
        )


def _first(classes: Tensor) -> str:
    shown = ", ".join(map(str, cast(list[int], classes[:3].tolist())))
    return shown + (", ..." if len(classes) > 3 else "")


def check_pixels(images: Tensor, labels: Tensor | None = None) -> None:
    """Refuse images that are not uint8 pixels, or labels that do not match them.

    Raises:
        ValueError: says what came.
    """
    if images.ndim != 4 or images.dtype != torch.uint8 or images.shape[1] != 3 or not len(images):
        raise ValueError(
            "images must be pixels before normalisation, (n, 3, H, W) uint8 with n >= 1, as "
            f"evaluation_images gives them; got {tuple(images.shape)} {images.dtype}."
        )
    if labels is not None and tuple(labels.shape) != (len(images),):
        raise ValueError(
            f"labels must be (n,), one per image; got {tuple(labels.shape)} for "
            f"{len(images)} images."
        )


# --- The cache

_SAMPLE = 64
"""Images by which a data set without a fingerprint is known."""


def cache_file(
    folder: Path,
    backbone: nn.Module,
    images: Any,
    indices: Sequence[int] | None,
    settings: tuple[object, ...],
) -> Path:
    """Return where the features of this backbone and these images lie; makes the folder.

    Args:
        folder: for all caches.
        backbone: known by its weights and buffers, its classes and their plain attributes.
        images: known by its ``fingerprint``, else its ``labels`` and a sample of the images.
        indices: of the chosen images; None is all.
        settings: plain values that the features depend on besides.

    Raises:
        ValueError: a data set with neither a fingerprint nor labels.
        OSError: a folder that cannot be made.
    """
    digest = hashlib.sha256(repr(settings).encode())
    _add_data(digest, images, indices)
    _add_backbone(digest, backbone)
    folder = folder.expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"features-{digest.hexdigest()[:32]}.safetensors"


def _read_cache(path: Path, count: int) -> tuple[Tensor, Tensor] | None:
    """Return features and labels of so many images; None, and a warning, if they are damaged."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            features, labels = file.get_tensor("features"), file.get_tensor("labels")
            checksum = (file.metadata() or {}).get("sha256")
    except FileNotFoundError:
        return None
    except Exception as error:  # safetensors has an exception of its own
        problem = str(error)
    else:
        if checksum == _checksum(features, labels) and len(features) == len(labels) == count:
            return features, labels
        problem = "its checksum does not match"
    warnings.warn(
        f"the cached features in {path} are damaged ({problem}); they are computed anew.",
        UserWarning,
        stacklevel=4,  # the caller of extract_features, through torch.no_grad
    )
    return None


def _write_cache(path: Path, features: Tensor, labels: Tensor) -> None:
    """Keep features and labels; a file that cannot be written is warned of, and nothing lost."""
    from safetensors.torch import save

    # Its own name for each process: several may compute the same features at once.
    own = path.with_name(f"{path.name}.{os.getpid()}")
    tensors = {"features": features.contiguous(), "labels": labels.contiguous()}
    try:
        write_durably(save(tensors, metadata={"sha256": _checksum(features, labels)}), own)
        own.replace(path)
    except OSError as error:
        warnings.warn(
            f"the features could not be kept in {path} ({error.strerror}); they are returned all "
            "the same.",
            UserWarning,
            stacklevel=4,
        )


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _checksum(features: Tensor, labels: Tensor) -> str:
    digest = hashlib.sha256(repr((features.dtype, features.shape)).encode())
    digest.update(_bytes(features))
    digest.update(_bytes(labels))
    return digest.hexdigest()


def _add_backbone(digest: Any, backbone: nn.Module) -> None:
    """Add weights and buffers, and the form: the number of heads is no weight, nor is an epsilon.

    Buffers that are not in the state dict count as well. Code is not looked at.
    """
    for name, module in backbone.named_modules():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        digest.update(repr((name, kind, *_plain_attributes(module))).encode())
    for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers()):
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(_bytes(tensor))


def _plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in sorted(vars(module).items()):
        parts = value if isinstance(value, (tuple, list)) else (value,)
        plain = all(isinstance(part, (bool, int, float, str, type(None))) for part in parts)
        # Features are computed in evaluation mode, whatever the mode is now.
        if plain and name != "training" and not name.startswith("_"):
            yield name, value


def _add_data(digest: Any, images: Any, indices: Sequence[int] | None) -> None:
    chosen = list(range(len(images))) if indices is None else [int(i) for i in indices]
    while isinstance(images, Subset):
        chosen = [int(images.indices[i]) for i in chosen]
        images = images.dataset
    digest.update(np.asarray(chosen, dtype="<i8").tobytes())
    fingerprint = getattr(images, "fingerprint", None)
    if isinstance(fingerprint, str):
        digest.update(f"fingerprint {fingerprint}".encode())
        return
    labels = getattr(images, "labels", None)
    numbers = None if labels is None or callable(labels) else np.asarray(labels)
    if numbers is None or numbers.dtype.kind not in "biu":
        raise ValueError(
            f"the features of a {type(images).__name__} cannot be cached: it has neither a "
            "fingerprint (a string that changes with the images) nor labels (an array of whole "
            "numbers), so nothing would tell it from another data set. Give it one, or leave out "
            "cache."
        )
    digest.update(np.ascontiguousarray(numbers, dtype="<i8").tobytes())
    for position in np.unique(np.linspace(0, len(chosen) - 1, _SAMPLE).round().astype(int)):
        content = _content(images, chosen[position])
        digest.update(repr(len(content)).encode())
        digest.update(content)


def _content(images: Any, index: int) -> bytes:
    encoded = getattr(images, "encoded", None)
    if encoded is None:
        image = images[index][0]
        return repr((image.mode, image.size)).encode() + bytes(image.tobytes())
    try:
        return bytes(encoded(index))
    except DamagedImageError as error:  # which one stands in for it follows from the others
        return str(error).encode()
