"""The reference DINO trainer: a linear loop around one pure step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from maskdistill.data.augment import Crops, MultiCrop, normalize
from maskdistill.data.loading import (
    BatchStream,
    CropDataset,
    crop_loader,
    derive_seed,
    steps_per_epoch,
)
from maskdistill.models import MaskedViT, MultiCropWrapper
from maskdistill.training.build import build_state
from maskdistill.training.checkpoint import load_checkpoint, save_atomically
from maskdistill.training.config import TrainingConfig
from maskdistill.training.distributed import Processes, start_processes
from maskdistill.training.records import CollapseAlarm, Pace, RunRecord
from maskdistill.training.schedules import cosine_with_warmup, linear_by_epoch
from maskdistill.training.step import (
    StepMetrics,
    StepSettings,
    train_step,
)
from maskdistill.views import ViewPolicy

CHECKPOINT = "checkpoint.pt"

# What may differ between a run and its resumption without changing the result.
_FREE = {"device", "workers", "log_every", "checkpoint_every"}

Evaluate = Callable[[MaskedViT], dict[str, float]]


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient became NaN or infinite, so training was stopped."""


class CollapseWarning(UserWarning):
    """Training goes on but has collapsed."""


@dataclass(frozen=True)
class TrainReport:
    """What a run did, from its first step on.

    Attributes:
        steps: of the run so far, those before a resumption included.
        images_per_second: over all processes, evaluation and checkpoints left out.
        seconds: of training, likewise.
        evaluation: what the last evaluation found; None where there was none.
    """

    steps: int
    images_per_second: float
    seconds: float
    evaluation: dict[str, float] | None


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
        transform: cuts an image into crops.
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
        self._seconds = 0.0
        assert self.config.local_size is not None
        self.transform = MultiCrop(
            self.config.image_size,
            self.config.local_size,
            self.config.local_crops,
            self.config.global_scale,
            self.config.local_scale,
        )
        self.state = build_state(self.config, policy, self.processes, backbone)

    @property
    def teacher(self) -> MultiCropWrapper:
        """The averaged network, which is the one to evaluate and to keep."""
        return self.state.teacher

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
            evaluate: called with the teacher's backbone, in the main process, at the end and every
                ``evaluate_every`` steps; its numbers are recorded.
            evaluate_every: steps between two evaluations; None evaluates at the end alone.
            progress_bar: show loss, images/s and the time left.

        Raises:
            NonFiniteLossError: the loss or the gradient became NaN or infinite; the last good
                checkpoint stays.
            FileExistsError: ``out`` holds a run already and ``resume`` is False.
            ValueError: a checkpoint that is damaged or belongs to other settings.
        """
        checkpoint = out / CHECKPOINT
        if resume:
            self._restore(self.check_resumable(out))
        elif checkpoint.exists():
            raise FileExistsError(
                f"{out} holds a run already. Resume it (--resume), or choose another folder."
            )
        config, processes = self.config, self.processes
        if processes.is_main:
            out.mkdir(parents=True, exist_ok=True)
        record = RunRecord(out, self.step) if processes.is_main else None
        alarm = CollapseAlarm(config.out_dim or 0)
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            unit="step",
            desc="training",
            disable=not (processes.is_main and progress_bar),
            dynamic_ncols=True,
        )
        window: list[StepMetrics] = []
        evaluation: dict[str, float] | None = None
        pace = Pace(config.batch_size * processes.world, self.step, self._seconds)
        with contextlib.closing(record) if record else contextlib.nullcontext(), bar:
            for crops in self._loader():
                window.append(self._run_step(crops))
                self.step += 1
                pace.step()
                bar.update()
                last = self.step == self.total_steps
                saving = last or self.step % config.checkpoint_every == 0
                logging = last or self.step % config.log_every == 0
                evaluating = last or (evaluate_every and self.step % evaluate_every == 0)
                if logging or saving or processes.device.type == "cpu":
                    self._check_finite(window[-1], checkpoint)
                if logging:
                    values = self._summarise(window)
                    window.clear()
                    values["images_per_second"] = pace.lap()
                    bar.set_postfix_str(
                        f"loss {values['loss']:.3f}, {values['images_per_second']:.0f} images/s"
                    )
                    if record:
                        record.write(self.step, values)
                    warning = alarm.observe(values["loss"], values["feature_spread"])
                    if warning and processes.is_main:
                        warnings.warn(f"step {self.step}: {warning}", CollapseWarning, stacklevel=2)
                if saving and processes.is_main:
                    self._seconds = pace.seconds
                    with pace.pause():
                        save_atomically(self._content(), checkpoint)
                if evaluating and evaluate and record:
                    with pace.pause():
                        evaluation = evaluate(self.teacher.backbone)
                        record.write(self.step, evaluation)
        return TrainReport(self.step, pace.images_per_second, pace.seconds, evaluation)

    def _loader(self) -> Any:
        config, processes = self.config, self.processes
        workers = config.workers
        if workers is None:
            workers = min(max((os.cpu_count() or 1) - 1, 0), 8)
        return crop_loader(
            CropDataset(self.images, self.transform, config.seed),
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

    def _run_step(self, crops: Crops) -> StepMetrics:
        device, seed, rank = self.processes.device, self.config.seed, self.processes.rank
        views = [normalize(crop.to(device, non_blocking=True)) for crop in crops.images]
        torch.manual_seed(derive_seed(seed, "drop path", self.step, rank))
        masks = torch.Generator(device).manual_seed(derive_seed(seed, "masks", self.step, rank))
        self.state.student.train()
        return train_step(
            self.state, views, self.policy, self.settings(self.step), masks,
            boxes=crops.boxes.to(device, non_blocking=True),
            flipped=crops.flipped.to(device, non_blocking=True),
        )  # fmt: skip

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
        # An infinite gradient spoils the weights before the loss shows it.
        values = {"loss": float(metrics.loss), "gradient norm": float(metrics.grad_norm)}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if not bad:
            return
        kept = (
            f"The last good checkpoint is {checkpoint}"
            if checkpoint.exists()
            else "No checkpoint had been written yet"
        )
        raise NonFiniteLossError(
            f"the {bad[0]} became {values[bad[0]]} at step {self.step}; training was stopped. "
            f"{kept}. Try a lower learning rate (--lr), a longer warm-up, or --precision float32."
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
            "seconds": self._seconds,
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

    def check_resumable(self, out: Path) -> dict[str, Any]:
        """Read the checkpoint in ``out`` and return it, refusing one that this run cannot resume.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or belongs to other settings.
        """
        was, now = load_checkpoint(out / CHECKPOINT), self._identity()
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
        return was

    def _restore(self, content: dict[str, Any]) -> None:
        self.state.student_net.load_state_dict(content["student"])
        self.state.teacher.load_state_dict(content["teacher"])
        self.state.objective.load_state_dict(content["objective"])
        self.state.optimizer.load_state_dict(content["optimizer"])
        self.step = content["step"]
        self._seconds = content["seconds"]
