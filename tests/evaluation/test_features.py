"""Features of a backbone that is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maskdistill.data import Scenes, normalize, resize_for_evaluation
from maskdistill.evaluation import evaluating, extract_features, raw_pixels


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
