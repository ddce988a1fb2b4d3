"""Fine-tuning: it learns, can be repeated, is not misled by validation, and timm reads it.

Images are of one colour with noise, and the colour is the class: easy for any weights.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from maskdistill.evaluation import load_backbone

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        import fine_tune

        yield fine_tune
    sys.modules.pop("fine_tune", None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colours")
    random = np.random.RandomState(0)
    for split, count in (("train", 16), ("val", 6)):
        for channel, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.randint(0, 120, (16, 16, 3)).astype(np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


Settings = Callable[..., Any]


@pytest.fixture
def settings(example: ModuleType, data: Path) -> Settings:
    def settings(**changes: Any) -> Any:
        tiny = {
            "data": data, "image_size": 16, "patch_size": 8, "depth": 2, "epochs": 3, "lr": 8e-3,
            "batch_size": 16, "warmup_epochs": 0.5, "drop_path": 0.0, "device": "cpu",
            "crop_scale": (0.6, 1.0), "mixup": (0.0, 0.0), "augment": "", "erase": 0.0,
        }  # fmt: skip
        return dataclasses.replace(example.REAL, **{**tiny, **changes})

    return settings


def tuned(example: ModuleType, s: Any, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tune, and return what was found and the weights."""
    found = example.main(dataclasses.replace(s, out=path))
    return found, load_file(path)


def test_it_learns_and_scratch_starts_afresh(
    example: ModuleType, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = tmp_path / "numbers.json"
    found = example.main(settings(epochs=6, from_scratch=True, json=where))
    assert found["fine_tuned"]["accuracy"] > 0.9, "of three colours"
    assert found["fine_tuned"]["train_loss"] < 1.0 < np.log(3)
    assert (found["images"], found["training_images"], found["classes"]) == (18, 48, 3)
    assert found["from_scratch"]["train_loss"] != found["fine_tuned"]["train_loss"]
    assert json.loads(where.read_text())["settings"]["epochs"] == 6
    said = capsys.readouterr().out
    assert "of 18 validation images" in said
    assert "from scratch" in said
    with pytest.raises(FileExistsError, match=r"numbers\.json is there already"):
        example.main(settings(json=where))


def test_it_can_be_repeated_and_loaders_change_nothing(
    example: ModuleType, settings: Settings, tmp_path: Path
) -> None:
    all_of_it = {"augment": "rand-m9-mstd0.5-inc1", "erase": 0.5, "mixup": (0.8, 1.0),
                 "drop_path": 0.2, "epochs": 2}  # fmt: skip
    _, first = tuned(example, settings(**all_of_it), tmp_path / "a.safetensors")
    torch.rand(7)  # another state of the generators around it
    np.random.rand(7)
    _, second = tuned(example, settings(**all_of_it, workers=1), tmp_path / "b.safetensors")
    _, other = tuned(example, settings(**all_of_it, seed=1), tmp_path / "c.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_validation_images_choose_nothing(
    example: ModuleType, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, weights = tuned(example, settings(), tmp_path / "a.safetensors")
    real = example.images_of

    def wrong(s: Any, size: int) -> Any:
        images = real(s, size)
        return dataclasses.replace(images, val_labels=(images.val_labels + 1) % 3)

    monkeypatch.setattr(example, "images_of", wrong)
    misled, same = tuned(example, settings(), tmp_path / "b.safetensors")
    assert misled["fine_tuned"]["accuracy"] < found["fine_tuned"]["accuracy"]
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_settings_are_tried_on_training_images(example: ModuleType, settings: Settings) -> None:
    images = example.images_of(settings(hold_out=0.25), 16)
    assert (len(images.train_labels), len(images.val_labels)) == (36, 12)
    assert len(images.train) == 36
    kept, held = set(images.train.indices), set(images.val.indices)
    assert kept | held == set(range(48)), "each training image once, and no other"
    for part, labels in ((images.train, images.train_labels), (images.val, images.val_labels)):
        assert [part[i][1] for i in range(len(labels))] == labels.tolist()
    with pytest.raises(ValueError, match="hold_out 0.001 of 48 images is none"):
        example.images_of(settings(hold_out=0.001), 16)


@pytest.mark.parametrize(
    ("model", "pool"),
    [
        ("vit_tiny_patch16_224", "token"),
        ("vit_tiny_patch16_224", "avg"),
        ("eva02_tiny_patch14_224", "own"),
    ],
)
def test_timm_and_load_backbone_read_the_result(
    example: ModuleType, settings: Settings, tmp_path: Path, model: str, pool: str
) -> None:
    path = tmp_path / "tuned.safetensors"
    found, _ = tuned(example, settings(backbone=model, pool=pool, epochs=1), path)
    with safetensors.safe_open(path, "pt") as file:
        arguments = json.loads(file.metadata()["timm.create_model"])
    plain = timm.create_model(**arguments, checkpoint_path=str(path)).eval()
    images = example.images_of(settings(), 16)
    again = example.accuracy(
        plain, images, 16, example.statistics(plain, settings()), torch.device("cpu")
    )
    assert again == found["fine_tuned"]["accuracy"]
    x = torch.randn(2, 3, 16, 16)
    vit = load_backbone(path)
    with torch.no_grad():
        features = plain.forward_head(plain.forward_features(x), pre_logits=True)
        torch.testing.assert_close(vit.embed(x), features)
        assert plain(x).shape == (2, 3)
    more = example.main(settings(backbone=str(path), depth=None, patch_size=None, epochs=1))
    assert more["fine_tuned"]["train_loss"] < found["fine_tuned"]["train_loss"], "it went on"


def test_the_layers_learn_by_their_depth(example: ModuleType, settings: Settings) -> None:
    s = settings(layer_decay=0.5)
    vit = load_backbone("vit_tiny_patch16_224", image_size=16, patch_size=8, depth=2)
    model = example.with_head(vit.backbone, 3, s)
    seen: list[Any] = []
    real = example.create_optimizer_v2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            example, "create_optimizer_v2", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1]
        )
        example.fine_tune(model, example.images_of(s, 16), s, 16, "test")
    scale = {id(p): group["lr_scale"] for group in seen[0].param_groups for p in group["params"]}
    decay = {
        id(p): group["weight_decay"] for group in seen[0].param_groups for p in group["params"]
    }
    assert scale[id(model.patch_embed.proj.weight)] == 0.125
    assert scale[id(model.blocks[0].attn.qkv.weight)] == 0.25
    assert scale[id(model.blocks[1].attn.qkv.weight)] == 0.5
    assert scale[id(model.head.weight)] == 1
    assert (
        decay[id(model.pos_embed)] == decay[id(model.head.bias)] == 0 < decay[id(model.head.weight)]
    )
    rates = {group["lr"] / group["lr_scale"] for group in seen[0].param_groups}
    assert max(rates) == pytest.approx(min(rates)), "the schedule keeps the scales"
    assert max(rates) < s.lr * s.batch_size / 256 / 4, "and comes down"


