"""What holds for all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

# The networks are tiny: one thread is faster, also in the processes that tests start, and the
# numbers do not depend on the cores.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Statistical tests draw the same each time: none fails by chance."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_wandb_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test logs to the project of whoever runs them."""
    monkeypatch.delenv("WANDB_PROJECT", raising=False)


@pytest.fixture(autouse=True)
def _signals_are_heard() -> Iterator[None]:
    """Tests send SIGINT and SIGHUP, which a shell's background job or nohup has ignored."""
    usual = {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}
    numbers = {getattr(signal, name): h for name, h in usual.items() if hasattr(signal, name)}
    ignored = {n: h for n, h in numbers.items() if signal.getsignal(n) is signal.SIG_IGN}
    for number, handler in ignored.items():
        signal.signal(number, handler)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
