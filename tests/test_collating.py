"""Masks as DINOv2's collated entries, and drawn in the data loader and its workers."""

from __future__ import annotations

import copy
import os
import pickle
import random
import runpy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

import maskdistill as md
from maskdistill.collating import MaskCollate, collated_masks
from maskdistill.data import Crops

RANDOM = md.RandomMasker(0.3)
POLICY = md.AsymmetricMaskPolicy(RANDOM)
UNEVEN = md.AsymmetricMaskPolicy(md.masking.BernoulliMasker(0.4).sometimes(0.7))


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and a == b


# --- collated_masks


def test_the_entries_by_hand() -> None:
    first = torch.tensor([[True, False, False], [False, False, False]])
    second = torch.tensor([[False, True, True], [True, True, True]])
    entries = collated_masks([first, second])
    # Rows are image 0 and image 1 of the first crop, then both of the second: patches 0 to 11.
    assert entries["collated_masks"].tolist() == [*first.tolist(), *second.tolist()]
    assert entries["mask_indices_list"].tolist() == [0, 7, 8, 9, 10, 11]
    third = float(torch.tensor(1 / 3))
    assert entries["masks_weight"].tolist() == [1.0, 0.5, 0.5, third, third, third]
    assert entries["upperbound"] == 6
    assert entries["n_masked_patches"].tolist() == [6]
    dtypes = [v.dtype if isinstance(v, Tensor) else type(v) for v in entries.values()]
    assert dtypes == [torch.bool, torch.int64, torch.float32, int, torch.int64]
    assert list(entries) == [
        "collated_masks", "mask_indices_list", "masks_weight", "upperbound", "n_masked_patches",
    ]  # fmt: skip


def test_every_form_of_masks_gives_the_same_entries() -> None:
    masks = UNEVEN([torch.zeros(6, 3, 24, 32)] * 2 + [torch.zeros(6, 3, 16, 16)] * 3, 8)
    first, second = masks.student[:2]
    assert first is not None
    assert second is not None
    expected = collated_masks([first, second], upperbound=2 * 6 * 12)
    assert expected["upperbound"] == 144
    for given in (masks, torch.cat([first, second])):
        entries = collated_masks(given, upperbound=144)
        assert all(equal(entries[name], value) for name, value in expected.items())


def test_clean_crops_and_empty_batches() -> None:
    mask = torch.zeros(2, 4, dtype=torch.bool)
    entries = collated_masks([mask, None])
    assert entries["collated_masks"].shape == (4, 4)
    assert entries["upperbound"] == 0
    assert entries["masks_weight"].shape == entries["mask_indices_list"].shape == (0,)
    assert collated_masks(mask[:0])["collated_masks"].shape == (0, 4)
    mask[1, 2] = True
    assert collated_masks([None, mask])["mask_indices_list"].tolist() == [(2 + 1) * 4 + 2]


@pytest.mark.parametrize(
    ("masks", "bound", "message"),
    [
        ([None, None], None, "no mask among these"),
        ([], None, "no mask among these"),
        (torch.zeros(2, 4), None, r"must be \(B, N\) bool.*\(2, 4\) torch.float32"),
        (torch.zeros(4, dtype=torch.bool), None, r"must be \(B, N\) bool"),
        (
            [torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 1, dtype=torch.bool)],
            None,
            r"\(2, 4\) and \(2, 1\).*masks.student\[:2\]",
        ),
        (torch.ones(2, 4, dtype=torch.bool), 7, "upperbound must be .* 8 here; got 7"),
        (torch.ones(2, 4, dtype=torch.bool), 8.0, "upperbound must be an int"),
        (md.ViewPolicy.symmetric(RANDOM), None, "the teacher's views are masked"),
        (md.ViewPolicy.student_all_views(RANDOM), None, "the student's local views are masked"),
    ],
)
def test_what_cannot_be_collated(masks: Any, bound: Any, message: str) -> None:
    if isinstance(masks, md.ViewPolicy):
        masks = masks([torch.zeros(2, 3, 32, 32)] * 2 + [torch.zeros(2, 3, 16, 16)], 8)
    with pytest.raises(ValueError, match=message):
        collated_masks(masks, bound)


