"""Colours: each operation against Pillow's, their order, and the independence of the crops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import ImageFilter
from torch import Tensor
from torchvision.transforms import functional as TF

from maskdistill.data import MultiCrop
from maskdistill.data import crops as colour
from maskdistill.data.crops import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    CropParameters,
    colour_,
    image_keys,
)
from tests.data.pictures import pictures, to_pillow

NONE = {BRIGHTNESS: 1.0, CONTRAST: 1.0, SATURATION: 1.0, HUE: 0.0}
PILLOW = {
    BRIGHTNESS: TF.adjust_brightness,
    CONTRAST: TF.adjust_contrast,
    SATURATION: TF.adjust_saturation,
    HUE: TF.adjust_hue,
}


def nothing(count: int) -> CropParameters:
    no = torch.zeros(count, dtype=torch.bool)
    factors = torch.tensor([list(NONE.values())] * count)
    order = torch.arange(4, dtype=torch.uint8).repeat(count, 1)
    return CropParameters(torch.zeros(count, 4), no, no, factors, order, no, torch.zeros(count), no)


def sampled(count: int, seed: int = 0) -> CropParameters:
    keys = image_keys(seed, torch.zeros(count, dtype=torch.long), torch.arange(count))
    parameters = MultiCrop(224, 96, 1).sample(keys, torch.full((count, 2), 64))
    return parameters.stacked(slice(1, 2))._replace(sigma=parameters.sigma[:, 2])


def by_pillow(x: Tensor, what) -> Tensor:  # type: ignore[no-untyped-def]
    return torch.stack([TF.pil_to_tensor(what(to_pillow(one))) for one in x])


def apart(a: Tensor, b: Tensor) -> Tensor:
    return (a.int() - b.int()).abs()


@pytest.mark.parametrize("factor", [0.6, 0.83, 1.0, 1.17, 1.4])
@pytest.mark.parametrize("operation", [BRIGHTNESS, CONTRAST, SATURATION])
def test_blends_are_pillows(operation: int, factor: float) -> None:
    x = pictures()
    want = by_pillow(x, lambda one: PILLOW[operation](one, factor))
    colours = nothing(len(x))._replace(jitter=torch.ones(len(x), dtype=torch.bool))
    colours.factors[:, operation] = factor
    assert torch.equal(colour_(x.clone(), colours), want)
    assert torch.equal(want, x) == (factor == 1.0)


@pytest.mark.parametrize("turns", [-0.1, -0.04, 0.06, 0.1, 0.5])
def test_the_hue_turns_as_in_pillow(turns: float) -> None:
    x = pictures()
    turns = int(255 * turns) / 256  # Pillow turns by whole steps; its own error remains
    want = by_pillow(x, lambda one: PILLOW[HUE](one, turns * 256 / 255))
    colours = nothing(len(x))._replace(jitter=torch.ones(len(x), dtype=torch.bool))
    colours.factors[:, HUE] = turns
    off = apart(colour_(x.clone(), colours), want)
    assert float(off.float().mean()) < 1.5
    assert float((off > 6).float().mean()) < 0.01


def test_the_hue_turns_as_in_colorsys() -> None:
    import colorsys

    x = torch.tensor(list(itertools.product((0, 1, 100, 254, 255), repeat=3))).float()
    for turns in (-0.5, -0.1, 0.0, 0.07, 0.5):
        want = []
        for rgb in x.tolist():
            h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in rgb))
            want.append([255 * c for c in colorsys.hsv_to_rgb((h + turns) % 1, s, v)])
        got = x.clone()[:, :, None, None]
        colour.rotate_hue_(got, torch.full((len(x),), turns))
        assert float((got[:, :, 0, 0] - torch.tensor(want)).abs().max()) <= 0.501


def test_grey_and_solarisation_are_pillows() -> None:
    x = pictures()
    yes = torch.ones(len(x), dtype=torch.bool)
    want = by_pillow(x, lambda one: TF.rgb_to_grayscale(one, 3))
    assert torch.equal(colour_(x.clone(), nothing(len(x))._replace(grey=yes)), want)
    want = by_pillow(x, lambda one: TF.solarize(one, 128))
    assert torch.equal(colour_(x.clone(), nothing(len(x))._replace(solarize=yes)), want)


@pytest.mark.parametrize("sigma", [0.03, 0.1, 0.5, 0.8, 0.9, 1.3, 2.0, 4.5])
def test_blur_is_pillows(sigma: float) -> None:
    x = pictures()
    want = by_pillow(x, lambda one: one.filter(ImageFilter.GaussianBlur(sigma)))
    got = colour_(x.clone(), nothing(len(x))._replace(sigma=torch.full((len(x),), sigma)))
    off = apart(got, want)
    # Pillow continues the edge anew before each of its three passes: only there noise shows it.
    edge = 1 + int(3 * sigma)
    assert int(off[:, :, edge:-edge, edge:-edge].max()) <= 3
    assert float(off.float().mean()) < 0.6
    assert torch.equal(got[-6:], x[-6:]), "what is flat stays"
    if sigma > 0.3:
        assert float(apart(got, x).float().mean()) > 1


def test_the_kernel_has_the_variance_asked_for() -> None:
    sigma = torch.tensor([0.05, 0.3, 0.7, 1.0, 1.6, 2.0, 4.0], dtype=torch.float64)
    taps = colour.blur_taps(sigma)
    at = torch.arange(taps.shape[1])
    assert torch.allclose(2 * taps.sum(1) - taps[:, 0], torch.ones(7, dtype=torch.float64))
    variance = 2 * (taps * at**2).sum(1)
    assert bool((variance <= sigma**2 * 1.001).all())
    assert bool((variance[1:] > sigma[1:] ** 2 * 0.9).all())


def test_everything_together_is_pillows() -> None:
    """Every crop its own factors and its own order, against Pillow one by one."""
    x, colours = pictures(32), sampled(96)
    got = colour_(x.clone(), colours)
    off = []
    for i in range(len(x)):
        image = to_pillow(x[i])
        if colours.jitter[i]:
            for operation in colours.order[i].tolist():
                image = PILLOW[operation](image, float(colours.factors[i, operation]))
        if colours.grey[i]:
            image = TF.rgb_to_grayscale(image, 3)
        if colours.sigma[i]:
            image = image.filter(ImageFilter.GaussianBlur(float(colours.sigma[i])))
        if colours.solarize[i]:
            continue  # turns a level's difference at 128 into 128 levels
        off.append(apart(got[i], TF.pil_to_tensor(image)).float())
    assert len(off) > 60
    assert float(torch.stack(off).mean()) < 1.5
    assert float((torch.stack(off) > 8).float().mean()) < 0.01


def test_the_order_matters_and_is_kept() -> None:
    x = pictures(2)[:1]
    factors = torch.tensor([[1.4, 0.6, 1.2, 0.1]])
    yes = torch.ones(1, dtype=torch.bool)
    results = set()
    for order in itertools.permutations(range(4)):
        colours = nothing(1)._replace(
            jitter=yes, factors=factors, order=torch.tensor([order], dtype=torch.uint8)
        )
        results.add(colour_(x.clone(), colours).numpy().tobytes())
    assert len(results) > 12


@pytest.mark.parametrize("side", [13, 64, 160])
def test_a_crop_does_not_depend_on_its_neighbours(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 40
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (count, 3, side, side), generator=generator).byte()
    colours = sampled(count, seed=2)
    together = colour_(x.clone(), colours)
    for i in range(count):
        row = slice(i, i + 1)
        alone = colour_(x[row].clone(), CropParameters(*(values[row] for values in colours)))
        assert torch.equal(alone[0], together[i])
    backwards = colour_(x.flip(0), CropParameters(*(values.flip(0) for values in colours)))
    assert torch.equal(backwards.flip(0), together)
    monkeypatch.setitem(colour._CHUNK, "cpu", 5 * 3 * side * side)
    assert torch.equal(colour_(x.clone(), colours), together)


def test_threads_do_not_matter() -> None:
    x, colours = pictures(40), sampled(120)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(colour_(x.clone(), colours))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_crops_without_colours_stay() -> None:
    x = pictures()
    assert torch.equal(colour_(x.clone(), nothing(len(x))), x)


def test_odd_sizes() -> None:
    for shape in ((1, 3, 1, 1), (2, 3, 1, 7), (3, 3, 5, 2)):
        x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8))
        out = colour_(x.clone(), sampled(shape[0])._replace(sigma=torch.full(shape[:1], 2.0)))
        assert out.shape == x.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda() -> None:
    x, colours = pictures(40), sampled(120)
    colours = colours._replace(solarize=torch.zeros(120, dtype=torch.bool))
    off = apart(colour_(x.cuda(), colours).cpu(), colour_(x.clone(), colours))
    assert float((off > 2).float().mean()) < 1e-3
