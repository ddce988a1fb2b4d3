"""Class-token attention over training as a moving picture."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from maskdistill.plotting.attention import Scale, Sheet, brightest, check_sheet, chosen_steps
from maskdistill.plotting.pixels import Look, Pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PILLOW = (".gif", ".png", ".webp")
_HELD = 4
"""Times that the last frame stays longer than the others."""


def attention_video(
    images: Tensor,
    attention: Mapping[int, Tensor],
    grid: tuple[int, int],
    path: Path | str,
    masks: Tensor | None = None,
    *,
    seconds: float = 0.5,
    style: Look = "overlay",
    scale: Scale = "own",
) -> Path:
    """Write how class-token attention changes over training, one frame per step.

    >>> attention_video(images, {0: before, 100: later, 400: last}, (4, 4), "attention.gif")
    ... # doctest: +SKIP

    Args:
        images: ``(B, 3, H, W)`` uint8, or ``(3, H, W)``; one row each.
        attention: step to ``(B, heads, N)``; drawn averaged over heads, in the order of the steps.
        grid: patch rows and columns.
        path: of the file. ``.gif``, ``.png`` (animated) and ``.webp`` are written by Pillow;
            ``.mp4`` needs the program ffmpeg.
        masks: ``(B, H, W)`` bool object masks, drawn as outlines, where there are any.
        seconds: of a frame; the last one stays four times as long, and then it starts again.
        style: ``"overlay"`` over the darkened image, or ``"map"``, the colours alone.
        scale: what has the brightest colour: the maximum of each map (``"own"``), of an image's
            maps over all steps (``"image"``), or of all (``"all"``).

    Returns:
        The path.

    Raises:
        ValueError: another suffix, no step, and what `plot_attention_strip` refuses.
        FileNotFoundError: ``.mp4`` without ffmpeg.
        RuntimeError: ffmpeg fails; in its words.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (*_PILLOW, ".mp4"):
        raise ValueError(
            f"a video's name must end in {', '.join(_PILLOW)} or .mp4; got {path.name!r}."
        )
    if suffix == ".mp4" and shutil.which("ffmpeg") is None:
        raise FileNotFoundError(
            f"{path.name} needs the program ffmpeg, which is not on the PATH. Install it, or write "
            "a .gif, a .png or a .webp."
        )
    if seconds <= 0:
        raise ValueError(f"seconds must be positive; got {seconds!r}.")
    if images.ndim == 3:
        images = images[None]
        masks = None if masks is None or masks.ndim == 3 else masks[None]
    frames = _frames(images, attention, grid, masks, style, scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    (_write_mp4 if suffix == ".mp4" else _write_pillow)(frames, path, seconds)
    return path


def _frames(
    images: Tensor,
    attention: Mapping[int, Tensor],
    grid: tuple[int, int],
    masks: Tensor | None,
    look: Look,
    scale: Scale,
) -> list[Pixels]:
    """Return one picture per step, all of one size."""
    steps = chosen_steps(attention, max(2, len(attention)))
    check_sheet(
        images, {f"step {step}": attention[step] for step in steps}, grid, masks, look, scale
    )
    means = [attention[step].float().mean(dim=1) for step in steps]
    sheet = Sheet(len(images), 2, images, 1.1)
    sheet.titles(["image", f"step {steps[-1]:,}"])
    sheet.finish("attention averaged over heads", scale, masks)
    frames = []
    for step, mean in zip(steps, means, strict=True):
        for row in range(len(images)):
            mask = None if masks is None else masks[row]
            top = brightest([other[row] for other in means], means, scale)[0]
            sheet.image(row, 0, row, mask)
            sheet.attention(row, 1, row, mean[row], grid, look, top, mask)
        sheet.axes[0][1].set_title(f"step {step:,}", fontsize=7, pad=3)
        frames.append(_drawn(sheet.figure))
    return frames


def _drawn(figure: Figure) -> Pixels:
    """Return a figure's pixels on white, with even sides, as video codecs want them."""
    canvas: Any = figure.canvas
    canvas.draw()
    rgba = np.asarray(canvas.buffer_rgba()).astype(np.float32)
    opaque = rgba[..., 3:] / 255
    pixels = (rgba[..., :3] * opaque + 255 * (1 - opaque)).round().astype(np.uint8)
    height, width = (side - side % 2 for side in pixels.shape[:2])
    even: Pixels = pixels[:height, :width]
    return even


def _write_pillow(frames: list[Pixels], path: Path, seconds: float) -> None:
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in frames]
    times = [round(1000 * seconds)] * len(frames)
    times[-1] *= _HELD
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=times, loop=0)


def _write_mp4(frames: list[Pixels], path: Path, seconds: float) -> None:
    height, width = frames[0].shape[:2]
    command = [
        "ffmpeg", "-loglevel", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24",
        "-s", f"{width}x{height}", "-r", f"{1 / seconds:g}", "-i", "-",
        "-pix_fmt", "yuv420p", "-r", "25", str(path),
    ]  # fmt: skip
    shown = b"".join(frame.tobytes() for frame in [*frames, *[frames[-1]] * (_HELD - 1)])
    done = subprocess.run(command, input=shown, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"ffmpeg did not write {path}: {said}")
