"""Checkpoints that appear whole or not at all, are verified when read, and run no code."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

import numpy as np
import torch

from maskdistill.data.writing import file_checksum, locked, replace_durably, to_disk
from maskdistill.policies import ViewPolicy
from maskdistill.training.config import TrainingConfig
from maskdistill.training.distributed import Agreement, gathered, load_gathered, load_moments
from maskdistill.training.step import TrainState

FORMAT = 1
FOLDER = "checkpoints"
# The name carries the checksum, as torch.hub's files do: one rename puts both in place at once.
_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{16})\.pt")


class CheckpointError(OSError):
    """A checkpoint or a line of metrics could not be written, so training was stopped.

    Earlier checkpoints are kept.
    """


class FoundCheckpoint(NamedTuple):
    """The checkpoint to go on from, and why it is this one.

    Attributes:
        path: of the file.
        content: what was saved, on the CPU.
        skipped: a sentence for each newer checkpoint that could not be used.
    """

    path: Path
    content: dict[str, Any]
    skipped: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Steps that were done when it was written."""
        return int(self.content["step"])

    def describe(self, total_steps: int) -> str:
        """Return which checkpoint it is and which ones were passed over, in one line."""
        taken = f"resuming from step {self.step} of {total_steps} ({self.path})"
        return "; ".join((taken, *self.skipped))


def save_checkpoint(
    content: dict[str, Any], out: Path, *, keep: int = 3, milestone_every: int | None = None
) -> Path:
    """Write ``out/checkpoints/step-<step>-<checksum>.pt``, then remove all but the last few.

    The content goes to a temporary file in the same folder, which is flushed to the disk and then
    renamed. Whatever happens meanwhile, all earlier checkpoints are untouched: they are removed
    only when the new one is in place.

    >>> save_checkpoint({"step": 500, ...}, Path("runs/first"))  # doctest: +SKIP
    PosixPath('runs/first/checkpoints/step-00000500-5bd0bd2c7b5c1ab9.pt')

    Args:
        content: tensors and plain values; ``content["step"]`` is the number of steps done.
        out: folder of the run.
        keep: number of checkpoints to keep, at least 1.
        milestone_every: keep those of every so many steps besides, for good.

    Returns:
        Where it is.

    Raises:
        CheckpointError: it could not be written, such as on a full disk.
        TypeError: the content holds objects that ``weights_only`` would not read again.
    """
    folder, step = out / FOLDER, content["step"]
    temporary = folder / f"step-{step:08d}.pt.tmp"
    hashing: _HashingFile | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            hashing = _HashingFile(file)
            torch.save({"format": FORMAT, **content}, cast(IO[bytes], hashing))
            to_disk(file)
        _check_readable(temporary)
        path = folder / f"step-{step:08d}-{hashing.checksum}.pt"
        replace_durably(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save puts an error of its own in place of the one that the file raised.
        cause = error if hashing is None or hashing.error is None else hashing.error
        if not isinstance(cause, OSError):
            raise
        what = f"the checkpoint of step {step}"
        raise not_written(cause, what, out) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _remove_old(out, path, step, keep, milestone_every)
    return path


def _check_readable(path: Path) -> None:
    """Refuse a file that could never be read again; this reads no tensors."""
    classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if classes:
        raise TypeError(
            f"a checkpoint holds tensors and plain values, but this one would hold "
            f"{', '.join(sorted(classes))}, which reading without running code does not allow. "
            "Turn such values into tensors or plain numbers before they reach the trainer."
        )


def checkpoint_files(out: Path) -> list[Path]:
    """Return what has a checkpoint's name in the folder of a run, newest first, unverified."""
    found = []
    with contextlib.suppress(OSError):  # there is no such folder
        for path in (out / FOLDER).iterdir():
            if name := _NAME.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):
                    found.append((int(name[1]), path.lstat().st_mtime_ns, path))
    return [path for *_, path in sorted(found, reverse=True)]


