"""ADIOS: a mask network trained against the encoder, on built-in scenes or on images of yours.

    python examples/adios_scenes.py                             # ADIOS (Shi et al., 2022)
    python examples/adios_scenes.py --curriculum easy-to-hard   # CL-MAE's curriculum on it
    python examples/adios_scenes.py --mask random               # baseline: as many random masks
    python examples/adios_scenes.py --mask none                 # baseline: SimCLR without masks

Afterwards the network is a masker like any other: `md.masking.LearnedMasker(ratio, network)`.

On 2 CPU cores: about 2 minutes. Jaccard of the learned mask and the object 0.459, of rectangles of
the same area 0.285; 20-NN accuracy 58.3 %, with random masks 62.6 %, without masks 56.3 % (means of
seeds 0, 1 and 2). docs/learned.md explains it, and says what did not work.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from adios_masks import MaskNetwork, compare_with_objects, draw_masks
from einops import rearrange
from torch import Tensor, nn

import maskdistill as md
from maskdistill.data import (
    BatchStream,
    CropDataset,
    DamagedDataError,
    MultiCrop,
    Scenes,
    crop_loader,
    derive_seed,
    normalize,
    open_data,
)
from maskdistill.evaluation.judge import JobImages, Judge
from maskdistill.training import NonFiniteLossError

CURRICULA = {
    "adversary": md.Linear(-1.0, -1.0),
    "partner": md.Linear(1.0, 1.0),
    "easy-to-hard": md.Linear(1.0, -1.0),
}
"""What the encoder's loss counts in what the mask network minimises: -1 is ADIOS's adversary, +1 a
partner; from one to the other is CL-MAE's curriculum (Madan et al., 2024)."""


@dataclass(frozen=True)
class Settings:
    """What to train, how long, and where to write."""

    mask: Literal["learned", "random", "none"] = "learned"
    """What hides the second view: the mask network, as many random masks, or nothing."""
    curriculum: Literal["adversary", "partner", "easy-to-hard"] = "adversary"
    """What the mask network works towards: ADIOS's adversary, its opposite, or CL-MAE's change."""
    masks: int = 4
    """Masks per image, K; the network shares out each pixel among them."""
    ratio: float = 0.25
    """Share of patches that random masks hide, and the learned masker after training."""
    alpha: float = 1.0
    """Weight of the penalty on masks that hide nearly nothing or nearly all."""
    data: Path | None = None
    """Folder or file of images, in any form that open_data reads; None is the built-in scenes."""
    allow_pickle: bool = False
    """Read pickle caches, with an unpickler that runs no code."""
    scenes: int = 3000
    """Number of built-in scenes to train on."""
    image_size: int = 32
    """Pixels of a side."""
    patch_size: int = 8
    """Pixels of a side of a patch."""
    width: int = 64
    """Width of the ViT, in heads of 32."""
    depth: int = 3
    """Blocks of the ViT."""
    epochs: int = 4
    """Passes over the data."""
    batch_size: int = 32
    """Images per step."""
    lr: float = 1e-3
    """Peak learning rate of the encoder (AdamW)."""
    mask_lr: float = 4e-3
    """Learning rate of the mask network (AdamW), which does not fall: a curriculum ends hard."""
    temperature: float = 0.2
    """Of the contrastive loss."""
    seed: int = 0
    """Of weights, data order, crops and random masks."""
    out: Path | None = None
    """Folder for summary.json and masks.png; None is a folder in runs/."""

    def __post_init__(self) -> None:
        for name in ("scenes", "width", "depth", "epochs", "patch_size", "masks", "batch_size"):
            least = 2 if name in ("masks", "batch_size") else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be an int >= {least}; got {getattr(self, name)!r}.")
        for name in ("lr", "mask_lr", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number > 0; got {getattr(self, name)!r}.")
        if not 0 < self.ratio < 1 or not 0 <= self.alpha < math.inf or self.seed < 0:
            raise ValueError(
                "ratio must lie in (0, 1), and alpha and seed must be >= 0; got "
                f"ratio={self.ratio!r}, alpha={self.alpha!r}, seed={self.seed!r}."
            )
        size, patch = self.image_size, self.patch_size
        if size < 16 or size % patch or size % 4 or self.width % 32:
            raise ValueError(
                f"image_size must be at least 16, a multiple of 4 and of patch_size={patch}, and "
                f"width a multiple of 32; got image_size={size!r}, width={self.width!r}."
            )
        if self.mask != "learned" and self.curriculum != "adversary":
            raise ValueError(f"--curriculum is the mask network's; --mask {self.mask} has none.")


# --- The encoder


def make_encoder(settings: Settings) -> nn.Sequential:
    """Return a timm ViT, and SimCLR's projection after it."""
    wide = settings.width
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=settings.image_size, patch_size=settings.patch_size,
        embed_dim=wide, num_heads=wide // 32, depth=settings.depth, num_classes=0,
    )  # fmt: skip
    project = nn.Sequential(nn.Linear(wide, 4 * wide), nn.ReLU(), nn.Linear(4 * wide, 128))
    return nn.Sequential(md.MaskedViT(vit, apply="pixel"), project)


