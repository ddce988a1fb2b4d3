"""The reference DINO trainer: a linear loop around one pure step."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from maskdistill.data.crops import Crops, MultiCrop, normalize
from maskdistill.data.loading import (
    BatchStream,
    DoesNotFitError,
    LoaderError,
    ResidentImages,
    cores,
    crop_batches,
    deaths_explained,
    derive_seed,
    free_memory,
    steps_per_epoch,
)
from maskdistill.data.shards import Shards
from maskdistill.models import MaskedViT, MultiCropWrapper, create_backbone
from maskdistill.models.probing import evaluating
from maskdistill.models.speed import compile_blocks, unfuse_attention
from maskdistill.objectives import DINOHead, DINOLoss, Objective, build_objective
from maskdistill.policies import OF_EVERY_VIEW, ViewPolicy
from maskdistill.presets import Preset
from maskdistill.training.checkpoint import (
    FoundCheckpoint,
    check_same,
    checkpoint_files,
    find_checkpoint,
    hold_folder,
    identity,
    restore_state,
    state_content,
)
from maskdistill.training.config import TrainingConfig, cosine_with_warmup, linear_by_epoch
from maskdistill.training.distributed import Agreement, Processes, replicate, shard, start_processes
from maskdistill.training.interruption import SignalWatch, StopRequest, TrainingInterrupted
from maskdistill.training.logging import CollapseWarning as CollapseWarning
from maskdistill.training.logging import NonFiniteLossError as NonFiniteLossError
from maskdistill.training.logging import (
    RunKeeper,
    health_due,
    import_wandb,
    measure_health,
    wandb_project,
)
from maskdistill.training.step import (
    StepMetrics,
    StepSettings,
    TrainState,
    make_teacher,
    parameter_groups,
    train_step,
)


def build_state(
    config: TrainingConfig,
    policy: ViewPolicy,
    processes: Processes,
    backbone: nn.Module | None = None,
) -> TrainState:
    """Build a fresh student, its teacher, the objective and the optimiser.

    Args:
        config: resolved settings; the weights depend on its seed alone.
        policy: that the networks will train under.
        processes: where to compute.
        backbone: a ViT to train instead of ``config.model``.

    Raises:
        ValueError: settings, model and policy that do not go together.
    """
    assert config.out_dim is not None, "the settings must be resolved"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(config.seed, "weights"))
        if backbone is None:
            backbone = create_backbone(
                config.model,
                config.image_size,
                config.patch_size,
                local_size=config.local_size,
                depth=config.depth,
                drop_path=config.drop_path,
            )
        vit = MaskedViT(backbone, config.apply)
        objective = build_objective(config.objective or "dino", config)
        head = _head(_embedding_width(vit, config), config)
        _check_objective(objective, config, vit)
        patch_head = None
        if config.patch_head == "own" and _needs_patches(objective):
            patch_head = _head(_patch_width(vit, config), config)
    if processes.device.type == "cpu" and (
        config.precision == "bfloat16" or _is_short(vit, config)
    ):
        unfuse_attention(vit)
    student = MultiCropWrapper(vit, head, patch_head).to(processes.device)
    _check_policy(policy, config, vit)
    if vit.mask_token is not None and not policy.masks_student:
        # Without a gradient it would stop data parallelism.
        vit.mask_token.requires_grad_(False)
    for parameter in classifier_parameters(
        backbone
    ):  # nor has it one: it lies behind the embedding
        parameter.requires_grad_(False)
    objective = objective.to(processes.device)
    teacher = make_teacher(student)
    if config.compile:
        for network in (student, teacher):
            compile_blocks(network.backbone.backbone)
    wrapped: nn.Module = student
    if config.sharding == "fsdp" and processes.world > 1:
        for network in (student, teacher):
            shard(network)
        with torch.no_grad():  # FSDP2 must see the whole network before its backbone alone
            teacher([_empty_image(vit, config.image_size)])
    elif processes.world > 1:
        wrapped = replicate(student, processes.device)
    optimizer = torch.optim.AdamW(
        parameter_groups(student, decay_tokens=config.decay_tokens), fused=True
    )
    return TrainState(wrapped, teacher, objective, optimizer)


def _head(width: int, config: TrainingConfig) -> DINOHead:
    assert config.out_dim is not None
    return DINOHead(
        width,
        config.out_dim,
        hidden_dim=config.hidden_dim,
        bottleneck_dim=config.bottleneck_dim,
        norm_last_layer=config.norm_last_layer,
    )


def _needs_patches(objective: Objective) -> bool:
    return any(loss.needs_patches for loss, _ in objective.terms().values())


def _check_objective(objective: Objective, config: TrainingConfig, vit: MaskedViT) -> None:
    """Refuse losses that the settings and the model do not go with."""
    terms = objective.terms()
    if not any(isinstance(loss, DINOLoss) for loss, _ in terms.values()):
        raise ValueError(
            f"the objective {config.objective} needs a loss between the class tokens of different "
            "views, from which the backbone learns to see an image as a whole: add dino or msn."
        )
    whole = [name for name, (loss, _) in terms.items() if not loss.in_parts]
    if whole and config.accumulate > 1:
        raise ValueError(
            f"accumulate={config.accumulate} changes {config.objective}, which compares the images "
            "of a whole batch. Leave one of them out."
        )
    if not _needs_patches(objective):
        return
    if config.apply == "drop":
        raise ValueError(
            f"the objective {config.objective} compares hidden patches, of which apply='drop' "
            "leaves nothing. Use apply='token'."
        )
    rows, columns = vit.grid(config.image_size, config.image_size)
    with torch.no_grad(), evaluating(vit):
        tokens = vit.tokens(_empty_image(vit, config.image_size))
    if tokens.patches.shape[1] != rows * columns:
        raise ValueError(
            f"{vit.name} gives {tokens.patches.shape[1]} patch tokens of {rows}x{columns} patches, "
            f"so that the objective {config.objective} cannot compare them. Use a plain ViT."
        )


def _patch_width(vit: MaskedViT, config: TrainingConfig) -> int:
    with torch.no_grad(), evaluating(vit):
        return vit.tokens(_empty_image(vit, config.image_size)).patches.shape[2]


def classifier_parameters(backbone: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a timm model's classifier, or classifiers."""
    find = getattr(backbone, "get_classifier", None)
    found = find() if callable(find) else ()
    heads = found if isinstance(found, (tuple, list)) else (found,)
    return [p for head in heads if isinstance(head, nn.Module) for p in head.parameters()]


