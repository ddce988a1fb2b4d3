"""DINO with masks as a PyTorch Lightning module: one CPU, one GPU or many, the same lines.

    pip install lightning
    python examples/recipe_lightning.py --max-steps 20
    python examples/recipe_lightning.py --max-steps 20 --devices 2
    python examples/recipe_lightning.py --max-steps 20 --masker "AttentionGuidedMasker(0.4)"
    python examples/recipe_lightning.py --data PATH --model vit_small_patch16_224 --depth 12 \
        --image-size 224 --local-size 96 --local-crops 8 --patch-size 16 --out-dim 65536 \
        --hidden-dim 2048 --lr 5e-4 --momentum 0.996 --max-epochs 100 --devices 8 \
        --precision bf16-mixed --workers 8

Copy the module and change it. Masks, drop path, crops and their order depend on the seed, the
epoch, the batch and the process alone. Without ``--data`` it trains on built-in scenes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

import maskdistill as md
from maskdistill.data import (
    BatchStream,
    CropDataset,
    Crops,
    MultiCrop,
    Scenes,
    crop_loader,
    derive_seed,
    normalize,
    open_data,
)
from maskdistill.evaluation import extract_features, knn_accuracy
from maskdistill.evaluation.health import feature_spread
from maskdistill.models import create_backbone
from maskdistill.training import make_teacher
from maskdistill.training.config import cosine_with_warmup
from maskdistill.training.step import (
    clip_gradients,
    freeze_gradients,
    parameter_groups,
    update_average,
)


class MaskedDINO(lightning.LightningModule):  # type: ignore[misc]
    """DINO whose student sees masked global views; its teacher and its local views stay clean.

    >>> module = MaskedDINO(masker="BlockMasker(0.4)", apply="drop")  # doctest: +SKIP
    >>> lightning.Trainer(max_steps=20).fit(module, CropData())  # doctest: +SKIP

    Args:
        model: a ViT by its name in timm.
        image_size: pixels of a side of the global crops.
        patch_size: pixels of a side of a patch.
        depth: number of blocks; None is the model's own.
        masker: hides the student's global views, as text; one that needs the teacher's attention
            gets it.
        apply: ``"token"``, ``"drop"`` or ``"pixel"``.
        out_dim: number of prototypes.
        hidden_dim: width of the head's hidden layers.
        lr: peak learning rate; DINO takes 5e-4 for every 256 images of a step.
        momentum: of the teacher at the start, rising to 1.
        teacher_temp: the teacher's softmax temperature.
        freeze_last_layer: epochs in which the prototypes stay as they are.
        seed: of weights, masks and drop path.
    """

    def __init__(
        self,
        model: str = "vit_tiny_patch16_224",
        image_size: int = 32,
        patch_size: int = 8,
        depth: int | None = 3,
        masker: str = "RandomMasker(0.3)",
        apply: Any = "token",
        out_dim: int = 256,
        hidden_dim: int = 512,
        lr: float = 1e-3,
        momentum: float = 0.99,
        teacher_temp: float = 0.03,
        freeze_last_layer: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.policy = md.AsymmetricMaskPolicy(md.parse_masker(masker))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(seed, "weights"))
            backbone = create_backbone(model, image_size, patch_size, depth=depth, drop_path=0.1)
            vit = md.MaskedViT(backbone, apply)
            head = md.DINOHead(vit.num_features, out_dim, hidden_dim=hidden_dim)
        self.student = md.MultiCropWrapper(vit, head)
        self.teacher = make_teacher(self.student)
        self.objective = md.DINOLoss(out_dim)

    def training_step(self, crops: Crops, batch_idx: int) -> Tensor:
        """Run the teacher, draw the student's masks, run the student, and compare."""
        views = [normalize(view) for view in crops.images]
        draw = (self.hparams.seed, self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(derive_seed("drop path", *draw))
        masks_from = torch.Generator(self.device).manual_seed(derive_seed("masks", *draw))

        vit, guided = self.teacher.backbone, "attention" in self.policy.needs
        with torch.no_grad(), vit.record_attention() if guided else nullcontext() as seen:
            teacher = self.teacher(views[: self.policy.global_crops])
        signals = {} if seen is None else {"attention": seen.attention}
        masks = self.policy(
            views, vit.patch_size, generator=masks_from, progress=self.global_step / self.steps,
            boxes=crops.boxes, flipped=crops.flipped, **signals,
        )  # fmt: skip
        student = self.student(views, masks.student_masks)

        targets = self.objective.targets(teacher.logits, self.hparams.teacher_temp)
        loss: Tensor = self.objective(student.logits, targets, views=len(views))
        self.objective.update_center(teacher.logits)
        self.log("loss", loss, prog_bar=True)
        self.log("teacher_spread", feature_spread(teacher.features[: len(views[0])]))
        return loss

    @property
    def steps(self) -> int:
        """The optimiser's steps of the whole run, for the schedules."""
        return int(self.trainer.estimated_stepping_batches)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Spare biases and norms from weight decay, as the original does."""
        return torch.optim.AdamW(parameter_groups(self.student))

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip each tensor by its own norm, and freeze the prototypes at first."""
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        clip_gradients(gradients, gradient_clip_val or 0.0, "per_parameter")
        if self.current_epoch < self.hparams.freeze_last_layer:
            freeze_gradients(self.student, "last_layer")

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, closure: Callable[[], Any] | None = None
    ) -> None:
        """Set the schedules, step, and move the teacher; once per step, however many batches."""
        step, total = self.global_step, self.steps
        for group in optimizer.param_groups:
            group["lr"] = cosine_with_warmup(step, total, self.hparams.lr, 1e-6, total // 10)
        optimizer.param_groups[0]["weight_decay"] = cosine_with_warmup(step, total, 0.04, 0.4)
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        momentum = cosine_with_warmup(step, total, self.hparams.momentum, 1.0)
        update_average(self.teacher.parameters(), self.student.parameters(), momentum)


class CropData(lightning.LightningDataModule):  # type: ignore[misc]
    """The crops of built-in scenes, or of images on disk in any form that ``open_data`` reads.

    Args:
        data: folder or file with images; None for the scenes.
        image_size: pixels of a side of the global crops.
        local_size: pixels of a side of the local crops.
        local_crops: number of local crops.
        batch_size: images of a step in each process.
        workers: loader processes; the crops do not depend on them.
        seed: of the images' order and the crops.
    """

    def __init__(
        self,
        data: Path | None = None,
        image_size: int = 32,
        local_size: int = 16,
        local_crops: int = 4,
        batch_size: int = 32,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        images: Any = Scenes(5000, image_size) if data is None else open_data(data).train
        scale = (0.15, 0.5) if image_size < 64 else (0.05, 0.4)  # else they hold a few pixels
        transform = MultiCrop(image_size, local_size, local_crops, local_scale=scale)
        self.crops = CropDataset(images, transform, seed)
        self.images, self.batch_size, self.workers, self.seed = images, batch_size, workers, seed

    def train_dataloader(self) -> Any:
        """Return this process's share of every batch."""
        batches = _Epochs(
            len(self.images), self.batch_size, start=0, stop=0, seed=self.seed,
            rank=self.trainer.global_rank, world=self.trainer.world_size,
        )  # fmt: skip
        batches.set_epoch(0)
        return crop_loader(
            self.crops, batches, workers=self.workers, pin_memory=torch.cuda.is_available()
        )


class _Epochs(BatchStream):
    """One epoch of batches after another, each when Lightning says which it is."""

    def set_epoch(self, epoch: int) -> None:
        steps = self.steps_per_epoch
        self.start, self.stop = epoch * steps, (epoch + 1) * steps


OPTIONS = {
    "masker": "RandomMasker(0.3)", "apply": "token", "model": "vit_tiny_patch16_224", "depth": 3,
    "image-size": 32, "patch-size": 8, "out-dim": 256, "hidden-dim": 512, "lr": 8e-3,
    "momentum": 0.99, "local-size": 16, "local-crops": 4, "batch-size": 32, "max-steps": -1,
    "max-epochs": 3, "accelerator": "auto", "devices": 1, "precision": "32-true", "workers": 0,
    "seed": 0,
}  # fmt: skip
"""The command line: arguments of the module, the data and Lightning's trainer."""


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="images; without it, built-in scenes")
    parser.add_argument("--out", type=Path, help="write the teacher's weights there, for timm")
    parser.add_argument("--compile", action="store_true", help="compile the student's ViT")
    for name, value in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"{value} if unset")
    a = parser.parse_args()

    module = MaskedDINO(
        a.model, a.image_size, a.patch_size, a.depth, a.masker, a.apply, a.out_dim, a.hidden_dim,
        a.lr * a.batch_size * a.devices / 256, a.momentum, seed=a.seed,
    )  # fmt: skip
    if a.compile:
        module.student.backbone.compile()
    trainer = lightning.Trainer(
        max_steps=a.max_steps, max_epochs=a.max_epochs, accelerator=a.accelerator,
        devices=a.devices, precision=a.precision, gradient_clip_val=3.0, log_every_n_steps=5,
        use_distributed_sampler=False,  # each process takes its own share of the batches already
    )  # fmt: skip
    data = CropData(
        a.data, a.image_size, a.local_size, a.local_crops, a.batch_size, a.workers, a.seed
    )
    trainer.fit(module, data)
    vit = module.teacher.backbone.unwrap()
    if a.data is None and trainer.is_global_zero:
        val = Scenes(1000, a.image_size, split="val")
        known, asked = (extract_features(vit, x, a.image_size) for x in (data.images, val))
        print(f"20-NN accuracy of the teacher: {knn_accuracy(*known, *asked):.1%}")
    if a.out and trainer.is_global_zero:
        torch.save(vit.state_dict(), a.out)


if __name__ == "__main__":
    main()
