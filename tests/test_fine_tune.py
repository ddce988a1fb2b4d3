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
            "workers": 0,
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


@pytest.mark.parametrize(("epochs", "warm"), [(3, 2.0), (2, 0.0)])
def test_the_learning_rate_has_no_jump(
    example: ModuleType, settings: Settings, epochs: int, warm: float
) -> None:
    """Up to the peak, then down by half a cosine that begins there."""
    s = settings(epochs=epochs, warmup_epochs=warm, batch_size=4, layer_decay=1.0)
    vit = load_backbone("vit_tiny_patch16_224", image_size=16, patch_size=8, depth=1)
    rates: list[float] = []
    real = example.CosineLRScheduler.step_update

    def noted(self: Any, step: int) -> None:
        real(self, step)
        rates.append(max(group["lr"] for group in self.optimizer.param_groups))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example.CosineLRScheduler, "step_update", noted)
        model = example.with_head(vit.backbone, 3, s)
        example.fine_tune(model, example.images_of(s, 16), s, 16, "test")
    peak, up = s.lr * 4 / 256, round(12 * warm)
    assert len(rates) == 12 * epochs
    assert rates[up] == pytest.approx(peak)
    t = np.arange(12 * epochs - up) / (12 * epochs - up)
    cosine = 1e-6 + (peak - 1e-6) * (1 + np.cos(np.pi * t)) / 2
    np.testing.assert_allclose(rates[up:], cosine, rtol=1e-6)
    np.testing.assert_allclose(rates[:up], peak * np.arange(up) / max(up, 1), atol=2e-8)


def test_what_is_finished_is_kept(
    example: ModuleType,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second model fails, and the first one's numbers and weights are there."""
    real = example.fine_tune

    def failing(model: Any, images: Any, s: Any, size: int, what: str) -> Any:
        if what == "from scratch":
            raise FloatingPointError("the loss is nan")
        return real(model, images, s, size, what)

    monkeypatch.setattr(example, "fine_tune", failing)
    where, out = tmp_path / "new" / "numbers.json", tmp_path / "tuned.safetensors"
    with pytest.raises(FloatingPointError):
        example.main(settings(epochs=1, from_scratch=True, json=where, out=out))
    found = json.loads(where.read_text())
    assert "from_scratch" not in found
    low, high = found["fine_tuned"]["interval"]
    assert 0 < low < found["fine_tuned"]["accuracy"] <= high <= 1
    assert "fine tuned" in capsys.readouterr().out
    assert out.is_file()


def test_an_interval_at_the_edge_is_none_of_no_width(
    example: ModuleType, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    result: dict[str, Any] = {"images": 20}
    result["fine_tuned"] = {"accuracy": 1.0, "train_loss": 0.1, "seconds": 1.0}
    example.keep(result, "fine_tuned", settings())
    z2 = 1.959964**2
    assert result["fine_tuned"]["interval"] == pytest.approx([20 / (20 + z2), 1.0], abs=1e-6)
    assert "100.0% (83.9 to 100.0) of 20" in capsys.readouterr().out


def test_a_tuned_model_keeps_its_normalisation(
    example: ModuleType, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of timm's weights goes into the file: tuning goes on with it, and timm knows it."""
    own = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "statistics", lambda model, s: own)
        tuned(example, settings(epochs=1), first)
    again = settings(backbone=str(first), depth=None, patch_size=None, image_size=None, epochs=1)
    with pytest.warns(UserWarning, match=r"0\.4, 0\.5, 0\.6.*statistics="):
        tuned(example, again, second)
    for path in (first, second):
        assert example.statistics(None, settings(backbone=str(path))) == own
        with safetensors.safe_open(path, "pt") as file:
            arguments = json.loads(file.metadata()["timm.create_model"])
        plain = timm.create_model(**arguments, checkpoint_path=str(path))
        config = timm.data.resolve_model_data_config(plain)
        assert (tuple(config["mean"]), tuple(config["std"])) == own


def test_loaders_as_the_trainer_has_them(
    example: ModuleType, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For real data, as many as there are cores but one; the scenes need none."""
    assert example.REAL.workers is None
    assert example.SCENES.workers == 0
    seen: list[int] = []

    def loader(*args: Any, num_workers: int, **kwargs: Any) -> list[Any]:
        seen.append(num_workers)
        return []

    monkeypatch.setattr(example, "DataLoader", loader)
    for cores, workers in ((1, None), (4, None), (64, None), (64, 2)):
        monkeypatch.setattr(example, "cores", lambda: cores)  # noqa: B023
        s = settings(epochs=1, workers=workers)
        list(example.batches(example.Augmented(None, None, 0), s))
    assert seen == [0, 3, 8, 2]


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
        ({"warmup_epochs": 1}, "warmup_epochs must be >= 0 and below epochs.* 1; got 1"),
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
