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
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

import numpy as np
import torch
import torchvision
import tyro
from PIL import Image, __version__
from torch.utils.data import Dataset
from tqdm import tqdm

from maskdistill.data import MultiCrop, Scenes, normalize
from maskdistill.data.crops import image_keys
from maskdistill.data.loading import CropDataset, ResidentImages

CLONE = "git clone --depth 1 https://github.com/facebookresearch/dino DINO"


@dataclass(frozen=True)
class Settings:
    """What to time, and how."""

    dino: Path | None = None
    """A clone of facebookresearch/dino; without it, ours alone is timed."""
    data: Path | None = None
    """A folder with JPEGs for the small case, at any depth; None draws scenes."""
    case: Literal["small", "large", "both"] = "both"
    """84-pixel images to 2 + 6 crops of 64 and 24 pixels; 500 x 375 to 2 + 8 of 224 and 96."""
    images: int = 64
    """Images per round."""
    rounds: int = 21
    """How often each is timed, by turns."""
    threads: int = 1
    """CPU threads."""
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


CASES = {
    "small": Case("84 x 84 to 2 x 64 + 6 x 24", (84, 84), MultiCrop(64, 24, 6)),
    "large": Case("500 x 375 to 2 x 224 + 8 x 96", (500, 375), MultiCrop(224, 96, 8)),
}


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
    if not (clone / "main_dino.py").exists():
        raise SystemExit(f"error: there is no main_dino.py in {clone}; get it by\n  {CLONE}")
    sys.path.insert(0, str(clone))  # it imports its neighbours by name
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


def by_turns(calls: dict[str, Callable[[], object]], rounds: int, what: str) -> dict[str, Any]:
    """Return the seconds of every round of each, timed by turns, in CPU time where there is one."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for turn in tqdm(range(rounds), desc=what, leave=False):
        names = list(calls)
        for name in names if turn % 2 else reversed(names):
            waits = "cuda" in name
            clock = time.perf_counter if waits else time.process_time
            begin = clock()
            calls[name]()
            if waits:
                torch.cuda.synchronize()
            seconds[name].append(clock() - begin)
    return seconds


def run(case: Case, settings: Settings) -> None:
    """Time one case and print its lines of the table."""
    count, small = settings.images, case is CASES["small"]
    source = Encoded(jpegs(case, count, settings.data if small else None))
    crops = CropDataset(source, case.transform, seed=0)
    items = [(0, index) for index in range(count)]
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: [normalize(view) for view in crops.batch(items).images],
        "decoding alone": lambda: [source[index] for index in range(count)],
    }
    if settings.dino is not None:
        theirs = original(settings.dino, case.transform)
        calls["facebookresearch/dino"] = lambda: [
            theirs(source[index][0]) for index in range(count)
        ]
    if settings.resident:
        images = ResidentImages(source, settings.device, progress_bar=False)
        rows = torch.arange(count)
        keys = image_keys(0, torch.zeros_like(rows), rows)
        calls[f"ours, resident on {settings.device}"] = lambda: [
            normalize(view) for view in images.crops(case.transform, rows, keys).images
        ]
    seconds = by_turns(calls, settings.rounds, case.name)
    reference = median(seconds.get("facebookresearch/dino", [float("nan")]))
    for name, times in seconds.items():
        low, _, high = quantiles([1000 * t / count for t in times], n=4)
        faster = "" if settings.dino is None else f"{reference / median(times):.2f}"
        print(
            f"| {case.name} | {name} | {count / median(times):.0f} | {low:.2f} to {high:.2f} "
            f"| {faster} |"
        )


def main(settings: Settings) -> None:
    """Time every case."""
    torch.set_num_threads(settings.threads)
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {__version__}")
    print(f"{settings}\n")
    if settings.dino is None:
        print(f"Ours alone is timed. For the original, pass --dino DINO after\n  {CLONE}\n")
    print("| images to crops | what | images/s | ms per image, quartiles | times the original's |")
    print("|---|---|--:|--:|--:|")
    for name, case in CASES.items():
        if settings.case in (name, "both"):
            run(case, settings)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