def _is_short(vit: MaskedViT, config: TrainingConfig) -> bool:
    """Say whether sequences are so short that fused attention is the slower one on a CPU."""
    rows, columns = vit.grid(config.image_size, config.image_size)
    return rows * columns <= 128


def _check_policy(policy: ViewPolicy, config: TrainingConfig, vit: MaskedViT) -> None:
    apply = getattr(policy, "apply", config.apply)  # a preset says how it is applied
    if apply != config.apply and policy.masks_student:
        raise ValueError(
            f"{policy!r} is applied by {apply!r}, but the settings say {config.apply!r}. Set "
            f"apply={apply!r}, or take its masks alone: ViewPolicy(student_global=...)."
        )
    unknown = sorted(policy.needs - {"attention"} - OF_EVERY_VIEW)
    if unknown:
        raise ValueError(
            f"the policy needs the signal(s) {unknown}, but the trainer supplies 'attention' and "
            f"{sorted(OF_EVERY_VIEW)} only. "
            "Supply others in a loop of your own, with policy.begin(...)."
        )
    if policy.global_crops != 2:
        raise ValueError(
            f"DINO's multi-crop has 2 global crops; the policy is for {policy.global_crops}. Its "
            "masker serves in a policy of your own: ViewPolicy(student_global=...)."
        )
    policy.by_view("student", 2 + config.local_crops)  # refuses a list for other local crops
    if "attention" in policy.needs:
        vit.attention(_empty_image(vit, config.image_size))  # refuses a model that has none
    if config.apply == "drop":
        _check_drop(policy, config, vit)


def _check_drop(policy: ViewPolicy, config: TrainingConfig, vit: MaskedViT) -> None:
    if "attention" in policy.needs and policy.teacher_global is not None:
        raise ValueError(
            "apply='drop' with teacher_global leaves the teacher without attention to the patches "
            f"it does not see, but {policy!r} needs it. Use apply='token'."
        )
    assert config.local_size is not None
    whole, local = [config.image_size] * 2, [config.local_size] * config.local_crops
    student = policy.by_view("student", len(whole + local))
    pairs = zip(student + policy.by_view("teacher", 2), whole + local + whole, strict=True)
    for masker, size in dict.fromkeys(pairs):
        rows, columns = vit.grid(size, size)
        for progress in (i / 64 for i in range(65)):
            count = 0 if masker is None else masker.fixed_count((rows, columns), progress)
            if count is None:
                raise ValueError(
                    f"apply='drop' needs a masker that hides the same number of patches in every "
                    f"image, and {masker!r} may not. Use .exactly(ratio), or apply='token'."
                )
            if count == rows * columns:
                raise ValueError(
                    f"apply='drop' with {masker!r} leaves no patch of a {rows}x{columns} grid. "
                    "Use a smaller ratio."
                )