def latest_checkpoint(out: Path | str) -> FoundCheckpoint:
    """Return the newest checkpoint of a run that is whole; say which were skipped and why.

    >>> found = latest_checkpoint(Path("runs/first"))  # doctest: +SKIP
    >>> found.step, found.content["teacher"].keys()  # doctest: +SKIP

    Args:
        out: folder of the run.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: there are some, and none can be used.
    """
    skipped: list[str] = []
    out = Path(out)
    for path in checkpoint_files(out):
        try:
            return FoundCheckpoint(path, read_checkpoint(path), tuple(skipped))
        except (ValueError, OSError) as error:
            skipped.append(f"{path.name} was skipped: {error}")
    if not skipped:
        raise FileNotFoundError(
            f"there is no checkpoint in {out / FOLDER} to resume from; start without --resume."
        )
    raise ValueError(
        f"no checkpoint in {out / FOLDER} can be used: {'; '.join(skipped)}. Put back a copy, or "
        "start anew in another folder."
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, if its checksum is the one in its name.

    It is read with ``weights_only=True``: tensors and plain values, no code.

    Raises:
        ValueError: it is damaged, or no checkpoint of ours; the message says which.
        OSError: it cannot be opened.
    """
    if path.is_dir():
        raise ValueError("it is a folder")
    name = _NAME.fullmatch(path.name)
    if name is None:
        raise ValueError("its name is not step-<8 digits>-<16 hexadecimal digits>.pt")
    if file_checksum(path) != name[2]:
        raise ValueError("its checksum does not match (truncated or damaged)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:  # the file is whole
        raise
    except Exception as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise ValueError(
            f"it is not a file of tensors and plain values ({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"it is no maskdistill checkpoint of format {FORMAT} (found {found!r})")
    return content


def remove_unfinished(out: Path) -> None:
    """Remove what a process left that was killed while it wrote a checkpoint."""
    for path in (out / FOLDER).glob("*.pt.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


class _HashingFile:
    """A file that is only written to, and that knows the checksum of what it was given."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self._hash.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()

    @property
    def checksum(self) -> str:
        return self._hash.hexdigest()[:16]


def not_written(cause: OSError, what: str, out: Path) -> CheckpointError:
    """Return the error that says what could not be written, and what the run can go on from."""
    there = [path for path in checkpoint_files(out) if path.is_file()]
    kept = f"The last checkpoint is {there[0]}" if there else "There is no checkpoint yet"
    error = CheckpointError(
        f"{what} could not be written into {out} ({cause.strerror or cause}); training was "
        f"stopped. {kept}. Make room, then go on with --resume."
    )
    error.errno = cause.errno
    return error


def _remove_old(out: Path, new: Path, step: int, keep: int, milestone_every: int | None) -> None:
    files = [path for path in checkpoint_files(out) if path.is_file() and path != new]
    # What lies beyond was passed over when the run resumed before it. Of damaged files nothing is
    # left; another may have been out of reach for a moment, and is kept.
    at = {path: int(path.name.split("-")[1]) for path in files}
    older = [path for path in files if at[path] < step]
    replaced = [path for path in files if at[path] == step]
    damaged = [path for path in files if at[path] > step and _is_damaged(path)]
    too_many = [
        path for path in older[keep - 1 :] if not milestone_every or at[path] % milestone_every
    ]
    for path in replaced + damaged + too_many:
        with contextlib.suppress(OSError):  # one file too many harms nobody
            path.unlink()


def _is_damaged(path: Path) -> bool:
    name = _NAME.fullmatch(path.name)
    try:
        return name is not None and file_checksum(path) != name[2]
    except OSError:
        return False


# --- The folder of a run

LOCK = ".lock"
"""The file that is locked while a run writes into its folder; it names the process."""


@contextlib.contextmanager
def hold_folder(out: Path) -> Iterator[None]:
    """Keep other processes from writing a run into the same folder while the context lasts.

    Within a process it may be taken again, as the main job and ``Trainer.fit`` do. See
    `data.writing.locked` for what becomes of it when the process is killed.

    Args:
        out: folder of the run; made if it is not there.

    Raises:
        BlockingIOError: another run holds it.
        OSError: it cannot be made or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(
            f"the output folder {out} cannot be made: {error}. Choose --out."
        ) from None
    path = out.resolve() / LOCK
    with locked(path, lambda: _in_use(out), again=True):
        holder = {"host": platform.node(), "process": os.getpid(), "launch": launch()}
        path.write_text(json.dumps(holder) + "\n")
        yield


def refuse_if_held(out: Path) -> None:
    """Raise what `hold_folder` would if another run holds the folder; write nothing.

    Raises:
        BlockingIOError: another run holds it.
    """
    path = out.resolve() / LOCK
    if path.is_file():
        with contextlib.suppress(PermissionError), locked(path, lambda: _in_use(out), again=True):
            return


def launch() -> str | None:
    """Name the ``torchrun`` that started this process: the same after a restart, unlike others.

    None without ``torchrun``. The name is that of the agent's process on this machine, since the
    id that torchrun gives to a launch is "none" unless one is asked for.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None:
        return None
    agent, since = os.getppid(), ""
    with contextlib.suppress(OSError, IndexError):  # numbers of processes are used again
        since = Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{run_id} {platform.node()} {agent} {since}"


def choose_folder(
    out: Path | None,
    name: str,
    *,
    resume: bool = False,
    auto_resume: bool = False,
    restart: bool = False,
) -> tuple[Path, bool]:
    """Return the folder to write to, and whether to go on with the run in it; write nothing.

    >>> choose_folder(None, "dino-asymmetric-seed0")  # doctest: +SKIP
    (PosixPath('runs/dino-asymmetric-seed0'), False)

    Args:
        out: the folder; None is a new one in ``runs/``, or after a restart by ``torchrun`` the one
            that this run had begun.
        name: of a new folder; a number is added if there is one of that name.
        resume: go on with the run there, which must be.
        auto_resume: go on if there is one.
        restart: ``torchrun --max-restarts`` started the run anew, which implies ``auto_resume``.

    Raises:
        FileExistsError: it holds a run, which is not to be resumed.
        FileNotFoundError: there is nothing to resume.
        BlockingIOError: another run is writing there.
        ValueError: it cannot be written to, or a run to resume was not named.
    """
    if out is None:
        if resume or auto_resume:
            option = "--resume" if resume else "--auto-resume"
            raise ValueError(f"{option} needs --out: the folder of the run to go on with.")
        out = _new_folder(name, restart)
    refuse_if_held(out)
    there = bool(checkpoint_files(out))
    if there and not (resume or auto_resume or restart):
        raise FileExistsError(
            f"{out} holds a run already. Go on with it by --resume, or choose another --out."
        )
    if resume and not there:
        raise FileNotFoundError(f"there is no checkpoint in {out / FOLDER} to resume from.")
    above = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "is no folder" if not above.is_dir() else "is not writable"
        raise ValueError(f"cannot write to {out}: {above} {why}. Choose another --out.")
    return out, there


def _new_folder(name: str, restart: bool) -> Path:
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    for folder in (Path("runs") / each for each in itertools.chain([name], numbered)):
        if not folder.exists():
            return folder
        mine = launch()
        if restart and mine is not None and _holder(folder).get("launch") == mine:
            return folder
    raise AssertionError("the numbers have no end")


def _holder(out: Path) -> dict[str, Any]:
    try:
        holder = json.loads((out / LOCK).read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _in_use(out: Path) -> BlockingIOError:
    holder = _holder(out)
    who = f"process {holder['process']} on {holder['host']}" if holder else "another process"
    return BlockingIOError(
        f"{out} is in use: {who} is writing its run there. Wait for its end, or choose another "
        "folder (--out)."
    )


# What may differ between a run and its resumption without changing the result.
_FREE = {
    "device", "workers", "views", "log_every", "checkpoint_every", "keep_checkpoints",
    "milestone_every", "health_every", "wandb",
    # These to rounding, and but for what drop path draws: see docs/distributed.md.
    "accumulate", "compile", "sharding",
}  # fmt: skip


def state_content(state: TrainState) -> dict[str, Any]:
    """Return the tensors of a run; all processes call it, for some states are spread over them."""
    return {
        "student": gathered(state.student_net.state_dict()),
        "teacher": gathered(state.teacher.state_dict()),
        "objective": state.objective.state_dict(),
        "optimizer": gathered(state.optimizer.state_dict()),
    }


def restore_state(state: TrainState, content: dict[str, Any]) -> None:
    """Put the tensors of `state_content` back; all processes call it.

    They are taken out of ``content``, so that the memory does not hold everything twice.
    """
    load_gathered(state.student_net, content.pop("student"))
    load_gathered(state.teacher, content.pop("teacher"))
    state.objective.load_state_dict(content.pop("objective"))
    load_moments(state.optimizer, content.pop("optimizer"))


def identity(
    config: TrainingConfig,
    policy: ViewPolicy,
    images: Any,
    count: int,
    world: int,
    precision: str,
) -> dict[str, Any]:
    """Return what a checkpoint must agree on with the run that resumes it.

    Args:
        config: of the run, resolved.
        policy: that it trains under.
        images: to train on.
        count: of them.
        world: number of processes.
        precision: of the run; what "auto" means depends on the device.
    """
    fields = {field.name for field in dataclasses.fields(TrainingConfig)}
    return {
        "config": {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(config).items()
            if name in fields
        },
        "policy": repr(policy),
        "images": count,
        "fingerprint": fingerprint(images),
        "world": world,
        "precision": precision,
    }


def fingerprint(images: Any) -> str | None:
    """Return what tells a data set from another, wherever it lies; None where nothing does.

    It is the data set's own ``fingerprint``, a string, where it has one, and else a hash of its
    ``labels`` in their order, which costs next to nothing.
    """
    own = getattr(images, "fingerprint", None)
    if isinstance(own, str):
        return own
    labels = getattr(images, "labels", None)
    if labels is None:
        return None
    # Not of the bytes in memory alone: machines differ in the width and order of integers.
    array = np.asarray(labels)
    if array.dtype.kind in "biu":
        content = np.ascontiguousarray(array, dtype="<i8").tobytes()
    elif array.dtype.kind in "fUS":
        content = repr(array.tolist()).encode()
    else:  # a method of that name, or objects whose text may differ from run to run
        return None
    return hashlib.sha256(content).hexdigest()[:16]


def check_same(was: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with a run whose identity was another.

    Raises:
        ValueError: names each setting that was different.
    """
    changed = [
        f"{name} was {was['config'].get(name)!r} and is {value!r}"
        for name, value in now["config"].items()
        if name not in _FREE and was["config"].get(name) != value
    ]
    names = {"policy": "policy", "images": "images", "world": "the number of processes"}
    if was["config"].get("precision") == now["config"]["precision"]:  # else it was said above
        names["precision"] = f"the precision, {now['config']['precision']} on this device,"
    changed += [
        f"{words} was {was[name]!r} and is {now[name]!r}"
        for name, words in names.items()
        if name in was and was[name] != now[name]
    ]
    if was["images"] == now["images"] and was["fingerprint"] != now["fingerprint"]:
        changed.append(
            f"the data are as many images, but not the same or in another order (fingerprint was "
            f"{was['fingerprint']} and is {now['fingerprint']})"
        )
    if changed:
        raise ValueError(
            "the checkpoint belongs to other settings, with which the run cannot be resumed "
            f"exactly: {'; '.join(changed)}. Resume with the same settings, or start anew."
        )


def find_checkpoint(out: Path, agreement: Agreement) -> FoundCheckpoint:
    """Return the newest usable checkpoint, the same one in all processes.

    Raises:
        FileNotFoundError: there is none.
        ValueError: none can be used.
    """
    found: list[FoundCheckpoint] = []

    def look() -> tuple[Path, tuple[str, ...]]:
        found.append(latest_checkpoint(out))
        return found[0].path, found[0].skipped

    path, skipped = agreement.by_main(look)
    return found[0] if found else FoundCheckpoint(path, read_checkpoint(path), skipped)
