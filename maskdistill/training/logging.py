"""What a run leaves behind while it runs: JSON lines, TensorBoard events, and an alarm."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from maskdistill.data.writing import write_durably
from maskdistill.evaluation import health
from maskdistill.masking.mask import PatchMask
from maskdistill.models.probing import evaluating
from maskdistill.policies import ViewPolicy
from maskdistill.training.checkpoint import (
    FoundCheckpoint,
    checkpoint_files,
    not_written,
    remove_unfinished,
    save_checkpoint,
)
from maskdistill.training.config import TrainingConfig
from maskdistill.training.distributed import Agreement, Processes
from maskdistill.training.interruption import TrainingInterrupted
from maskdistill.training.step import (
    StepMetrics,
    StepSettings,
    StepView,
    TrainState,
    rows_of,
    targets_of,
)

_OF_TRAINING = "images_per_second"  # lines of metrics have it, those of evaluations do not


@contextmanager
def warnings_kept(out: Path) -> Iterator[None]:
    """Write each warning inside to ``out/warnings.log`` too: of damaged images, a collapse.

    Those of forked workers are among them.

    Args:
        out: folder of the run.
    """
    show = warnings.showwarning

    def keep(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        with contextlib.suppress(OSError), (out / "warnings.log").open("a") as log:
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            log.write(f"{now} {category.__name__}: {message}\n")
        show(message, category, *where, **more)

    warnings.showwarning = keep
    try:
        yield
    finally:
        warnings.showwarning = show


class RunRecord:
    """Appends metrics to ``metrics.jsonl`` and to TensorBoard events in the same folder.

    Args:
        folder: of the run; must exist.
        step: steps that a resumed run has done, whose later lines are dropped; None is a new run.
        wandb: a run of Weights & Biases to log to as well, which is finished at the end. If it
            fails, that is warned of, and the record goes on without it.
    """

    def __init__(self, folder: Path, step: int | None = None, wandb: Any = None) -> None:
        self._wandb = wandb
        self.path = folder / "metrics.jsonl"
        there = [] if step is None else _read_lines(self.path)
        self._kept = [line for line in there if line["step"] <= (step or 0)]
        write_durably("".join(map(_line, self._kept)), self.path)
        self._events = _summary_writer(folder, step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Record the values of a step; in the lines, one that is not finite is null."""
        with self.path.open("a") as file:
            file.write(_line({"step": step, **values}))
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        self._tell_wandb(lambda run: run.log({"step": step, **values}))

    def _tell_wandb(self, tell: Callable[[Any], object]) -> None:
        """Let no failure of Weights & Biases stop training, or hide why it stopped."""
        if self._wandb is None:
            return
        try:
            tell(self._wandb)
        except Exception as error:
            self._wandb = None
            warnings.warn(
                f"Weights & Biases failed ({type(error).__name__}: {error}) and gets no more of "
                f"this run; {self.path} has every line.",
                UserWarning,
                stacklevel=3,
            )

    def evaluation_at(self, step: int) -> dict[str, float] | None:
        """Return what an earlier attempt found when it evaluated at a step, if it came to that."""
        for line in self._kept:
            if line["step"] == step and _OF_TRAINING not in line:
                found = {name: value for name, value in line.items() if name != "step"}
                return {name: math.nan if v is None else v for name, v in found.items()}
        return None

    def sync(self) -> None:
        """Flush the lines to the disk, so that a checkpoint's are there when it is."""
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())
        if self._events is not None:
            self._events.flush()

    def close(self, *, failed: bool = False) -> None:
        """Flush the TensorBoard events, and finish the run of Weights & Biases.

        Args:
            failed: the run did not come to its end.
        """
        if self._events is not None:
            self._events.close()
        self._tell_wandb(lambda run: run.finish(exit_code=int(failed)))


