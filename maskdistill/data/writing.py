"""Files and folders that appear under their names only when they are complete."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

_NO_ROOM = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


def check_free(out: Path, overwrite: bool, kind: str) -> None:
    """Refuse a name that is taken, unless it may be overwritten."""
    if not out.exists():
        return
    if (kind == "file") != out.is_file():
        raise FileExistsError(f"{out} exists and is not a {kind}; choose another name.")
    if not overwrite:
        raise FileExistsError(
            f"{out} exists. Pass overwrite=True (--overwrite on the command line) to replace it."
        )


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


@contextlib.contextmanager
def appearing(out: Path) -> Iterator[BinaryIO]:
    """Open a file that gets its name when all is written and on the disk, or else goes."""
    partial = _partial(out)
    with partial.open("ab") as lock:
        _lock(lock, out)
        # What a killed run left behind is overwritten here.
        try:
            with partial.open("wb") as file:
                yield file
                to_disk(file)
            os.replace(partial, out)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    _folder_to_disk(out.parent)


@contextlib.contextmanager
def appearing_folder(out: Path) -> Iterator[Path]:
    """Make a folder that gets its name when all in it is written, or else goes."""
    # Not ".old", which is what people call a copy that they want to keep.
    partial, replaced = _partial(out), out.with_name(out.name + ".replaced")
    with _held(out):
        # What a killed run left: in its way, this one would fail after all its work.
        _settle(out, replaced)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            _folder_to_disk(partial)
            if out.exists():
                os.replace(out, replaced)
            os.replace(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):  # what went wrong first is what to tell
                _settle(out, replaced)
            raise
        with contextlib.suppress(OSError):
            _settle(out, replaced)
        _folder_to_disk(out.parent)


def _settle(out: Path, replaced: Path) -> None:
    """Remove a folder that was replaced, or put it back if nothing came in its place."""
    if not os.path.lexists(replaced):
        return
    if not out.exists():  # a kill came in between, and there is no other copy
        os.replace(replaced, out)
    elif replaced.is_symlink():
        replaced.unlink()
    else:
        shutil.rmtree(replaced)


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    """Keep other processes from writing the same folder; the lock's file goes with the lock."""
    path = out.with_name(out.name + ".partial.lock")
    with path.open("ab") as lock:
        _lock(lock, out)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def _lock(file: BinaryIO, out: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Who held it may have ended since it was opened, and another may hold a new file.
        mine = os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except (BlockingIOError, FileNotFoundError):
        mine = False
    except OSError as error:  # such as on a Lustre that is mounted without locks
        warnings.warn(
            f"{out} lies on a file system without locks ({error.strerror}): nothing keeps a second "
            "process from writing there.",
            UserWarning,
            stacklevel=5,
        )
        return
    if not mine:
        raise FileExistsError(f"Another process is writing {out} right now.")


def to_disk(file: IO[Any]) -> None:
    """Wait until what was written has reached the disk."""
    file.flush()
    os.fsync(file.fileno())


def _folder_to_disk(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_room(out: Path, wanted: int) -> None:
    """Refuse to begin what the disk has no room for; `wanted` is in bytes."""
    free = shutil.disk_usage(out.parent).free
    if free < wanted:
        raise OSError(
            errno.ENOSPC,
            f"{out} needs about {wanted / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free",
        )


@contextlib.contextmanager
def room(out: Path) -> Iterator[None]:
    """Say plainly that a disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM and str(out) not in str(error):
            raise OSError(
                error.errno,
                f"no room left while writing {out} ({error.strerror}); nothing of it was kept",
            ) from error
        raise


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


def progress(items: Any, total: int, what: str, unit: str) -> Any:
    """Show a progress bar on a terminal where tqdm is installed and it takes over a second."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, total=total, desc=what, unit=unit, delay=1, disable=None, leave=False)
