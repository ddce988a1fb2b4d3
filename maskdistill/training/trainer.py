"""The reference DINO trainer: a linear loop around one pure step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from tqdm import tqdm

from maskdistill.data.augment import MultiCrop, normalize
from maskdistill.data.loading import (
    BatchStream,
    CropDataset,
    crop_loader,
    derive_seed,
    steps_per_epoch,
)
from maskdistill.models import MaskedViT, MultiCropWrapper, create_backbone
from maskdistill.objectives import DINOHead, DINOLoss
from maskdistill.training.checkpoint import load_checkpoint, save_atomically
from maskdistill.training.config import TrainingConfig
from maskdistill.training.distributed import Processes, start_processes
from maskdistill.training.optimizer import parameter_groups
from maskdistill.training.records import CollapseAlarm, RunRecord
from maskdistill.training.schedules import cosine_with_warmup, linear_by_epoch
from maskdistill.training.step import (
    StepMetrics,
    StepSettings,
    TrainState,
    make_teacher,
    train_step,
)
from maskdistill.views import ViewPolicy

CHECKPOINT = "checkpoint.pt"

# What may differ between a run and its resumption without changing the result.
_FREE = {"device", "workers", "log_every", "checkpoint_every"}

Evaluate = Callable[[MaskedViT], dict[str, float]]


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite, so training was stopped."""


class CollapseWarning(UserWarning):
    """Training goes on but has collapsed."""


@dataclass(frozen=True)
class TrainReport:
    """What a call of ``Trainer.fit`` did.

    Attributes:
        steps: of the run so far, those before a resumption included.
        images_per_second: over all processes, evaluation and checkpoints left out.
        seconds: of training in this call.
    """

    steps: int
    images_per_second: float
    seconds: float