class MetricsWindow:
    """The metrics of the steps since the last line, and their mean.

    They are averaged over the processes row by row, so that it changes no bit of the mean whether
    a checkpoint came between.

    >>> window = MetricsWindow(world=1)
    >>> window.add((torch.tensor(2.0), torch.tensor(0.5)))
    >>> window.add((torch.tensor(4.0), torch.tensor(0.5)))
    >>> window.mean()
    [3.0, 0.5]

    Args:
        world: number of processes; all must call ``rows`` and ``mean`` at the same steps.
        rows: ``(n, metrics)``, what a checkpoint kept of an unfinished window.
    """

    def __init__(self, world: int, rows: Tensor | None = None) -> None:
        self._world = world
        self._done = [] if rows is None else list(rows)
        self._pending: list[Tensor] = []

    def add(self, metrics: Sequence[Tensor]) -> None:
        """Take the metrics of a step, scalars on the device, without waiting for them."""
        self._pending.append(torch.stack(tuple(metrics)))

    def rows(self) -> Tensor:
        """Return ``(n, metrics)`` on the CPU, means over the processes; this waits for them."""
        if self._pending:
            rows = mean_over_processes(torch.stack(self._pending), self._world)
            self._done += list(rows.cpu())
            self._pending.clear()
        return torch.stack(self._done) if self._done else torch.empty(0)

    def mean(self) -> list[float]:
        """Return the means over the steps and begin another window."""
        means: list[float] = self.rows().mean(dim=0).tolist()
        self._done.clear()
        return means


def mean_over_processes(values: Tensor, world: int) -> Tensor:
    """Return the means of what all processes have, which must all call this."""
    if world > 1:
        torch.distributed.all_reduce(values)
        values /= world
    return values


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ``metrics.jsonl``; one that a crash cut short is left out.

    So are values that were not finite, which the file has as null.
    """
    return [{k: v for k, v in line.items() if v is not None} for line in _read_lines(path)]


def _line(values: dict[str, Any]) -> str:
    """Write values as a line of JSON, which knows neither NaN nor infinity."""
    unknown = [k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)]
    return json.dumps({**values, **dict.fromkeys(unknown)}, allow_nan=False) + "\n"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    if not path.is_file():
        return lines
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _summary_writer(folder: Path, step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # without the train extra there are JSON lines alone
        return None
    # Events of the purged step and of later ones are hidden; what is at the checkpoint's stays.
    purge = None if step is None else step + 1
    return SummaryWriter(str(folder), purge_step=purge)  # type: ignore[no-untyped-call]


class Pace:
    """Measures how fast training goes, leaving out what is not training.

    Args:
        images_per_step: over all processes.
        steps: done before, in a run that is resumed.
        seconds: that those took.
    """

    def __init__(self, images_per_step: int, steps: int = 0, seconds: float = 0.0) -> None:
        self._images_per_step = images_per_step
        self._steps, self._lap_steps = steps, 0
        self._lap_start = time.perf_counter()
        self._start = self._lap_start - seconds

    def step(self) -> None:
        """Count a step."""
        self._steps += 1
        self._lap_steps += 1

    def lap(self) -> float:
        """Return images per second since the last lap, and begin another."""
        now = time.perf_counter()
        rate = self._lap_steps * self._images_per_step / max(now - self._lap_start, 1e-9)
        self._lap_start, self._lap_steps = now, 0
        return rate

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out the time inside the context."""
        begin = time.perf_counter()
        yield
        paused = time.perf_counter() - begin
        self._start += paused
        self._lap_start += paused

    @property
    def seconds(self) -> float:
        """Seconds of training."""
        return time.perf_counter() - self._start

    @property
    def images_per_second(self) -> float:
        """Images per second of all steps."""
        return self._steps * self._images_per_step / max(self.seconds, 1e-9)


