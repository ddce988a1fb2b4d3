"""What a run measures of itself while it trains, and the attention that it keeps."""

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

from maskdistill.data.crops import normalize
from maskdistill.data.writing import write_durably
from maskdistill.evaluation.attention import HeadScores, attention_jaccard
from maskdistill.evaluation.features import (
    balanced_indices,
    evaluation_images,
    extract_features,
    raw_pixels,
)
from maskdistill.evaluation.health import effective_rank
from maskdistill.evaluation.knn import knn_accuracies, knn_accuracy
from maskdistill.models import MaskedViT
from maskdistill.models.probing import evaluating

SHOWN = 10
"""Images whose attention is shown."""
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

    def balanced(self, train: int, val: int) -> dict[str, list[int]]:
        """Choose at most so many images of ``"train"`` and ``"val"``, evenly over the classes."""
        return {
            "train": balanced_indices(torch.from_numpy(self.train_labels), train),
            "val": balanced_indices(torch.from_numpy(self.val_labels), val),
        }

    def whole(self, rows: Sequence[int], size: int) -> Tensor:
        """Return validation images as the masks show them, uncropped: ``(n, 3, S, S)`` uint8."""
        return evaluation_images(self.val, size, indices=rows, crop=False)[0]


class Sharing(Protocol):
    """How several processes share the images; ``training.distributed.Agreement`` does."""

    def share(self, items: Sequence[int]) -> list[int]:
        """Return this process's share of some work."""
        ...

    def join(self, rows: Tensor, count: int) -> Tensor:
        """Return the rows that all processes made of their shares, in the order of the work."""
        ...


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
        agreement: Sharing | None = None,
    ) -> None:
        self._agreement = agreement
        self.size = image_size
        self.images = images
        self.rows = images.balanced(knn_train, knn_val)
        # One image of each of as many classes as are shown, then any.
        first: dict[int, int] = {}
        for row in self.rows["val"]:
            first.setdefault(int(images.val_labels[row]), row)
        self.shown = list(dict.fromkeys([*first.values(), *self.rows["val"]]))[:SHOWN]

    def evaluate(self, vit: MaskedViT) -> dict[str, float]:
        """Return what the features are worth.

        Returns:
            ``knn``, the accuracy with 20 neighbours; ``knn_10``, ``knn_100`` and ``knn_200``; and
            ``effective_rank``, RankMe of the validation images' features.
        """
        val = self._features(vit, "val")
        accuracy = knn_accuracies(*self._features(vit, "train"), *val, ks=(20, 10, 100, 200))
        values = {"knn" if k == 20 else f"knn_{k}": share for k, share in accuracy.items()}
        return {**values, "effective_rank": float(effective_rank(val[0].float()))}

    def _features(self, vit: MaskedViT, split: str) -> tuple[Tensor, Tensor]:
        images, rows = getattr(self.images, split), self.rows[split]
        if self._agreement is None:
            return extract_features(vit, images, self.size, indices=rows)
        own = self._agreement.share(rows)
        features, labels = extract_features(vit, images, self.size, indices=own)
        join = self._agreement.join
        return join(features, len(rows)), join(labels, len(rows))

    def start(self, vit: MaskedViT) -> tuple[dict[str, Any], Tensor | None]:
        """Return what training has to beat, and the attention to the shown images."""
        pixels = [
            part
            for split, rows in self.rows.items()
            for part in raw_pixels(getattr(self.images, split), rows)
        ]
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
        jaccard = self.jaccard(vit)
        values = {} if jaccard is None else {"attention_jaccard": jaccard._asdict()}
        return values, self.attention(vit)

    def jaccard(self, vit: MaskedViT) -> HeadScores | None:
        """Compare the attention with the object masks, where the images have them."""
        if self.images.val_masks is None:
            return None
        attention = self._attention(vit, self.rows["val"])
        if attention is None:
            return None
        masks = torch.from_numpy(self.images.val_masks[self.rows["val"]])
        return attention_jaccard(attention, masks, vit.grid(self.size, self.size))

    def attention(self, vit: MaskedViT) -> Tensor | None:
        """Return the attention to the shown images, ``(n, heads, N)``, if the model has any."""
        return self._attention(vit, self.shown)

    def _attention(self, vit: MaskedViT, rows: Sequence[int]) -> Tensor | None:
        device = next(vit.parameters()).device
        try:
            with evaluating(vit):
                maps = [
                    vit.attention(normalize(self.pixels(rows[first : first + 256]).to(device)))
                    for first in range(0, len(rows), 256)
                ]
        except ValueError:  # a model without a class token
            return None
        return torch.cat(maps).cpu()

    def pixels(self, rows: Sequence[int]) -> Tensor:
        """Return whole validation images, as the masks show them: ``(n, 3, size, size)`` uint8."""
        return self.images.whole(rows, self.size)


# --- The attention over training


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
