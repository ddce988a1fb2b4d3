"""Whatever happens to a checkpoint's file, an earlier one is there, is found, and runs no code."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskdistill.training import Trainer
from maskdistill.training import checkpoint as module
from maskdistill.training.checkpoint import (
    CheckpointError,
    FoundCheckpoint,
    checkpoint_files,
    latest_checkpoint,
    read_checkpoint,
    remove_unfinished,
    save_checkpoint,
)
from maskdistill.training.trainer import DamagedCheckpointWarning
from tests.training.conftest import assert_same, weights
from tests.training.forking import KILLED, die, in_fork

Build = Callable[..., Trainer]


def content(step: int, size: int = 500) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((size,), float(step)), "note": "plain"}


def steps(out: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in checkpoint_files(out)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run with the checkpoints of steps 100 and 200."""
    save_checkpoint(content(100), tmp_path)
    save_checkpoint(content(200), tmp_path)
    return tmp_path


# --- Writing


def test_the_name_carries_the_step_and_the_checksum(tmp_path: Path) -> None:
    path = save_checkpoint(content(500), tmp_path / "deep" / "run")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert path == tmp_path / "deep" / "run" / "checkpoints" / f"step-00000500-{digest}.pt"
    found = latest_checkpoint(tmp_path / "deep" / "run")
    assert (found.path, found.step, found.skipped) == (path, 500, ())
    assert torch.equal(found.content["weights"], content(500)["weights"])
    assert torch.load(path, weights_only=True)["note"] == "plain"


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    for step in range(7):
        save_checkpoint(content(step), tmp_path, keep=3)
    assert steps(tmp_path) == [6, 5, 4]
    save_checkpoint(content(7), tmp_path, keep=1)
    assert steps(tmp_path) == [7]


def test_milestones_are_kept_for_good(tmp_path: Path) -> None:
    for step in range(0, 1000, 100):
        save_checkpoint(content(step), tmp_path, keep=2, milestone_every=300)
    assert steps(tmp_path) == [900, 800, 600, 300, 0]


def test_what_was_passed_over_goes_when_its_step_is_written_again(out: Path) -> None:
    """Nor does it count among the last few."""
    for step in (300, 400):
        damage(save_checkpoint(content(step), out, keep=9))
    assert latest_checkpoint(out).step == 200
    save_checkpoint(content(250), out, keep=2)
    assert steps(out) == [250, 200]


