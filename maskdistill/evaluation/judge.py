"""Evaluates a backbone on a fixed choice of a job's images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import Dataset

from maskdistill.data import normalize, resize_for_evaluation
from maskdistill.data.writing import write_durably
from maskdistill.evaluation import (
    AttentionJaccard,
    attention_jaccard,
    balanced_indices,
    effective_rank,
    evaluating,
    extract_features,
    knn_accuracies,
    knn_accuracy,
    raw_pixels,
)
from maskdistill.models import MaskedViT

SHOWN = 10
"""Images whose attention is drawn."""
SNAPSHOTS = "attention"
"""The folder in a run's folder that keeps their attention over training."""


@dataclass(frozen=True)
class JobImages:
    """A job's images.

    Attributes:
        train: images to train on, and to vote in k-NN.
        val: images to classify.
        train_labels: ``(n,)``.
        val_labels: ``(m,)``.
        val_masks: ``(m, H, W)`` object masks of the whole validation images, if there are any.
        note: what the images are, in words.
    """

    train: Dataset[tuple[Image.Image, int]]
    val: Dataset[tuple[Image.Image, int]]
    train_labels: NDArray[np.int64]
    val_labels: NDArray[np.int64]
    val_masks: NDArray[np.bool_] | None
    note: str


class _Sharing(Protocol):
    """How several processes share the images; ``training.Agreement`` does."""

    def share(self, items: Sequence[int]) -> list[int]: ...
    def join(self, rows: Tensor, count: int) -> Tensor: ...


