"""Checkpoints that appear whole or not at all, are verified when read, and run no code."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

import torch

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
            file.flush()
            os.fsync(file.fileno())
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
    if _checksum(path) != name[2]:
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


def replace_durably(temporary: Path, path: Path) -> None:
    """Rename a file that is flushed already, and flush the rename."""
    temporary.replace(path)
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that knows no such thing
            raise
    finally:
        os.close(folder)


def write_durably(content: str | bytes, path: Path) -> None:
    """Write a file so that the old content or the new is there, whatever happens."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        replace_durably(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


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


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


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
        return name is not None and _checksum(path) != name[2]
    except OSError:
        return False