class CollapseAlarm:
    """Says in words, once each, when training has collapsed in one of DINO's two ways.

    Uniform collapse pins the loss at ln(out_dim): teacher and student say "all prototypes alike".
    The other maps every image to one point. Either must last, since both pass early in training.

    Args:
        out_dim: number of prototypes, K.
        patience: consecutive observations that make an alarm.
    """

    def __init__(self, out_dim: int, patience: int = 20) -> None:
        self._uniform = math.log(out_dim)
        self._patience = patience
        self._pinned = 0
        self._narrow = 0

    @property
    def counts(self) -> list[int]:
        """How often in a row each sign has been seen; a checkpoint keeps and sets it."""
        return [self._pinned, self._narrow]

    @counts.setter
    def counts(self, counts: Sequence[int]) -> None:
        self._pinned, self._narrow = counts

    def observe(self, loss: float, feature_spread: float) -> str | None:
        """Return a warning, or None.

        Args:
            loss: mean of the last steps.
            feature_spread: of the teacher's embeddings, in [0, 1].
        """
        self._pinned = self._pinned + 1 if abs(loss / self._uniform - 1) < 0.002 else 0
        self._narrow = self._narrow + 1 if feature_spread < 0.02 else 0
        if self._pinned == self._patience:
            return (
                f"the loss has stayed at ln(out_dim) = {self._uniform:.3f}: teacher and student "
                "have collapsed to the uniform distribution and learn nothing. Try a lower "
                "teacher temperature (0.02 to 0.04), fewer prototypes (out_dim), a higher "
                "learning rate, or a lower momentum."
            )
        if self._narrow == self._patience:
            return (
                f"the teacher maps all images almost to one point (feature spread "
                f"{feature_spread:.4f}): the features have collapsed. Try centring with "
                "sinkhorn_knopp, a higher teacher temperature, or a lower learning rate."
            )
        return None


KEPT = "wandb.json"
"""The file in a run's folder that says which run of Weights & Biases is its own."""


def wandb_project(setting: str | None) -> str | None:
    """Return the project to log to: the setting, else that of the variable WANDB_PROJECT.

    >>> wandb_project("masks"), wandb_project("")
    ('masks', None)

    Args:
        setting: of the configuration; an empty one asks for no project whatever the variable says.
    """
    return (os.environ.get("WANDB_PROJECT") if setting is None else setting) or None


def import_wandb(project: str) -> Any:
    """Return the module.

    Args:
        project: that was asked for, by name.

    Raises:
        ImportError: it is not installed.
    """
    try:
        module = importlib.import_module("wandb")
    except ImportError as error:
        raise _not_installed(project) from error
    if not hasattr(module, "init"):  # a folder of that name, as its own runs leave one
        raise _not_installed(project)
    return module


def open_wandb(folder: Path, project: str, settings: dict[str, Any]) -> Any:
    """Begin a run of Weights & Biases, or go on with the one that the folder's run had begun.

    What is logged has ``step`` as its axis, so that the lines that a resumed run writes again are
    not refused for coming late.

    Args:
        folder: of the run, where its id is kept in ``wandb.json`` and its files in ``wandb/``.
        project: to log to.
        settings: shown as the run's configuration.

    Raises:
        ImportError: it is not installed.
        ConnectionError: it cannot begin, such as without a login.
    """
    wandb = import_wandb(project)
    kept = folder / KEPT
    known = _read(kept)
    known = known if known.get("project") == project else {}
    plain = {key: str(v) if isinstance(v, Path) else v for key, v in settings.items()}
    try:
        run = wandb.init(
            project=project,
            id=known.get("id"),
            resume="allow" if known else None,
            name=folder.absolute().name,
            dir=str(folder),
            config=plain,
        )
    except wandb.Error as error:
        raise ConnectionError(
            f"Weights & Biases cannot begin a run of the project {project!r}: {error} Log in by "
            "`wandb login`, keep it on this machine by WANDB_MODE=offline, or leave out wandb."
        ) from error
    write_durably(json.dumps({"project": project, "id": run.id}) + "\n", kept)
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _not_installed(project: str) -> ImportError:
    return ImportError(
        f"the project {project!r} of Weights & Biases was asked for (by the setting wandb or the "
        "variable WANDB_PROJECT), but the package is not installed: pip install wandb. The setting "
        'wandb="" leaves it out.'
    )


