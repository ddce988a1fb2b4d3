"""Weights & Biases beside the lines of metrics, by a stand-in that writes down what it is told."""

from __future__ import annotations

import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maskdistill.training import NonFiniteLossError, Trainer, TrainingInterrupted
from maskdistill.training.checkpoint import latest_checkpoint
from maskdistill.training.logging import read_metrics, wandb_project

Build = Callable[..., Trainer]


class Run:
    """Stands in for a run of Weights & Biases."""

    def __init__(self, wanted: dict[str, Any]) -> None:
        self.id = wanted["id"] or "fresh0"
        self.wanted = wanted
        self.lines: list[dict[str, Any]] = []
        self.axes: list[tuple[str, Any]] = []
        self.exit_code: int | None = None

    def define_metric(self, name: str, **how: Any) -> None:
        self.axes.append((name, how.get("step_metric")))

    def log(self, values: dict[str, Any]) -> None:
        assert self.exit_code is None, "it is finished"
        self.lines.append(values)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that begin, in their order."""
    begun: list[Run] = []
    module = types.ModuleType("wandb")

    def init(**wanted: Any) -> Run:
        begun.append(Run(wanted))
        return begun[-1]

    module.init, module.Error = init, RuntimeError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return begun


def fit(trainer: Trainer, out: Path, **how: Any) -> None:
    trainer.fit(out, progress_bar=False, **how)


def test_it_gets_what_the_lines_get(build: Build, tmp_path: Path, runs: list[Run]) -> None:
    out = tmp_path / "mine"
    trainer = build(wandb="masks")
    fit(trainer, out, evaluate=lambda vit: {"score": 1.0}, evaluate_every=5)
    (run,) = runs
    assert run.lines == read_metrics(out / "metrics.jsonl")
    assert run.exit_code == 0
    assert ("*", "step") in run.axes, "their own steps, or those of a resumed run come late"
    assert run.wanted["project"] == "masks"
    assert run.wanted["name"] == "mine"
    assert run.wanted["dir"] == str(out)
    assert run.wanted["config"]["out_dim"] == 32
    assert run.wanted["config"]["policy_used"] == repr(trainer.policy)
    assert run.wanted["id"] is run.wanted["resume"] is None


def broken(self: Run, *args: Any, **kwargs: Any) -> None:
    raise RuntimeError("the service has died")


def test_its_failure_ends_nothing(
    build: Build, tmp_path: Path, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a line nor a checkpoint is lost, and it is said once."""
    monkeypatch.setattr(Run, "log", broken)
    monkeypatch.setattr(Run, "finish", broken)
    with pytest.warns(UserWarning, match="failed .RuntimeError: the service has died") as said:
        fit(build(wandb="masks"), tmp_path / "a", evaluate=lambda vit: {"score": 1.0})
    assert len([each for each in said if "Weights & Biases" in str(each.message)]) == 1
    assert [line["step"] for line in read_metrics(tmp_path / "a/metrics.jsonl")] == [
        2, 4, 6, 8, 10, 12, 12
    ]  # fmt: skip
    assert latest_checkpoint(tmp_path / "a").step == 12


def test_its_failure_hides_no_other(
    build: Build, tmp_path: Path, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "finish", broken)

    def crash(vit: Any) -> dict[str, float]:
        raise LookupError("of the evaluation")

    with (
        pytest.warns(UserWarning, match="the service has died"),
        pytest.raises(LookupError, match="of the evaluation"),
    ):
        fit(build(wandb="masks"), tmp_path, evaluate=crash)


def test_a_run_that_is_stopped_has_not_failed(
    build: Build, tmp_path: Path, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on another time; one that has crashed has."""
    real = Trainer._run_step

    def stopped(self: Trainer, *args: Any) -> Any:
        if self.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *args)

    monkeypatch.setattr(Trainer, "_run_step", stopped)
    with pytest.raises(TrainingInterrupted):
        fit(build(wandb="masks"), tmp_path)
    assert runs[0].exit_code == 0


def test_a_resumed_run_goes_on_with_its_own(
    build: Build, tmp_path: Path, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer._run_step

    def failing(self: Trainer, *args: Any) -> Any:
        metrics = real(self, *args)
        return metrics._replace(loss=metrics.loss * float("nan")) if self.step == 5 else metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_run_step", failing)
        with pytest.raises(NonFiniteLossError):
            fit(build(wandb="masks"), tmp_path)
    fit(build(wandb="masks"), tmp_path, resume=True)
    first, second = runs
    assert first.exit_code == 1
    assert (second.wanted["id"], second.wanted["resume"]) == (first.id, "allow")
    assert [line["step"] for line in second.lines] == [6, 8, 10, 12]
    fit(build(wandb="another"), tmp_path, resume=True)
    assert runs[2].wanted["id"] is None, "another project has no run of that id"
    fit(build(), tmp_path, resume=True)
    assert len(runs) == 3, "it is asked for anew"


def test_the_variable_asks_for_it_too(
    build: Build, tmp_path: Path, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    assert wandb_project(None) == "ours"
    assert wandb_project("masks") == "masks"
    fit(build(wandb="", max_steps=1), tmp_path / "a")
    assert not runs
    fit(build(max_steps=1), tmp_path / "b")
    assert runs[0].wanted["project"] == "ours"


@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")], ids=["none", "a folder"])
def test_without_the_package(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    """A folder of that name, which its runs leave behind, can be imported as well."""
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(ImportError, match=r"'masks' of Weights & Biases.*pip install wandb"):
        build(wandb="masks")
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    with pytest.raises(ImportError, match="'ours'.*WANDB_PROJECT"):
        build()


def test_a_run_that_cannot_begin(build: Build, tmp_path: Path, runs: list[Run]) -> None:
    def refuse(**wanted: Any) -> None:
        raise RuntimeError("api_key not configured.")

    sys.modules["wandb"].init = refuse  # type: ignore[attr-defined]
    with pytest.raises(ConnectionError, match=r"api_key not configured\. Log in by `wandb login`"):
        fit(build(wandb="masks"), tmp_path)
