"""How fast multi-crop views are made, against facebookresearch/dino's own augmentation.

    git clone --depth 1 https://github.com/facebookresearch/dino DINO
    python examples/benchmarks/views.py --dino DINO
    python examples/benchmarks/views.py --dino DINO --data mini-imagenet
    python examples/benchmarks/views.py --resident --device cuda

One thread, no workers, decoding included; both end with normalised floats. They run by turns in one
process, and what is reported is the ratio of medians. Without --data the images are scenes, drawn
at the size and saved as JPEG at the quality that photographs of the two data sets have.
"""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
import torchvision
import tyro
from PIL import Image, __version__
from timing import by_turns, faster, machine, main_dino_of, seconds, table
from torch.utils.data import Dataset

from maskdistill.data import MultiCrop, Scenes, normalize
from maskdistill.data.crops import image_keys
from maskdistill.data.loading import CropDataset, ResidentImages


@dataclass(frozen=True)
class Settings:
    """What to time, and how."""

    dino: Path | None = None
    """A clone of facebookresearch/dino; without it, ours alone is timed."""
    data: Path | None = None
    """A folder with JPEGs for the small case, at any depth; None draws scenes."""
    images: int = 64
    """Images per round."""
    rounds: int = 21
    """How often each is timed, by turns."""
    resident: bool = False
    """Also time views cut out of images that lie decoded in the device's memory."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the resident images lie."""


@dataclass(frozen=True)
class Case:
    """One way of pretraining: images as they lie on the disk, and their crops."""

    name: str
    size: tuple[int, int]
    transform: MultiCrop


SMALL = Case("84 x 84 to 2 x 64 + 6 x 24", (84, 84), MultiCrop(64, 24, 6))
LARGE = Case("500 x 375 to 2 x 224 + 8 x 96", (500, 375), MultiCrop(224, 96, 8))


class Encoded(Dataset[tuple[Image.Image, int]]):
    """JPEGs in memory, decoded when asked for."""

    def __init__(self, files: list[bytes]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(io.BytesIO(self.files[index])).convert("RGB"), 0


def jpegs(case: Case, count: int, folder: Path | None) -> list[bytes]:
    """Read JPEGs from a folder, or draw scenes with a photograph's noise and save them."""
    if folder is not None:
        paths = sorted(
            path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")
        )
        if not paths:
            raise SystemExit(f"error: {folder} holds no .jpg or .jpeg files; pass another --data.")
        return [path.read_bytes() for path in islice(cycle(paths), count)]
    noise, files = np.random.default_rng(0), []
    width, height = case.size
    for image in Scenes(min(count, 16), max(case.size)).images:
        pixels = image[:height, :width] + noise.normal(0, 8, (height, width, 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
        files.append(buffer.getvalue())
    return list(islice(cycle(files), count))


def original(clone: Path, transform: MultiCrop) -> Callable[[Image.Image], Any]:
    """Return DataAugmentationDINO of a clone, with the crop sizes of `transform`."""
    sys.path.insert(0, str(main_dino_of(clone).parent))  # it imports its neighbours by name
    try:
        module = importlib.import_module("main_dino")
    finally:
        sys.path.remove(str(clone))
    made = module.DataAugmentationDINO(
        transform.global_scale, transform.local_scale, transform.local_crops
    )
    for pipeline, size in (
        (made.global_transfo1, transform.global_size),
        (made.global_transfo2, transform.global_size),
        (made.local_transfo, transform.local_size),
    ):
        pipeline.transforms[0].size = (size, size)
    return made  # type: ignore[no-any-return]


def rows(case: Case, s: Settings) -> list[tuple[str, ...]]:
    """Time one case and return its lines of the table."""
    source = Encoded(jpegs(case, s.images, s.data if case is SMALL else None))
    crops = CropDataset(source, case.transform, seed=0)
    items = [(0, index) for index in range(s.images)]
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: [normalize(view) for view in crops.batch(items).images],
        "decoding alone": lambda: [source[index] for index in range(s.images)],
    }
    if s.dino is not None:
        theirs = original(s.dino, case.transform)
        calls["facebookresearch/dino"] = lambda: [
            theirs(source[index][0]) for index in range(s.images)
        ]
    timed = {name: partial(seconds, call) for name, call in calls.items()}
    if s.resident:
        images = ResidentImages(source, s.device, progress_bar=False)
        indices = torch.arange(s.images)
        keys = image_keys(0, torch.zeros_like(indices), indices)
        timed[f"ours, resident on {s.device}"] = partial(
            seconds,
            lambda: [normalize(v) for v in images.crops(case.transform, indices, keys).images],
            s.device,
        )
    taken = by_turns(timed, s.rounds, case.name)
    base = taken.get("facebookresearch/dino")
    return [
        (case.name, name, f"{s.images / median(times):.0f}", *(faster(base, times) if base else ""))
        for name, times in taken.items()
    ]


def main(s: Settings) -> None:
    """Time both cases."""
    torch.set_num_threads(1)
    print(machine(s.device))
    print(f"torchvision {torchvision.__version__}, Pillow {__version__}\n{s}\n")
    head = ["images to crops", "what", "images/s"]
    if s.dino is not None:
        head += ["times the original's", "quartiles"]
    print(*table(head, [*rows(SMALL, s), *rows(LARGE, s)]), sep="\n")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
