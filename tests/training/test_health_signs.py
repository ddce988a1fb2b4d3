"""Health in the lines of metrics: right numbers, nothing else changed, the same after a resume."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskdistill as md
from maskdistill.evaluation import health
from maskdistill.models.speed import compile_blocks
from maskdistill.training import (
    NonFiniteLossError,
    Trainer,
    TrainingConfig,
    TrainingInterrupted,
    train_step,
)
from maskdistill.training import trainer as trainer_module
from maskdistill.training.logging import PREFIX, health_due, measure_health, read_metrics
from maskdistill.training.step import StepView
from tests.training.conftest import TINY, assert_same, weights

Build = Callable[..., Trainer]
OF_TEACHER = {"kl_to_uniform", "kl_of_mean", "prototype_share", "prototype_perplexity",
              "effective_rank", "alignment", "uniformity"}  # fmt: skip
LOSSES = {"masked_loss", "unmasked_loss"}


def signs_of(line: dict[str, Any]) -> dict[str, float]:
    return {k.removeprefix(PREFIX): v for k, v in line.items() if k.startswith(PREFIX)}


def lines_of(out: Path) -> list[dict[str, Any]]:
    lines = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


@given(st.integers(1, 60), st.integers(1, 40), st.integers(1, 40))
def test_they_are_due_once_in_each_span(last: int, log_every: int, health_every: int) -> None:
    """In the first line at or after each multiple, and in the last line of all."""
    logged = [step for step in range(1, last + 1) if step % log_every == 0]
    wanted = {next((s for s in logged if s >= due), 0) for due in range(0, last + 1, health_every)}
    wanted = {s for s in wanted if s >= health_every} | {last}
    how = {"log_every": log_every, "health_every": health_every}
    found = {step for step in range(1, last + 1) if health_due(step, last, **how)}
    assert found == wanted
    assert not health_due(last, last, log_every=log_every, health_every=0)


@pytest.mark.parametrize(
    ("policy", "apply", "accumulate"),
    [
        (md.ViewPolicy.none(), "token", 1),
        (md.AsymmetricMaskPolicy(md.AttentionGuidedMasker(0.5, temperature=0.5)), "token", 2),
        (md.ViewPolicy.student_all_views(md.RandomMasker(0.5)), "drop", 1),
        (md.AsymmetricMaskPolicy(md.RandomMasker(md.Uniform(0.1, 0.5))), "pixel", 2),
    ],
    ids=["none", "attention", "all views", "ratios"],
)
def test_looking_changes_no_bit(
    build: Build, tmp_path: Path, policy: md.ViewPolicy, accumulate: int, apply: str
) -> None:
    changes = {
        "drop_path": 0.3,
        "max_steps": 2,
        "log_every": 1,
        "accumulate": accumulate,
        "apply": apply,
    }
    watched, alone = (build(policy, health_every=every, **changes) for every in (1, 0))
    for trainer, out in ((watched, "watched"), (alone, "alone")):
        trainer.fit(tmp_path / out, progress_bar=False)
    assert_same(weights(watched), weights(alone))
    lines, plain = lines_of(tmp_path / "watched"), lines_of(tmp_path / "alone")
    names = OF_TEACHER | (LOSSES if policy.masks_student else set())
    assert [set(signs_of(line)) for line in lines] == [names] * 2
    assert [{k: v for k, v in line.items() if not k.startswith(PREFIX)} for line in lines] == plain


def test_the_numbers_are_those_of_the_step(build: Build) -> None:
    """Measured again from what the step saw, by other means; drop path would show."""
    trainer = build(drop_path=0.5, accumulate=2)
    seen: list[StepView] = []
    signs: dict[str, torch.Tensor] = {}
    student, objective = trainer.state.student_net, trainer.state.objective

    def look(view: StepView) -> None:
        signs.update(measure_health(trainer.state, view, trainer.settings(0)))
        modes = {part.training for part in student.modules()}
        assert modes == {True}, "the student trains on"
        student.eval()
        with torch.no_grad():
            for name, masks in (("masked_loss", view.masks), ("unmasked_loss", None)):
                logits = student(view.crops, masks).logits
                loss = objective(logits, view.targets, views=len(view.crops))
                torch.testing.assert_close(signs[name], loss)
        student.train()
        seen.append(view)

    crops = [torch.randn(4, 3, 16, 16) for _ in range(2)] + [torch.randn(4, 3, 8, 8)] * 2
    student.train()
    train_step(trainer.state, crops, trainer.policy, trainer.settings(0), observe=look)
    features, targets = seen[0].teacher.features, seen[0].targets
    assert targets.shape == (8, 32)
    entropy = -(targets * targets.log()).sum(dim=1).mean()
    assert float(signs["kl_to_uniform"]) == pytest.approx(math.log(32) - float(entropy), abs=1e-4)
    assert signs["effective_rank"].equal(health.effective_rank(features[:4])), "one view alone"
    assert signs["alignment"].equal(health.alignment(features[:4], features[4:]))
    assert float(signs["prototype_share"]) == len(targets.argmax(dim=1).unique()) / 32
    assert signs["masked_loss"] != signs["unmasked_loss"]


def test_a_resumed_run_writes_the_same_lines(build: Build, tmp_path: Path) -> None:
    changes = {"health_every": 4, "checkpoint_every": 3}
    build(**changes).fit(tmp_path / "whole", progress_bar=False)
    real = trainer_module.Trainer._run_step

    def stopped(self: Trainer, *args: Any) -> Any:
        if self.step == 6:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "_run_step", stopped)
        with pytest.raises(TrainingInterrupted):
            build(**changes).fit(tmp_path / "run", progress_bar=False)
    build(**changes).fit(tmp_path / "run", resume=True, progress_bar=False)
    lines = lines_of(tmp_path / "run")
    assert lines == lines_of(tmp_path / "whole")
    assert [line["step"] for line in lines if signs_of(line)] == [4, 8, 12]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_of_one_has_no_uniformity(build: Build, tmp_path: Path, batch: int) -> None:
    build(batch_size=batch, max_steps=1).fit(tmp_path, progress_bar=False)
    (line,) = lines_of(tmp_path)
    assert set(signs_of(line)) == (OF_TEACHER | LOSSES) - ({"uniformity"} if batch == 1 else set())


def test_a_run_that_diverges_says_so(build: Build, tmp_path: Path) -> None:
    """Not that a singular value decomposition has failed."""
    trainer = build(max_steps=2)
    with torch.no_grad():
        trainer.teacher.backbone.backbone.cls_token.fill_(math.nan)
    with pytest.raises(NonFiniteLossError, match="loss became nan at step 1"):
        trainer.fit(tmp_path, progress_bar=False)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_blocks_run_as_written(build: Build) -> None:
    """A look compiles nothing anew, which on an accelerator takes longer than many looks."""
    ran: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        ran.append("compiled")
        return graph.forward

    trainer = build()
    compile_blocks(trainer.state.student_net.backbone.backbone, backend=backend)
    crops = [torch.randn(4, 3, 16, 16) for _ in range(2)] + [torch.randn(4, 3, 8, 8)] * 2
    settings = trainer.settings(0)
    view: list[StepView] = []
    train_step(trainer.state, crops, trainer.policy, settings, observe=view.append)
    before = len(ran)
    assert before, "training is compiled"
    assert set(measure_health(trainer.state, view[0], settings)) == OF_TEACHER | LOSSES
    assert len(ran) == before


def test_signs_are_settings_of_the_run() -> None:
    with pytest.raises(ValueError, match="health_every must be >= 0; got -1"):
        TrainingConfig(**{**TINY, "health_every": -1})