@pytest.mark.parametrize("name", ["dinov2", "dinov3"])
def test_the_originals_collate_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give their function our masks to draw: all it returns is what ours returns.

    Needs clones: MASKDISTILL_DINOV2 and MASKDISTILL_DINOV3 are their folders.
    """
    folder = os.environ.get(f"MASKDISTILL_{name.upper()}")
    if not folder:
        pytest.skip(f"MASKDISTILL_{name.upper()} does not say where a clone is")
    theirs = runpy.run_path(f"{folder}/{name}/data/collate.py")["collate_data_and_cast"]
    monkeypatch.setattr(random, "shuffle", lambda rows: None)  # else they would mix our masks
    for seed in range(20):
        torch.manual_seed(seed)
        batch = 1 + seed % 7
        crops = [torch.randn(batch, 3, 8, 12) for _ in range(2)]
        local = [torch.randn(batch, 3, 4, 4) for _ in range(3)]
        samples = [
            ({"global_crops": [c[b] for c in crops], "local_crops": [c[b] for c in local]}, ())
            for b in range(batch)
        ]
        drawn: list[Tensor] = []

        def their_collate(samples: Any) -> Any:
            rows = iter(drawn[0])  # noqa: B023
            return theirs(
                samples, (0.0, 0.9), 1.0, torch.float32, n_tokens=24,
                mask_generator=lambda k: next(rows).view(4, 6).numpy(),
            )  # fmt: skip

        torch.manual_seed(seed)
        ours = MaskCollate(UNEVEN, 2, collated=True)(samples)
        drawn.append(ours["collated_masks"])
        original = their_collate(samples)
        assert isinstance(original.pop("upperbound"), int)
        assert set(ours) == {*original, "upperbound"}
        assert all(equal(ours[key], value) for key, value in original.items())
        assert collated_masks(ours["collated_masks"], 10**6)["upperbound"] == 10**6
        # Wrapped around theirs, which keeps what else it returns.
        torch.manual_seed(seed)
        both = MaskCollate(UNEVEN, 2, their_collate, collated=True)(samples)
        assert all(equal(both[key], value) for key, value in ours.items())


# --- MaskCollate: what goes in, what comes out


def crops_of(i: int, local: int = 2) -> list[Tensor]:
    return [torch.full((3, 32, 32), float(i))] * 2 + [torch.full((3, 16, 16), float(i))] * local


def places(views: int) -> tuple[Tensor, Tensor]:
    box = torch.tensor([0.1, 0.1, 0.9, 0.9])
    return box.expand(views, 4).clone(), torch.zeros(views, dtype=torch.bool)


def test_samples_with_labels() -> None:
    samples = [(crops_of(i), i) for i in range(4)]
    torch.manual_seed(1)
    crops, labels, masks = MaskCollate(POLICY, 8)(samples)
    assert [crop[:, 0, 0, 0].tolist() for crop in crops] == [[0, 1, 2, 3]] * 4
    assert labels.tolist() == [0, 1, 2, 3]
    torch.manual_seed(1)
    expected = POLICY(crops, 8)
    assert all(equal(a, b) for a, b in zip(masks.student, expected.student, strict=True))
    assert masks.teacher == [None, None]
    assert [m and m.count for m in masks.student_masks] == [5, 5, None, None]


def test_the_other_forms_of_a_sample() -> None:
    collate = MaskCollate(POLICY, 8)
    crops, masks = collate([crops_of(i) for i in range(3)])
    assert len(crops) == 4
    assert masks.student[1].shape == (3, 16)

    batch = collate([(crops_of(i), i, f"file {i}") for i in range(3)])
    assert len(batch) == 4
    assert batch[2] == ("file 0", "file 1", "file 2")
    assert isinstance(batch[3], md.ViewMasks)

    batch = collate([{"crops": crops_of(i), "label": i} for i in range(3)])
    assert list(batch) == ["crops", "label", "masks"]
    assert batch["masks"].student[0].shape == (3, 16)
    batch = MaskCollate(POLICY, 8, key="pixel_values")([{"pixel_values": crops_of(1)}])
    assert batch["masks"].student[0].shape == (1, 16)

    parts = {"global_crops": crops_of(0)[:2], "local_crops": crops_of(0)[2:]}
    for sample in (parts, (parts, 0)):
        assert len(collate([sample] * 3)[-1 if isinstance(sample, tuple) else "masks"].student) == 4


@pytest.mark.parametrize("form", ["Crops", "labelled", "dict"])
def test_boxes_reach_the_policy(form: str) -> None:
    policy = md.ViewPolicy.student_all_views(md.SceneMasker(RANDOM))
    assert policy.needs >= {"boxes", "flipped"}
    boxes, flipped = places(4)
    samples: dict[str, Any] = {
        "Crops": Crops(crops_of(0), boxes, flipped),
        "labelled": (Crops(crops_of(0), boxes, flipped), 7),
        "dict": {"crops": crops_of(0), "boxes": boxes, "flipped": flipped},
    }
    torch.manual_seed(3)
    batch = MaskCollate(policy, 8)([samples[form]] * 5)
    masks = batch["masks"] if form == "dict" else batch[-1]
    if form == "Crops":
        assert len(batch) == 2
        assert isinstance(batch[0], Crops)
    torch.manual_seed(3)
    expected = policy(
        default_collate([crops_of(0)] * 5), 8,
        boxes=boxes.expand(5, 4, 4), flipped=flipped.expand(5, 4),
    )  # fmt: skip
    assert all(equal(a, b) for a, b in zip(masks.student, expected.student, strict=True))
    torch.manual_seed(3)
    whole = md.AsymmetricMaskPolicy(md.SceneMasker(RANDOM))
    entries = MaskCollate(whole, 8, collated=True)([samples[form]] * 5)
    assert entries["collated_masks"].shape == (10, 16)


def test_collated() -> None:
    collate = MaskCollate(POLICY, 8, collated=True, upperbound=99)
    batch = collate([(crops_of(i), i) for i in range(3)])
    assert batch["collated_global_crops"][:, 0, 0, 0].tolist() == [0, 1, 2] * 2
    assert batch["collated_local_crops"][:, 0, 0, 0].tolist() == [0, 1, 2] * 2
    assert batch["collated_masks"].sum(dim=1).tolist() == [5] * 6
    assert batch["upperbound"] == 99
    assert "collated_local_crops" not in collate([(crops_of(i, local=0), i) for i in range(3)])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MaskCollate(RANDOM, 8), "must be a ViewPolicy; got RandomMasker"),  # type: ignore[arg-type]
        (
            lambda: MaskCollate(md.AsymmetricMaskPolicy(md.AttentionGuidedMasker(0.3)), 8),
            r"\['attention'\], which a data loader cannot give",
        ),
        (lambda: MaskCollate(md.ViewPolicy.symmetric(RANDOM), 8, collated=True), "teacher's"),
        (lambda: MaskCollate(md.ViewPolicy.local_only(RANDOM), 8, collated=True), "local views"),
        (lambda: MaskCollate(POLICY, 8, upperbound=9), "upperbound is for collated=True"),
    ],
)
def test_refused_when_built(build: Callable[[], MaskCollate], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([(torch.zeros(3, 32, 32), 1)], r"must be a list of crops.*batch of list"),
        ([torch.zeros(3, 32, 32)], "must be a list of crops.*batch of Tensor"),
        ([{"image": crops_of(0)}], r"under 'crops'.*\['image'\]"),
        ([crops_of(0, local=0)[:1]], "at least 2 tensors"),
    ],
)
def test_refused_samples(samples: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskCollate(POLICY, 8)(samples)


def test_refused_batches() -> None:
    policy = md.AsymmetricMaskPolicy(md.SceneMasker(RANDOM))
    with pytest.raises(ValueError, match="where crops lie.*MultiCrop"):
        MaskCollate(policy, 8)([(crops_of(0), 0)])

    def theirs(samples: list[Any]) -> dict[str, Any]:
        return {
            "collated_global_crops": torch.zeros(4, 3, 32, 32),
            "collated_masks": torch.zeros(4, 4, dtype=torch.bool),
            "more": 1,
        }

    with pytest.raises(ValueError, match="give collated=True"):
        MaskCollate(POLICY, 8, theirs)([])
    with pytest.raises(ValueError, match=r"\(4, 4\), but the policy \(4, 16\)"):
        MaskCollate(POLICY, 8, theirs, collated=True)([])
    assert MaskCollate(POLICY, 16, theirs, collated=True)([])["more"] == 1


def test_progress_moves_schedules() -> None:
    collate = MaskCollate(md.AsymmetricMaskPolicy(md.RandomMasker(md.Linear(0.0, 0.5))), 8)
    samples = [(crops_of(i), i) for i in range(2)]
    assert collate(samples)[-1].student_masks[0].count == 0
    collate.progress = 1.0
    assert collate.progress == 1.0
    assert collate(samples)[-1].student_masks[0].count == 8
    with pytest.raises(ValueError, match=r"progress must lie in \[0, 1\]; got 3"):
        collate.progress = 3
    for other in (copy.deepcopy(collate), pickle.loads(pickle.dumps(collate))):
        other.progress = 0.5
        assert other(samples)[-1].student_masks[0].count == 4
        assert other.policy == collate.policy
    assert collate.progress == 1.0


def test_masks_move_with_the_batch() -> None:
    masks = MaskCollate(POLICY, 8)([(crops_of(0), 0)] * 2)[-1].to("meta")
    assert [None if m is None else m.device.type for m in masks.student] == ["meta"] * 2 + [
        None
    ] * 2
    assert [m and m.count for m in masks.student_masks] == [5, 5, None, None]
    assert callable(masks.pin_memory)  # which DataLoader(pin_memory=True) calls


# --- MaskCollate in the workers of a data loader


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


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("workers", "start", "persistent"),
    [(0, "fork", False), (2, "fork", False), (2, "fork", True), (1, "spawn", True)],
)
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
