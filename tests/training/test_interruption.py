"""Stopped by a signal at any step, a run is saved, and goes on as if nothing had been."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import maskdistill as md
from maskdistill.data.loading import LoaderError
from maskdistill.training import Trainer, TrainingConfig
from maskdistill.training.checkpoint import latest_checkpoint
from maskdistill.training.interruption import (
    SIGNALS,
    SignalWatch,
    StopRequest,
    TrainingInterrupted,
)
from maskdistill.training.logging import read_metrics
from tests.training.conftest import TINY, Noise, assert_same

Build = Callable[..., Trainer]

# Everything that is drawn at random is: masks, their number, drop path, crops, the order.
RANDOM = md.AsymmetricMaskPolicy(md.RandomMasker(md.Uniform(0.1, 0.7)).sometimes(0.5))
CHANGES = {"drop_path": 0.5, "log_every": 5, "checkpoint_every": 4, "depth": 1}


def fit(trainer: Trainer, out: Path, **kwargs: Any) -> Trainer:
    trainer.fit(out, progress_bar=False, **kwargs)
    return trainer


@contextlib.contextmanager
def within_step(step: int, event: Callable[[], object]) -> Iterator[None]:
    """Let something happen in the middle of a step."""
    real = Trainer._run_step

    def eventful(self: Trainer, crops: Any) -> Any:
        if self.step + 1 == step:
            event()
        return real(self, crops)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_run_step", eventful)
        yield


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def lines(out: Path) -> list[dict[str, Any]]:
    """Everything in metrics.jsonl but times."""
    found = read_metrics(out / "metrics.jsonl")
    for line in found:
        line.pop("images_per_second", None)
    return found


def saved(out: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint, the optimiser's too."""
    tensors: dict[str, torch.Tensor] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        items: Any = ()
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list | tuple):
            items = enumerate(value)
        for key, part in items:
            collect(f"{name}.{key}", part)

    collect("", latest_checkpoint(out).content)
    assert len(tensors) > 100
    return tensors


