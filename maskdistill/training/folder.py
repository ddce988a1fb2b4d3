"""The folder of a run: held by one run at a time, and found again after a restart."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskdistill.training.checkpoint import FOLDER, checkpoint_files

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
# By process too: a forked one has a copy of this, and not the locks.
_held: dict[tuple[int, Path], int] = {}


@contextlib.contextmanager
def hold_folder(out: Path) -> Iterator[None]:
    """Keep other processes from writing a run into the same folder while the context lasts.

    The system lets go of the lock when the process ends, however it ends. Within a process it may
    be taken again, as the main job and ``Trainer.fit`` do. The lock is the process's own and is not
    inherited by a loader's workers, which may outlive a killed run for some seconds.

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
    key = (os.getpid(), out.resolve())
    if fcntl is None or _held.get(key):
        _held[key] = _held.get(key, 0) + 1
        try:
            yield
        finally:
            _held[key] -= 1
        return
    with (out / LOCK).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise _in_use(out) from None
        except OSError as error:  # such as on a Lustre that is mounted without locks
            warnings.warn(
                f"{out} lies on a file system without locks ({error.strerror}): nothing keeps a "
                "second run from writing there.",
                UserWarning,
                stacklevel=4,
            )
        file.truncate(0)
        holder = {"host": platform.node(), "process": os.getpid(), "launch": launch()}
        file.write(json.dumps(holder) + "\n")
        file.flush()
        _held[key] = 1
        try:
            yield
        finally:
            _held[key] = 0


def refuse_if_held(out: Path) -> None:
    """Raise what `hold_folder` would if another run holds the folder; write nothing.

    Raises:
        BlockingIOError: another run holds it.
    """
    path = out / LOCK
    if fcntl is None or _held.get((os.getpid(), out.resolve())) or not path.is_file():
        return
    with contextlib.suppress(PermissionError), path.open("r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise _in_use(out) from None
        except OSError:  # no locks here
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
