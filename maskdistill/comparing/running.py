"""Runs the grid of a study: skips what is done, goes on with what was begun, several at once."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Literal, NamedTuple

from maskdistill.comparing.one_run import (
    HELD,
    RunRequest,
    check_unchanged,
    data_identity,
    folder_of,
    is_done,
    part_done,
    write_identity,
)
from maskdistill.comparing.study import Cell, Study
from maskdistill.data.loading import cores
from maskdistill.policies import ViewPolicy
from maskdistill.training.checkpoint import refuse_if_held

State = Literal["done", "failed", "interrupted", "elsewhere", "missing"]


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
    _check_pickled(study)
    outcomes: dict[Cell, Outcome] = {}
    left = []
    for cell in study.cells():
        if is_done(study, cell, folder_of(out, cell)):
            outcomes[cell] = Outcome("done")
            ended(cell, outcomes[cell])
        else:
            left.append(cell)
    if not left:
        return outcomes
    grid = _Grid(study, out, images, study_file, devices)
    with ThreadPoolExecutor(len(devices)) as pool, _signals() as came:
        futures = {pool.submit(grid.run, cell): cell for cell in left}
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            if came and not grid.stopped:
                grid.stop(came[0])
            if came[1:].count(signal.SIGINT):  # once more: at once, and unsaved
                grid.kill()
            for future in done:
                cell = futures[future]
                outcomes[cell] = future.result()
                ended(cell, outcomes[cell])
            progress(len(outcomes) + grid.parts_done())
    if grid.stopped:
        raise StudyInterrupted(grid.stopped)
    return {cell: outcomes[cell] for cell in study.cells()}


class _Grid:
    """The processes of a study's runs, each started and awaited by a thread."""

    def __init__(
        self,
        study: Study,
        out: Path,
        images: str,
        study_file: Path | None,
        devices: Sequence[str],
    ) -> None:
        self.study, self.out, self.images, self.study_file = study, out, images, study_file
        self.threads = max(cores() // len(devices), 1)  # of a run
        self.free: queue.SimpleQueue[str] = queue.SimpleQueue()
        for device in devices:
            self.free.put(device)
        self.running: dict[Cell, subprocess.Popen[bytes]] = {}
        self.lock = threading.Lock()
        self.stopped = 0  # the signal that stopped the grid

    def run(self, cell: Cell) -> Outcome:
        """Run one cell in a process of its own on the next free device; called in a thread."""
        device = self.free.get()
        try:
            return self._run(cell, device)
        finally:
            self.free.put(device)

    def _run(self, cell: Cell, device: str) -> Outcome:
        folder = folder_of(self.out, cell)
        try:
            refuse_if_held(folder)
        except BlockingIOError as error:
            return Outcome("elsewhere", str(error))
        write_identity(self.study, cell, self.images, folder)
        # A run's loader keeps to its share of the cores, as its threads do.
        request = RunRequest(self.study, cell, folder, device, min(max(self.threads - 1, 0), 8))
        # So many threads, where the user chose none.
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        start = time.perf_counter()
        log_path = folder / "log.txt"
        with log_path.open("ab") as log:
            begun = log.tell()
            with self.lock:
                if self.stopped:
                    return Outcome("interrupted", "not begun")
                # A session of its own: Ctrl-C reaches it once, through stop().
                process = subprocess.Popen(
                    run_command(self.study_file), stdin=subprocess.PIPE, stdout=log, stderr=log,
                    env={**threads, **os.environ}, start_new_session=True,
                )  # fmt: skip
                self.running[cell] = process
            with contextlib.suppress(BrokenPipeError):  # it died at once; its log says why
                process.communicate(pickle.dumps(request))
            code = process.wait()
        with self.lock:
            self.running.pop(cell, None)
        seconds = time.perf_counter() - start
        if code == 0:
            return Outcome("done", seconds=seconds)
        if self.stopped:
            return Outcome("interrupted", "saved; the same command goes on", seconds)
        said = _why(code, log_path, begun)
        if code == HELD:
            return Outcome("elsewhere", said, seconds)
        return Outcome("failed", f"{said} ({log_path})", seconds)

    def parts_done(self) -> float:
        """Return the shares of the running runs that are done, summed."""
        with self.lock:
            cells = list(self.running)
        return sum(
            part_done(folder_of(self.out, cell), self.study.config(cell.policy, cell.seed))
            for cell in cells
        )

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


def run_command(study_file: Path | None) -> list[str]:
    """Return the command of a run's process, which reads a `RunRequest`."""
    command = [sys.executable, "-m", "maskdistill.comparing.one_run"]
    return command if study_file is None else [*command, str(study_file)]


def _check_pickled(study: Study) -> None:
    """Refuse policies that the processes of the runs could not be given."""
    for name, own in study.policies.items():
        if not isinstance(own, ViewPolicy):
            continue
        try:
            found = pickle.dumps(own)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"the policy {name!r} cannot be given to another process ({error}). Define "
                "its classes at the top of the study's file, or of a module."
            ) from None
        if b"__main__" in found:
            raise ValueError(
                f"the policy {name!r} has a class of the script that is running, which "
                "other processes do not know. Put the class into a module, or the study into a "
                "file for `maskdistill compare`."
            )


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
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if line.startswith("error: ")]
    return (errors or said or [f"exit code {code}"])[-1]


# --- Devices


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