def test_what_is_whole_and_was_out_of_reach_stays(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file server that hiccups, or a format that only a newer version reads, costs nothing."""
    newer = save_checkpoint(content(300), out)

    def unreachable(path: Path) -> dict[str, Any]:
        if path == newer:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read_checkpoint(path)

    with monkeypatch.context() as patch:
        patch.setattr(module, "read_checkpoint", unreachable)
        assert latest_checkpoint(out).step == 200
    save_checkpoint(content(250), out)
    assert steps(out) == [300, 250, 200, 100]
    assert latest_checkpoint(out).path == newer


def test_too_little_memory_is_no_damage(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "load", exhausted)
    with pytest.raises(MemoryError):
        latest_checkpoint(out)


def test_of_two_with_one_step_the_later_is_taken(out: Path) -> None:
    first = checkpoint_files(out)[0]
    again = save_checkpoint(content(200, size=7), out)
    assert not first.exists()
    assert latest_checkpoint(out).path == again


def test_older_ones_go_only_when_the_new_one_is_in_place(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".pt":
            seen.append(steps(out))
        real(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    save_checkpoint(content(300), out, keep=1)
    assert seen == [[300, 200, 100], [300, 100]]


def test_everything_is_flushed_before_it_counts(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file before the rename, the folder after it."""
    events: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def replace(path: Path, target: Path) -> Path:
        events.append("rename")
        return real_replace(path, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("this system does not say which file a descriptor is of")
    monkeypatch.setattr(module.os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    save_checkpoint(content(300), out)
    assert events == ["step-00000300.pt.tmp", "rename", "checkpoints"]


@pytest.mark.parametrize("moment", ["first write", "last write", "flush", "rename", "removal"])
def test_killed_while_writing(out: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By SIGKILL, which nothing can catch."""
    real, writes = module._HashingFile.write, []
    save_checkpoint(content(1), out / "elsewhere")
    monkeypatch.setattr(
        module._HashingFile, "write", lambda self, data: writes.append(1) or real(self, data)
    )
    save_checkpoint(content(1), out / "elsewhere")
    last = len(writes)
    assert last > 5

    def killed() -> None:
        if "write" in moment:
            count = iter(range(1, last + 1))

            def write(self: Any, data: Any) -> int:
                if next(count) == (1 if moment == "first write" else last):
                    self._file.write(bytes(data)[: len(bytes(data)) // 2])
                    self._file.flush()
                    die()
                return real(self, data)

            module._HashingFile.write = write  # type: ignore[method-assign]
        elif moment == "flush":
            module.os.fsync = die  # type: ignore[assignment]
        elif moment == "rename":
            module.replace_durably = die
        else:
            module._remove_old = die
        save_checkpoint(content(300), out, keep=1)

    assert in_fork(killed) == KILLED
    found = latest_checkpoint(out)
    assert found.step == (300 if moment == "removal" else 200)
    assert found.skipped == ()
    assert bool(list(out.rglob("*.tmp"))) == (moment != "removal")
    remove_unfinished(out)
    assert not list(out.rglob("*.tmp"))
    assert steps(out) == ([300, 200, 100] if moment == "removal" else [200, 100])


def test_a_full_disk(out: Path) -> None:
    """A limit of the system's own, which torch.save meets in the middle of the file."""
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(content(300, size=100_000), out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    said = str(caught.value)
    assert "step 300 could not be written" in said
    assert "File too large" in said
    assert f"The last checkpoint is {checkpoint_files(out)[0]}" in said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("where", ["open", "fsync", "replace"])
def test_a_disk_that_fails_elsewhere(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os if where == "fsync" else Path, where, full)
    with pytest.raises(
        CheckpointError, match=r"No space left on device.*There is no checkpoint yet"
    ):
        save_checkpoint(content(300), tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_what_could_not_be_read_again_is_not_written(out: Path) -> None:
    with pytest.raises(TypeError, match=r"numpy.*scalar.*Turn such values into"):
        save_checkpoint({**content(300), "lr": np.float64(0.1)}, out)
    assert steps(out) == [200, 100]
    assert not list(out.rglob("*.tmp"))


def test_a_mistake_in_the_content_is_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):
        save_checkpoint({"step": 1, "code": lambda: None}, tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


# --- Reading


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_one_flipped_bit_anywhere(out: Path) -> None:
    path = checkpoint_files(out)[0]
    whole = path.read_bytes()
    assert latest_checkpoint(out).step == 200
    for i in sorted({*range(0, len(whole), 97), len(whole) - 1}):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i + 1 :])
        found = latest_checkpoint(out)
        assert found.step == 100, i
        assert found.skipped == (
            f"{path.name} was skipped: its checksum does not match (truncated or damaged)",
        )
    path.write_bytes(whole)
    assert latest_checkpoint(out).step == 200


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_truncated_or_empty_file(out: Path, share: float) -> None:
    path = checkpoint_files(out)[0]
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    found = latest_checkpoint(out)
    assert found.step == 100
    assert "checksum" in found.skipped[0]
    assert found.describe(937) == (
        f"resuming from step 100 of 937 ({found.path}); {path.name} was skipped: its checksum does "
        "not match (truncated or damaged)"
    )


def put(out: Path, step: int, save: Callable[[Path], object]) -> Path:
    """Put a file in place whose checksum is right."""
    path = out / "checkpoints" / "new"
    save(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return path.rename(path.with_name(f"step-{step:08d}-{digest}.pt"))


class Harmful:
    """Pickled code: reading it as pickle would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_what_is_no_checkpoint_is_passed_over(out: Path, tmp_path: Path) -> None:
    put(out, 300, lambda path: path.write_text("a letter"))
    put(out, 301, lambda path: torch.save({"format": 99, "step": 301}, path))
    put(out, 302, lambda path: torch.save([1, 2], path))
    put(out, 303, lambda path: torch.save({"x": Harmful(tmp_path / "harm")}, path))
    (out / "checkpoints" / f"step-00000304-{0:016x}.pt").mkdir()
    (out / "checkpoints" / f"step-00000305-{0:016x}.pt").symlink_to("nowhere")
    (out / "checkpoints" / "notes.txt").write_text("no candidate")
    found = latest_checkpoint(out)
    assert found.step == 200
    for said, why in zip(
        found.skipped,
        ["No such file", "it is a folder", "not a file of tensors and plain values",
         "(found 'list')", "(found 99)", "not a file of tensors"],
        strict=True,
    ):  # fmt: skip
        assert why in said
    assert not (tmp_path / "harm").exists(), "no code ran"
    save_checkpoint(content(400), out)  # and does not trip over them
    assert latest_checkpoint(out).skipped == ()


def test_none_is_usable(out: Path) -> None:
    for path in checkpoint_files(out):
        damage(path)
    with pytest.raises(ValueError, match=r"no checkpoint in .*00000200.*checksum.*00000100"):
        latest_checkpoint(out)
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*without --resume"):
        latest_checkpoint(out / "elsewhere")
    other = checkpoint_files(out)[0].rename(out / "checkpoints" / "best.pt")
    with pytest.raises(ValueError, match="its name is not step-"):
        read_checkpoint(other)


# --- In the trainer


def fit(trainer: Trainer, out: Path, **kwargs: Any) -> Trainer:
    trainer.fit(out, progress_bar=False, **kwargs)
    return trainer


def test_a_run_keeps_its_milestones(build: Build, tmp_path: Path) -> None:
    fit(build(keep_checkpoints=1, milestone_every=8), tmp_path)
    assert steps(tmp_path) == [12, 8, 0]
    with pytest.raises(ValueError, match=r"milestone_every must be a multiple of checkpoint_every"):
        build(milestone_every=6)


def test_the_first_checkpoint_is_of_step_0(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that cannot be written to shows before the first step."""
    trainer = build()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_run_step", die)
        patch.setattr(module.torch, "save", full)
        with pytest.raises(CheckpointError, match="step 0 could not be written"):
            fit(trainer, tmp_path)
    assert steps(tmp_path) == []
    seen: list[list[int]] = []
    real = Trainer._run_step

    def watching(self: Trainer, *args: Any) -> Any:
        seen.append(steps(tmp_path))
        return real(self, *args)

    monkeypatch.setattr(Trainer, "_run_step", watching)
    fit(build(max_steps=1), tmp_path)
    assert seen == [[0]]


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_up_during_the_run(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(build(), tmp_path / "whole")
    real, calls = torch.save, iter(range(9))

    def filling(content: Any, file: Any) -> None:
        if next(calls) == 2:  # of steps 0, 4 and 8
            file.write(b"half")
            full()
        real(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(module.torch, "save", filling)
        with pytest.raises(
            CheckpointError, match=r"step 8 could not.*The last checkpoint is .*00000004"
        ):
            fit(build(), tmp_path / "run")
    assert not list(tmp_path.rglob("*.tmp"))
    resumed = fit(build(), tmp_path / "run", resume=True)
    assert_same(weights(resumed), weights(whole))


def test_a_disk_that_is_too_full_for_metrics(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    def filling(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if path.name == "metrics.jsonl" and mode == "a" and steps(tmp_path)[0] == 4:
            full()
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", filling)
    with pytest.raises(CheckpointError, match=r"metrics of step 6 .*The last checkpoint is .*04-"):
        fit(build(), tmp_path)


def test_a_damaged_one_is_named_and_the_run_ends_the_same(build: Build, tmp_path: Path) -> None:
    whole = weights(fit(build(), tmp_path))
    damage(checkpoint_files(tmp_path)[0])
    (tmp_path / "checkpoints" / "step-00000003.pt.tmp").write_text("left by a kill")
    resumed = build()
    with pytest.warns(DamagedCheckpointWarning, match=r"from step 8 of 12.*00000012.*was skipped"):
        fit(resumed, tmp_path, resume=True)
    assert_same(weights(resumed), whole)
    assert steps(tmp_path) == [12, 8, 4]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_found_checkpoint_needs_no_second_reading(build: Build, tmp_path: Path) -> None:
    fit(build(max_steps=4), tmp_path)
    trainer = build(max_steps=4)
    found = trainer.check_resumable(tmp_path)
    assert isinstance(found, FoundCheckpoint)
    checkpoint_files(tmp_path)[0].unlink()
    fit(trainer, tmp_path, resume=found)
    assert trainer.step == 4
