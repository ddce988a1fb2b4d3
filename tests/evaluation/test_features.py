"""Features of a backbone that is left as it was, and those that are kept."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Subset

from maskdistill.data import Scenes, normalize, open_data, resize_for_evaluation
from maskdistill.evaluation import evaluating, extract_features, raw_pixels
from maskdistill.evaluation.features import check_labelled, check_split
from maskdistill.models import MaskedViT


class Network(nn.Module):
    """Behaves differently in training: by dropout, and by batch norm that stays in training."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.Dropout(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layers(x)
        return output


def test_features_and_labels_of_the_chosen_images() -> None:
    torch.manual_seed(0)
    network, scenes = Network(), Scenes(12, 16)
    network.layers[2].eval()
    features, labels = extract_features(network, scenes, 16, indices=[3, 7, 8], batch_size=2)
    assert labels.tolist() == scenes.labels[[3, 7, 8]].tolist()
    pixels = normalize(resize_for_evaluation(scenes[7][0], 16)[None])
    with torch.no_grad():
        torch.testing.assert_close(features[1:2], network.layers[1](pixels.flatten(1)))
    assert [part.training for part in network.layers] == [True, True, False]
    assert len(extract_features(network, scenes, 16)[0]) == 12


def test_modes_come_back_after_an_error() -> None:
    network = Network()

    def fail() -> None:
        with evaluating(network):
            assert not network.layers[2].training
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert network.training
    assert network.layers[2].training


def test_raw_pixels() -> None:
    pixels, labels = raw_pixels(Scenes(5, 16), [0, 4], size=4)
    assert pixels.shape == (2, 48)
    assert labels.tolist() == [0, 4]
    assert float(pixels.abs().max()) <= 0.5


def test_half_precision_and_other_colours() -> None:
    network, scenes = Network(), Scenes(6, 16)
    full, labels = extract_features(network, scenes, 16, batch_size=4)
    half, same = extract_features(network, scenes, 16, precision="float16")
    assert half.dtype == torch.float16
    assert torch.equal(labels, same)
    torch.testing.assert_close(half.float(), full, rtol=1e-3, atol=1e-3)
    other, _ = extract_features(network, scenes, 16, statistics=((0.5,) * 3, (0.25,) * 3))
    pixels = resize_for_evaluation(scenes[2][0], 16)[None] / 255
    with torch.no_grad():
        expected = network.eval()((pixels - 0.5) / 0.25)
    torch.testing.assert_close(other[2:3], expected)


def test_more_batches_than_are_held_on_the_device() -> None:
    network, scenes = Network(), Scenes(70, 16)
    features, labels = extract_features(network, scenes, 16, batch_size=1)
    assert labels.tolist() == scenes.labels.tolist()
    torch.testing.assert_close(features, extract_features(network, scenes, 16)[0])


def test_what_cannot_be_embedded() -> None:
    network, scenes = Network(), Scenes(2, 16)
    with pytest.raises(ValueError, match="no images to embed"):
        extract_features(network, scenes, 16, indices=[])
    with pytest.raises(ValueError, match="precision must be"):
        extract_features(network, scenes, 16, precision="bfloat16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(2, D\); it gave \(2, 3, 16, 16\)"):
        extract_features(nn.Identity(), scenes, 16)
    with torch.no_grad():
        network.layers[1].weight.mul_(1e6)
    with pytest.raises(ValueError, match="float16; use precision='float32'"):
        extract_features(network, scenes, 16, precision="float16")


# --- The cache


class Counting(Network):
    """Counts its forwards, outside of the module."""

    def __init__(self, count: list[int]) -> None:
        super().__init__()
        self._count = count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._count.append(len(x))
        return super().forward(x)


@pytest.fixture
def count() -> list[int]:
    return []