# --- The two objectives


def contrastive_loss(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """SimCLR's: each ``(B, D)`` projection picks its partner out of all the others."""
    z = F.normalize(torch.cat([a, b]), dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(a))
    loss: Tensor = F.cross_entropy(similarity, partner)
    return loss


def masked_losses(
    encoder: nn.Module, views: Sequence[Tensor], masks: Tensor | None, settings: Settings
) -> Tensor:
    """Return the loss between the first view and the second one under each of K masks: ``(K,)``.

    Args:
        encoder: gives projections ``(B, D)``.
        views: two, ``(B, 3, h, w)`` each.
        masks: ``(K * B, N)`` or ``(K * B, 1, h, w)``, bool or soft, mask by mask; None hides
            nothing, K = 1.
        settings: for patch size and temperature.
    """
    first, second = views
    if masks is not None:
        copies = second.repeat(len(masks) // len(second), 1, 1, 1)
        second = md.mask_pixels(copies, masks, settings.patch_size)
    first, *others = encoder(torch.cat([first, second])).split(len(first))
    return torch.stack([contrastive_loss(first, z, settings.temperature) for z in others])


def soft_masks(network: nn.Module, images: Tensor) -> Tensor:
    """Return the network's masks mask by mask, ``(K * B, 1, h, w)``."""
    masks: Tensor = network(images)
    return rearrange(masks, "b k h w -> (k b) 1 h w")


def encoder_step(
    encoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    views: Sequence[Tensor],
    masks: Tensor | None,
    settings: Settings,
) -> Tensor:
    """Make the views agree in spite of the masks; return the losses before, ``(K,)``."""
    losses = masked_losses(encoder, views, None if masks is None else masks.detach(), settings)
    optimizer.zero_grad(set_to_none=True)
    losses.sum().backward()
    optimizer.step()
    return losses.detach()


def mask_objective(
    encoder: nn.Module, masks: Tensor, views: Sequence[Tensor], kappa: float, settings: Settings
) -> Tensor:
    """Return what the mask network minimises: kappa * (sum of the losses) + alpha * penalty.

    The penalty of a mask that hides the share s of an image is 1 / sin(pi * s): it keeps masks from
    hiding all or nothing. ``kappa`` = -1 is ADIOS's objective, with the sign turned.
    """
    share = rearrange(masks.mean(dim=(1, 2, 3)), "(k b) -> k b", b=len(views[1]))
    penalty = (1 / (torch.sin(math.pi * share) + 1e-10)).mean(dim=1).sum()
    losses = masked_losses(encoder, views, masks, settings)
    objective: Tensor = kappa * losses.sum() + settings.alpha * penalty
    return objective


def mask_step(
    encoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    views: Sequence[Tensor],
    masks: Tensor,
    kappa: float,
    settings: Settings,
) -> Tensor:
    """Move the network that made the masks, with the encoder frozen; return its objective before.

    The masks may be the encoder step's, for that has left the mask network as it was.
    """
    encoder.requires_grad_(False)
    objective = mask_objective(encoder, masks, views, kappa, settings)
    optimizer.zero_grad(set_to_none=True)
    objective.backward()
    optimizer.step()
    encoder.requires_grad_(True)
    return objective.detach()


# --- The run


def train(
    settings: Settings, images: JobImages, encoder: nn.Module, network: nn.Module | None
) -> Tensor:
    """Train both; return each mask's loss, ``(K,)``, as a running mean at the end."""
    from tqdm import tqdm

    device, size = next(encoder.parameters()).device, settings.image_size
    count, batch_size = len(images.train_labels), settings.batch_size
    steps = settings.epochs * (count // batch_size)
    batches = BatchStream(count, batch_size, start=0, stop=steps, seed=settings.seed)
    crops = CropDataset(images.train, MultiCrop(size, size, local_crops=0), settings.seed)
    encoder_optimizer = torch.optim.AdamW(encoder.parameters(), weight_decay=0.05)
    mask_optimizer = torch.optim.AdamW(network.parameters()) if network else None
    rise_and_fall, rise = (
        md.masking.WarmUp(md.masking.Cosine(1.0, 0.0), until=0.1),
        md.masking.WarmUp(1.0, until=0.1),
    )
    generator = torch.Generator().manual_seed(derive_seed(settings.seed, "masks"))
    late = torch.tensor(0.0, device=device)
    bar = tqdm(crop_loader(crops, batches, workers=0), total=steps, unit="step", mininterval=1)
    for step, batch in enumerate(bar):
        progress = step / steps
        views = [normalize(crop.to(device)) for crop in batch.images]
        masks: Tensor | None = None
        if network is not None:
            masks = soft_masks(network, views[1])
        elif settings.mask == "random":
            grid = (size // settings.patch_size,) * 2
            draw = md.RandomMasker(settings.ratio)
            masks = draw(settings.masks * batch_size, grid, generator=generator, device=device)
        encoder_optimizer.param_groups[0]["lr"] = settings.lr * rise_and_fall.at(progress)
        losses = encoder_step(encoder, encoder_optimizer, views, masks, settings)
        if mask_optimizer is not None and masks is not None:
            mask_optimizer.param_groups[0]["lr"] = settings.mask_lr * rise.at(progress)
            kappa = CURRICULA[settings.curriculum].at(progress)
            mask_step(encoder, mask_optimizer, views, masks, kappa, settings)
        late = losses.lerp(late, min(0.95, step))  # the first step's own, then a running mean
        if step % 20 == 0 or step == steps - 1:
            bar.set_postfix(loss=f"{float(late.mean()):.3f}")
            if not torch.isfinite(late).all():
                raise NonFiniteLossError(f"the loss is not finite at step {step}; lower --lr.")
    return late


def open_images(settings: Settings) -> JobImages:
    """Open the data, or make the scenes."""
    if settings.data is None:
        train = Scenes(settings.scenes, settings.image_size, split="train", seed=0)
        val = Scenes(max(settings.scenes // 3, 20), settings.image_size, split="val", seed=0)
        note = f"built-in scenes: {len(train)} to train on, {len(val)} to evaluate"
        return JobImages(train, val, train.labels, val.labels, val.masks, note)
    data = open_data(settings.data, allow_pickle=settings.allow_pickle)
    note = f"{data.path}: {data.note}"
    return JobImages(data.train, data.val, data.train.labels, data.val.labels, None, note)


def run(settings: Settings) -> dict[str, Any]:
    """Train, evaluate, draw; return what was written to summary.json."""
    name = f"adios-{settings.mask}-{settings.curriculum}-seed{settings.seed}"
    out = settings.out or Path("runs") / name
    if (out / "summary.json").exists():
        raise ValueError(f"{out} holds a run already; choose another --out.")
    images = open_images(settings)
    if len(images.train_labels) < settings.batch_size:
        raise ValueError(
            f"{len(images.train_labels)} images do not fill one batch of {settings.batch_size}; "
            "choose a smaller --batch-size."
        )
    out.mkdir(parents=True, exist_ok=True)
    print(images.note)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(derive_seed(settings.seed, "weights"))
    encoder = make_encoder(settings).to(device)
    network = MaskNetwork(settings.masks) if settings.mask == "learned" else None
    judge = Judge(images, settings.image_size, knn_train=5000, knn_val=2000)
    vit: Any = encoder[0]
    before = judge.evaluate(vit)["knn"]
    summary: dict[str, Any] = {}
    if network is not None:
        if images.val_masks is not None:
            untrained = compare_with_objects(network, judge, settings.ratio)["jaccard_of_each_mask"]
            summary["jaccard_of_each_mask_random_init"] = untrained
        network.to(device)
    start = time.perf_counter()
    late = train(settings, images, encoder, network)
    summary |= {
        "training_seconds": round(time.perf_counter() - start, 1),
        "knn": judge.evaluate(vit)["knn"],
        "knn_random_init": before,
        "loss_of_each_mask": late.tolist(),
        "device": str(device),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()},
    }
    print(f"20-NN accuracy {summary['knn']:.1%} (random weights {before:.1%})")
    if network is not None:
        # Which of the K is the masker's? The one that costs the encoder most: no label is needed.
        chosen = summary["chosen_mask"] = int(late.argmax())
        network.cpu()
        if images.val_masks is not None:
            summary |= compare_with_objects(network, judge, settings.ratio)
            each = summary["jaccard_of_each_mask"]
            print(
                f"Jaccard with the objects: chosen mask {each[chosen]:.3f}, best of the masks "
                f"{max(each):.3f}, rectangles of the same area {summary['jaccard_rectangles']:.3f}"
            )
        figure = draw_masks(network, chosen, judge, settings.ratio, settings.patch_size)
        figure.savefig(out / "masks.png")
        torch.save(network.state_dict(), out / "network.pt")
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"all of it is in {out}")
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """Read the arguments (None: the command line's) and run; return the exit code."""
    try:
        import tyro
    except ImportError:
        print(
            'error: this needs the train extra: pip install "maskdistill[train]"', file=sys.stderr
        )
        return 2
    try:
        run(tyro.cli(Settings, description=__doc__, args=argv))
    except (NonFiniteLossError, DamagedDataError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