def _empty_image(vit: MaskedViT, size: int) -> torch.Tensor:
    return torch.zeros(1, 3, size, size, device=next(vit.parameters()).device)


def _embedding_width(vit: MaskedViT, config: TrainingConfig) -> int:
    """Return the width of the embeddings of crops of all sizes; refuses sizes it does not take."""
    assert config.local_size is not None
    sizes = (config.local_size, config.image_size)
    with torch.no_grad(), evaluating(vit):
        widths = [vit.embed(_empty_image(vit, size)).shape[1] for size in sizes]
    return int(widths[-1])


_SHARE = 0.25
"""Of the memory that is free before the first step, when neither activations nor the optimiser's
moments are there yet: what images may take that nobody asked to have on the device."""


class Feed:
    """Hands out the crops of each step of a run, from any step on.

    Args:
        images: a data set of ``(RGB image, label)`` pairs, or ``Shards``.
        config: of the run; ``config.views`` says where crops are cut.
        processes: of the run.
        agreement: among the processes.

    Attributes:
        count: images in the data.
        steps_per_epoch: of this process, full batches alone.

    Raises:
        ValueError: fewer images than one step takes, or shards whose crops are to be cut on the
            device.
    """

    def __init__(
        self, images: Any, config: TrainingConfig, processes: Processes, agreement: Agreement
    ) -> None:
        self.images, self.config, self.processes = images, config, processes
        self._agreement = agreement
        self.count = len(images)
        self._resident: ResidentImages | None = None
        if isinstance(images, Shards):
            if config.views == "device":
                raise ValueError(
                    "shards stream, so their crops cannot be cut out of the device's memory; leave "
                    "out --views device."
                )
            self.steps_per_epoch = self._shard_stream(0, 1).steps_per_epoch
        else:
            self.steps_per_epoch = steps_per_epoch(self.count, config.batch_size, processes.world)

    @property
    def workers(self) -> int:
        """Loader processes: as set, else all cores it may use but one, shared out here."""
        if self.config.workers is not None:
            return self.config.workers
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return min(max(cores() // here - 1, 0), 8)

    def batches(self, transform: MultiCrop, start: int, stop: int) -> Iterator[Crops]:
        """Yield the crops of the steps from ``start`` up to but without ``stop``.

        Nothing is read before the first step is asked for, which all processes must do alike.

        Raises:
            LoaderError: while iterating: a worker died.
            DoesNotFitError: while iterating: the device has no room for ``views="device"``.
        """
        if isinstance(self.images, Shards):
            return self._from_shards(transform, start, stop)
        return self._from_images(transform, start, stop)

    def _from_images(self, transform: MultiCrop, start: int, stop: int) -> Iterator[Crops]:
        if start >= stop:  # nothing is decoded for a run that is finished
            return
        stream = BatchStream(
            self.count,
            self.config.batch_size,
            start=start,
            stop=stop,
            seed=self.config.seed,
            rank=self.processes.rank,
            world=self.processes.world,
        )
        yield from crop_batches(
            self._resident_images() or self.images,
            transform,
            stream,
            seed=self.config.seed,
            workers=self.workers,
            device=self.processes.device,
        )

    def _resident_images(self) -> ResidentImages | None:
        """Decode the images into the device's memory, if that is wanted and they fit."""
        views, device = self.config.views, self.processes.device
        if views == "workers" or (views == "auto" and device.type != "cuda"):
            return None
        if self._resident is None:
            limit = self._careful_limit() if views == "auto" else None
            try:
                with deaths_explained(self.workers):
                    self._resident = ResidentImages(
                        self.images,
                        device,
                        workers=self.workers,
                        limit=limit,
                        progress_bar=self.processes.is_main,
                    )
            except DoesNotFitError:
                if views == "device":
                    raise
        return self._resident

    def _careful_limit(self) -> int:
        """Return how many bytes images may take by themselves: on the fullest device, for all.

        Crops cut on a CPU differ by a grey level or two, so no process cuts alone there.
        """
        free = self._agreement.gather([free_memory(self.processes.device) or 0])
        return int(min(theirs for (theirs,) in free) * _SHARE)

    def _shard_stream(self, start: int, stop: int) -> Any:
        return self.images.stream(
            self.config.batch_size,
            start=start,
            stop=stop,
            seed=self.config.seed,
            rank=self.processes.rank,
            world=self.processes.world,
        )

    def _from_shards(self, transform: MultiCrop, start: int, stop: int) -> Iterator[Crops]:
        from maskdistill.data.shards import CutCrops

        stream = self._shard_stream(start, stop)
        stream.transform = CutCrops(transform, self.config.seed)
        pinned = self.processes.device.type == "cuda"
        with deaths_explained(self.workers):
            yield from stream.loader(workers=self.workers, pin_memory=pinned)


def moved(crops: Crops, device: torch.device) -> Crops:
    """Return crops on a device; those that lie there already stay."""
    images, boxes, flipped = crops
    return Crops(
        [image.to(device, non_blocking=True) for image in images],
        boxes.to(device, non_blocking=True),
        flipped.to(device, non_blocking=True),
    )


Evaluate = Callable[[MaskedViT], dict[str, float]]


class DamagedCheckpointWarning(UserWarning):
    """A newer checkpoint could not be used, so training goes on from an older one."""


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
        images: data set of ``(RGB image, label)`` pairs, whose labels are not used; or ``Shards``.
        policy: who sees which mask.
        backbone: a ViT to train instead of ``config.model``; its embeddings must be ``(B, D)``.
            Its classifier, if it has one, is set aside: ``requires_grad`` becomes False there.
        processes: where to compute; by default as ``config.device`` and ``torchrun`` say.

    Attributes:
        config: with everything filled in.
        transform: cuts an image into crops.
        state: the networks, the objective and the optimiser.
        agreement: small decisions among the processes.
        step: steps done.
        total_steps: of the whole run.

    Raises:
        ValueError: settings, model and policy that do not go together.
        TypeError: a policy that is none.
        ImportError: Weights & Biases was asked for and is not installed.
    """

    def __init__(
        self,
        config: TrainingConfig,
        images: Dataset[tuple[Image.Image, int]] | Shards,
        policy: ViewPolicy,
        *,
        backbone: nn.Module | None = None,
        processes: Processes | None = None,
    ) -> None:
        if not isinstance(policy, ViewPolicy):
            raise TypeError(
                f"policy must be a ViewPolicy, such as AsymmetricMaskPolicy(RandomMasker(0.3)); "
                f"got {policy!r}."
            )
        self.processes = processes or start_processes(config.device)
        self.images = images
        self.policy = policy
        self.agreement = Agreement(self.processes)
        project = wandb_project(config.wandb)
        if project:
            self.agreement.by_main(lambda: bool(import_wandb(project)))
        self.feed = Feed(images, config, self.processes, self.agreement)
        self._per_epoch = self.feed.steps_per_epoch
        if config.objective is None:
            own = policy.trainable if isinstance(policy, Preset) else "dino"
            config = dataclasses.replace(config, objective=own)
        self.config = config.resolved(self.feed.count, self.processes.world)
        self.total_steps = self.config.total_steps(self._per_epoch)
        self.step = 0
        assert self.config.local_size is not None
        self.transform = MultiCrop(
            self.config.image_size,
            self.config.local_size,
            self.config.local_crops,
            self.config.global_scale,
            self.config.local_scale,
        )
        self.state = build_state(self.config, policy, self.processes, backbone)
        self._signs: dict[str, Tensor] = {}  # of health, where the last step's were due

    @property
    def teacher(self) -> MultiCropWrapper:
        """The averaged network, which is the one to evaluate and to keep."""
        return self.state.teacher

    # --- Running

    def fit(
        self,
        out: Path | str,
        *,
        resume: bool | FoundCheckpoint = False,
        evaluate: Evaluate | None = None,
        evaluate_every: int | None = None,
        progress_bar: bool = True,
    ) -> TrainReport:
        """Train to the end, writing metrics and checkpoints into ``out``.

        SIGINT, SIGTERM and SIGUSR1 let the running step end; then the run is saved and
        `TrainingInterrupted` is raised, in all processes after the same step. A second SIGINT stops
        at once. The handlers from before come back when ``fit`` ends.

        Args:
            out: folder for ``metrics.jsonl``, TensorBoard events and ``checkpoints/``; a run of
                Weights & Biases is kept there too, if ``config.wandb`` asks for one.
            resume: go on from the newest whole checkpoint in ``out``, or from one that
                `check_resumable` returned; the result is the uninterrupted run's.
            evaluate: called with the teacher's backbone, in all processes, at the end and every
                ``evaluate_every`` steps; the main process's numbers are recorded, as floats.
            evaluate_every: steps between two evaluations; None evaluates at the end alone.
            progress_bar: show loss, images/s and the time left.

        Raises:
            TrainingInterrupted: a signal came; a ``KeyboardInterrupt``.
            NonFiniteLossError: the loss or the gradient became NaN or infinite; the last good
                checkpoint stays.
            LoaderError: a loader's worker died; the finished steps are saved.
            CheckpointError: a checkpoint could not be written; earlier ones stay.
            FileExistsError: ``out`` holds a run already and ``resume`` is False.
            BlockingIOError: another run is writing into ``out``.
            ValueError: no checkpoint is whole, or it belongs to other settings.
            TypeError: ``evaluate`` returned something that is no number.
            ConnectionError: Weights & Biases was asked for and cannot begin.
        """
        out = Path(out)
        config, processes, total = self.config, self.processes, self.total_steps
        alone, on_cpu = processes.world == 1, processes.device.type == "cpu"
        evaluation: dict[str, float] | None = None
        metrics: StepMetrics | None = None
        with contextlib.ExitStack() as stack:
            self.agreement.by_main(lambda: stack.enter_context(hold_folder(out)))
            found = self._start(out, resume)
            keeper = RunKeeper(
                out, config, processes, self.agreement, self.policy, found,
                steps=total, show=progress_bar,
            )  # fmt: skip
            stack.enter_context(keeper)
            signals = stack.enter_context(SignalWatch(say=processes.is_main))
            batches = self._batches()
            try:
                if found is None:  # a folder that cannot be written to shows at once
                    keeper.save(self._content())
                while True:
                    last = self.step == total
                    due = last or (evaluate_every and self.step % evaluate_every == 0)
                    if evaluate and due and self.step:
                        evaluation = self.agreement.by_main(lambda: keeper.evaluation_at(self.step))
                        if evaluation is None:
                            with signals.interruptible(alone), keeper.pace.pause():
                                evaluation = _as_floats(evaluate(self.teacher.backbone))
                            keeper.write_evaluation(self.step, evaluation)
                    if last:
                        break
                    try:
                        with signals.interruptible(alone), deaths_explained(self.feed.workers):
                            signals.raise_deferred()
                            crops = next(batches)
                    except Exception as error:
                        raise self._data_failure(error, keeper, metrics, signals) from error

                    with signals.undisturbed():
                        metrics = self._run_step(crops)
                        self.step += 1
                        keeper.add(metrics)
                        stopping = self.agreement.highest(signals.received)
                        last = self.step == total
                        saving = stopping or last or self.step % config.checkpoint_every == 0
                        logging = last or self.step % config.log_every == 0
                        if logging or saving or on_cpu:
                            keeper.check_finite(metrics, self.step)
                        if logging:
                            keeper.log(self.step, *self._beside_metrics(), self._signs)
                        if saving:
                            keeper.save(self._content())
                    if stopping and keeper.saved:
                        raise TrainingInterrupted(
                            stopping, self.step, total, keeper.saved, processes.is_main
                        )
                self.agreement.settle()
            except StopRequest:  # the signal came between two steps
                saved = self._save_finished(keeper, metrics)
                raise TrainingInterrupted(signals.received, self.step, total, saved) from None
            finally:
                _close(batches)
                del batches
        return TrainReport(
            self.step, keeper.pace.images_per_second, keeper.pace.seconds, evaluation
        )

    def _start(self, out: Path, resume: bool | FoundCheckpoint) -> FoundCheckpoint | None:
        """Restore what is to be resumed, and refuse to write over a run."""
        if not resume:
            if self.agreement.by_main(lambda: bool(checkpoint_files(out))):
                raise FileExistsError(
                    f"{out} holds a run already. Resume it (--resume), or choose another folder."
                )
            return None
        found = self.check_resumable(out) if isinstance(resume, bool) else resume
        if found.skipped and isinstance(resume, bool) and self.processes.is_main:
            said = found.describe(self.total_steps)
            warnings.warn(said, DamagedCheckpointWarning, stacklevel=3)
        restore_state(self.state, found.content)
        self.step = found.step
        return found

    def _data_failure(
        self,
        error: Exception,
        keeper: RunKeeper,
        metrics: StepMetrics | None,
        signals: SignalWatch,
    ) -> BaseException:
        """Save the finished steps, and return what to raise when no next batch comes."""
        if self.processes.world > 1:  # saving needs the others, who wait for this one's gradient
            return error
        saved = self._save_finished(keeper, metrics)
        if signals.received:  # a scheduler's signal goes to the workers too
            return TrainingInterrupted(signals.received, self.step, self.total_steps, saved)
        if not isinstance(error, LoaderError):
            return error
        return LoaderError(
            f"{error} The {self.step} finished steps are saved in {saved}; go on with --resume."
        )

    def _save_finished(self, keeper: RunKeeper, metrics: StepMetrics | None) -> Path:
        if metrics:
            keeper.check_finite(metrics, self.step)
        return keeper.save(self._content())

    def _batches(self) -> Iterator[Crops]:
        return self.feed.batches(self.transform, self.step, self.total_steps)

    def _run_step(self, crops: Crops) -> StepMetrics:
        device, seed, rank = self.processes.device, self.config.seed, self.processes.rank
        crops = moved(crops, device)
        torch.manual_seed(derive_seed(seed, "drop path", self.step, rank))
        masks = torch.Generator(device).manual_seed(derive_seed(seed, "masks", self.step, rank))
        self.state.student.train()
        settings, c = self.settings(self.step), self.config
        self._signs = {}
        due = health_due(
            self.step + 1, self.total_steps, log_every=c.log_every, health_every=c.health_every
        )
        return train_step(
            self.state, [normalize(crop) for crop in crops.images], self.policy, settings, masks,
            boxes=crops.boxes, flipped=crops.flipped,
            observe=lambda seen: self._signs.update(measure_health(self.state, seen, settings))
            if due else None,
        )  # fmt: skip

    def settings(self, step: int) -> StepSettings:
        """Return what the schedules say at a step."""
        c, total = self.config, self.total_steps
        assert c.momentum is not None
        assert c.warmup_epochs is not None
        assert c.warmup_patch_temp_epochs is not None
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
            patch_temp=linear_by_epoch(
                epoch, c.warmup_patch_temp_epochs, c.warmup_patch_temp, c.patch_temp
            ),
            progress=step / total,
            freeze_last_layer=step < c.freeze_last_layer * self._per_epoch,
            clip_grad=c.clip_grad,
            clip_mode=c.clip_mode,
            amp_dtype=self._amp_dtype(),
            accumulate=c.accumulate,
        )

    def _amp_dtype(self) -> torch.dtype | None:
        on_gpu = self.processes.device.type == "cuda" and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
        use = self.config.precision == "bfloat16" or (self.config.precision == "auto" and on_gpu)
        return torch.bfloat16 if use else None

    def _beside_metrics(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return what a line of metrics says besides them: before, and after."""
        settings = self.settings(self.step - 1)
        return {"epoch": (self.step - 1) / self._per_epoch}, {
            "lr": settings.lr,
            "weight_decay": settings.weight_decay,
            "momentum": settings.momentum,
            "teacher_temp": settings.teacher_temp,
        }

    # --- Keeping

    def _content(self) -> dict[str, Any]:
        return {"step": self.step, **state_content(self.state), **self._identity()}

    def _identity(self) -> dict[str, Any]:
        return identity(
            self.config,
            self.policy,
            self.images,
            self.feed.count,
            self.processes.world,
            precision="float32" if self._amp_dtype() is None else "bfloat16",
        )

    def check_resumable(self, out: Path | str) -> FoundCheckpoint:
        """Return the newest whole checkpoint in ``out``, refusing one this run cannot resume.

        Damaged ones are skipped; ``found.describe(trainer.total_steps)`` says which and why. With
        several processes all must call it, and all get the same one.

        Raises:
            FileNotFoundError: there is none.
            ValueError: none is whole, or it belongs to other settings.
        """
        found = find_checkpoint(Path(out), self.agreement)
        check_same(found.content, self._identity())
        return found


def _as_floats(values: Mapping[str, Any]) -> dict[str, float]:
    """Return what an evaluation found as plain numbers: JSON has no other ones."""
    plain = {}
    for name, value in values.items():
        try:
            plain[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"evaluate must return numbers by name; {name!r} is {value!r}."
            ) from error
    return plain


def _close(batches: Any) -> None:
    """End a generator of batches, and with it its workers; a loader's own iterator has no close."""
    close = getattr(batches, "close", None)
    if close:
        close()