PREFIX = "health/"
"""Before the names of the signs in a line: an evaluation has an effective rank of its own."""


def health_due(step: int, last: int, *, log_every: int, health_every: int) -> bool:
    """Say whether the line of metrics after a step has signs of health in it.

    >>> [step for step in range(1, 81) if health_due(step, 80, log_every=10, health_every=25)]
    [30, 50, 80]

    They are in the first line at or after each multiple of ``health_every``, and in the last line;
    the steps before do not matter, so that a resumed run agrees.

    Args:
        step: steps done by then.
        last: steps of the whole run.
        log_every: steps between two lines.
        health_every: steps between two looks; 0 is never.
    """
    if not health_every:
        return False
    return step == last or (step % log_every == 0 and step % health_every < log_every)


@torch.no_grad()
def measure_health(state: TrainState, seen: StepView, settings: StepSettings) -> dict[str, Tensor]:
    """Return the signs of health of a step, scalar tensors by name; nothing is changed or drawn.

    >>> signs = {}
    >>> look = lambda seen: signs.update(measure_health(state, seen, settings))
    >>> train_step(state, crops, policy, settings, observe=look)  # doctest: +SKIP

    Of the teacher's targets: ``kl_to_uniform`` per image and ``kl_of_mean`` of their mean, the
    ``prototype_share`` and ``prototype_perplexity`` of `health.prototype_usage`. Of its features:
    ``effective_rank`` of the first global view, ``alignment`` of two views and ``uniformity``.
    Of the student, where masks hide something from it: ``masked_loss`` and ``unmasked_loss``, which
    are DINO's loss with these masks and without any, both without drop path.

    It takes two forwards of the student and a singular value decomposition, for which an
    accelerator makes the host wait. With several processes all must call it, and each gets the
    signs of its own part of the batch.

    Args:
        state: as it is before the step.
        seen: what the step gives to ``observe``.
        settings: of the step.

    Returns:
        Signs by name; NaN in the place of those of features or targets that are not finite.
    """
    signs = _teacher_signs(seen)
    if any(mask is not None for mask in seen.masks):
        nothing = [None] * len(seen.crops)
        with evaluating(state.student_net), _as_written(state.student_net):
            signs["masked_loss"] = _loss(state, seen, settings, seen.masks)
            signs["unmasked_loss"] = _loss(state, seen, settings, nothing)
    return {name: value.float() for name, value in signs.items()}


def _teacher_signs(seen: StepView) -> dict[str, Tensor]:
    batch = seen.crops[0].shape[0]
    targets, features = seen.targets, seen.teacher.features
    finite = bool(torch.isfinite(features).all() & torch.isfinite(targets).all())
    if not finite:  # what does not depend on the numbers: the names
        features, targets = torch.zeros_like(features), torch.ones_like(targets)
        targets = targets / targets.shape[1]
    usage = health.prototype_usage(targets)
    signs = {
        "kl_to_uniform": health.kl_to_uniform(targets),
        "kl_of_mean": health.kl_to_uniform(targets.mean(dim=0, keepdim=True)),
        "prototype_share": usage.share,
        "prototype_perplexity": usage.perplexity,
        "effective_rank": health.effective_rank(features[:batch]),
    }
    if len(features) > batch:
        signs["alignment"] = health.alignment(features[:batch], features[batch : 2 * batch])
    if batch > 1:
        signs["uniformity"] = health.uniformity(features[:batch])
    return signs if finite else {name: value * math.nan for name, value in signs.items()}


