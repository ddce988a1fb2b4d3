"""What a peer of benchmark_masks.py is, and how its file is loaded out of a clone or a package.

A file is loaded unchanged; what it imports for other purposes than masks is replaced by stubs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import maskdistill as md

INSTALLABLE = ("lightly", "lightly_train", "mmpretrain", "stable_pretraining")
"""Packages that can be installed, and are found where they are."""


def load(path: Path, stubs: tuple[str, ...]) -> ModuleType:
    """Load one Python file as a module, with stubs for packages that it need not have.

    Args:
        path: the file.
        stubs: top-level packages to be replaced while it loads, whether installed or not.
    """
    name = "peer_" + "_".join(path.with_suffix("").parts[-3:]).replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    with _stubbed(stubs):
        spec.loader.exec_module(module)
    return module


class OneImage:
    """An image folder whose only item is one blank image per index."""

    def __init__(self, image: Tensor) -> None:
        self.image = image

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        return [self.image], 0


Draw = Callable[[], object]
"""Draws one batch of masks."""


class AbsentError(Exception):
    """A peer cannot run here; the message says why, and how to get it."""


@dataclass(frozen=True)
class Request:
    """What is to be drawn: a batch of masks over a grid, and the signals that guide some of them.

    Attributes:
        batch: number of images, B.
        grid: patch rows and columns, (H, W); N = H * W.
        ratio: share of patches to hide; every generator gets the whole number below ratio * N.
        device: where the masks are wanted.
    """

    batch: int
    grid: tuple[int, int]
    ratio: float
    device: str

    @property
    def patches(self) -> int:
        """Number of patches, N."""
        return self.grid[0] * self.grid[1]

    @property
    def hidden(self) -> int:
        """Number of hidden patches."""
        return int(self.ratio * self.patches)

    @property
    def share(self) -> float:
        """A short ratio, the given one or near it, that is ``hidden`` however it is rounded."""
        near = (round((self.hidden + 0.25) / self.patches, digits) for digits in range(1, 9))
        for ratio in (self.ratio, *near):
            if self.hidden <= ratio * self.patches < self.hidden + 0.5:
                return ratio
        return self.hidden / self.patches

    def tokens(self) -> Tensor:
        """Make ``(B, N, 1)`` tokens, for those that drop tokens while they draw."""
        return torch.zeros(self.batch, self.patches, 1, device=self.device)

    def signal(self, name: str) -> Iterator[Tensor]:
        """Make up a signal that a masker needs, for one draw after the other.

        Draws that all had the same small signal would train the processor's branch prediction.
        """
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.patches)
        if name == "images":  # 4 pixels a side for each patch, so that the largest batches fit
            height, width = (4 * side for side in self.grid)
            made = [torch.rand(self.batch, 3, height, width, generator=generator)]
        elif name == "parts":
            made = [torch.randint(0, 7, shape, generator=generator)]
        else:
            different = max(1, min(16, 4096 // self.batch))
            made = [torch.rand(shape, generator=generator) for _ in range(different)]
        return itertools.cycle([signal.to(self.device) for signal in made])


@dataclass(frozen=True)
class Peer:
    """Somebody else's generator, and the one of ours that draws the same.

    Attributes:
        name: what the table calls it.
        folder: its clone's folder inside ``--peers``.
        file: its file, from the clone's root.
        origin: where the clone is to be had.
        ours: our masker for the same request.
        make: from the loaded file, a function that draws a batch.
        goal: how many times faster ours is meant to be on one CPU thread, if there is a goal.
        stubs: packages that its file imports for other things than the generator.
        loop: whether it draws on the CPU, one image at a time, whatever the device.
    """

    name: str
    folder: str
    file: str
    origin: str
    ours: Callable[[Request], md.Masker]
    make: Callable[[Any, Request], Draw]
    goal: float | None = None
    stubs: tuple[str, ...] = ()
    loop: bool = True

    def load(self, peers: Path | None, request: Request) -> Draw:
        """Load its file, draw once, and return the function that draws.

        Raises:
            AbsentError: it is not here, or cannot do what is requested.
        """
        path = self._path(peers)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # some of them greet
                draw = self.make(load(path, self.stubs), request)
                draw()
        except AbsentError:
            raise
        except Exception as error:  # anything may be wrong in a file that is not ours
            said = f"{type(error).__name__}: {error}".strip().rstrip(":")
            raise AbsentError(f"{self.file} refused: {said}") from error
        return draw

    def _path(self, peers: Path | None) -> Path:
        path = (peers or Path("PEERS")) / self.folder / self.file
        if peers is not None and path.is_file():
            return path
        fetch = f"git clone --depth 1 {self.origin} {path.parents[self.file.count('/')]}"
        inside = self.file.removeprefix("src/")
        package = inside.partition("/")[0]
        if package in INSTALLABLE:
            found = importlib.util.find_spec(package)
            installed = Path(found.origin).parents[1] / inside if found and found.origin else None
            if installed is not None and installed.is_file():
                return installed
            fetch = f"pip install {self.folder}"
        raise AbsentError(f"not here: {fetch}")


class _AnyType(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything


class _Anything(metaclass=_AnyType):
    """Stands for whatever a file imports besides its generator: a base class, a decorator."""

    def __init__(self, *args: object, **settings: object) -> None:
        pass

    def __class_getitem__(cls, item: object) -> type[_Anything]:
        return cls

    def __call__(self, *args: Any) -> Any:
        return args[0] if args else self


class _Stub(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return OneImage if name == "ImageFolder" else _Anything


class _Stubs:
    """Finds a stub for every module of some packages."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        ours = name.partition(".")[0] in self.packages
        return ModuleSpec(name, self, is_package=True) if ours else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextlib.contextmanager
def _stubbed(packages: tuple[str, ...]) -> Iterator[None]:
    """Put stubs in the place of packages, whether they are installed or not, for a while."""

    def loaded() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in packages]

    real = {name: sys.modules.pop(name) for name in loaded()}
    stubs: Any = _Stubs(packages)
    sys.meta_path.insert(0, stubs)
    try:
        yield
    finally:
        sys.meta_path.remove(stubs)
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(real)
