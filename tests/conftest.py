"""What holds for all tests."""

from __future__ import annotations

import pytest
import torch

# The networks are tiny: one thread is faster, and the numbers do not depend on the cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Statistical tests draw the same each time: none fails by chance."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_wandb_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test logs to the project of whoever runs them."""
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