def _loss(
    state: TrainState,
    seen: StepView,
    settings: StepSettings,
    masks: Sequence[PatchMask | None],
) -> Tensor:
    """Return the student's loss on its views, as it is now, under some masks."""
    crops, net = seen.crops, state.student_net
    between_views, _ = state.objective.terms()[state.between_views]
    losses = []
    for part in seen.parts:
        # A context of its own: autocast keeps the weights that it has cast, here without gradient.
        with torch.autocast(
            crops[0].device.type, settings.amp_dtype, enabled=settings.amp_dtype is not None
        ):
            logits = net(rows_of(crops, part), rows_of(masks, part)).logits
        own = targets_of(seen.targets, part, crops[0].shape[0])
        losses.append(between_views(logits, own, views=len(crops)))
    return torch.stack(losses).mean()


def _as_written(net: nn.Module) -> Any:
    """Run compiled blocks as they are written: this is rare, and compiling again takes long."""
    if any(getattr(module, "_compiled_call_impl", None) for module in net.modules()):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


LINES_EVERY = 30.0
"""Seconds between two lines about the progress where there is no terminal to show a bar on."""


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient became NaN or infinite, so training was stopped."""


class CollapseWarning(UserWarning):
    """Training goes on but has collapsed."""


class RunKeeper:
    """Writes what a run leaves in its folder; only the main process writes, but all must call.

    Args:
        out: folder of the run, which the main process holds already.
        config: of the run, resolved.
        processes: of the run.
        agreement: among them.
        policy: of masks, as Weights & Biases shows it.
        found: the checkpoint that the run goes on from; None starts anew.
        steps: of the whole run.
        show: a progress bar.
    """

    def __init__(
        self,
        out: Path,
        config: TrainingConfig,
        processes: Processes,
        agreement: Agreement,
        policy: ViewPolicy,
        found: FoundCheckpoint | None,
        *,
        steps: int,
        show: bool = True,
    ) -> None:
        self.out, self.saved = out, found.path if found else None
        self._saved_step = found.step if found else -1
        self._keep, self._milestones = config.keep_checkpoints, config.milestone_every
        self._agreement, self._is_main = agreement, processes.is_main
        self._world = processes.world
        content: dict[str, Any] = found.content if found else {}
        step = content.get("step", 0)
        self._record: RunRecord | None = None
        settings = {**dataclasses.asdict(config), "policy_used": repr(policy)}
        agreement.by_main(lambda: self._open(found.step if found else None, settings))
        self.pace = Pace(config.batch_size * processes.world, step, content.get("seconds", 0.0))
        self._names: list[str] = []
        self._window = MetricsWindow(processes.world, content.get("window"))
        self._alarm = CollapseAlarm(config.out_dim or 0)
        self._alarm.counts = content.get("alarm", [0, 0])
        self._bar = tqdm(
            total=steps,
            initial=step,
            unit="step",
            desc="training",
            # None shows it on a terminal alone: a file would get a line without an end.
            disable=None if self._is_main and show else True,
            dynamic_ncols=True,
        )
        self._lines = self._is_main and show and self._bar.disable
        self._total, self._said = steps, time.monotonic()

    def _open(self, step: int | None, settings: dict[str, Any]) -> None:
        remove_unfinished(self.out)
        project = wandb_project(settings["wandb"])
        run = open_wandb(self.out, project, settings) if project else None
        self._record = RunRecord(self.out, step, run)

    def __enter__(self) -> RunKeeper:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        if self._record:
            stopped = kind is not None and issubclass(kind, TrainingInterrupted)
            self._record.close(failed=kind is not None and not stopped)

    def add(self, metrics: StepMetrics) -> None:
        """Take the metrics of a step that is done; waits for nothing."""
        named = metrics.named()
        self._names = list(named)
        self._window.add(list(named.values()))
        self.pace.step()
        self._bar.update()

    def check_finite(self, metrics: StepMetrics, step: int) -> None:
        """Stop all processes alike if the loss or the gradient of any is no number.

        An infinite gradient spoils the weights before the loss shows it.

        Raises:
            NonFiniteLossError: names the step, the process and the last good checkpoint.
        """
        values = self._agreement.gather([float(metrics.loss), float(metrics.grad_norm)])
        for rank, pair in enumerate(values):
            for name, value in zip(("loss", "gradient norm"), pair, strict=True):
                if math.isfinite(value):
                    continue
                where = f" in process {rank} of {len(values)}" if len(values) > 1 else ""
                there = checkpoint_files(self.out)
                kept = (
                    f"The last good checkpoint is {there[0]}"
                    if there
                    else "No checkpoint had been written yet"
                )
                raise NonFiniteLossError(
                    f"the {name} became {value} at step {step}{where}; training was stopped. "
                    f"{kept}. Try a lower learning rate (--lr), a longer warm-up, or --precision "
                    "float32."
                )

    def log(
        self,
        step: int,
        before: dict[str, float],
        after: dict[str, float],
        signs: dict[str, Tensor] | None = None,
    ) -> None:
        """Write a line of metrics: the means since the last line, between other values.

        Args:
            step: steps done.
            before: values that come first in the line.
            after: values that come after the means.
            signs: of health at this step, scalar tensors; their means over the processes come last.

        Raises:
            CheckpointError: in all processes, if it could not be written.
        """
        means = self._window.mean()
        values = {**before, **dict(zip(self._names, means, strict=True)), **after}
        values["images_per_second"] = self.pace.lap()
        if signs:
            means = mean_over_processes(torch.stack(list(signs.values())), self._world).tolist()
            values |= {PREFIX + name: mean for name, mean in zip(signs, means, strict=True)}
        self._bar.set_postfix_str(
            f"loss {values['loss']:.3f}, {values['images_per_second']:.0f} images/s"
        )
        if self._lines and (step == self._total or time.monotonic() - self._said >= LINES_EVERY):
            self._said = time.monotonic()
            print(
                f"step {step} of {self._total}: loss {values['loss']:.3f}, "
                f"{values['images_per_second']:.0f} images/s",
                flush=True,
            )
        self._agreement.by_main(lambda: self._write_line(step, values))
        between_views = values.get("loss_dino", values["loss"])
        warning = self._alarm.observe(between_views, values["feature_spread"])
        if warning and self._is_main:
            warnings.warn(f"step {step}: {warning}", CollapseWarning, stacklevel=3)

    def save(self, content: dict[str, Any]) -> Path:
        """Write a checkpoint, unless there is one of this step, and return where it is.

        Raises:
            CheckpointError: in all processes, if it could not be written.
        """
        content["seconds"] = self.pace.seconds
        content["window"], content["alarm"] = self._window.rows(), self._alarm.counts
        if self.saved is None or content["step"] != self._saved_step:
            with self.pace.pause():
                self.saved = self._agreement.by_main(lambda: self._write(content))
            self._saved_step = content["step"]
        return self.saved

    def _write(self, content: dict[str, Any]) -> Path:
        if self._record:
            self._record.sync()
        return save_checkpoint(content, self.out, keep=self._keep, milestone_every=self._milestones)

    def evaluation_at(self, step: int) -> dict[str, float] | None:
        """Return the evaluation that the run made at this step before it was resumed, if any."""
        return self._record.evaluation_at(step) if self._record else None

    def write_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Write a line with what an evaluation found, the main process's numbers.

        Raises:
            CheckpointError: in all processes, if it could not be written.
        """
        self._agreement.by_main(lambda: self._write_line(step, values))

    def _write_line(self, step: int, values: dict[str, float]) -> None:
        assert self._record, "only the main process writes"
        try:
            self._record.write(step, values)
        except OSError as error:  # lines come oftener, and meet a full disk first
            raise not_written(error, f"the metrics of step {step}", self.out) from error