class Judge:
    """Evaluates a backbone on a fixed choice of images.

    Args:
        images: to choose from.
        image_size: pixels of a side of what the backbone sees.
        knn_train: most training images that vote.
        knn_val: most validation images.
        agreement: among the processes, which then embed a share of the images each and must all
            call the same methods; None is one process.
    """

    def __init__(
        self,
        images: JobImages,
        image_size: int,
        *,
        knn_train: int,
        knn_val: int,
        agreement: _Sharing | None = None,
    ) -> None:
        self._agreement = agreement
        self.size = image_size
        self.images = images
        self.train_indices = balanced_indices(torch.from_numpy(images.train_labels), knn_train)
        self.val_indices = balanced_indices(torch.from_numpy(images.val_labels), knn_val)
        self.shown = self._distinct_images()

    def evaluate(self, vit: MaskedViT) -> dict[str, float]:
        """Return what the features are worth.

        Returns:
            ``knn``, the accuracy with 20 neighbours; ``knn_10``, ``knn_100`` and ``knn_200``; and
            ``effective_rank``, RankMe of the validation images' features.
        """
        train = self._features(vit, self.images.train, self.train_indices)
        val = self._features(vit, self.images.val, self.val_indices)
        accuracy = knn_accuracies(*train, *val, ks=(20, 10, 100, 200))
        values = {"knn" if k == 20 else f"knn_{k}": share for k, share in accuracy.items()}
        return {**values, "effective_rank": float(effective_rank(val[0].float()))}

    def knn(self, vit: MaskedViT) -> float:
        """Return the accuracy with 20 neighbours alone."""
        return self.evaluate(vit)["knn"]

    def _features(
        self, vit: MaskedViT, images: Dataset[tuple[Image.Image, int]], indices: list[int]
    ) -> tuple[Tensor, Tensor]:
        if self._agreement is None:
            return extract_features(vit, images, self.size, indices=indices)
        own = self._agreement.share(indices)
        features, labels = extract_features(vit, images, self.size, indices=own)
        join, count = self._agreement.join, len(indices)
        return join(features, count), join(labels, count)

    def start(self, vit: MaskedViT) -> tuple[dict[str, Any], Tensor | None]:
        """Return what training has to beat, and the attention to the shown images."""
        pixels = (
            *raw_pixels(self.images.train, self.train_indices),
            *raw_pixels(self.images.val, self.val_indices),
        )
        found = self.evaluate(vit)
        values: dict[str, Any] = {
            "knn_random_init": found["knn"],
            "knn_raw_pixels": knn_accuracy(*pixels),
            "effective_rank_random_init": found["effective_rank"],
        }
        jaccard = self.jaccard(vit)
        if jaccard is not None:
            values["attention_jaccard_random_init"] = jaccard._asdict()
        return values, self.attention(vit)

    def end(self, vit: MaskedViT) -> tuple[dict[str, Any], Tensor | None]:
        """Return what training achieved beside k-NN, and the attention to the shown images."""
        values: dict[str, Any] = {}
        jaccard = self.jaccard(vit)
        if jaccard is not None:
            values["attention_jaccard"] = jaccard._asdict()
        return values, self.attention(vit)

    def jaccard(self, vit: MaskedViT) -> AttentionJaccard | None:
        """Compare the attention with the object masks, where the images have them."""
        if self.images.val_masks is None:
            return None
        try:
            with evaluating(vit):
                maps = [
                    vit.attention(self._inputs(part, vit))
                    for part in torch.tensor(self.val_indices).split(256)
                ]
        except ValueError:  # a model without a class token
            return None
        masks = torch.from_numpy(self.images.val_masks[self.val_indices])
        grid = vit.grid(self.size, self.size)
        return attention_jaccard(torch.cat(maps).cpu(), masks, grid)

    def attention(self, vit: MaskedViT) -> Tensor | None:
        """Return the attention to the shown images, ``(n, heads, N)``, if the model has any."""
        try:
            with evaluating(vit):
                return vit.attention(self._inputs(self.shown, vit)).cpu()
        except ValueError:
            return None

    def _inputs(self, indices: Sequence[int] | Tensor, vit: MaskedViT) -> Tensor:
        # The whole image, not its centre: the object masks are of the whole image.
        pixels = self.pixels(indices)
        return normalize(pixels.to(next(vit.parameters()).device))

    def pixels(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return whole images, ``(n, 3, size, size)`` uint8."""
        return torch.stack(
            [
                resize_for_evaluation(self.images.val[int(i)][0], self.size, crop=False)
                for i in indices
            ]
        )

    def _distinct_images(self) -> list[int]:
        """Choose the shown images, one of each of as many classes as are shown."""
        first: dict[int, int] = {}
        for index in self.val_indices:
            first.setdefault(int(self.images.val_labels[index]), index)
        chosen = list(first.values())
        chosen += [index for index in self.val_indices if index not in chosen]
        return chosen[:SHOWN]


def save_attention(out: Path, step: int, attention: Tensor, pixels: Tensor) -> None:
    """Keep the attention to the shown images at a step, and the images once.

    Args:
        out: folder of the run; ``attention/`` in it gets ``images.safetensors`` and
            ``step-<step>.safetensors``.
        step: steps done.
        attention: ``(n, heads, N)``, kept in half precision.
        pixels: ``(n, 3, H, W)`` uint8, the images.
    """
    folder = out / SNAPSHOTS
    folder.mkdir(exist_ok=True)
    images = folder / "images.safetensors"
    if not images.is_file() or _read(images, "images") is None:
        write_durably(save({"images": pixels.contiguous()}), images)
    content = save({"attention": attention.to("cpu", torch.float16).contiguous()})
    write_durably(content, folder / f"step-{step:08d}.safetensors")


def read_attention(out: Path) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the shown images of a run, and its attention to them by step.

    >>> images, attention = read_attention(Path("runs/first"))  # doctest: +SKIP
    >>> images.shape, attention[0].shape  # doctest: +SKIP
    (torch.Size([10, 3, 32, 32]), torch.Size([10, 3, 16]))

    Args:
        out: folder of the run.

    Returns:
        ``(n, 3, H, W)`` uint8, and by step, in their order, ``(n, heads, N)`` float32 attention of
        each head to the patches. Damaged snapshots are left out with a warning.

    Raises:
        FileNotFoundError: the run kept none, as its model has no attention to show.
    """
    folder = out / SNAPSHOTS
    kept = {int(path.stem[5:]): path for path in folder.glob("step-*.safetensors")}
    found = {step: _read(kept[step], "attention") for step in sorted(kept)}
    attention = {step: each.float() for step, each in found.items() if each is not None}
    path = folder / "images.safetensors"
    images = _read(path, "images") if path.is_file() else None
    if not attention or images is None:
        raise FileNotFoundError(f"{out} has no attention over training: {folder} has no snapshots.")
    return images, attention


def _read(path: Path, name: str) -> Tensor | None:
    try:
        return load_file(path)[name]
    except (SafetensorError, KeyError, OSError) as error:
        warnings.warn(f"{path} is damaged ({error}) and was left out.", UserWarning, stacklevel=3)
        return None


def forget_attention(out: Path, step: int | None) -> None:
    """Remove what an earlier attempt kept of later steps, as its lines of metrics are dropped.

    Args:
        out: folder of the run.
        step: that the run goes on from; None is a new run, which keeps nothing.
    """
    for path in (out / SNAPSHOTS).glob("*.safetensors"):
        of_a_step = path.stem.startswith("step-")
        if step is None or (of_a_step and int(path.stem[5:]) > step):
            path.unlink()
