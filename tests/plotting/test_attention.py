"""Figures and videos of attention."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskdistill import plotting
from maskdistill.plotting.attention import chosen_steps
from tests.plotting.shown import (
    GRID,
    IMAGES,
    MASKS,
    attention,
)


def test_a_row_per_model_and_a_column_per_image() -> None:
    figure = plotting.plot_attention(IMAGES, {"a": attention(), "b": attention()}, GRID, MASKS)
    rows = [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()]
    assert len(figure.axes) == 12
    assert rows == ["image", "a", "b"]
    assert "own maximum; blue outline: object mask" in figure.get_supxlabel().replace("\n", " ")
    assert (
        "outline" not in plotting.plot_attention(IMAGES, {"a": attention()}, GRID).get_supxlabel()
    )


def test_one_scale_shows_that_one_model_attends_less() -> None:
    weak = attention() / 10

    def shown(scale: Any) -> list[float]:
        figure = plotting.plot_attention(
            IMAGES[:1], {"a": attention()[:1], "weak": weak[:1]}, GRID, scale=scale
        )
        return [float(axis.images[0].get_array().mean()) for axis in figure.axes[1:]]

    strong, same = shown("own")
    assert strong == same
    strong, dark = shown("image")
    assert dark < strong / 3
    assert shown("image") == shown("all")


def test_each_head_and_their_mean_are_drawn() -> None:
    given = attention(2, heads=5)
    figure = plotting.plot_attention_heads(
        IMAGES[:2], given, GRID, titles=["cat", "dog"], style="map"
    )
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["image", *(f"head {i}" for i in range(1, 6)), "mean"]
    assert [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()] == ["cat", "dog"]
    shown = figure.axes[7 + 6].images[0].get_array()
    wanted = plotting.attention_pixels(
        IMAGES[1], given[1].mean(dim=0), GRID, look="map", size=shown.shape[0]
    )
    assert (shown == wanted).all()


def test_a_strip_has_the_steps_in_order() -> None:
    given = {step: attention(seed=step) for step in (400, 0, 100)}
    figure = plotting.plot_attention_strip(IMAGES, given, GRID)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["image", "step 0", "step 100", "step 400"]
    assert len(figure.axes) == 16


def test_of_many_steps_the_first_and_last_are_kept() -> None:
    steps = dict.fromkeys(range(0, 1000, 10), 0)
    assert chosen_steps(steps, 5) == [0, 250, 500, 740, 990]
    assert chosen_steps(steps, 200) == sorted(steps)
    with pytest.raises(ValueError, match="at least 2"):
        chosen_steps(steps, 1)
    with pytest.raises(ValueError, match="at least one step"):
        chosen_steps({}, 5)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: plotting.plot_attention(IMAGES, {}, GRID), "at least one model"),
        (lambda: plotting.plot_attention(IMAGES, {"a": attention(3)}, GRID), "'a' must be .*got"),
        (lambda: plotting.plot_attention(IMAGES, {"a": attention()}, (2, 4)), "2x4 patches"),
        (lambda: plotting.plot_attention(IMAGES, {"a": attention()}, GRID, MASKS[:2]), "masks"),
        (
            lambda: plotting.plot_attention(IMAGES, {"a": attention()}, GRID, style="heat"),  # type: ignore[arg-type]
            "style must be one of overlay, map",
        ),
        (
            lambda: plotting.plot_attention(IMAGES, {"a": attention()}, GRID, scale="max"),  # type: ignore[arg-type]
            "scale must be one of own, image, all",
        ),
        (lambda: plotting.plot_attention_heads(IMAGES[0], attention(), GRID), "images must"),
        (lambda: plotting.plot_attention_heads(IMAGES, attention(), GRID, titles=["x"]), "titles"),
    ],
)  # fmt: skip
def test_attention_that_does_not_fit_is_refused(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_a_video_has_a_frame_per_step(tmp_path: Path, suffix: str) -> None:
    given = {step: attention(1, seed=step) for step in (0, 10, 20)}
    path = plotting.attention_video(
        IMAGES[0], given, GRID, tmp_path / "new" / f"x.{suffix}", MASKS[0], seconds=0.2
    )
    with Image.open(path) as video:
        assert video.n_frames == 3  # type: ignore[attr-defined]
        frames, times = [], []
        for i in range(3):
            video.seek(i)
            video.load()
            frames.append(np.asarray(video.convert("RGB")).copy())
            times.append(video.info["duration"])
    assert times == [200, 200, 800]
    middle = frames[0].shape[1] // 2
    assert any((frames[0][:, middle:] != frames[1][:, middle:]).ravel())
    assert frames[0].shape[0] % 2 == frames[0].shape[1] % 2 == 0


def test_an_mp4_goes_through_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in takes the frames and writes how many bytes of which size they are."""
    given = {step: attention(1, seed=step) for step in (0, 10)}
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"ffmpeg.*\.gif"):
        plotting.attention_video(IMAGES[0], given, GRID, tmp_path / "x.mp4")
    stand_in = tmp_path / "ffmpeg"
    stand_in.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys\n"
        "size = sys.argv[sys.argv.index('-s') + 1]\n"
        "pathlib.Path(sys.argv[-1]).write_text(f'{size} {len(sys.stdin.buffer.read())}')\n"
    )
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    path = plotting.attention_video(IMAGES[0], given, GRID, tmp_path / "x.mp4")
    size, count = path.read_text().split()
    width, height = map(int, size.split("x"))
    assert int(count) == 3 * width * height * (2 + 3)  # the last frame stays four times as long
    stand_in.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no such codec')\n")
    with pytest.raises(RuntimeError, match="no such codec"):
        plotting.attention_video(IMAGES[0], given, GRID, tmp_path / "x.mp4")


def test_a_video_needs_a_known_suffix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.gif, \.png, \.webp or \.mp4; got 'x.avi'"):
        plotting.attention_video(IMAGES[0], {0: attention(1)}, GRID, tmp_path / "x.avi")
    with pytest.raises(ValueError, match="at least one step"):
        plotting.attention_video(IMAGES[0], {}, GRID, tmp_path / "x.gif")
    with pytest.raises(ValueError, match="seconds must be positive"):
        plotting.attention_video(IMAGES[0], {0: attention(1)}, GRID, tmp_path / "x.gif", seconds=0)
    assert not os.listdir(tmp_path)
