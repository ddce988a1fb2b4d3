"""Features on disk, found again by the content of what they were computed from."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from maskdistill.data.formats.listing import DamagedImageError

_SAMPLE = 64
"""Images by which a data set without a fingerprint is known."""


@dataclass(frozen=True)
class FeatureCache:
    """The place of one set of features.

    >>> FeatureCache.of(Path("cache"), vit, images, None, (64,)).path  # doctest: +SKIP
    PosixPath('cache/features-5bd0bd2c7b5c1ab95bd0bd2c7b5c1ab9.safetensors')

    Attributes:
        path: of the file, there or not.
    """

    path: Path

    @staticmethod
    def of(
        folder: Path,
        backbone: nn.Module,
        images: Any,
        indices: Sequence[int] | None,
        settings: tuple[object, ...],
    ) -> FeatureCache:
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
        return FeatureCache(folder / f"features-{digest.hexdigest()[:32]}.safetensors")

    def read(self, count: int) -> tuple[Tensor, Tensor] | None:
        """Return the features and labels of this many images, or None if they are not there.

        A damaged file is warned of and passed over.
        """
        from safetensors import safe_open

        try:
            with safe_open(self.path, framework="pt") as file:
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
            f"the cached features in {self.path} are damaged ({problem}); they are computed anew.",
            UserWarning,
            stacklevel=4,  # the caller of extract_features, through torch.no_grad
        )
        return None

    def write(self, features: Tensor, labels: Tensor) -> None:
        """Keep features and labels; a file that cannot be written is warned of, and nothing lost.

        The file appears whole or not at all.
        """
        from safetensors.torch import save

        # Its own name for each process: several may compute the same features at once.
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        tensors = {"features": features.contiguous(), "labels": labels.contiguous()}
        try:
            with temporary.open("wb") as file:
                file.write(save(tensors, metadata={"sha256": _checksum(features, labels)}))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except OSError as error:
            warnings.warn(
                f"the features could not be kept in {self.path} ({error.strerror}); they are "
                "returned all the same.",
                UserWarning,
                stacklevel=4,
            )
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _checksum(features: Tensor, labels: Tensor) -> str:
    digest = hashlib.sha256(repr((features.dtype, features.shape)).encode())
    digest.update(_bytes(features))
    digest.update(_bytes(labels))
    return digest.hexdigest()


# --- The backbone


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


# --- The images


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