def score(vit: md.MaskedViT) -> dict[str, float]:
    """Evaluate by a number that any change of the weights changes."""
    return {"score": float(sum(p.double().abs().sum() for p in vit.parameters()))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing stops."""
    out = tmp_path_factory.mktemp("whole")
    trainer = Trainer(TrainingConfig(**{**TINY, **CHANGES}), Noise(), RANDOM)
    fit(trainer, out, evaluate=score, evaluate_every=3)
    assert [line["step"] for line in lines(out) if "score" in line] == [3, 6, 9, 12]
    assert [line["step"] for line in lines(out) if "loss" in line] == [5, 10, 12]
    return out


@pytest.mark.parametrize(
    ("stops", "workers"), [([1, 2, 3, 4, 7, 9, 12], 0), ([6, 8, 11], 2)], ids=str
)
def test_stopped_at_any_step(
    build: Build, whole: Path, tmp_path: Path, stops: list[int], workers: int
) -> None:
    """Bit for bit: networks, optimiser, centre, and the lines of metrics but for times.

    The stops lie within epochs and within lines of metrics, at checkpoints and at evaluations.
    """
    for i, step in enumerate(stops):
        trainer = build(RANDOM, **CHANGES, workers=workers)
        with within_step(step, terminate), pytest.raises(TrainingInterrupted) as caught:
            fit(trainer, tmp_path, resume=i > 0, evaluate=score, evaluate_every=3)
        assert (caught.value.step, caught.value.exit_code) == (step, 143)
        assert latest_checkpoint(tmp_path).step == step, "nothing is lost"
        assert caught.value.checkpoint == latest_checkpoint(tmp_path).path
    report = build(RANDOM, **CHANGES, workers=workers).fit(
        tmp_path, resume=True, evaluate=score, evaluate_every=3, progress_bar=False
    )
    assert_same(saved(tmp_path), saved(whole))
    assert lines(tmp_path) == lines(whole)
    assert report.evaluation == {"score": lines(whole)[-1]["score"]}


def test_killed_without_a_warning(build: Build, whole: Path, tmp_path: Path) -> None:
    """What was done after the last checkpoint is done again, and is not recorded twice."""

    def kill() -> None:
        raise KeyboardInterrupt

    with within_step(8, kill), pytest.raises(KeyboardInterrupt):
        fit(build(RANDOM, **CHANGES), tmp_path, evaluate=score, evaluate_every=3)
    assert latest_checkpoint(tmp_path).step == 4
    fit(build(RANDOM, **CHANGES), tmp_path, resume=True, evaluate=score, evaluate_every=3)
    assert_same(saved(tmp_path), saved(whole))
    assert lines(tmp_path) == lines(whole)


# --- When a signal comes between two steps


def test_a_signal_ends_an_evaluation(build: Build, whole: Path, tmp_path: Path) -> None:
    """It may take longer than a scheduler waits; it is made when the run goes on."""

    def endless(vit: md.MaskedViT) -> dict[str, float]:
        if latest_checkpoint(tmp_path).step == 4:
            terminate()
            time.sleep(60)
        return score(vit)

    begin = time.monotonic()
    with pytest.raises(TrainingInterrupted, match="SIGTERM stopped the run after step 6 of 12"):
        fit(build(RANDOM, **CHANGES), tmp_path, evaluate=endless, evaluate_every=3)
    assert time.monotonic() - begin < 30
    fit(build(RANDOM, **CHANGES), tmp_path, resume=True, evaluate=score, evaluate_every=3)
    assert_same(saved(tmp_path), saved(whole))
    assert lines(tmp_path) == lines(whole)


class Stalling(Noise):
    """A disk that stops answering, when it has brought some images."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def __getitem__(self, index: int) -> Any:
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return super().__getitem__(index)


def test_a_signal_ends_the_wait_for_data(build: Build, tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(TrainingInterrupted) as caught:
        fit(build(data=Stalling(after=3 * 4 + 2)), tmp_path)
    assert time.monotonic() - begin < 30
    assert caught.value.step == latest_checkpoint(tmp_path).step == 3


# --- The handlers


def test_a_second_ctrl_c_stops_at_once(build: Build, tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # again is no reason to hurry
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it went on")

    with within_step(6, twice), pytest.raises(KeyboardInterrupt) as caught:
        fit(build(), tmp_path)
    assert not isinstance(caught.value, TrainingInterrupted)
    assert latest_checkpoint(tmp_path).step == 4


def test_handlers_come_back_and_those_of_others_stay(
    build: Build, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    heard: list[int] = []
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    ours = [signal.getsignal(number) for number in SIGNALS]
    try:
        with within_step(2, lambda: signal.raise_signal(signal.SIGUSR1)):
            fit(build(max_steps=3), tmp_path / "a")
        assert heard == [signal.SIGUSR1]
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with within_step(2, terminate):
            assert fit(build(max_steps=3), tmp_path / "b").step == 3
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for event, code in ((terminate, 143), (lambda: signal.raise_signal(signal.SIGINT), 130)):
            with within_step(2, event), pytest.raises(TrainingInterrupted) as caught:
                fit(build(max_steps=3), tmp_path / str(code))
            assert caught.value.exit_code == code
        assert [signal.getsignal(number) for number in SIGNALS] == ours
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert capfd.readouterr().err.count("stopping after this step, and saving") == 2


def test_beside_the_main_thread_signals_are_left_alone(build: Build, tmp_path: Path) -> None:
    seen: list[Any] = []
    before = [signal.getsignal(number) for number in SIGNALS]

    def look() -> None:
        seen.append([signal.getsignal(number) for number in SIGNALS])

    def work() -> None:
        with within_step(1, look):
            seen.append(fit(build(max_steps=1), tmp_path).step)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, 1]


def test_a_watch_alone() -> None:
    with SignalWatch(say=False) as watch:
        with watch.interruptible(False):
            terminate()
        assert watch.received == signal.SIGTERM
        with pytest.raises(StopRequest), watch.interruptible():
            raise AssertionError("it was noted before")


# --- A loader's worker that dies


@pytest.fixture
def kill_a_worker() -> Callable[[], None]:
    """As the kernel does when the memory is used up."""
    others = set(multiprocessing.active_children())

    def kill() -> None:
        worker, _ = set(multiprocessing.active_children()) - others
        assert worker.pid
        os.kill(worker.pid, signal.SIGKILL)
        worker.join(10)
        time.sleep(0.05)  # the signal of its death has come, in the middle of the step

    return kill


def test_a_worker_that_dies(
    build: Build, whole: Path, tmp_path: Path, kill_a_worker: Callable[[], None]
) -> None:
    """The running step is finished first: half a step would be saved otherwise."""
    step = 7
    with within_step(step, kill_a_worker), pytest.raises(LoaderError) as caught:
        fit(build(RANDOM, **CHANGES, workers=2), tmp_path, evaluate=score, evaluate_every=3)
    found = latest_checkpoint(tmp_path)
    assert step <= found.step <= step + 4, "batches that were ready may be used up first"
    assert "a loader worker died" in str(caught.value)
    assert "--workers (now 2)" in str(caught.value)
    assert f"The {found.step} finished steps are saved in {found.path}" in str(caught.value)
    fit(build(RANDOM, **CHANGES), tmp_path, resume=True, evaluate=score, evaluate_every=3)
    assert_same(saved(tmp_path), saved(whole))
    assert lines(tmp_path) == lines(whole)


def test_a_signal_to_the_workers_as_well(
    build: Build, tmp_path: Path, kill_a_worker: Callable[[], None]
) -> None:
    """As schedulers send it: it is no failure that the workers die of it."""

    def everybody() -> None:
        kill_a_worker()
        terminate()

    with within_step(3, everybody), pytest.raises(TrainingInterrupted):
        fit(build(workers=2), tmp_path)
    assert latest_checkpoint(tmp_path).step == 3


def test_workers_outlast_signals(build: Build, whole: Path, tmp_path: Path) -> None:
    """torchrun and schedulers signal the workers too, without whom no step would be finished."""
    others = set(multiprocessing.active_children())

    def from_elsewhere() -> None:
        workers = set(multiprocessing.active_children()) - others
        assert len(workers) == 2
        for name in ("TERM", "USR1", "INT"):
            subprocess.run(["kill", f"-{name}", *(str(w.pid) for w in workers)], check=True)
        time.sleep(0.2)
        assert all(worker.is_alive() for worker in workers)

    with within_step(7, from_elsewhere):
        fit(build(RANDOM, **CHANGES, workers=2), tmp_path, evaluate=score, evaluate_every=3)
    assert set(multiprocessing.active_children()) <= others
    assert_same(saved(tmp_path), saved(whole))


def test_a_hanging_worker_ends_after_a_while() -> None:
    """Even where it hangs in something that Python cannot interrupt."""
    code = """if True:
        import ctypes, sys
        from maskdistill.data import loading as workers
        workers.GRACE = 0.1
        workers.prepare_worker(0)
        print("ready", flush=True)
        ctypes.CDLL(None).pause.restype = None
        while True:
            ctypes.CDLL(None).pause()  # a signal wakes it, and it hangs again"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as worker:
        try:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
            for number in (signal.SIGINT, signal.SIGUSR1):
                worker.send_signal(number)
            with pytest.raises(subprocess.TimeoutExpired):
                worker.wait(0.5)
            worker.terminate()
            assert worker.wait(30) == 0
        finally:
            worker.kill()


def test_data_that_fail_save_the_finished_steps(build: Build, tmp_path: Path) -> None:
    class Failing(Noise):
        left = 3 * 4 + 2

        def __getitem__(self, index: int) -> Any:
            self.left -= 1
            if self.left < 0:
                raise ConnectionError("the file server is gone")
            return super().__getitem__(index)

    with pytest.raises(ConnectionError, match="file server"):
        fit(build(data=Failing()), tmp_path)
    assert latest_checkpoint(tmp_path).step == 3


# --- Two processes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_two_processes() -> None:
    """In a fresh interpreter: one that has run autograd's threads cannot be forked any more."""
    file = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
