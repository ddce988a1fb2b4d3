"""The grid: what is done is skipped, what fails does not stop the rest, signals save."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import maskdistill as md
from maskdistill.comparing import Cell, Outcome, Study, StudyInterrupted, running
from maskdistill.comparing.one_run import check_unchanged, folder_of
from maskdistill.comparing.running import devices_at_hand, run_grid

# Stands in for a run: says what it is, waits where it is told to, and ends as it is told to.
WORKER = """
import os, signal, sys, time
sys.stdin.buffer.read()
print("a run of", os.environ["OMP_NUM_THREADS"], "threads")
where = {folder!r}
with open(where + "/began", "a") as file:
    print(time.time(), file=file, flush=True)
def stop(*_):
    open(where + "/saved", "a").write("x")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
end = time.time() + {seconds}
while time.time() < end:
    time.sleep(0.02)
with open(where + "/ended", "a") as file:
    print(time.time(), file=file)
print({last!r})
sys.exit({code})
"""
STUDY = Study({"none": {"policy": "none"}, "random": {}}, seeds=(0, 1))


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    options: dict[str, Any] = {"seconds": 0.0, "last": "error: no luck", "code": 0}

    def command(study_file: Path | None) -> list[str]:
        code = WORKER.format(folder=str(tmp_path), **options)
        return [sys.executable, "-c", code]

    monkeypatch.setattr(running, "run_command", command)
    return options


def begun(study: Study, out: Path) -> None:
    """Run the grid, and leave what a run leaves that came to its end."""
    run_grid(study, out)
    for cell in study.cells():
        (folder_of(out, cell) / "summary.json").write_text("{}")


def times(folder: Path, name: str) -> list[float]:
    return [float(line) for line in (folder / name).read_text().split()]


def test_each_run_has_its_folder_its_settings_and_its_log(
    tmp_path: Path, worker: dict[str, Any]
) -> None:
    told: list[tuple[Cell, Outcome]] = []
    outcomes = run_grid(STUDY, tmp_path / "s", ended=lambda *of: told.append(of))
    assert [outcome.state for outcome in outcomes.values()] == ["done"] * 4
    assert list(outcomes) == STUDY.cells()
    assert {cell for cell, _ in told} == set(STUDY.cells())
    folder = tmp_path / "s/runs/random-seed1"
    assert "a run of" in (folder / "log.txt").read_text()
    assert json.loads((folder / "cell.json").read_text())["seed"] == 1


def test_runs_go_at_once_where_there_are_devices(tmp_path: Path, worker: dict[str, Any]) -> None:
    worker["seconds"] = 1.0
    run_grid(STUDY, tmp_path / "s", devices=("cpu", "cpu"))
    began, ended = sorted(times(tmp_path, "began")), sorted(times(tmp_path, "ended"))
    assert began[1] < ended[0]  # the second began before the first ended
    assert began[2] >= ended[0] - 0.05  # and the third waited for a device


def test_a_failure_is_told_and_does_not_stop_the_rest(
    tmp_path: Path, worker: dict[str, Any]
) -> None:
    worker["code"] = 1
    outcomes = run_grid(STUDY, tmp_path / "s")
    assert [outcome.state for outcome in outcomes.values()] == ["failed"] * 4
    message = outcomes[Cell("none", 0)].message
    assert "no luck" in message
    assert "none-seed0/log.txt" in message


def test_a_run_that_another_process_works_on_is_left_to_it(
    tmp_path: Path, worker: dict[str, Any]
) -> None:
    out = tmp_path / "s"
    holder = subprocess.Popen(
        [sys.executable, "-c",
         "import sys, time; from pathlib import Path\n"
         "from maskdistill.training.checkpoint import hold_folder\n"
         "with hold_folder(Path(sys.argv[1])):\n"
         "    print('held', flush=True); time.sleep(60)",
         str(out / "runs/none-seed0")],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        outcomes = run_grid(STUDY, out)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()  # type: ignore[union-attr]
    assert outcomes[Cell("none", 0)].state == "elsewhere"
    assert outcomes[Cell("none", 1)].state == "done"


@contextlib.contextmanager
def signalled(signum: int, folder: Path, runs: int) -> Iterator[None]:
    """Send a signal to this process once so many runs have begun."""

    def send() -> None:
        for _ in range(400):
            with contextlib.suppress(OSError):
                if len(times(folder, "began")) >= runs:
                    os.kill(os.getpid(), signum)
                    return
            time.sleep(0.05)

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGHUP, 129)],
)
def test_a_signal_saves_all_runs(
    tmp_path: Path, worker: dict[str, Any], signum: int, code: int
) -> None:
    worker["seconds"] = 30.0
    before = signal.getsignal(signum)
    start = time.perf_counter()
    with (
        signalled(signum, tmp_path, 2),
        pytest.raises(StudyInterrupted) as stopped,
    ):
        run_grid(STUDY, tmp_path / "s", devices=("cpu", "cpu"))
    assert stopped.value.exit_code == code
    assert (tmp_path / "saved").read_text() == "xx"  # both runs saved themselves
    assert len(times(tmp_path, "began")) == 2  # and no other was begun
    assert time.perf_counter() - start < 20
    assert signal.getsignal(signum) is before


def test_other_settings_are_refused_before_anything_runs(
    tmp_path: Path, worker: dict[str, Any]
) -> None:
    begun(STUDY, tmp_path / "s")
    (tmp_path / "began").unlink()
    other = dataclasses.replace(STUDY, settings={"epochs": 9})
    with pytest.raises(ValueError, match=r"none-seed0 was begun with .* epochs was 3 and is 9"):
        run_grid(other, tmp_path / "s")
    other = dataclasses.replace(
        STUDY, policies={"none": {"policy": "none"}, "random": {"masker": "RandomMasker(0.4)"}}
    )
    with pytest.raises(ValueError, match=r"random-seed0 .* policy was .*0\.3"):
        run_grid(other, tmp_path / "s")
    assert not (tmp_path / "began").exists()


def test_what_does_not_change_a_run_may_change(tmp_path: Path, worker: dict[str, Any]) -> None:
    begun(STUDY, tmp_path / "s")
    more = dataclasses.replace(
        STUDY, seeds=(0, 1, 2), settings={"workers": 0, "checkpoint_every": 7}
    )
    check_unchanged(more, tmp_path / "s")


def test_a_damaged_cell_says_what_to_remove(tmp_path: Path, worker: dict[str, Any]) -> None:
    begun(STUDY, tmp_path / "s")
    (tmp_path / "s/runs/none-seed0/cell.json").write_text("{")
    with pytest.raises(ValueError, match="Remove .*none-seed0 to do it anew"):
        check_unchanged(STUDY, tmp_path / "s")


def test_a_run_that_never_began_blocks_nothing(tmp_path: Path, worker: dict[str, Any]) -> None:
    # Such as one whose settings could not work: it failed before its first checkpoint.
    worker["code"] = 1
    run_grid(STUDY, tmp_path / "s")
    corrected = dataclasses.replace(STUDY, settings={"epochs": 9})
    worker["code"] = 0
    outcomes = run_grid(corrected, tmp_path / "s")
    assert {outcome.state for outcome in outcomes.values()} == {"done"}


def test_why_a_run_failed(tmp_path: Path, worker: dict[str, Any]) -> None:
    study = Study({"none": {"policy": "none"}}, seeds=(0,))
    worker.update(code=1, last="error: of the first attempt")
    run_grid(study, tmp_path / "s")
    worker["last"] = "not a word of why"
    outcome = run_grid(study, tmp_path / "s")[Cell("none", 0)]
    assert "not a word of why" in outcome.message  # and not the first attempt's
    worker["code"] = "os.kill(os.getpid(), signal.SIGKILL)"
    outcome = run_grid(study, tmp_path / "s")[Cell("none", 0)]
    assert outcome.message.startswith("killed by SIGKILL, perhaps for want of memory")


def test_policies_must_reach_other_processes(tmp_path: Path, worker: dict[str, Any]) -> None:
    class Hidden(md.RandomMasker):
        pass

    study = Study({"hidden": md.AsymmetricMaskPolicy(Hidden(0.3))})
    with pytest.raises(ValueError, match=r"'hidden' cannot be given .* top of the study's file"):
        run_grid(study, tmp_path / "s")
    assert not (tmp_path / "began").exists()


def test_runs_end_when_the_study_is_killed(tmp_path: Path) -> None:
    # The process of a run notices that its parent is gone, and asks itself to stop.
    child = (
        "import signal, sys, time\n"
        "from maskdistill.comparing import one_run\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(tmp_path / 'saved')!r}, 'w').close(),"
        " sys.exit()))\n"
        "one_run._end_with_parent()\n"
        f"open({str(tmp_path / 'ready')!r}, 'w').close()\n"
        "time.sleep(60)"
    )
    parent = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    for name in ("ready", "saved"):
        for _ in range(600):
            if (tmp_path / name).exists():
                break
            time.sleep(0.1)
        assert (tmp_path / name).exists(), name
        process.kill()
        process.wait()


def test_progress_counts_parts(tmp_path: Path, worker: dict[str, Any]) -> None:
    worker["seconds"] = 1.5
    study = Study({"none": {"policy": "none"}}, seeds=(0,), settings={"epochs": 4})
    folder = tmp_path / "s/runs/none-seed0"
    folder.mkdir(parents=True)
    lines = [{"step": 10, "epoch": 0.5}, {"step": 20, "epoch": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen: list[float] = []
    run_grid(study, tmp_path / "s", progress=seen.append)
    assert 0.25 in seen
    assert seen[-1] == 1.0


def test_devices() -> None:
    assert devices_at_hand(devices=["cuda:0", "cuda:1"], jobs=3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert devices_at_hand(devices=["cpu"], jobs=2) == ["cpu", "cpu"]
    with pytest.raises(ValueError, match="--jobs"):
        devices_at_hand(jobs=0)
