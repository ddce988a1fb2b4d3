"""The generators that ``masks.py`` times ours against, one entry each in ``PEERS``.

Each is loaded unchanged from its own file in a clone or a package, with stubs for what the file
imports for other purposes than masks, and called as its own training code calls it. A draw ends in
what the generator naturally gives for the whole batch (a stack of its masks, its mask tensor, its
lists of indices), on the device where ours is. Ours is set to the same distribution and the same
number of hidden patches.
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

import numpy as np
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


def draws(masker: md.Masker, request: Request) -> Draw:
    """Return a function that draws a batch with one of our maskers."""
    batch, grid, device = request.batch, request.grid, request.device
    if isinstance(
        masker, md.masking.MultiBlockMasker
    ):  # it gives the target blocks as well, as I-JEPA's
        return lambda: masker.draw_blocks(batch, grid, device=device)
    signals = {name: request.signal(name) for name in masker.needs}

    def draw() -> Tensor:
        now: dict[str, Any] = {name: next(signal) for name, signal in signals.items()}
        return masker(batch, grid, device=device, **now)

    return draw


# How each is called.


def _stacked(draw: Callable[..., Any], request: Request, *arguments: object) -> Draw:
    """Draw image by image, stack, and bring to the device in one copy."""

    def batch() -> Tensor:
        masks = np.stack([draw(*arguments) for _ in range(request.batch)])
        return torch.from_numpy(masks).to(request.device)

    return batch


def _dinov2(module: Any, request: Request) -> Draw:
    generator = module.MaskingGenerator(request.grid, max_num_patches=0.5 * request.patches)
    return _stacked(generator, request, request.hidden)


def _ibot(shape: str) -> Callable[[Any, Request], Draw]:
    def make(module: Any, request: Request) -> Draw:
        height, width = (16 * side for side in request.grid)
        folder = module.ImageFolderMask(
            torch.zeros(3, height, width),
            patch_size=16,
            pred_ratio=request.share,
            pred_ratio_var=0,
            pred_aspect_ratio=(0.3, 1 / 0.3),
            pred_shape=shape,
        )
        return lambda: torch.from_numpy(
            np.stack([folder[index][-1][0] for index in range(request.batch)])
        ).to(request.device)

    return make


def _beit(module: Any, request: Request) -> Draw:
    if not hasattr(np, "int"):  # NumPy took the name away after the file was written
        module.np = ModuleType("numpy")
        vars(module.np).update(vars(np), int=int)
    return _stacked(module.MaskingGenerator(request.grid, request.hidden), request)


def _capi(name: str, **settings: bool) -> Callable[[Any, Request], Draw]:
    return lambda module, request: _stacked(
        getattr(module, name)(request.grid, **settings), request, request.hidden
    )


def _franca(module: Any, request: Request) -> Draw:
    generator = module.MaskingGenerator(request.grid, min_aspect=0.5)
    return _stacked(generator, request, request.hidden)


def _mmpretrain(name: str, arguments: Callable[[Request], tuple[Any, ...]]) -> Any:
    def make(module: Any, request: Request) -> Draw:
        transform = getattr(module, name)(*arguments(request)).transform
        return _stacked(lambda: transform({})["mask"], request)

    return make


def _simmim(request: Request) -> tuple[int, int, int, float]:
    if request.grid[0] != request.grid[1]:
        raise AbsentError("draws on square grids only")
    return 16 * request.grid[0], 32, 16, request.ratio


def _ijepa(module: Any, request: Request) -> Draw:
    height, width = (16 * side for side in request.grid)
    collator = module.MaskCollator((height, width), 16, (0.85, 1.0), (0.15, 0.2), (0.75, 1.5),
                                   nenc=1, npred=4, min_keep=10)  # fmt: skip
    images = [0] * request.batch

    def draw() -> list[Tensor]:
        _, context, targets = collator(images)
        return [indices.to(request.device) for indices in (*context, *targets)]

    return draw


def _data2vec2(module: Any, request: Request) -> Draw:
    if request.grid[0] != request.grid[1]:
        raise AbsentError("draws on square grids only")
    shape = (request.batch, request.patches)
    return lambda: module.compute_block_mask_2d(
        shape, request.share, 3, mask_prob_adjust=0.07, inverse_mask=True
    ).to(request.device)


def _attmask(mode: str) -> Callable[[Any, Request], Draw]:
    def make(module: Any, request: Request) -> Draw:
        attention = request.signal("attention")
        return lambda: module.AttMask(next(attention), 1.0, mode, request.share, 0.1 * 0.3, 0.1)

    return make


def _milan(module: Any, request: Request) -> Draw:
    tokens, importance = request.tokens(), request.signal("attention")
    method = module.MaskedAutoencoderViT.attention_masking
    return lambda: method(None, tokens, request.share, next(importance))


def _mae(module: Any, request: Request) -> Draw:
    tokens = request.tokens()
    return lambda: module.MaskedAutoencoderViT.random_masking(None, tokens, request.share)


def _um_mae(module: Any, request: Request) -> Draw:
    return _stacked(module.RandomMaskingGenerator(request.grid, 0.75, regular=True), request)


def _spt(**settings: float) -> Callable[[Any, Request], Draw]:
    def make(module: Any, request: Request) -> Draw:
        tokens = request.tokens()
        masking = module.PatchMasking(mask_ratio=request.share, **settings)
        return lambda: masking(tokens, *request.grid)

    return make


def _lightly_token(module: Any, request: Request) -> Draw:
    size = (request.batch, 1 + request.patches)
    return lambda: module.random_token_mask(size, request.share, device=request.device)


def _lightly_block(module: Any, request: Request) -> Draw:
    size = (request.batch, *request.grid)
    ratio = request.share
    return lambda: module.random_block_mask(size, 1.0, ratio, ratio).to(request.device)


def _lightly_inverse(module: Any, request: Request) -> Draw:
    size = (request.batch, 1 + request.patches)
    return lambda: module.random_inverse_block_mask(size, request.share, device=request.device)


# The table. Goals: 10 times over DINOv2, DINOv3 and iBOT, 3 over every other generator of
# rectangles, 2 over MAE's two sorts and over AttMask.

_HUB = "https://github.com/"
_DINOV2 = ("dinov2", "dinov2/data/masking.py", _HUB + "facebookresearch/dinov2")
_DINOV3 = ("dinov3", "dinov3/data/masking.py", _HUB + "facebookresearch/dinov3")
_IBOT = ("ibot", "loader.py", _HUB + "bytedance/ibot")
_BEIT = ("beit", "beit/masking_generator.py", _HUB + "microsoft/unilm")
_CAPI = ("capi", "data.py", _HUB + "facebookresearch/capi")
_FRANCA = ("franca", "franca/data/masking.py", _HUB + "valeoai/Franca")
_MMPRETRAIN = (
    "mmpretrain", "mmpretrain/datasets/transforms/processing.py", _HUB + "open-mmlab/mmpretrain",
)  # fmt: skip
_LIGHTLY_TRAIN = (
    "lightly-train", "src/lightly_train/_methods/dinov2/utils.py",
    _HUB + "lightly-ai/lightly-train",
)  # fmt: skip
_LIGHTLY = ("lightly", "lightly/models/utils.py", _HUB + "lightly-ai/lightly")
_SPT = (
    "stable-pretraining", "stable_pretraining/backbone/patch_masking.py",
    _HUB + "rbalestr-lab/stable-pretraining",
)  # fmt: skip
_IJEPA = ("ijepa", "src/masks/multiblock.py", _HUB + "facebookresearch/ijepa")
_DATA2VEC2 = ("data2vec2", "fairseq/data/data_utils.py", _HUB + "facebookresearch/fairseq")
_MAE = ("mae", "models_mae.py", _HUB + "facebookresearch/mae")
_SIMMIM = ("simmim", "data/data_simmim.py", _HUB + "microsoft/SimMIM")
_UM_MAE = ("um_mae", "mask_transform.py", _HUB + "implus/UM-MAE")
_ATTMASK = ("attmask", "attmask.py", _HUB + "gkakogeorgiou/attmask")
_MILAN = ("milan", "models_milan.py", _HUB + "zejiangh/MILAN")

_VISION = ("torchvision",)
_CAPI_STUBS = ("torchvision", "datasets", "jaxtyping", "scipy", "filelock", "PIL")
_MM_STUBS = ("torchvision", "mmcv", "mmengine", "mmpretrain", "PIL", "albumentations")
_SPT_STUBS = ("transformers", "stable_pretraining")


def _capped(r: Request) -> md.Masker:
    return md.BlockMasker(r.share, max_patches=r.patches // 2, exact=False)


def _short(r: Request) -> md.Masker:
    return md.BlockMasker(r.share, exact=False)


def _inverse(r: Request) -> md.Masker:
    return md.masking.SingleBlockMasker(r.share, inverse=True).rolled()


def _random(r: Request) -> md.Masker:
    return md.RandomMasker(r.share)


def _units(r: Request) -> md.Masker:
    return md.RandomMasker(r.share).in_units(2)


PEERS: tuple[Peer, ...] = (
    Peer("DINOv2", *_DINOV2, _capped, _dinov2, 10),
    Peer("lightly-train", *_LIGHTLY_TRAIN, _capped, _dinov2, 3, ("lightly_train",)),
    Peer("DINOv3", *_DINOV3,
         lambda r: md.BlockMasker(r.share, max_patches=r.patches // 2), _dinov2, 10),
    Peer("iBOT block", *_IBOT,
         lambda r: md.BlockMasker(r.share, min_patches=None, exact=False), _ibot("block"), 10,
         _VISION),
    Peer("BEiT", *_BEIT, _short, _beit, 3),
    Peer("lightly random_block_mask", *_LIGHTLY, _short, _lightly_block, 3,
         ("torchvision", "lightly")),
    Peer("mmpretrain BEiTMaskGenerator", *_MMPRETRAIN, lambda r: md.BlockMasker(r.share),
         _mmpretrain("BEiTMaskGenerator", lambda r: (r.grid, r.hidden)), 3, _MM_STUBS),
    Peer("CAPI block", *_CAPI, lambda r: md.masking.SingleBlockMasker(r.share),
         _capi("BlockMasking", roll=False), 3, _CAPI_STUBS),
    Peer("CAPI block, rolled", *_CAPI, lambda r: md.masking.SingleBlockMasker(r.share).rolled(),
         _capi("BlockMasking"), 3, _CAPI_STUBS),
    Peer("CAPI inverse block", *_CAPI, _inverse, _capi("InverseBlockMasking"), 3, _CAPI_STUBS),
    Peer("Franca inverse block", *_FRANCA, _inverse, _franca, 3),
    Peer("lightly random_inverse_block_mask", *_LIGHTLY, _inverse, _lightly_inverse, 3,
         ("torchvision", "lightly")),
    Peer("stable-pretraining crop", *_SPT,
         lambda r: md.masking.SingleBlockMasker(r.share, aspect=(0.75, 1.33), inverse=True),
         _spt(crop_ratio=1.0), 3, _SPT_STUBS, loop=False),
    Peer("stable-pretraining blocks of 4", *_SPT,
         lambda r: md.masking.SquaresMasker(r.share, size=4),
         _spt(block_size=4), 3, _SPT_STUBS, loop=False),
    Peer("data2vec 2.0", *_DATA2VEC2, lambda r: md.masking.SquaresMasker(r.share, inverse=True),
         _data2vec2, 3, ("fairseq",)),
    Peer("I-JEPA, its own ratios", *_IJEPA, lambda r: md.masking.MultiBlockMasker(), _ijepa, 3),
    Peer("MAE", *_MAE, _random, _mae, 2, ("timm", "util"), loop=False),
    Peer("stable-pretraining random", *_SPT, _random, _spt(), None, _SPT_STUBS, loop=False),
    Peer("lightly random_token_mask", *_LIGHTLY, _random, _lightly_token, None,
         ("torchvision", "lightly"), loop=False),
    Peer("CAPI uniform", *_CAPI, _random, _capi("UniformMasking"), None, _CAPI_STUBS),
    Peer("iBOT rand", *_IBOT, _random, _ibot("rand"), None, _VISION),
    Peer("SimMIM", *_SIMMIM, _units, lambda module, r: _stacked(
        module.MaskGenerator(*_simmim(r)), r), None, ("torchvision", "timm")),
    Peer("mmpretrain SimMIMMaskGenerator", *_MMPRETRAIN, _units,
         _mmpretrain("SimMIMMaskGenerator", _simmim), None, _MM_STUBS),
    Peer("UM-MAE, ratio 0.75", *_UM_MAE,
         lambda r: md.masking.GridMasker(2, random=True), _um_mae, None,
         _VISION),
    Peer("AttMask high", *_ATTMASK, lambda r: md.AttentionGuidedMasker(r.share),
         _attmask("attmask_high"), 2, loop=False),
    Peer("AttMask low", *_ATTMASK, lambda r: md.AttentionGuidedMasker(r.share, hide="least"),
         _attmask("attmask_low"), 2, loop=False),
    Peer("AttMask hint", *_ATTMASK, lambda r: md.masking.AttentionHintMasker(r.share, exact=False),
         _attmask("attmask_hint"), 2, loop=False),
    Peer("MILAN", *_MILAN,
         lambda r: ~md.AttentionGuidedMasker(round(1 - r.share, 8), temperature=1.0), _milan, None,
         ("timm", "util"), loop=False),
)  # fmt: skip
"""Every peer, in the order of the table."""

OURS: tuple[Callable[[Request], md.Masker], ...] = (
    _random,
    lambda r: md.masking.BernoulliMasker(r.share),
    _units,
    lambda r: md.masking.GridMasker(2, random=True),
    lambda r: md.masking.CheckerboardMasker(),
    lambda r: md.BlockMasker(r.share),
    lambda r: md.masking.SingleBlockMasker(r.share),
    _inverse,
    lambda r: md.masking.SquaresMasker(r.share, inverse=True),
    lambda r: md.masking.MultiBlockMasker(),
    lambda r: md.masking.ColorNoiseMasker(r.share),
    lambda r: md.AttentionGuidedMasker(r.share),
    lambda r: md.AttentionGuidedMasker(r.share, temperature=1.0),
    lambda r: md.masking.AttentionHintMasker(r.share),
    lambda r: md.SignalMasker(r.share, "loss"),
    lambda r: md.masking.PartMasker(r.share),
    lambda r: md.masking.ClusterMasker(r.share),
)
"""One of each of ours, for a table that needs no peer; its first is what the others are held to."""
