"""What a run's lines and events keep: every step once, and nothing that JSON does not know."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskdistill.training import Trainer
from maskdistill.training.logging import read_metrics

Build = Callable[..., Trainer]


def test_events_have_each_step_once(build: Build, tmp_path: Path) -> None:
    """Lost: those after the checkpoint, which come again. Kept: that of the checkpoint's step."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    real = Trainer._run_step

    def failing(self: Trainer, *args: Any) -> Any:
        if self.step == 7:
            raise LookupError("crash")
        return real(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_run_step", failing)
        with pytest.raises(LookupError):
            build().fit(tmp_path, progress_bar=False)
    build().fit(tmp_path, resume=True, progress_bar=False)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [event.step for event in events] == [line["step"] for line in lines]
    assert [event.step for event in events] == [2, 4, 6, 8, 10, 12]


def test_numbers_of_other_kinds_are_numbers(build: Build, tmp_path: Path) -> None:
    found: Any = {
        "a": np.float32(0.5),
        "b": torch.tensor(0.25),
        "c": math.nan,
        "d": -math.inf,
        "e": 1,
    }
    report = build(max_steps=2).fit(tmp_path, evaluate=lambda vit: found, progress_bar=False)
    wanted = {"a": 0.5, "b": 0.25, "c": None, "d": None, "e": 1.0, "step": 2}
    texts = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(texts[-1], parse_constant=pytest.fail) == wanted
    assert report.evaluation is not None
    assert {type(value) for value in report.evaluation.values()} == {float}
    known = {name: value for name, value in wanted.items() if value is not None}
    assert read_metrics(tmp_path / "metrics.jsonl")[-1] == known, "readers get numbers"
    again = build(max_steps=2)
    none: Any = pytest.fail
    resumed = again.fit(tmp_path, resume=True, evaluate=none, progress_bar=False)
    assert resumed.evaluation is not None
    assert resumed.evaluation["a"] == 0.5
    assert math.isnan(resumed.evaluation["c"]), "it was evaluated, and is not again"
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == texts


def test_an_evaluation_of_no_numbers(build: Build, tmp_path: Path) -> None:
    found: Any = {"a": [1, 2]}
    with pytest.raises(TypeError, match=r"evaluate must return numbers.*'a' is \[1, 2\]"):
        build(max_steps=1).fit(tmp_path, evaluate=lambda vit: found, progress_bar=False)