def test_an_average_of_the_weights(example: ModuleType, settings: Settings, tmp_path: Path) -> None:
    _, last = tuned(example, settings(), tmp_path / "a.safetensors")
    _, average = tuned(example, settings(ema=0.9), tmp_path / "b.safetensors")
    assert not torch.equal(last["head.weight"], average["head.weight"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 64}, "48 images do not fill a batch"),
        ({"batch_size": 5, "mixup": (0.8, 0.0)}, "batch_size must be even"),
        ({"drop_path": 1.0}, r"drop_path must lie in \[0, 1\)"),
        ({"layer_decay": 0.0}, r"layer_decay must lie in \(0, 1\]"),
        ({"pool": "token", "backbone": "vit_base_patch16_siglip_224"}, "takes no pool='token'"),
        ({"backbone": "vit_tinny_patch16_224"}, "Did you mean"),
        ({"device": "abacus"}, "device must be"),
        ({"lr": 1e30}, "lower --lr"),
    ],
)
def test_what_cannot_work(
    example: ModuleType, settings: Settings, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises((ValueError, FloatingPointError), match=said):
        example.main(settings(**{"epochs": 1, **changes}))


def test_classes_that_were_never_seen(
    example: ModuleType, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = example.open_data

    def others(path: Path) -> Any:
        opened = real(path)
        opened.val.labels[:] += 3
        return opened

    monkeypatch.setattr(example, "open_data", others)
    with pytest.raises(ValueError, match="classes that the training images lack"):
        example.main(settings())
