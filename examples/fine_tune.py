"""Fine-tune any backbone on labelled images, next to the same model from random weights.

    python examples/fine_tune.py runs/first --from-scratch
    python examples/fine_tune.py runs/first --data mini-imagenet --out tuned.safetensors
    python examples/fine_tune.py vit_small_patch16_224.dino --pretrained --data PATH

The backbone may be whatever load_backbone reads. Without --data the images are scenes, and the
defaults suit them; --help --data PATH shows those of real data, which are MAE's (He et al., 2022,
appendix A.1), but for batches of a size that one device takes.

What is reported is the accuracy after the last epoch. The validation images choose nothing: no
epoch, no setting. Try settings on a part of the training images, by --hold-out.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import timm
import torch
import torch.nn.functional as F
import tyro
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from scipy.stats import binomtest
from timm.data import Mixup, create_transform  # type: ignore[attr-defined]
from timm.layers import DropPath  # type: ignore[attr-defined]
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from timm.scheduler import CosineLRScheduler  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from maskdistill.data import Scenes, derive_seed, open_data, resize_for_evaluation
from maskdistill.data.crops import MEAN, STD
from maskdistill.data.loading import cores
from maskdistill.data.writing import write_durably
from maskdistill.evaluation import load_backbone, reinitialised
from maskdistill.models.backbones import build_on_meta
from maskdistill.models.probing import SIZE_ARGUMENTS
from maskdistill.training.distributed import start_processes

Labelled = Dataset[tuple[Image.Image, int]]


@dataclass(frozen=True)
class Settings:
    """What to tune, on what, and how."""

    backbone: Annotated[str, tyro.conf.Positional]
    """A run's folder, a file of weights, or timm's name of a model."""
    data: Path | None = None
    """Images in any form that open_data reads; None draws scenes."""
    scenes: int = 600
    """Number of scenes to train on, where there is no data."""
    hold_out: float = 0.0
    """Share of the training images to report on in the place of the validation images, to try
    settings with."""
    from_scratch: bool = False
    """Train the same model from random weights too, without layer-wise decay."""
    pretrained: bool = False
    """Take timm's weights of the named model, which may download them."""
    image_size: int | None = None
    """Pixels of a side; None is the backbone's own."""
    patch_size: int | None = None
    """Pixels of a patch's side; None is the backbone's own."""
    depth: int | None = None
    """Number of blocks, with timm's name of a model; None is the model's own."""
    pool: Literal["own", "token", "avg"] = "own"
    """What the head sees: as the model has it, the class token, or the mean of the patches."""
    epochs: int = 100
    """Passes over the training images."""
    batch_size: int = 128
    """Images per step."""
    lr: float = 1e-3
    """Peak learning rate for a batch of 256, scaled linearly; a cosine takes it to 1e-6."""
    warmup_epochs: float = 5
    """Epochs of linear warm-up."""
    weight_decay: float = 0.05
    """Of AdamW; not on biases, norms, positions and tokens."""
    layer_decay: float = 0.75
    """Factor of the learning rate from a block to the one before it."""
    drop_path: float = 0.1
    """Greatest rate of stochastic depth."""
    smoothing: float = 0.1
    """Label smoothing."""
    mixup: tuple[float, float] = (0.8, 1.0)
    """Alphas of mixup and of CutMix, each batch by one of them; 0 is none."""
    augment: str = "rand-m9-mstd0.5-inc1"
    """RandAugment in timm's notation; an empty one is none."""
    erase: float = 0.25
    """Probability of random erasing."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Least and greatest share of the image in a crop."""
    seed: int = 0
    """Of the head, the order, the augmentation and drop path."""
    device: str = "auto"
    """auto takes a GPU where there is one."""
    workers: int | None = None
    """Loader processes; None is all cores but one, at most 8. They change no result."""
    out: Path | None = None
    """File for the tuned model, .safetensors in timm's layout."""
    json: Path | None = None
    """Where to write the numbers."""

    def __post_init__(self) -> None:
        if any(self.mixup) and self.batch_size % 2:
            raise ValueError(f"batch_size must be even, for mixup of pairs; got {self.batch_size}.")
        for name in ("epochs", "batch_size", "scenes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be an int >= 1; got {getattr(self, name)}.")
        for name in ("hold_out", "drop_path", "smoothing", "erase"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1); got {getattr(self, name)}.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must lie in (0, 1]; got {self.layer_decay}.")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs must be >= 0 and below epochs, of which there are "
                             f"{self.epochs}; got {self.warmup_epochs}.")  # fmt: skip


