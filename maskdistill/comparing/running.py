"""Runs the grid of a study: skips what is done, goes on with what was begun, several at once."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from maskdistill.comparing.one_run import Order, is_done, read_json, with_folder
from maskdistill.comparing.study import Cell, Study
from maskdistill.data.writing import write_durably
from maskdistill.training.checkpoint import checkpoint_files, refuse_if_held
from maskdistill.training.job import JobConfig, open_images

RUNS = "runs"
CELL = "cell.json"
# These change where and how fast a run computes, and its result by rounding alone.
_FREE = {
    "out", "resume", "auto_resume", "device", "workers", "views", "log_every", "checkpoint_every",
    "keep_checkpoints", "milestone_every", "accumulate", "compile", "sharding", "data", "shards",
    "val_shards", "health_every", "max_damaged", "knn_train", "knn_val", "evaluations", "wandb",
}  # fmt: skip


def folder_of(out: Path, cell: Cell) -> Path:
    """Return the folder of a run of a study in ``out``."""
    return out / RUNS / cell.name


def orders(study: Study, images: str = "") -> dict[Cell, Order]:
    """Return what is to be done for each run of a study.

    Args:
        study: whose runs.
        images: what tells its data from others, as `data_identity` does.
    """
    return {
        cell: Order(
            *study.recipe(cell.policy, cell.seed),
            tuple(study.measures),
            random_weights=cell.policy == study.baseline,
            images=images,
        )
        for cell in study.cells()
    }


def data_identity(study: Study) -> str:
    """Return what tells a study's images from others, wherever they lie: their classes, in order.

    Raises:
        ValueError: data that cannot be read.
        OSError: a file that is not there.
    """
    if not study.real:
        return ""  # the scenes are all in the settings
    cell = study.cells()[0]
    config = study.config(cell.policy, cell.seed)
    images, _ = open_images(config, config.image_size)
    hashed = hashlib.sha256()
    for labels in (images.train_labels, images.val_labels):
        hashed.update(f"{len(labels)} ".encode() + np.asarray(labels, dtype="<i8").tobytes())
    return hashed.hexdigest()[:16]


def check_unchanged(study: Study, out: Path, images: str | None = None) -> None:
    """Refuse a study whose runs in ``out`` were begun with other settings.

    A run that ended before it had a checkpoint was not begun.

    Args:
        study: whose runs.
        out: its folder.
        images: what tells its data from others; None does not compare that.

    Raises:
        ValueError: names what was different, of the first such run.
    """
    for cell, order in orders(study, images or "").items():
        folder = folder_of(out, cell)
        path = folder / CELL
        begun = checkpoint_files(folder) or (folder / "summary.json").exists()
        if not path.is_file() or not begun:
            continue
        was, now = read_json(path), identity(order)
        if not was:
            raise ValueError(f"{path} is damaged. Remove {folder} to do it anew.")
        if images is None:
            now.pop("images")
        changed = [
            f"{name} was {was.get(name)!r} and is {now[name]!r}"
            for name in now
            if was.get(name) != now[name]
        ]
        if changed:
            raise ValueError(
                f"the run in {folder} was begun with other settings: {'; '.join(changed)}. Choose "
                "another folder by --out, or remove that one to do it anew."
            )


def identity(order: Order) -> dict[str, Any]:
    """Return what a run must agree on with an earlier one in its folder, as JSON knows it."""
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(order.config).items()
        if name not in _FREE
    }
    # The policy is what is drawn, however the settings put it; data may be moved.
    for name in ("policy", "masker", "preset"):
        values.pop(name)
    return {**values, "policy": repr(order.policy), "images": order.images}


State = Literal["done", "failed", "interrupted", "elsewhere", "missing"]

_POLL = 0.5


class Outcome(NamedTuple):
    """How a run of the grid ended.

    Attributes:
        state: done, failed, interrupted, elsewhere (another process works on it) or missing.
        message: in a sentence, why it is not done.
        seconds: that it took now; 0 where it was done before.
    """

    state: State
    message: str = ""
    seconds: float = 0.0


class StudyInterrupted(KeyboardInterrupt):
    """A signal stopped the grid; all runs are saved, and the same command goes on.

    Attributes:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"{signal.Signals(signum).name} stopped the study; its runs are saved.")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """What a shell calls this end."""
        return 128 + self.signum