class Trainer:
    """Trains a student and its teacher by DINO, under a policy of masks.

    >>> trainer = Trainer(TrainingConfig(epochs=10), images, policy)  # doctest: +SKIP
    >>> trainer.fit(Path("runs/first"))  # doctest: +SKIP
    >>> trainer.teacher.backbone(batch).shape  # doctest: +SKIP
    torch.Size([64, 192])

    Everything is checked when the trainer is built, and nothing is written before ``fit``. Masks,
    crops, data order and drop path at a step depend on (seed, step, rank) alone.

    Args:
        config: settings; those left to the data are filled in from it.
        images: data set of ``(RGB image, label)`` pairs; labels are not used.
        policy: who sees which mask.
        backbone: a ViT to train instead of ``config.model``; its embeddings must be ``(B, D)``.
        processes: where to compute; by default as ``config.device`` and ``torchrun`` say.

    Attributes:
        config: with everything filled in.
        state: the networks, the objective and the optimiser.
        step: steps done.
        total_steps: of the whole run.

    Raises:
        ValueError: settings, model and policy that do not go together.
    """

    def __init__(
        self,
        config: TrainingConfig,
        images: Dataset[tuple[Image.Image, int]],
        policy: ViewPolicy,
        *,
        backbone: nn.Module | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or start_processes(config.device)
        self.images = images
        self.policy = policy
        self._count = len(images)  # type: ignore[arg-type]
        world = self.processes.world
        self._per_epoch = steps_per_epoch(self._count, config.batch_size, world)
        self.config = config.resolved(self._count, world)
        self.total_steps = self.config.total_steps(self._per_epoch)
        self.step = 0
        self.state = self._build(backbone)
        self._check_policy()

    @property
    def teacher(self) -> MultiCropWrapper:
        """The averaged network, which is the one to evaluate and to keep."""
        return self.state.teacher

    # --- Building

    def _build(self, backbone: nn.Module | None) -> TrainState:
        config, device = self.config, self.processes.device
        assert config.out_dim is not None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(config.seed, "weights"))
            if backbone is None:
                backbone = create_backbone(
                    config.model,
                    config.image_size,
                    config.patch_size,
                    depth=config.depth,
                    drop_path=config.drop_path,
                )
            vit = MaskedViT(backbone, config.apply)
            head = DINOHead(
                _embedding_width(vit, config.image_size),
                config.out_dim,
                hidden_dim=config.hidden_dim,
                bottleneck_dim=config.bottleneck_dim,
                norm_last_layer=config.norm_last_layer,
            )
        student = MultiCropWrapper(vit, head).to(device)
        if vit.mask_token is not None and not self.policy.masks_student:
            # Without a gradient it would only shrink by weight decay, and stop data parallelism.
            vit.mask_token.requires_grad_(False)
        objective = DINOLoss(
            config.out_dim,
            student_temp=config.student_temp,
            center_momentum=config.center_momentum,
            centering=config.centering,
        ).to(device)
        groups = parameter_groups(student, decay_tokens=config.decay_tokens)
        teacher = make_teacher(student)
        wrapped: nn.Module = student
        if self.processes.world > 1:
            wrapped = DistributedDataParallel(
                student, device_ids=[device] if device.type == "cuda" else None
            )
        return TrainState(wrapped, teacher, objective, torch.optim.AdamW(groups))

    def _check_policy(self) -> None:
        unknown = sorted(self.policy.needs - {"attention"})
        if unknown:
            raise ValueError(
                f"the policy needs the signal(s) {unknown}, but the trainer supplies only "
                "'attention'. Call train_step's parts in a loop of your own to supply others."
            )
        if self.policy.global_crops != 2:
            raise ValueError(
                f"DINO's multi-crop has 2 global crops; the policy says {self.policy.global_crops}."
            )
        student, teacher = self.state.student_net.backbone, self.state.teacher.backbone
        assert self.config.local_size is not None
        if "attention" in self.policy.needs:
            teacher.attention(self._empty_images())  # refuses a model without attention to read
        if self.config.apply == "drop":
            grid = student.grid(self.config.image_size, self.config.image_size)
            for masker in (
                self.policy.student_global,
                self.policy.student_local,
                self.policy.teacher_global,
            ):
                if masker is not None and masker.fixed_count(grid[0] * grid[1]) is None:
                    raise ValueError(
                        f"apply='drop' needs a masker that hides the same number of patches in "
                        f"every image, and {masker!r} may not. Use .exactly(ratio), or "
                        "apply='token'."
                    )
        for size in (self.config.image_size, self.config.local_size):
            student.grid(size, size)

    def _empty_images(self) -> torch.Tensor:
        size = self.config.image_size
        return torch.zeros(1, 3, size, size, device=self.processes.device)

    # --- Running

    def fit(
        self,
        out: Path,
        *,
        resume: bool = False,
        evaluate: Evaluate | None = None,
        evaluate_every: int | None = None,
        progress_bar: bool = True,
    ) -> TrainReport:
        """Train to the end, writing metrics and checkpoints into ``out``.

        Args:
            out: folder for ``metrics.jsonl``, TensorBoard events and ``checkpoint.pt``.
            resume: go on from ``out/checkpoint.pt``; the result is the uninterrupted run's.
            evaluate: called with the teacher's backbone, in the main process; its numbers are
                recorded.
            evaluate_every: steps between two evaluations; the end is the caller's.
            progress_bar: show loss, images/s and the time left.

        Raises:
            NonFiniteLossError: the loss became NaN or infinite; the last good checkpoint stays.
            FileExistsError: ``out`` holds a run already and ``resume`` is False.
            ValueError: a checkpoint that is damaged or belongs to other settings.
        """
        checkpoint = out / CHECKPOINT
        if resume:
            self._restore(load_checkpoint(checkpoint))
        elif checkpoint.exists():
            raise FileExistsError(
                f"{out} holds a run already. Resume it (--resume), or choose another folder."
            )
        main, world = self.processes.is_main, self.processes.world
        if main:
            out.mkdir(parents=True, exist_ok=True)
        record = RunRecord(out, self.step) if main else None
        alarm = CollapseAlarm(self.config.out_dim or 0)
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            unit="step",
            desc="training",
            disable=not (main and progress_bar),
            dynamic_ncols=True,
        )
        images_per_step = self.config.batch_size * world
        window: list[StepMetrics] = []
        seconds, since, first = 0.0, time.perf_counter(), self.step
        lap, lap_step = since, self.step
        loader = self._loader()
        with contextlib.closing(record) if record else contextlib.nullcontext(), bar:
            for crops in loader:
                window.append(self._run_step(crops.images))
                self.step += 1
                last = self.step == self.total_steps
                saving = self.step % self.config.checkpoint_every == 0 or last
                logging = self.step % self.config.log_every == 0 or last
                if logging or saving or self.processes.device.type == "cpu":
                    self._check_finite(window[-1], checkpoint)
                bar.update()
                if logging:
                    values = self._summarise(window)
                    window.clear()
                    now = time.perf_counter()
                    rate = images_per_step * (self.step - lap_step) / (now - lap)
                    lap, lap_step = now, self.step
                    bar.set_postfix_str(f"loss {values['loss']:.3f}, {rate:.0f} images/s")
                    if record:
                        record.write(self.step, {**values, "images_per_second": rate})
                    warning = alarm.observe(values["loss"], values["feature_spread"])
                    if warning and main:
                        message = f"step {self.step}: {warning}"
                        warnings.warn(message, CollapseWarning, stacklevel=2)
                evaluating = (
                    evaluate and evaluate_every and self.step % evaluate_every == 0 and not last
                )
                if not (saving or evaluating):
                    continue
                seconds += time.perf_counter() - since
                if saving and main:
                    save_atomically(self._content(), checkpoint)
                if evaluating and record and evaluate:
                    bar.set_postfix_str("evaluating")
                    record.write(self.step, evaluate(self.teacher.backbone))
                since = time.perf_counter()
                lap, lap_step = since, self.step
        seconds += time.perf_counter() - since
        done = (self.step - first) * images_per_step
        return TrainReport(self.step, done / seconds if done else 0.0, seconds)

    def _loader(self) -> Any:
        config, processes = self.config, self.processes
        assert config.local_size is not None
        transform = MultiCrop(
            config.image_size,
            config.local_size,
            config.local_crops,
            config.global_scale,
            config.local_scale,
        )
        workers = config.workers
        if workers is None:
            workers = min(max((os.cpu_count() or 1) - 1, 0), 8)
        return crop_loader(
            CropDataset(self.images, transform, config.seed),
            BatchStream(
                self._count,
                config.batch_size,
                start=self.step,
                stop=self.total_steps,
                seed=config.seed,
                rank=processes.rank,
                world=processes.world,
            ),
            workers=workers,
            pin_memory=processes.device.type == "cuda",
        )

    def _run_step(self, crops: list[torch.Tensor]) -> StepMetrics:
        device, seed, rank = self.processes.device, self.config.seed, self.processes.rank
        views = [normalize(crop.to(device, non_blocking=True)) for crop in crops]
        torch.manual_seed(derive_seed(seed, "drop path", self.step, rank))
        masks = torch.Generator(device).manual_seed(derive_seed(seed, "masks", self.step, rank))
        self.state.student.train()
        return train_step(self.state, views, self.policy, self.settings(self.step), masks)

    def settings(self, step: int) -> StepSettings:
        """Return what the schedules say at a step."""
        c, total = self.config, self.total_steps
        assert c.momentum is not None
        assert c.warmup_epochs is not None
        epoch = step // self._per_epoch
        warmup = min(round(c.warmup_epochs * self._per_epoch), total)
        peak = c.lr * c.batch_size * self.processes.world / 256
        return StepSettings(
            lr=cosine_with_warmup(step, total, peak, c.min_lr, warmup),
            weight_decay=cosine_with_warmup(step, total, c.weight_decay, c.weight_decay_end),
            momentum=cosine_with_warmup(step, total, c.momentum, 1.0),
            teacher_temp=linear_by_epoch(
                epoch, c.warmup_teacher_temp_epochs, c.warmup_teacher_temp, c.teacher_temp
            ),
            progress=step / total,
            freeze_last_layer=step < c.freeze_last_layer * self._per_epoch,
            clip_grad=c.clip_grad,
            clip_mode=c.clip_mode,
            amp_dtype=self._amp_dtype(),
        )

    def _amp_dtype(self) -> torch.dtype | None:
        on_gpu = self.processes.device.type == "cuda" and torch.cuda.is_bf16_supported()
        use = self.config.precision == "bfloat16" or (self.config.precision == "auto" and on_gpu)
        return torch.bfloat16 if use else None

    def _check_finite(self, metrics: StepMetrics, checkpoint: Path) -> None:
        loss = float(metrics.loss)
        if math.isfinite(loss):
            return
        kept = (
            f"The last good checkpoint is {checkpoint}"
            if checkpoint.exists()
            else "No checkpoint had been written yet"
        )
        raise NonFiniteLossError(
            f"the loss became {loss} at step {self.step}; training was stopped. {kept}. Try a "
            "lower learning rate (--lr), a longer warm-up, or --precision float32."
        )

    def _summarise(self, window: list[StepMetrics]) -> dict[str, float]:
        means = torch.stack([torch.stack(metrics) for metrics in window]).mean(dim=0)
        if self.processes.world > 1:
            torch.distributed.all_reduce(means)
            means /= self.processes.world
        settings = self.settings(self.step - 1)
        return {
            "epoch": (self.step - 1) / self._per_epoch,
            **dict(zip(StepMetrics._fields, means.tolist(), strict=True)),
            "lr": settings.lr,
            "weight_decay": settings.weight_decay,
            "momentum": settings.momentum,
            "teacher_temp": settings.teacher_temp,
        }

    # --- Keeping

    def _content(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "student": self.state.student_net.state_dict(),
            "teacher": self.state.teacher.state_dict(),
            "objective": self.state.objective.state_dict(),
            "optimizer": self.state.optimizer.state_dict(),
            **self._identity(),
        }

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the run that resumes it."""
        return {
            "config": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in dataclasses.asdict(self.config).items()
                if name in {field.name for field in dataclasses.fields(TrainingConfig)}
            },
            "policy": repr(self.policy),
            "images": self._count,
            "world": self.processes.world,
        }

    def _restore(self, content: dict[str, Any]) -> None:
        was, now = content, self._identity()
        changed = [
            f"{name} was {was['config'].get(name)!r} and is {value!r}"
            for name, value in now["config"].items()
            if name not in _FREE and was["config"].get(name) != value
        ] + [
            f"{name} was {was[name]!r} and is {now[name]!r}"
            for name in ("policy", "images", "world")
            if was[name] != now[name]
        ]
        if changed:
            raise ValueError(
                "the checkpoint belongs to other settings, with which the run cannot be resumed "
                f"exactly: {'; '.join(changed)}. Resume with the same settings, or start anew."
            )
        self.state.student_net.load_state_dict(content["student"])
        self.state.teacher.load_state_dict(content["teacher"])
        self.state.objective.load_state_dict(content["objective"])
        self.state.optimizer.load_state_dict(content["optimizer"])
        self.step = content["step"]


def _embedding_width(vit: MaskedViT, image_size: int) -> int:
    parameter = next(vit.parameters())
    images = torch.zeros(1, 3, image_size, image_size, device=parameter.device)
    training = vit.training
    with torch.no_grad():
        embedding = vit.eval()(images)
    vit.train(training)
    if embedding.ndim != 2:
        raise ValueError(
            f"the backbone gives {tuple(embedding.shape)} instead of one embedding per image "
            "(B, D); build it without a classifier and with pooling (timm: num_classes=0)."
        )
    return int(embedding.shape[1])