SCENES = Settings(
    "vit_tiny_patch16_224", epochs=8, batch_size=32, lr=8e-3, warmup_epochs=1, drop_path=0.0,
    mixup=(0.0, 0.0), augment="", erase=0.0, crop_scale=(0.5, 1.0), workers=0,
)  # fmt: skip
REAL = Settings("vit_tiny_patch16_224")


@dataclass(frozen=True)
class Images:
    """Labelled images; labels are 0, 1, ... of ``classes``, whatever the source calls them."""

    train: Labelled
    val: Labelled
    train_labels: NDArray[np.int64]
    val_labels: NDArray[np.int64]
    classes: int


def images_of(s: Settings, size: int) -> Images:
    """Open the images, and hold a part of the training images out if asked."""
    train: Any
    val: Any
    if s.data is None:
        train = Scenes(s.scenes, size, split="train", seed=0)
        val = Scenes(1000, size, split="val", seed=0)
    else:
        opened = open_data(s.data)
        train, val = opened.train, opened.val
    names, trained = np.unique(train.labels, return_inverse=True)
    if s.hold_out:
        order = np.random.RandomState(derive_seed(s.seed, "hold-out") % 2**32)
        held, kept = np.split(order.permutation(len(trained)), [round(len(trained) * s.hold_out)])
        if not len(held):
            raise ValueError(f"hold_out {s.hold_out} of {len(trained)} images is none of them.")
        parts = Subset(train, kept.tolist()), Subset(train, held.tolist())
        return Images(*parts, trained[kept], trained[held], len(names))
    if not np.isin(val.labels, names).all():
        raise ValueError("the validation images are of classes that the training images lack.")
    return Images(train, val, trained, np.searchsorted(names, val.labels), len(names))


class Augmented(Dataset[tuple[Tensor, int]]):
    """Augments images by random numbers of (seed, epoch, image) alone, whoever loads them."""

    def __init__(self, images: Images, transform: Any, seed: int) -> None:
        self.images, self.transform, self.seed, self.epoch = images, transform, seed, 0

    def __len__(self) -> int:
        return len(self.images.train_labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, _ = self.images.train[index]
        seed_everything(derive_seed(self.seed, "augment", self.epoch, index))
        return self.transform(image), int(self.images.train_labels[index])


def seed_everything(seed: int) -> None:
    """Seed the three generators that timm's augmentation draws from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def batches(data: Augmented, s: Settings) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield step, images ``(B, 3, H, W)`` and labels ``(B,)``, epoch by epoch."""
    step = 0
    workers = min(cores() - 1, 8) if s.workers is None else s.workers
    for data.epoch in range(s.epochs):
        shuffle = torch.Generator().manual_seed(derive_seed(s.seed, "order", data.epoch))
        how: dict[str, Any] = {"drop_last": True, "num_workers": workers, "generator": shuffle}
        for images, labels in DataLoader(data, s.batch_size, shuffle=True, **how):
            yield step, images, labels
            step += 1


def with_head(backbone: nn.Module, classes: int, s: Settings) -> nn.Module:
    """Give a timm model a fresh linear head and stochastic depth, if it takes them."""
    model: Any = backbone
    pool = {} if s.pool == "own" else {"global_pool": s.pool}
    try:
        model.reset_classifier(classes, **pool)
    except (AttributeError, AssertionError, TypeError) as error:
        raise ValueError(f"{type(model).__name__} takes no pool={s.pool!r}: {error}.") from error
    head: Any = model.get_classifier()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{type(model).__name__} has no linear head; it has {head!r}.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(s.seed, "head"))
        nn.init.trunc_normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    blocks = list(getattr(model, "blocks", ()))
    if s.drop_path and not blocks:
        raise ValueError(f"{type(model).__name__} has no list of blocks; set --drop-path 0.")
    for i, block in enumerate(blocks):
        for name in ("drop_path", "drop_path1", "drop_path2"):
            if isinstance(getattr(block, name, None), (DropPath, nn.Identity)):
                rate = s.drop_path * i / max(len(blocks) - 1, 1)
                setattr(block, name, DropPath(rate) if rate else nn.Identity())
    return model.requires_grad_(True)  # type: ignore[no-any-return]