@pytest.fixture
def extract(tmp_path: Path, count: list[int]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    network = Counting(count)

    def extract(images: Any = None, size: int = 16, **changes: Any) -> Any:
        chosen = changes.pop("network", network)
        return extract_features(chosen, images or Scenes(12, 16), size, cache=tmp_path, **changes)

    extract.network = network  # type: ignore[attr-defined]
    return extract


def test_features_are_computed_once(
    extract: Any, count: list[int], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    first = extract()
    assert count == [12]
    again = extract(batch_size=5, network=copy.deepcopy(extract.network))
    assert count == [12], "read, whatever the batch size and whichever the object"
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert extract(precision="float16")[0].dtype == torch.float16
    assert extract(precision="float16")[0].dtype == torch.float16
    assert count == [12, 12]
    assert len(list(tmp_path.iterdir())) == 2, "nothing unfinished is left"


@pytest.mark.parametrize(
    "change",
    [
        {"size": 20},
        {"indices": [0, 1]},
        {"indices": list(range(11, -1, -1))},
        {"images": Scenes(12, 16, seed=1)},  # the same labels
        {"images": Scenes(13, 16)},
        {"statistics": ((0.5,) * 3, (0.5,) * 3)},
    ],
    ids=["size", "indices", "order", "pixels", "number", "colours"],
)
def test_what_makes_other_features(extract: Any, count: list[int], change: dict[str, Any]) -> None:
    extract.network.layers = nn.Sequential(nn.AdaptiveAvgPool2d(16), *extract.network.layers)
    extract()
    extract(**change)
    assert len(count) == 2


def test_another_backbone_has_other_features(extract: Any, count: list[int]) -> None:
    extract()
    with torch.no_grad():
        extract.network.layers[1].weight[3, 5] += 1e-3
    extract()
    assert len(count) == 2, "one weight"
    extract.network.layers[1].register_buffer("shift", torch.ones(1), persistent=False)
    extract()
    assert len(count) == 3, "a buffer that is not in the state dict"
    extract.network.scale = 2.0
    extract()
    assert len(count) == 4, "a plain attribute"
    extract.network.train()
    extract()
    assert len(count) == 4, "but not the mode: features are of evaluation mode"


def test_a_number_of_heads_is_no_weight(tmp_path: Path) -> None:
    settings = {"img_size": 16, "patch_size": 8, "depth": 1, "num_classes": 0, "embed_dim": 24}
    vit = timm.create_model("vit_tiny_patch16_224", num_heads=3, **settings)
    other = timm.create_model("vit_tiny_patch16_224", num_heads=2, **settings)
    other.load_state_dict(vit.state_dict())
    for model in (vit, other, vit):
        extract_features(MaskedViT(model), Scenes(2, 16), 16, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other"])
def test_a_damaged_cache_is_computed_anew(
    extract: Any, count: list[int], tmp_path: Path, damage: str
) -> None:
    features, _ = extract()
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    at = len(whole) - 150
    path.write_bytes(
        {
            "truncated": whole[:-10],
            "flipped": whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :],
            "empty": b"",
            "other": b"not of this kind at all",
        }[damage]
    )
    with pytest.warns(UserWarning, match="are damaged .* computed anew") as caught:
        assert torch.equal(extract()[0], features)
    assert caught[0].filename == __file__, "told to whoever called"
    assert len(count) == 2
    assert path.read_bytes() == whole
    extract()
    assert len(count) == 2


def test_a_folder_that_cannot_be_written_loses_nothing(
    extract: Any, count: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.warns(UserWarning, match="could not be kept .*No space left"):
        features, _ = extract()
    assert features.shape == (12, 8)


class Bare:
    """Images and nothing that tells them from others."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (16, 16), (index, 0, 0)), 0


class Named(Bare):
    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint


def test_by_what_images_are_known(extract: Any, count: list[int]) -> None:
    with pytest.raises(ValueError, match="features of a Bare cannot be cached"):
        extract(Bare())
    assert not count, "refused before anything is computed"
    extract(Named("a"))
    extract(Named("a"))
    extract(Named("b"))
    assert len(count) == 2
    extract(indices=[5, 7])
    extract(Subset(Scenes(12, 16), [5, 7]))
    extract(Subset(Scenes(12, 16), [1, 5, 7]), indices=[1, 2])
    assert len(count) == 3, "a subset is its images"


def test_images_on_disk_are_known_by_their_bytes(
    extract: Any, count: list[int], tmp_path: Path
) -> None:
    scenes = Scenes(12, 16)
    for i, (image, label) in enumerate(scenes):
        (tmp_path / "data" / str(label % 2)).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "data" / str(label % 2) / f"{i}.png")
        if i == 11:
            break
    extract(open_data(tmp_path / "data").train)
    extract(open_data(tmp_path / "data").train)
    assert len(count) == 1
    some = next((tmp_path / "data" / "0").iterdir())
    for path in (tmp_path / "data").rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    assert some.is_file()
    extract(open_data(tmp_path / "data").train)
    assert len(count) == 2


# --- What no classifier is given


def test_features_and_labels_that_do_not_belong_together() -> None:
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    check_labelled("", x, y)
    check_split(x, y, x[:2], y[:2])
    with pytest.raises(ValueError, match="test_labels must be whole numbers"):
        check_split(x, y, x, y.float())
    with pytest.raises(ValueError, match="4 dimensions and test features 3"):
        check_split(x, y, x[:, :3], y)
    with pytest.raises(ValueError, match="no class in common: 0, 1, 2 in training and 10, 11"):
        check_split(x, y, x, y + 10)
    with pytest.raises(ValueError, match="train_features hold NaN or infinite"):
        check_split(x.clone().index_fill_(0, torch.tensor([5]), float("inf")), y, x, y)
    with pytest.raises(ValueError, match=r"features must be .* \(6, 4\) and \(6, 1\)"):
        check_labelled("", x, y[:, None])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_labelled("", x.half(), y.bool())
