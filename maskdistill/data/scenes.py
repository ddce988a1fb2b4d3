"""Built-in scenes: pictures of one object each, with its mask, generated without a download.

The kind of object is the class. It shows in hue, surface and outline, each of them noisily, as in
real classes (apples are mostly red or green); place, size, tilt and light say nothing about it.

Image *i* has a generator of its own, seeded by ``(seed, split, i)``. This is the one module
that uses NumPy's random numbers:
the pictures are data, made once, and nothing here runs in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch.utils.data import Dataset

Array = npt.NDArray[Any]

_SPLITS = ("train", "val")
_MIN_SIZE = 16
_NUMBERS = 512  # uniform numbers that one image may use
_BATCH = 16  # images of one kind rendered together


class Scenes(Dataset[tuple[Image.Image, int]]):
    """One object per picture on a textured background, with its class and its mask.

    >>> scenes = Scenes(24, size=48, split="val", seed=0)
    >>> scenes.images.shape, scenes.masks.shape, scenes.labels[:3]
    ((24, 48, 48, 3), (24, 48, 48), array([0, 1, 2]))
    >>> image, label = scenes[5]
    >>> image.size, scenes.classes[label]
    ((48, 48), 'fish')

    Image ``i`` depends on ``seed``, ``split``, ``i`` and ``size`` alone: a longer data set begins
    with the shorter one. The classes take turns, so every prefix is balanced. The splits come from
    different random streams.

    Args:
        count: number of images.
        size: height and width in pixels, at least 16.
        split: ``"train"`` or ``"val"``.
        seed: a non-negative integer; another seed gives another data set of the same kinds.

    Raises:
        ValueError: for any other argument.
    """

    classes: tuple[str, ...]
    """The kinds of object; ``labels`` index into it."""
    images: npt.NDArray[np.uint8]
    """``(count, size, size, 3)``, RGB."""
    labels: npt.NDArray[np.int64]
    """``(count,)``."""
    masks: npt.NDArray[np.bool_]
    """``(count, size, size)``, True on the object."""

    def __init__(self, count: int, size: int = 48, *, split: str = "train", seed: int = 0) -> None:
        if count < 1:
            raise ValueError(
                f"Scenes wants at least one image, got count={count!r}; pass 1 or more."
            )
        if size < _MIN_SIZE:
            raise ValueError(
                f"Scenes wants pictures of at least {_MIN_SIZE} pixels, got size={size!r}: smaller "
                "objects cannot be told apart; pass size=48, say."
            )
        if split not in _SPLITS:
            raise ValueError(
                f"Scenes has the splits {_SPLITS}, got split={split!r}; pass one of them."
            )
        if seed < 0:
            raise ValueError(
                f"Scenes wants a non-negative seed, got seed={seed!r}; pass 0 or more."
            )
        self.classes = tuple(kind.name for kind in _KINDS)
        self.labels = np.arange(count, dtype=np.int64) % len(_KINDS)
        self.images = np.empty((count, size, size, 3), np.uint8)
        self.masks = np.empty((count, size, size), np.bool_)
        for label, kind in enumerate(_KINDS):
            for first in range(label, count, _BATCH * len(_KINDS)):
                # The batch is always full, so that rounding cannot depend on `count`.
                indices = first + len(_KINDS) * np.arange(_BATCH)
                images, masks = _render(kind, _Dice(seed, split, indices), size)
                wanted = indices[indices < count]
                self.images[wanted] = images[: len(wanted)]
                self.masks[wanted] = masks[: len(wanted)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


class _Dice:
    """Random numbers for a batch of images, each image from its own stream."""

    def __init__(self, seed: int, split: str, indices: npt.NDArray[np.int64]) -> None:
        streams = [np.random.SeedSequence((seed, _SPLITS.index(split), int(i))) for i in indices]
        numbers = [np.random.default_rng(stream).random(_NUMBERS, np.float32) for stream in streams]
        self._numbers: Array = np.stack(numbers)
        self._used = 0

    def grid(self, side: int) -> Array:
        """Uniform in [0, 1): ``(batch, side, side)``."""
        start, self._used = self._used, self._used + side * side
        assert self._used <= _NUMBERS
        return self._numbers[:, start : self._used].reshape(-1, side, side)

    def uniform(self, low: float, high: float) -> Array:
        """Uniform in [low, high): ``(batch, 1, 1)``."""
        return low + (high - low) * self.grid(1)

    def one_of(self, *values: float) -> Array:
        """One of the values: ``(batch, 1, 1)``."""
        picks = (self.grid(1) * len(values)).astype(np.intp)
        return np.asarray(values, np.float32)[picks]


# ------------------------------------------------------------------------------------------------
# Outlines: negative inside, positive outside, in a frame where the object fills the unit disc.


def _radius(x: Array, y: Array) -> Array:
    radius: Array = np.hypot(x, y)
    return radius


def _union(a: Array, b: Array) -> Array:
    union: Array = np.minimum(a, b)
    return union


def _overlap(a: Array, b: Array) -> Array:
    overlap: Array = np.maximum(a, b)
    return overlap


def _disc(x: Array, y: Array) -> Array:
    return _radius(x, y) - 1


def _polar(petals: int, depth: float) -> Callable[[Array, Array], Array]:
    """A closed curve with `petals` bumps, `depth` of the radius deep."""

    def outline(x: Array, y: Array) -> Array:
        bumps: Array = np.cos(petals * np.arctan2(x, -y))
        return _radius(x, y) - (1 - depth + depth * bumps)

    return outline


def _apple(x: Array, y: Array) -> Array:
    dent = 0.3 * np.exp(-((x / 0.28) ** 2)) * (y < 0)
    body = _radius(x, (y - 0.12) / (0.88 - dent)) - 0.95
    stem = _overlap(abs(x - 0.12 * (y + 0.5) ** 2) - 0.09, abs(y + 0.75) - 0.32)
    return _union(body, stem)


def _leaf(x: Array, y: Array) -> Array:
    blade = _overlap(_radius(x - 0.62, y), _radius(x + 0.62, y)) - 1.18
    return _union(blade, _overlap(abs(x) - 0.07, abs(y - 1.0) - 0.25))


def _doughnut(x: Array, y: Array) -> Array:
    return abs(_radius(x, y) - 0.67) - 0.33


def _fish(x: Array, y: Array) -> Array:
    body = _radius((x + 0.22) / 0.82, y / 0.52) - 1
    tail = _overlap(abs(y) - 0.95 * (x - 0.38), x - 1.02)
    return _union(body, tail)


def _parcel(x: Array, y: Array) -> Array:
    box = _overlap(abs(x), abs(y - 0.1)) - 0.78
    bow = _radius((abs(x) - 0.24) / 0.26, (y + 0.84) / 0.17) - 1
    return _union(box, bow)


def _moon(x: Array, y: Array) -> Array:
    return _overlap(_radius(x, y) - 1, 0.82 - _radius(x - 0.5, y))


def _mushroom(x: Array, y: Array) -> Array:
    cap = _overlap(_radius(x, (y - 0.12) / 1.05) - 1, y - 0.12)
    stem = _overlap(abs(x) - 0.3 - 0.08 * y, abs(y - 0.45) - 0.5)
    return _union(cap, stem)


def _gem(x: Array, y: Array) -> Array:
    sides = _overlap(abs(x) + 0.75 * np.maximum(y, 0) - 0.95, y - 1)
    return _overlap(sides, _overlap(-y - 0.55, abs(x) - 0.95 - 0.6 * np.minimum(y, 0)))


# ------------------------------------------------------------------------------------------------
# Surfaces: how far the accent colour covers the base colour, 0 to 1, in the same frame.


def _edge(value: Array, width: float = 0.15) -> Array:
    """A soft step: 0 where `value` is well below zero, 1 where it is well above."""
    return np.clip(0.5 + value / (2 * width), 0, 1)


def _streaks(x: Array, y: Array, dice: _Dice) -> Array:
    return 0.5 * _edge(np.sin(9 * x / (1.4 - abs(y).clip(0, 1)) + dice.uniform(0, 6)), 0.8)


def _veins(x: Array, y: Array, dice: _Dice) -> Array:
    ribs = _edge(np.sin(13 * (y + 0.8 * abs(x))) - 0.5, 0.4)
    return _overlap(_edge(0.06 - abs(x), 0.06), ribs)


def _dots(pitch: float, radius: float) -> Callable[[Array, Array, _Dice], Array]:
    def surface(x: Array, y: Array, dice: _Dice) -> Array:
        u, v = x / pitch + dice.uniform(0, 1), y / pitch + dice.uniform(0, 1)
        u = u + 0.5 * (np.floor(v) % 2)
        return _edge(radius - _radius(u % 1 - 0.5, v % 1 - 0.5), 0.12)

    return surface


def _bands(x: Array, y: Array, dice: _Dice) -> Array:
    return _edge(np.sin(8 * (x + 0.1 * np.cos(3 * y)) + dice.uniform(0, 6)), 0.4)


def _ribbon(x: Array, y: Array, dice: _Dice) -> Array:
    cross = _union(abs(x), abs(y - 0.1))
    return _overlap(_edge(0.15 - cross, 0.06), y < -0.68).astype(np.float32)


def _segments(x: Array, y: Array, dice: _Dice) -> Array:
    return _edge(np.sin(3 * np.arctan2(y - 0.25, x + 0.2) + dice.uniform(0, 6)), 0.25)


def _heart_of_flower(x: Array, y: Array, dice: _Dice) -> Array:
    return _edge(dice.uniform(0.28, 0.4) - _radius(x, y), 0.08)


def _facets(x: Array, y: Array, dice: _Dice) -> Array:
    return 0.75 * _edge(np.sin(5 * (x + 0.3)) * np.sin(4.5 * (y - abs(x) + 0.1)), 0.2)


@dataclass(frozen=True)
class _Kind:
    """A class: its outline, its surface, the two hues it comes in and the colour of its accents."""

    name: str
    outline: Callable[[Array, Array], Array]
    surface: Callable[[Array, Array, _Dice], Array]
    hues: tuple[float, float]  # usual, seldom
    accent: tuple[float, float, float]  # hue, saturation, value


_KINDS = (
    _Kind("apple", _apple, _streaks, (0.98, 0.25), (0.13, 0.6, 0.9)),
    _Kind("leaf", _leaf, _veins, (0.3, 0.07), (0.2, 0.4, 0.9)),
    _Kind("starfish", _polar(5, 0.3), _dots(0.38, 0.28), (0.05, 0.72), (0.11, 0.3, 1.0)),
    _Kind("doughnut", _doughnut, _dots(0.27, 0.26), (0.89, 0.07), (0.5, 0.5, 1.0)),
    _Kind("beach ball", _disc, _segments, (0.67, 0.02), (0.14, 0.1, 1.0)),
    _Kind("fish", _fish, _bands, (0.58, 0.1), (0.12, 0.15, 1.0)),
    _Kind("parcel", _parcel, _ribbon, (0.4, 0.66), (0.0, 0.8, 0.85)),
    _Kind("moon", _moon, _dots(0.5, 0.22), (0.16, 0.62), (0.1, 0.5, 0.45)),
    _Kind("flower", _polar(7, 0.22), _heart_of_flower, (0.78, 0.9), (0.14, 0.9, 0.95)),
    _Kind("mushroom", _mushroom, _dots(0.55, 0.32), (0.1, 0.0), (0.1, 0.08, 1.0)),
    _Kind("gem", _gem, _facets, (0.49, 0.85), (0.5, 0.1, 1.0)),
)


# ------------------------------------------------------------------------------------------------
# Pictures


def _rgb(hue: Array, saturation: Array | float, value: Array | float) -> Array:
    """HSV to RGB: each ``(batch, H, W)`` or broadcasting to it, to ``(batch, H, W, 3)``."""
    sector = (hue[..., None] + np.asarray((0, 2 / 3, 1 / 3), np.float32)) % 1 * 6
    pure: Array = np.clip(abs(sector - 3) - 1, 0, 1)
    sat = np.asarray(saturation, np.float32)[..., None]
    colour: Array = np.asarray(value, np.float32)[..., None] * (1 - sat + sat * pure)
    return colour


def _mix(a: Array, b: Array, share: Array) -> Array:
    mixed: Array = a + (b - a) * share[..., None]
    return mixed


def _noise(cells: Array, size: int) -> Array:
    """Smooth noise: ``(batch, side, side)`` random values to ``(batch, size, size)``."""
    at = (np.arange(size, dtype=np.float32) + 0.5) / size * (cells.shape[1] - 1)
    low = at.astype(np.intp)
    share = (at - low) ** 2 * (3 - 2 * (at - low))  # smoothstep
    rows = cells[:, low] + (cells[:, low + 1] - cells[:, low]) * share[:, None]
    noise: Array = rows[:, :, low] + (rows[:, :, low + 1] - rows[:, :, low]) * share
    return noise


def _background(dice: _Dice, size: int) -> Array:
    """Light, dark and faint colours in patches of several sizes: ``(batch, size, size, 3)``.

    Every picture has them all, differently placed. A backdrop with a colour of its own would be
    what the crops of one picture share, and DINO would learn that colour before the object.
    """
    light = _noise(dice.grid(4), size) - 0.5
    for side, weight in ((7, 0.6), (13, 0.4)):
        light = light + weight * (_noise(dice.grid(side), size) - 0.5)
    value = np.clip(0.5 + 0.85 * light, 0.05, 1)
    tint = np.stack([_noise(dice.grid(5), size) for _ in range(3)], axis=-1) - 0.5
    return value[..., None] * (1 + 0.5 * tint)


def _render(kind: _Kind, dice: _Dice, size: int) -> tuple[Array, Array]:
    """A batch of pictures of one kind and their masks."""
    ticks = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    x, y = ticks[None, None, :], ticks[None, :, None]
    picture = _background(dice, size)

    # The object's own frame: moved, tilted, mirrored, scaled and foreshortened.
    radius = dice.uniform(0.26, 0.42)
    tilt = dice.uniform(-0.7, 0.7)
    cos, sin = np.cos(tilt), np.sin(tilt)
    widen = dice.uniform(0.85, 1.15)
    mirror = dice.one_of(-1, 1)
    left, top = dice.uniform(-0.22, 0.22), dice.uniform(-0.22, 0.22)

    def frame(dx: Array, dy: Array) -> tuple[Array, Array]:
        u, v = (dx - left) / radius, (dy - top) / radius
        return mirror * (cos * u + sin * v) * widen, (cos * v - sin * u) / widen

    # The light, from above and one side: it casts a soft shadow, shades the body, leaves a gloss.
    light = dice.uniform(-0.8, 0.8)
    reach = dice.uniform(0.1, 0.25) * radius
    shadow = _edge(-kind.outline(*frame(x + light * reach, y - reach)), 0.18)
    picture = picture * (1 - dice.uniform(0.3, 0.6) * shadow)[..., None]

    u, v = frame(x, y)
    outline = kind.outline(u, v)
    # Dividing by the slope makes the edge one pixel wide whatever the formula of the outline.
    slope = _radius(np.gradient(outline, axis=1), np.gradient(outline, axis=2))
    cover = np.clip(0.5 - outline / np.maximum(slope, 1e-3), 0, 1)

    usual, seldom = kind.hues
    hue = dice.one_of(usual, usual, usual, usual, seldom) + dice.uniform(-0.035, 0.035)
    base = _rgb(hue, dice.uniform(0.55, 0.95), dice.uniform(0.55, 0.95))
    accent = _rgb(kind.accent[0] + dice.uniform(-0.05, 0.05), kind.accent[1], kind.accent[2])
    body = _mix(base, accent, kind.surface(u, v, dice) * dice.uniform(0.6, 1))
    across, down = (x - left) / radius, (y - top) / radius
    lit = 0.3 * np.clip(light * across - down, -1.2, 1.2)
    shade = 1 + lit - 0.25 * np.clip(u * u + v * v, 0, 1.3)
    gloss = np.exp(-((across - 0.35 * light) ** 2 + (down + 0.4) ** 2) / 0.05)
    body = body * shade[..., None] + (dice.uniform(0, 0.6) * gloss)[..., None]
    picture = _mix(picture, body, cover)

    # Exposure and a warm or cold cast over all of it.
    warm = dice.uniform(-0.06, 0.06)
    cast = np.concatenate([1 + warm, np.ones_like(warm), 1 - warm], axis=2)[:, :, None]
    picture = np.clip(picture * dice.uniform(0.75, 1.1)[..., None] * cast, 0, 1)
    return (255 * picture + 0.5).astype(np.uint8), cover > 0.5
