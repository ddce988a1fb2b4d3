"""A backbone and the images that it is measured on: what the groups of measures share."""

# ruff: noqa: D102  (what it computes is named, and kept)

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from maskdistill.data import resize_for_evaluation
from maskdistill.evaluation import (
    Classifier,
    attention_maps,
    balanced_indices,
    evaluating,
    evaluation_images,
    extract_features,
    knn_classifier,
    linear_classifier,
)
from maskdistill.evaluation.attention_report import AttentionScores, attention_scores
from maskdistill.evaluation.robustness import OcclusionFill
from maskdistill.judge import JobImages
from maskdistill.models import MaskedViT

Curve: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]
"""Places, and the value at each."""
Found: TypeAlias = tuple[dict[str, float], dict[str, Curve], dict[str, str]]
"""Values, curves, and what was left out."""


class NotToBeHadError(Exception):
    """These images, or this model, cannot give a group; the message says why."""


@dataclass(frozen=True)
class Bench:
    """A backbone and the images it is measured on; what is computed is kept."""

    vit: MaskedViT
    images: JobImages
    size: int
    groups: tuple[str, ...]
    train_limit: int
    val_limit: int
    guide: Tensor | MaskedViT | None
    classifier: Literal["knn", "linear"]
    fill: OcclusionFill
    seed: int
    cache: str | Path | None
    batch_size: int

    @cached_property
    def train_rows(self) -> list[int]:
        return balanced_indices(torch.from_numpy(self.images.train_labels), self.train_limit)

    @cached_property
    def val_rows(self) -> list[int]:
        return balanced_indices(torch.from_numpy(self.images.val_labels), self.val_limit)

    @property
    def counts(self) -> dict[str, int]:
        masks = {} if self.images.val_masks is None else {"masks": len(self.masked[0])}
        return {"train": len(self.train_rows), "val": len(self.val_rows), **masks}

    @cached_property
    def device(self) -> torch.device:
        return next(self.vit.parameters()).device

    @cached_property
    def train(self) -> tuple[Tensor, Tensor]:
        return self._embedded("train", self.train_rows)

    @cached_property
    def val(self) -> tuple[Tensor, Tensor]:
        return self._embedded("val", self.val_rows)

    def _embedded(self, split: Literal["train", "val"], rows: list[int]) -> tuple[Tensor, Tensor]:
        features, labels = extract_features(
            self.vit, getattr(self.images, split), self.size,
            indices=rows, batch_size=self.batch_size, cache=self.cache,
        )  # fmt: skip
        return features.to(self.device), labels.to(self.device)

    @cached_property
    def pixels(self) -> tuple[Tensor, Tensor]:
        """Validation images as they are classified, cropped: ``(n, 3, S, S)``; and labels."""
        return evaluation_images(self.images.val, self.size, indices=self.val_rows)

    @cached_property
    def whole(self) -> Tensor:
        """Validation images as the masks show them, not cropped, ``(n, 3, S, S)``."""
        return evaluation_images(self.images.val, self.size, indices=self.val_rows, crop=False)[0]

    @cached_property
    def masked(self) -> tuple[Tensor, Tensor]:
        """Which of the chosen validation images have an object, and its mask, ``(k, S, S)``."""
        assert self.images.val_masks is not None
        masks = torch.from_numpy(self.images.val_masks[self.val_rows])
        masks = F.interpolate(masks[:, None].float(), size=(self.size, self.size))[:, 0] > 0.5
        rows = masks.flatten(1).any(dim=1).nonzero()[:, 0]
        return rows, masks[rows]

    @cached_property
    def classify(self) -> Classifier:
        fit = knn_classifier if self.classifier == "knn" else linear_classifier
        return fit(*self.train)

    @cached_property
    def saliency(self) -> Tensor | None:
        """What is salient in the cropped validation images, ``(n, N)``."""
        if isinstance(self.guide, MaskedViT):
            return attention_maps(self.guide, self.pixels[0], batch_size=self.batch_size)
        return self._objects() if self.guide is None else self.guide

    def _objects(self) -> Tensor | None:
        """Return each patch's share of object, cropped as the images are."""
        if self.images.val_masks is None:
            return None
        cropped = []
        for row in self.val_rows:
            mask = Image.fromarray(self.images.val_masks[row]).convert("RGB")
            # A mask is of the whole image, whose size and shape decide on the crop.
            mask = mask.resize(self.images.val[row][0].size, Image.Resampling.NEAREST)
            cropped.append(resize_for_evaluation(mask, self.size)[:1].float() / 255)
        grid = self.vit.grid(self.size, self.size)
        return F.adaptive_avg_pool2d(torch.stack(cropped), grid).flatten(1)

    @cached_property
    def scores(self) -> AttentionScores:
        rows, masks = self.masked
        return attention_scores(
            self.vit, self.whole[rows], masks,
            discovery="discovery" in self.groups, batch_size=min(self.batch_size, 32),
        )  # fmt: skip

    def require_attention(self) -> None:
        """Refuse a model whose attention cannot be read, before anything is computed."""
        try:
            with evaluating(self.vit):
                blank = torch.zeros(1, 3, self.size, self.size, device=self.device)
                self.vit.attention(blank)
        except ValueError as error:
            raise NotToBeHadError(str(error)) from error
