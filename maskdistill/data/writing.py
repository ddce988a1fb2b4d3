"""Files and folders that appear under their names only when they are complete.

`atomic_file` and `atomic_folder` write under another name first, and rename. `locked` and
`sole_writer` keep a second process out meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

_NO_ROOM = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


def write_durably(content: str | bytes, path: Path) -> None:
    """Write a file so that the old content or the new is there, whatever happens."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def file_checksum(path: Path) -> str:
    """Return the first 16 hexadecimal digits of a file's SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that gets its name when all is written and on the disk, or else goes."""
    temporary = _beside(path, ".tmp")
    try:
        with temporary.open("wb") as file:  # what a killed run left is overwritten
            yield file
            to_disk(file)
        replace_durably(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Make a folder that gets its name when all in it is written, or else goes.

    Its files are flushed by who writes them. One process at a time: see `sole_writer`.
    """
    # Not ".old", which is what people call a copy that they want to keep.
    temporary, replaced = _beside(path, ".tmp"), _beside(path, ".replaced")
    with sole_writer(path):
        # What a killed run left: in its way, this one would fail after all its work.
        _settle(path, replaced)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            _folder_to_disk(temporary)
            if path.exists():
                os.replace(path, replaced)
            replace_durably(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            with contextlib.suppress(OSError):  # what went wrong first is what to tell
                _settle(path, replaced)
            raise
        with contextlib.suppress(OSError):
            _settle(path, replaced)


def _settle(path: Path, replaced: Path) -> None:
    """Remove a folder that was replaced, or put it back if nothing came in its place."""
    if not os.path.lexists(replaced):
        return
    if not path.exists():  # a kill came in between, and there is no other copy
        os.replace(replaced, path)
    elif replaced.is_symlink():
        replaced.unlink()
    else:
        shutil.rmtree(replaced)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def replace_durably(temporary: Path, path: Path) -> None:
    """Rename what is flushed already, and flush the rename."""
    temporary.replace(path)
    _folder_to_disk(path.parent)


def to_disk(file: IO[Any]) -> None:
    """Wait until what was written has reached the disk."""
    file.flush()
    os.fsync(file.fileno())


def _folder_to_disk(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that knows no such thing
            raise
    finally:
        os.close(handle)


# --- one writer at a time


@contextlib.contextmanager
def locked(path: Path, refusal: Callable[[], OSError], *, again: bool = False) -> Iterator[None]:
    """Hold the lock file ``path`` while the context lasts.

    The system lets go of it when the process ends, however it ends; processes that were forked
    meanwhile, such as a loader's workers, do not hold it. On a file system without locks there is
    a warning, and nothing is held.

    Args:
        path: of the lock file, which stays.
        refusal: makes the error to raise where somebody else holds it.
        again: this process may take a lock again that it has taken with ``again``.
    """
    import filelock

    lock = filelock.FileLock(path, timeout=0, thread_local=False, is_singleton=again)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise refusal() from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"{path.parent} lies on a file system without locks ({error}): nothing keeps a second "
            "process from writing there.",
            UserWarning,
            stacklevel=4,
        )
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def sole_writer(out: Path) -> Iterator[None]:
    """Keep other processes from writing the same file or folder; nothing of the lock stays."""
    lock = _beside(out, ".lock")
    busy = FileExistsError(f"Another process is writing {out} right now.")
    with locked(lock, lambda: busy):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()


# --- before and after


def check_free(out: Path, overwrite: bool, kind: str) -> None:
    """Refuse a name that is taken, unless it may be overwritten; `kind` is "file" or "folder"."""
    if not out.exists():
        return
    if (kind == "file") != out.is_file():
        raise FileExistsError(f"{out} exists and is not a {kind}; choose another name.")
    if not overwrite:
        raise FileExistsError(
            f"{out} exists. Pass overwrite=True (--overwrite on the command line) to replace it."
        )


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


def progress(items: Any, total: int, what: str, unit: str) -> Any:
    """Show a progress bar on a terminal where tqdm is installed and it takes over a second."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, total=total, desc=what, unit=unit, delay=1, disable=None, leave=False)