def timm_arguments(model: Any, patch_size: int, size: int) -> dict[str, Any]:
    """Return the arguments with which timm.create_model builds this model, head included."""
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", "")
    head = {"num_classes": model.num_classes}
    sizes = {"img_size": size, "patch_size": patch_size, "global_pool": model.global_pool}
    depth = {"depth": len(getattr(model, "blocks", ()))}
    norms: tuple[dict[str, Any], ...] = ({}, {"fc_norm": False}, {"use_fc_norm": False})
    for own in ({**sizes, **depth}, sizes, {"img_size": size}, {}):
        for more in ({**norm, **how} for norm in norms for how in SIZE_ARGUMENTS):
            arguments = {**head, **own, **more}
            try:
                built = build_on_meta(name, **arguments)
            except (TypeError, ValueError, AssertionError, RuntimeError):
                continue  # a family that does not take them
            if {key: value.shape for key, value in built.state_dict().items()} == shapes:
                return {"model_name": name, **arguments}
    raise ValueError(f"timm.create_model cannot build this {name or 'model'}; leave out --out.")


def fine_tune(
    model: nn.Module, images: Images, s: Settings, size: int, what: str
) -> dict[str, float]:
    """Train all weights, and report on the last epoch; FloatingPointError if the loss is NaN."""
    device = start_processes(s.device).device
    mean, std = statistics(model, s)
    transform = create_transform(
        size, is_training=True, scale=s.crop_scale, auto_augment=s.augment or None, re_prob=s.erase,
        re_mode="pixel", interpolation="bicubic", color_jitter=0.0, mean=mean, std=std,
    )  # fmt: skip
    mix: Any = Mixup
    soft = {"label_smoothing": s.smoothing, "num_classes": images.classes}
    mixer = mix(*s.mixup, **soft) if any(s.mixup) else None
    model.to(device).train()
    per_epoch = len(images.train_labels) // s.batch_size
    total = s.epochs * per_epoch
    optimizer = create_optimizer_v2(
        model, "adamw", s.lr * s.batch_size / 256, s.weight_decay,
        layer_decay=None if s.layer_decay == 1 else s.layer_decay,
    )  # fmt: skip
    warmup = min(round(s.warmup_epochs * per_epoch), total - 1)
    schedule = CosineLRScheduler(  # the cosine begins at the peak, where the warm-up ends
        optimizer, total - warmup, 1e-6, t_in_epochs=False, warmup_lr_init=1e-8, warmup_t=warmup,
        warmup_prefix=True,
    )  # fmt: skip
    started, losses, mean_loss = time.perf_counter(), list[Tensor](), math.nan
    data = Augmented(images, transform, s.seed)
    bar = tqdm(batches(data, s), what, total, unit="step", disable=None)
    for step, x, y in bar:
        seed_everything(derive_seed(s.seed, "step", step))  # of mixup and drop path
        if mixer is not None:
            x, y = mixer(x, y)
        x, y = x.to(device), y.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            scores = model(x)
        smoothing = 0.0 if mixer else s.smoothing  # mixed labels are smooth already
        loss = F.cross_entropy(scores.float(), y, label_smoothing=smoothing)
        schedule.step_update(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if len(losses) == per_epoch:  # the host waits once an epoch
            mean_loss = float(torch.stack(losses).mean())
            losses.clear()
            bar.set_postfix_str(f"loss {mean_loss:.3f}")
            if not math.isfinite(mean_loss):
                raise FloatingPointError(f"the loss is {mean_loss} by step {step}: lower --lr.")
    seconds = time.perf_counter() - started
    share = accuracy(model, images, size, (mean, std), device)
    return {"accuracy": share, "train_loss": mean_loss, "seconds": seconds}


def statistics(model: Any, s: Settings) -> tuple[Any, Any]:
    """Return mean and standard deviation: of timm's weights or a tuned file, else ImageNet's."""
    cfg, path = model.pretrained_cfg if s.pretrained else {}, Path(s.backbone)
    if path.suffix == ".safetensors" and path.is_file():
        with safe_open(path, "pt") as file:
            stated = json.loads((file.metadata() or {}).get("timm.create_model", "{}"))
        cfg = stated.get("pretrained_cfg_overlay", {})
    return tuple(cfg.get("mean", MEAN)), tuple(cfg.get("std", STD))


@torch.no_grad()
def accuracy(
    model: nn.Module, images: Images, size: int, colours: tuple[Any, Any], device: torch.device
) -> float:
    """Return the share of images to report on whose class has the highest score."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in colours)
    model.eval()
    right, labels = 0, torch.from_numpy(images.val_labels)
    for part in tqdm(torch.arange(len(labels)).split(256), "accuracy", disable=None, leave=False):
        pixels = torch.stack([resize_for_evaluation(images.val[int(i)][0], size) for i in part])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            scores = model((pixels.to(device).float() / 255 - mean) / std)
        right += int((scores.argmax(dim=1).cpu() == labels[part]).sum())
    return right / len(labels)


def main(s: Settings) -> dict[str, Any]:
    """Tune the backbone, and the same model from random weights if asked."""
    for path in (s.out, s.json):
        if path is not None and path.exists():
            raise FileExistsError(f"{path} is there already; choose another file.")
    vit = load_backbone(
        s.backbone, image_size=s.image_size, patch_size=s.patch_size, depth=s.depth,
        pretrained=s.pretrained, seed=s.seed,
    )  # fmt: skip
    stem: Any = getattr(vit.backbone, "patch_embed", None)
    size = s.image_size or int((getattr(stem, "img_size", None) or (224,))[0])
    images = images_of(s, size)
    trained, count = len(images.train_labels), len(images.val_labels)
    if trained < s.batch_size:
        raise ValueError(f"{trained} images do not fill a batch; lower --batch-size.")
    fresh = reinitialised(vit, seed=s.seed) if s.from_scratch else None
    model = with_head(vit.backbone, images.classes, s)
    arguments = timm_arguments(model, vit.patch_size[0], size) if s.out is not None else {}
    colours = zip(("mean", "std"), statistics(model, s), strict=True)
    arguments["pretrained_cfg_overlay"] = dict(colours)
    print(f"{s.backbone}: {size} px; {trained} training images of {images.classes} classes")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(s).items()}
    result = {"training_images": trained, "images": count, "classes": images.classes,
              "timm": timm.__version__, "settings": settings}  # fmt: skip
    result["fine_tuned"] = fine_tune(model, images, s, size, "fine-tuning")
    if s.out is not None:
        state = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
        s.out.parent.mkdir(parents=True, exist_ok=True)
        write_durably(save(state, metadata={"timm.create_model": json.dumps(arguments)}), s.out)
    keep(result, "fine_tuned", s)  # at once: what comes next may fail
    if fresh is not None:
        scratch = dataclasses.replace(s, layer_decay=1.0)  # random layers have all to learn
        model = with_head(fresh.backbone, images.classes, scratch)
        result["from_scratch"] = fine_tune(model, images, scratch, size, "from scratch")
        keep(result, "from_scratch", s)
    return result


def keep(result: dict[str, Any], name: str, s: Settings) -> None:
    """Print what was found of a model, with Wilson's interval, and write all that is known."""
    found, count = result[name], result["images"]
    right = binomtest(round(found["accuracy"] * count), count)
    found["interval"] = list(right.proportion_ci(0.95, method="wilson"))
    low, high = (f"{100 * bound:.1f}" for bound in found["interval"])
    print(f"{name.replace('_', ' '):13s}{found['accuracy']:6.1%} ({low} to {high}) of {count} "
          f"{'training images held out' if s.hold_out else 'validation images'}; training loss "
          f"{found['train_loss']:.3f}; {found['seconds']:.0f} s", flush=True)  # fmt: skip
    if s.json is not None:
        s.json.parent.mkdir(parents=True, exist_ok=True)
        write_durably(json.dumps(result, indent=2) + "\n", s.json)


if __name__ == "__main__":
    plain = REAL if any(a.split("=")[0] == "--data" for a in sys.argv[1:]) else SCENES
    default = dataclasses.replace(plain, backbone=tyro.MISSING)
    try:
        main(tyro.cli(Settings, default=default, description=__doc__))
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
