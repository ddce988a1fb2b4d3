"""MaskCollate in the workers of a data loader: whose random numbers it draws, and what it hears."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import maskdistill as md
from maskdistill.collating import MaskCollate

POLICY = md.AsymmetricMaskPolicy(md.RandomMasker(0.3))


class Views(Dataset):  # type: ignore[type-arg]
    """A data set that draws nothing."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        return [torch.zeros(3, 32, 32)] * 2, index


def epochs(
    count: int, workers: int, seed: int, start: str = "fork", persistent: bool = False
) -> list[list[tuple[bool, ...]]]:
    """The masks of each batch, epoch by epoch, from a loader with a seeded generator."""
    loader = DataLoader(
        Views(),
        batch_size=2,
        num_workers=workers,
        collate_fn=MaskCollate(POLICY, 8),
        multiprocessing_context=start if workers else None,
        persistent_workers=persistent,
        generator=torch.Generator().manual_seed(seed),
    )
    torch.manual_seed(seed)  # without workers masks come from the process's own generator
    return [
        [tuple(batch[-1].student[0].flatten().tolist()) for batch in loader] for _ in range(count)
    ]


SOME = [
    (0, "fork", False),
    (1, "fork", False),
    (2, "fork", False),
    (2, "fork", True),
    (1, "spawn", True),  # one, for each takes seconds to start
]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(("workers", "start", "persistent"), SOME)
def test_workers_and_epochs_differ_and_a_seed_repeats(
    workers: int, start: str, persistent: bool
) -> None:
    random.seed(0)
    np.random.seed(0)
    states = random.getstate(), np.random.get_state()[1].tolist()
    drawn = epochs(3, workers, 0, start, persistent)
    assert [len(epoch) for epoch in drawn] == [6, 6, 6]
    assert len({mask for epoch in drawn for mask in epoch}) == 18, "no mask comes twice"
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    if start == "spawn":
        # Workers are seeded alike however they start, so nothing else feeds their numbers: neither
        # random nor NumPy, whose states a fork would have inherited.
        assert drawn == epochs(3, workers, 0, "fork", persistent)
    else:
        assert drawn == epochs(3, workers, 0, start, persistent)
        assert drawn != epochs(3, workers, 1, start, persistent)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("persistent", [False, True])
def test_progress_reaches_workers(persistent: bool) -> None:
    collate = MaskCollate(md.AsymmetricMaskPolicy(md.RandomMasker(md.Linear(0.0, 0.5))), 8)
    loader = DataLoader(
        Views(), 4, num_workers=2, collate_fn=collate, multiprocessing_context="fork",
        persistent_workers=persistent,
    )  # fmt: skip
    for progress, hidden in ((0.0, 0), (0.5, 4), (1.0, 8)):
        collate.progress = progress
        for batch in loader:
            assert [m.count for m in batch[-1].student_masks] == [hidden, hidden]
            assert batch[-1].student[0].sum(dim=1).tolist() == [hidden] * 4