def devices_at_hand(jobs: int | None = None, devices: Sequence[str] = ()) -> list[str]:
    """Return the devices of the runs that go at once, one entry for each.

    >>> devices_at_hand(devices=["cuda:0", "cuda:1"])
    ['cuda:0', 'cuda:1']
    >>> devices_at_hand(jobs=2, devices=["cpu"])
    ['cpu', 'cpu']

    Args:
        jobs: runs at a time; None is one on each GPU, and on a CPU one per core, at most 4.
        devices: to use, in turns; none are all GPUs, or the CPU.

    Raises:
        ValueError: no jobs at all.
    """
    import torch

    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs must be an int >= 1; got {jobs}.")
    names = list(devices)
    if not names and torch.cuda.is_available():
        names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if names and names != ["cpu"]:
        return [names[i % len(names)] for i in range(jobs or len(names))]
    # Small models gain more from a core each than from several cores for one: on two cores two
    # runs of the scenes side by side take 0.73 of the time of one after the other.
    return ["cpu"] * (jobs or min(cores(), 4))


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass
class _Grid:
    out: Path
    study_file: Path | None
    threads: int
    free: queue.SimpleQueue[str]
    running: dict[Cell, subprocess.Popen[bytes]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: int = 0  # the signal that stopped the grid

    def run(self, cell: Cell, order: Order) -> Outcome:
        """Run one cell in a process of its own on the next free device; called in a thread."""
        device = self.free.get()
        try:
            return self._run(cell, with_folder(order, folder_of(self.out, cell), device))
        finally:
            self.free.put(device)

    def _run(self, cell: Cell, order: Order) -> Outcome:
        folder = folder_of(self.out, cell)
        try:
            refuse_if_held(folder)
        except BlockingIOError as error:
            return Outcome("elsewhere", str(error))
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(json.dumps(identity(order), indent=1) + "\n", folder / CELL)
        start = time.perf_counter()
        path = folder / "log.txt"
        with path.open("ab") as log:
            begun = log.tell()
            with self.lock:
                if self.stopped:
                    return Outcome("interrupted", "not begun")
                # A session of its own: Ctrl-C reaches it once, through stop().
                process = subprocess.Popen(
                    worker_command(self.study_file), stdin=subprocess.PIPE, stdout=log, stderr=log,
                    env=_environment(self.threads), start_new_session=True,
                )  # fmt: skip
                self.running[cell] = process
            with contextlib.suppress(BrokenPipeError):  # it died at once; its log says why
                process.communicate(pickle.dumps(order))
            code = process.wait()
        with self.lock:
            self.running.pop(cell, None)
        seconds = time.perf_counter() - start
        if code == 0:
            return Outcome("done", seconds=seconds)
        if self.stopped:
            return Outcome("interrupted", "saved; the same command goes on", seconds)
        said = _why(code, path, begun)
        if "is in use:" in said:
            return Outcome("elsewhere", said, seconds)
        return Outcome("failed", f"{said} ({path})", seconds)

    def stop(self, signum: int) -> None:
        """Pass a signal on to all runs, which then save themselves and end."""
        with self.lock:
            self.stopped = signum
            for process in self.running.values():
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End all runs at once; what they had saved stays."""
        with self.lock:
            for process in self.running.values():
                process.kill()


def _environment(threads: int) -> dict[str, str]:
    """Return this process's environment with so many CPU threads, where the user chose none."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    return {**dict.fromkeys(names, str(threads)), **os.environ}


def worker_command(study_file: Path | None) -> list[str]:
    """Return the command of the process of a run, which reads its order."""
    command = [sys.executable, "-m", "maskdistill.comparing.one_run"]
    return command if study_file is None else [*command, str(study_file)]


def run_grid(
    study: Study,
    out: Path,
    *,
    study_file: Path | None = None,
    devices: Sequence[str] = ("cpu",),
    ended: Callable[[Cell, Outcome], None] = lambda cell, outcome: None,
    progress: Callable[[float], None] = lambda done: None,
) -> dict[Cell, Outcome]:
    """Run what is not done of a study, several at once, and say how each run ended.

    A run that fails does not keep the others from running. The same call on another machine that
    shares the folder takes other runs.

    Args:
        study: to run.
        out: its folder; ``out/runs/POLICY-seedN`` are the runs'.
        study_file: Python file whose classes the study uses, if any.
        devices: one entry for each run at a time.
        ended: called when a run has ended, or was done before.
        progress: called twice a second with the number of runs that are done, parts included.

    Raises:
        ValueError: runs in ``out`` were begun with other settings, data that cannot be read, or
            a policy that cannot be given to other processes; nothing has been run.
        StudyInterrupted: SIGINT, SIGTERM, SIGUSR1 or SIGHUP came, and the runs are saved; a second
            SIGINT ends them unsaved.
    """
    images = data_identity(study)
    check_unchanged(study, out, images)
    wanted = orders(study, images)
    _check_pickled(wanted)
    outcomes: dict[Cell, Outcome] = {}
    for cell, order in wanted.items():
        if is_done(folder_of(out, cell), order):
            outcomes[cell] = Outcome("done")
            ended(cell, outcomes[cell])
    left = [cell for cell in wanted if cell not in outcomes]
    if not left:
        return outcomes
    grid = _Grid(out, study_file, max(cores() // len(devices), 1), queue.SimpleQueue())
    for device in devices:
        grid.free.put(device)
    with ThreadPoolExecutor(len(devices)) as pool, _signals() as came:
        futures: dict[Future[Outcome], Cell] = {
            pool.submit(grid.run, cell, _placed(wanted[cell], grid.threads)): cell for cell in left
        }
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=_POLL, return_when=FIRST_COMPLETED)
            if came and not grid.stopped:
                grid.stop(came[0])
            if came[1:].count(signal.SIGINT):  # once more: at once, and unsaved
                grid.kill()
            for future in done:
                cell = futures[future]
                outcomes[cell] = future.result()
                ended(cell, outcomes[cell])
            with grid.lock:
                now = list(grid.running)
            progress(len(outcomes) + sum(part_done(folder_of(out, c), wanted[c]) for c in now))
    if grid.stopped:
        raise StudyInterrupted(grid.stopped)
    return {cell: outcomes[cell] for cell in wanted}


def _check_pickled(wanted: dict[Cell, Order]) -> None:
    """Refuse policies that the processes of the runs could not be given.

    Raises:
        ValueError: names the policy.
    """
    for cell, order in wanted.items():
        try:
            found = pickle.dumps(order)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"the policy {cell.policy!r} cannot be given to another process ({error}). Define "
                "its classes at the top of the study's file, or of a module."
            ) from None
        if b"__main__" in found:
            raise ValueError(
                f"the policy {cell.policy!r} has a class of the script that is running, which "
                "other processes do not know. Put the class into a module, or the study into a "
                "file for `maskdistill compare`."
            )


def part_done(folder: Path, order: Order) -> float:
    """Return the share of a run's training that its log of metrics shows."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(file.tell() - 4096, 0))
            last = json.loads(file.read().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return 0.0
    config: JobConfig = order.config
    shares = [last.get("epoch", 0.0) / config.epochs]
    if config.max_steps:
        shares.append(last.get("step", 0) / config.max_steps)
    return float(min(max(shares), 0.99))


def _placed(order: Order, threads: int) -> Order:
    """Return an order whose loader keeps to its share of the cores, as its threads do."""
    if order.config.workers is not None:
        return order
    config = dataclasses.replace(order.config, workers=min(max(threads - 1, 0), 8))
    return dataclasses.replace(order, config=config)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Note signals that ask for an end, in their order, while the context lasts.

    The handler does nothing else: it may run at any place of the main thread.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {
        number: signal.signal(number, lambda signum, frame: came.append(signum))
        for number in numbers
        if signal.getsignal(number) is not signal.SIG_IGN  # such as SIGHUP under nohup
    }
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _why(code: int, log: Path, start: int) -> str:
    """Say why a run ended, from its exit code and what it wrote since its start."""
    if code < 0:
        name = signal.Signals(-code).name
        memory = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return f"killed by {name}{memory}"
    try:
        with log.open("rb") as file:
            file.seek(start)
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        lines = []
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if line.startswith("error: ")]
    return (errors or said or [f"exit code {code}"])[-1]
