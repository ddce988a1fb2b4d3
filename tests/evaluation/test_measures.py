"""All numbers of a backbone: that they are the instruments' own, and what is left out."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

import maskdistill as md
from maskdistill.data import Scenes
from maskdistill.evaluation import (
    attention_maps,
    evaluation_images,
    extract_features,
    knn_accuracy,
    linear_probe,
    load_backbone,
)
from maskdistill.evaluation.judge import JobImages, Judge
from maskdistill.evaluation.measures import (
    GROUPS,
    MEASURES,
    Bench,
    Measured,
    measure,
    measures_named,
)

DOCS = Path(__file__).parents[2] / "docs"
pytestmark = pytest.mark.filterwarnings("ignore:the best learning rate")


@pytest.fixture(scope="module")
def images() -> JobImages:
    train, val = Scenes(88, 32), Scenes(110, 32, split="val")
    return JobImages(train, val, train.labels, val.labels, val.masks, "scenes")


@pytest.fixture(scope="module")
def vit() -> md.MaskedViT:
    return load_backbone("vit_tiny_patch16_224", image_size=32, patch_size=8, depth=1, seed=0)


@pytest.fixture(scope="module")
def everything(vit: md.MaskedViT, images: JobImages) -> Measured:
    few = dataclasses.replace(images, val_labels=images.val_labels % 5)
    object.__setattr__(few, "val", Relabelled(images.val, few.val_labels))
    return measure(vit, few, 32, groups=GROUPS)


class Relabelled(Dataset[tuple[Image.Image, int]]):
    """The same images under other labels; made anew, so that a cache does not mistake them."""

    def __init__(self, images: Any, labels: Any) -> None:
        self.images, self.labels = images, labels

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index][0], int(self.labels[index])

    def __len__(self) -> int:
        return len(self.images)


def test_the_table_of_measures_is_whole(everything: Measured) -> None:
    assert set(everything.values) == set(MEASURES)
    assert not everything.skipped
    assert {one.group for one in MEASURES.values()} == set(GROUPS)
    assert set(everything.seconds) == {"features", *GROUPS}
    for name, one in MEASURES.items():
        assert one.name == name
        assert (DOCS / one.page).is_file()
        value = everything.values[name]
        assert np.isfinite(value)
        if one.unit == "%":
            assert 0 <= value <= 1
        assert one.shown(value)
    assert len({one.title for one in MEASURES.values()}) == len(MEASURES)


def test_values_are_those_of_the_instruments(vit: md.MaskedViT, images: JobImages) -> None:
    groups = ("knn", "linear", "attention", "occlusion")
    found = measure(vit, images, 32, groups=groups, val_limit=44)
    judge = Judge(images, 32, knn_train=100, knn_val=44)
    train = extract_features(vit, images.train, 32)
    val = extract_features(vit, images.val, 32, indices=judge.rows["val"])
    assert found.values["knn_20"] == knn_accuracy(*train, *val)
    assert found.values["linear"] == linear_probe(*train, *val).accuracy
    jaccard = judge.jaccard(vit)
    assert jaccard is not None
    for name, value in jaccard._asdict().items():
        assert found.values[f"jaccard_{name}"] == pytest.approx(value, abs=1e-6)
    for kind in ("random", "salient", "background"):
        ratios, accuracies = found.curves[f"occlusion_{kind}"]
        assert accuracies[0] == pytest.approx(found.values["knn_20"])
        area = np.trapezoid(accuracies, ratios) / (ratios[-1] - ratios[0])
        assert found.values[f"occlusion_{kind}"] == pytest.approx(area)
    assert found.images == {"train": 88, "val": 44, "masks": 44}


def test_the_same_arguments_give_the_same_numbers(vit: md.MaskedViT, images: JobImages) -> None:
    groups = ("linear", "occlusion", "stability")
    first, second = (measure(vit, images, 32, groups=groups, val_limit=11) for _ in range(2))
    other = measure(vit, images, 32, groups=("occlusion",), val_limit=11, seed=1)
    assert (first.values, first.curves) == (second.values, second.curves)
    assert first.curves["occlusion_random"] != other.curves["occlusion_random"]


def test_json_and_back(everything: Measured) -> None:
    text = json.dumps(everything.to_json())
    assert Measured.from_json(json.loads(text)) == everything
    for wrong in ({"value": {}}, {"values": {}, "curves": {"a": [1]}}, {"values": 3}):
        with pytest.raises(ValueError, match="no measured values"):
            Measured.from_json(wrong)


def test_without_masks_only_what_needs_none(vit: md.MaskedViT, images: JobImages) -> None:
    groups = ("attention", "discovery", "occlusion")
    with_masks = measure(vit, images, 32, groups=groups, val_limit=11)
    bare = dataclasses.replace(images, val_masks=None)
    found = measure(vit, bare, 32, groups=groups, val_limit=11)
    assert set(found.values) == {
        "attention_entropy", "head_diversity", "attention_spread", "attention_distance",
        "occlusion_random",
    }  # fmt: skip
    for name, value in found.values.items():
        assert value == pytest.approx(with_masks.values[name], abs=1e-5)
    assert set(found.skipped) == {
        "attention", "discovery", "occlusion_salient", "occlusion_background",
    }  # fmt: skip
    assert found.images == {"train": 88, "val": 11}


def test_a_model_without_attention_has_the_rest(images: JobImages) -> None:
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=0, in_chans=3)
    vit = md.MaskedViT(network, "pixel", patch_size=8)
    found = measure(vit, images, 32, groups=("knn", "attention", "discovery", "stability"))
    assert set(found.values) == {"knn_10", "knn_20", "knn_100", "knn_200"}
    assert set(found.skipped) == {"attention", "discovery", "stability"}
    assert all("ResNet" in reason for reason in found.skipped.values())


def test_small_classes_have_no_episodes(vit: md.MaskedViT, images: JobImages) -> None:
    found = measure(vit, images, 32, groups=("few_shot",))  # ten images of each class
    assert not found.values
    assert "20 validation images" in found.skipped["few_shot"]


# --- What is salient


def bench(vit: md.MaskedViT, images: JobImages, **changes: Any) -> Bench:
    return Bench(vit, images, 32, **changes)


def test_the_masks_guide_cropped_as_the_images_are(vit: md.MaskedViT) -> None:
    """Pictures that are their own masks, twice as wide as high, show what the guide should be."""
    generator = np.random.default_rng(0)
    masks = np.kron(generator.random((6, 8, 8)) < 0.3, np.ones((12, 12))) > 0

    class Wide(Dataset[tuple[Image.Image, int]]):
        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            if index >= len(masks):
                raise IndexError
            picture = Image.fromarray(masks[index]).convert("RGB")
            return picture.resize((192, 96), Image.Resampling.NEAREST), index

        def __len__(self) -> int:
            return len(masks)

    wide = JobImages(Wide(), Wide(), np.arange(6), np.arange(6), masks, "")
    own = bench(vit, wide)
    seen = own.pixels[0][:, 0].float() / 255
    shares = F.avg_pool2d(seen, 8).flatten(1)
    assert own.saliency is not None
    assert 0.1 < shares.mean() < 0.6
    torch.testing.assert_close(own.saliency, shares, atol=1e-6, rtol=0)


def test_a_guide_is_a_model_or_its_attention(vit: md.MaskedViT, images: JobImages) -> None:
    guide = load_backbone("vit_tiny_patch16_224", image_size=32, patch_size=8, depth=1, seed=3)
    rows = bench(vit, images, val_limit=11).rows["val"]
    attention = attention_maps(guide, evaluation_images(images.val, 32, indices=rows)[0])
    by_model, by_attention, by_masks = (
        measure(vit, images, 32, groups=("occlusion",), guide=given, val_limit=11).curves
        for given in (guide, attention, None)
    )
    assert by_model == by_attention
    assert by_masks["occlusion_salient"] != by_model["occlusion_salient"]
    assert by_masks["occlusion_random"] == by_model["occlusion_random"]


# --- How it is called


def test_progress_counts_the_groups(vit: md.MaskedViT, images: JobImages) -> None:
    calls: list[tuple[str, int, int]] = []
    measure(vit, images, 32, groups=("health", "knn"), progress=lambda *call: calls.append(call))
    assert calls == [("features", 0, 3), ("knn", 1, 3), ("health", 2, 3), ("", 3, 3)]


def test_names_choose_measures() -> None:
    assert len(measures_named(["all"])) == len(MEASURES)
    assert [m.name for m in measures_named(["corloc_lost", "knn"])][-1] == "corloc_lost"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"groups": ("knm",)}, "no measure 'knm'. Did you mean knn"),
        ({"groups": ("knn_20",)}, "'knn_20' is no group"),
        ({"groups": ()}, "at least one measure"),
        ({"groups": ("knn",), "classifier": "svm"}, "classifier must be"),
        ({"groups": ("occlusion",), "fill": "drop"}, "needs a model that drops tokens"),
        ({"groups": ("occlusion",), "guide": torch.ones(3, 16)}, "attention"),
    ],
)
def test_what_cannot_be_measured(
    vit: md.MaskedViT, images: JobImages, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        measure(vit, images, 32, val_limit=11, **options)


def test_a_missing_library_is_said_before_anything_runs(
    vit: md.MaskedViT, images: JobImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    calls: list[Any] = []
    wanting: list[dict[str, Any]] = [{"groups": ("knn", "logistic")}, {"classifier": "linear"}]
    for options in wanting:
        with pytest.raises(ImportError, match="scikit-learn"):
            measure(vit, images, 32, progress=lambda *call: calls.append(call), **options)
    assert not calls


def test_dropped_tokens_leave_no_attention_to_compare(images: JobImages) -> None:
    vit = load_backbone(
        "vit_tiny_patch16_224", image_size=32, patch_size=8, depth=1, apply="drop", seed=0
    )
    groups = ("occlusion", "stability")
    found = measure(vit, images, 32, groups=groups, fill="drop", val_limit=11)
    assert "occlusion_random" in found.values
    assert "dropped" in found.skipped["stability"]


def test_features_are_kept_in_the_cache(
    vit: md.MaskedViT, images: JobImages, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"groups": ("knn",), "cache": tmp_path}
    first = measure(vit, images, 32, **options)
    assert len(list(tmp_path.iterdir())) == 2  # of training and of validation images
    assert measure(vit, images, 32, **options).values == first.values


def test_importing_is_light() -> None:
    heavy = {"sklearn", "scipy", "torchvision", "timm", "matplotlib"}
    code = f"import sys, maskdistill.evaluation.measures; print({heavy} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
