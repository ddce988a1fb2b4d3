"""The trainer as its user meets it: exact, restartable, and plain about what is wrong."""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import maskdistill as md
from maskdistill.training import (
    CollapseWarning,
    NonFiniteLossError,
    StepMetrics,
    Trainer,
    TrainingConfig,
)
from maskdistill.training import trainer as trainer_module
from maskdistill.training.checkpoint import fingerprint, latest_checkpoint
from maskdistill.training.logging import CollapseAlarm, RunRecord, read_metrics
from tests.training import parity
from tests.training.conftest import TINY, Noise, assert_same, weights

Build = Callable[..., Trainer]


def fit(trainer: Trainer, out: Path, **kwargs: Any) -> Trainer:
    trainer.fit(out, progress_bar=False, **kwargs)
    return trainer


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


@pytest.mark.skipif(torch.__version__ < "2.7", reason="drop path drew other numbers before")
def test_golden_run(build: Build, tmp_path: Path) -> None:
    """A refactor leaves these numbers as they are, or the CHANGELOG says "Draws change"."""
    trainer = build()
    # Weights that no version of timm or torch changes.
    parity.fill_weights(trainer.state.student_net)
    trainer.teacher.load_state_dict(trainer.state.student_net.state_dict())
    fit(trainer, tmp_path)
    np.testing.assert_allclose(losses(tmp_path), GOLDEN, rtol=1e-4)


GOLDEN = [2.2660041, 2.3893902, 2.4467211, 2.5673280, 2.6700206, 3.150449]


def test_a_run_leaves_what_it_promises(build: Build, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    report = build().fit(out, progress_bar=False)
    assert report.steps == 12
    assert report.images_per_second > 0
    lines = read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert set(lines[0]) >= {
        "loss", "grad_norm", "teacher_entropy", "feature_spread", "lr", "weight_decay", "momentum",
        "teacher_temp", "epoch", "images_per_second",
    }  # fmt: skip
    assert list(out.glob("events.out.tfevents.*"))
    assert latest_checkpoint(out).step == 12
    assert not list(out.rglob("*.tmp"))


def test_the_seed_changes_everything(build: Build, tmp_path: Path) -> None:
    a, b = fit(build(max_steps=2), tmp_path / "a"), fit(build(seed=1, max_steps=2), tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "b")
    assert not torch.equal(
        a.teacher.backbone.backbone.pos_embed, b.teacher.backbone.backbone.pos_embed
    )


def test_what_the_policy_masks_is_masked(build: Build, tmp_path: Path) -> None:
    """The student's global views and no others, as the backbone sees them."""
    policy = md.AsymmetricMaskPolicy(md.RandomMasker(0.5))
    trainer = build(policy, max_steps=1, health_every=0)  # which looks at the student as well
    seen: dict[str, list[tuple[int, bool]]] = {"student": [], "teacher": []}
    for role, net in (("student", trainer.state.student_net), ("teacher", trainer.teacher)):
        net.backbone.register_forward_pre_hook(
            lambda m, args, role=role: seen[role].append((args[0].shape[-1], args[1] is not None))
        )
    fit(trainer, tmp_path)
    assert seen == {"student": [(16, True), (8, False)], "teacher": [(16, False)]}


SYMMETRIC = md.ViewPolicy.symmetric(md.BlockMasker(0.4))
GUIDED = md.AsymmetricMaskPolicy(md.AttentionGuidedMasker(0.3, temperature=md.Linear(1, 0)))


@pytest.mark.parametrize(
    ("policy", "apply"),
    [
        (md.ViewPolicy.none(), "token"),
        (SYMMETRIC, "token"),
        (SYMMETRIC, "drop"),
        (md.ViewPolicy.student_all_views(md.RandomMasker(0.5)), "pixel"),
        (GUIDED, "token"),
        (GUIDED, "drop"),
    ],
)
def test_policies_train_by_each_application(
    build: Build, tmp_path: Path, apply: str, policy: md.ViewPolicy
) -> None:
    trainer = build(policy, apply=apply, max_steps=2)
    before = {k: v.clone() for k, v in weights(trainer).items()}
    fit(trainer, tmp_path)
    assert all(math.isfinite(loss) for loss in losses(tmp_path))
    after = weights(trainer)
    assert not torch.equal(after["teacher.head.mlp.0.weight"], before["teacher.head.mlp.0.weight"])
    if apply == "token":
        learned = not torch.equal(
            after["student.backbone.mask_token"], before["student.backbone.mask_token"]
        )
        assert learned == policy.masks_student


def test_a_preset_is_applied_as_it_says(build: Build) -> None:
    with pytest.raises(ValueError, match="Set apply='drop'"):
        build(md.presets.msn())
    assert build(md.presets.msn(), apply="drop").config.apply == "drop"


def test_maskers_that_know_geometry_train(build: Build, tmp_path: Path) -> None:
    """The boxes of the crops reach the maskers, of the right images and in the right order."""
    scene = md.SceneMasker(md.BlockMasker(0.5), grid=(16, 16))
    guided = md.AttentionGuidedMasker(0.5)
    policy = md.ViewPolicy(
        student_global=scene | guided, student_local=guided | scene, teacher_global=scene
    )
    trainer = build(policy, max_steps=1, health_every=0)
    seen: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
    for role, net in (("student", trainer.state.student_net), ("teacher", trainer.teacher)):
        net.backbone.register_forward_pre_hook(
            lambda m, args, role=role: seen[role].append(args[1].mask)
        )
    boxes: list[torch.Tensor] = []
    real_step = trainer_module.train_step

    def recording(*args: object, **kwargs: torch.Tensor):  # type: ignore[no-untyped-def]
        boxes.append(kwargs["boxes"])
        return real_step(*args, **kwargs)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "train_step", recording)
        fit(trainer, tmp_path)
    assert boxes[0].shape == (4, 4, 4)
    (teacher,) = seen["teacher"]
    student = seen["student"][0]
    assert (student | ~teacher).all(), "what the teacher does not see, the student does not see"
    assert [mask.shape for mask in seen["student"]] == [(8, 16), (8, 4)]


def test_a_backbone_of_ones_own(build: Build, images: Noise, tmp_path: Path) -> None:
    config = TrainingConfig(**{**TINY, "patch_size": 4, "max_steps": 2})
    vit = timm.create_model(
        "eva02_tiny_patch14_224", img_size=16, patch_size=4, depth=1, num_classes=0,
        dynamic_img_size=True,
    )  # fmt: skip
    trainer = Trainer(config, images, md.ViewPolicy.none(), backbone=vit)
    assert trainer.state.student_net.backbone.backbone is vit
    fit(trainer, tmp_path)
    static = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=1,
                               num_classes=0)  # fmt: skip
    with pytest.raises(ValueError, match=r"does not take 8x8.*dynamic_img_size=True"):
        Trainer(config, images, md.ViewPolicy.none(), backbone=static)


# --- Faithful details


def test_teacher_is_an_average_without_drop_path(build: Build, tmp_path: Path) -> None:
    trainer = build(drop_path=0.5, momentum=0.5, max_steps=1)
    start = {k: v.clone() for k, v in trainer.teacher.state_dict().items()}
    assert_same(start, dict(trainer.state.student_net.state_dict()))
    assert not any(p.requires_grad for p in trainer.teacher.parameters())
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(trainer.teacher.backbone(x), trainer.teacher.backbone(x))
    trainer.state.student.train()
    student = trainer.state.student_net.backbone
    assert not torch.equal(student(x), student(x)), "the student has drop path"
    fit(trainer, tmp_path)
    now = trainer.state.student_net.state_dict()
    for name, value in trainer.teacher.state_dict().items():
        torch.testing.assert_close(value, 0.5 * start[name] + 0.5 * now[name])


def test_the_last_layer_waits_an_epoch(build: Build, tmp_path: Path) -> None:
    frozen = build(freeze_last_layer=1, max_steps=4)  # 4 steps are an epoch
    before = frozen.state.student_net.head.last_layer.weight_v.clone()
    fit(frozen, tmp_path / "a")
    assert torch.equal(frozen.state.student_net.head.last_layer.weight_v, before)
    free = fit(build(freeze_last_layer=0, max_steps=4), tmp_path / "b")
    assert not torch.equal(free.state.student_net.head.last_layer.weight_v, before)


def test_schedules_of_the_settings(build: Build) -> None:
    trainer = build(lr=0.1, batch_size=4, warmup_epochs=1, momentum=0.9, teacher_temp=0.07,
                    warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=2)  # fmt: skip
    at = [trainer.settings(step) for step in range(12)]
    assert [s.lr for s in at[:4]] == pytest.approx([k / 3 * 0.1 * 4 / 256 for k in range(4)])
    assert at[0].weight_decay == pytest.approx(0.04)
    assert at[0].momentum == pytest.approx(0.9)
    assert at[11].momentum > 0.99
    assert [s.teacher_temp for s in at] == [0.04] * 4 + [0.07] * 8
    assert [s.freeze_last_layer for s in at] == [True] * 4 + [False] * 8
    assert at[6].progress == 0.5


def test_defaults_scale_with_the_data() -> None:
    imagenet = TrainingConfig(batch_size=256).resolved(1_281_167)
    assert (imagenet.out_dim, imagenet.momentum, imagenet.local_size) == (65536, 0.996, 96)
    assert imagenet.warmup_epochs == pytest.approx(10, rel=1e-3)
    mini = TrainingConfig(image_size=64, patch_size=8).resolved(50_000)
    assert (mini.out_dim, mini.local_size) == (4096, 24)
    tiny = TrainingConfig(epochs=1, batch_size=10).resolved(1000)
    assert (tiny.out_dim, tiny.momentum) == (256, 0.98)
    chosen = TrainingConfig(
        out_dim=7, momentum=0.5, local_size=32, warmup_epochs=0, warmup_patch_temp_epochs=3
    )
    assert chosen.resolved(1000) == chosen
    assert imagenet.warmup_patch_temp_epochs == 30


def test_each_loss_of_an_objective_is_logged(build: Build, tmp_path: Path) -> None:
    preset = md.presets.dinov2()
    trainer = fit(build(policy=preset, log_every=1), tmp_path)
    assert trainer.config.objective == "dino+ibot+koleo"
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        assert line["loss"] == pytest.approx(
            line["loss_dino"] + line["loss_ibot"] + 0.1 * line["loss_koleo"], rel=1e-5
        )
    assert build(policy=preset, objective="dino").config.objective == "dino"
    assert build(policy=md.ViewPolicy.none()).config.objective == "dino"
    with pytest.raises(ValueError, match="of which apply='drop' leaves nothing"):
        build(policy=md.AsymmetricMaskPolicy(md.RandomMasker(0.5)), apply="drop",
              objective="dino+ibot")  # fmt: skip
    with pytest.raises(ValueError, match="an objective is a sum such as"):
        build(objective="ibot+dinov2")
    with pytest.raises(ValueError, match="needs a loss between the class tokens"):
        build(objective="ibot", policy=md.ViewPolicy.none())


# --- What goes wrong


def test_a_non_finite_loss_stops_and_keeps_the_last_checkpoint(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_step = trainer_module.train_step
    calls = 0

    def diverging(*args: Any, **kwargs: Any) -> StepMetrics:
        nonlocal calls
        calls += 1
        metrics = real_step(*args, **kwargs)
        return metrics._replace(loss=torch.tensor(math.nan)) if calls == 6 else metrics

    monkeypatch.setattr(trainer_module, "train_step", diverging)
    with pytest.raises(NonFiniteLossError, match=r"nan at step 6.*last good checkpoint"):
        fit(build(), tmp_path)
    assert latest_checkpoint(tmp_path).step == 4


def test_an_infinite_gradient_never_reaches_a_checkpoint(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss is still finite; the weights are not, and step 8 would be saved."""
    calls = 0

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return gradient * math.inf if calls == 8 else gradient

    trainer = build()
    trainer.state.student_net.head.mlp[0].weight.register_hook(spoil)
    with pytest.raises(NonFiniteLossError, match=r"gradient norm became (inf|nan) at step 8"):
        fit(trainer, tmp_path)
    content = latest_checkpoint(tmp_path).content
    assert content["step"] == 4
    assert all(torch.isfinite(v).all() for v in content["student"].values())


def test_a_finished_run_resumes_to_the_same_report(build: Build, tmp_path: Path) -> None:
    first = build().fit(tmp_path, progress_bar=False)
    again = build().fit(tmp_path, resume=True, progress_bar=False)
    assert again.steps == first.steps
    assert again.images_per_second == pytest.approx(first.images_per_second, rel=0.5)


def test_other_settings_cannot_resume(build: Build, tmp_path: Path) -> None:
    fit(build(), tmp_path)
    with pytest.raises(ValueError, match=r"epochs was 3 and is 5"):
        fit(build(epochs=5), tmp_path, resume=True)
    with pytest.raises(ValueError, match="policy was"):
        fit(build(md.ViewPolicy.none()), tmp_path, resume=True)
    with pytest.raises(FileExistsError, match="holds a run already"):
        fit(build(), tmp_path)
    free = {"workers": 1, "log_every": 1, "checkpoint_every": 5, "keep_checkpoints": 1,
            "health_every": 0, "wandb": ""}  # fmt: skip
    assert build(**free).fit(tmp_path, resume=True, progress_bar=False).steps == 12


def test_other_data_cannot_resume(build: Build, tmp_path: Path) -> None:
    """As many images, told apart by their labels, or by what the data set calls itself."""

    def labelled(*labels: int) -> Noise:
        images = Noise()
        images.labels = np.resize(labels, len(images))  # type: ignore[attr-defined]
        return images

    fit(build(data=labelled(0, 1, 2)), tmp_path)
    with pytest.raises(ValueError, match=r"as many images, but not the same.*was \w{16} and is"):
        fit(build(data=labelled(0, 2, 1)), tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"images was 18 and is 16"):
        fit(build(data=Noise(16)), tmp_path, resume=True)
    fit(build(data=labelled(0, 1, 2)), tmp_path, resume=True)
    assert fingerprint(Noise()) is None, "nothing to go by"
    assert fingerprint(types.SimpleNamespace(fingerprint="v1", labels=[0])) == "v1"
    wide, narrow = np.arange(5, dtype=np.int64), np.arange(5, dtype=np.uint8)
    assert fingerprint(types.SimpleNamespace(labels=wide)) == fingerprint(
        types.SimpleNamespace(labels=torch.from_numpy(narrow))
    )


def test_the_precision_must_stay(build: Build, tmp_path: Path) -> None:
    """What "auto" means depends on the device, which may change otherwise."""
    fit(build(max_steps=4), tmp_path)
    elsewhere = build(max_steps=4)
    elsewhere._amp_dtype = lambda: torch.bfloat16  # type: ignore[method-assign]
    with pytest.raises(
        ValueError, match=r"the precision, auto on this device, was 'float32' and is 'bfloat16'"
    ):
        fit(elsewhere, tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"precision was 'auto' and is 'bfloat16'\. Resume"):
        fit(build(max_steps=4, precision="bfloat16"), tmp_path, resume=True)


def test_labels_of_any_kind_tell_data_apart() -> None:
    def of(labels: Any) -> str | None:
        return fingerprint(types.SimpleNamespace(labels=labels))

    assert of(["cat", "dog"]) == of(np.array(["cat", "dog"])) != of(["dog", "cat"])
    assert of([0.5, 1.0]) != of([0.5, 2.0])
    assert of([0, 1]) != of([1, 0])
    assert of(lambda: [0, 1]) is None
    assert of([object(), object()]) is None


def test_numbers_of_numpy(build: Build, tmp_path: Path) -> None:
    """A checkpoint may not hold their classes, and could not be read again."""
    rate = np.logspace(-4, -3, 3)[1]
    trainer = build(lr=rate, depth=np.int64(1), max_steps=2, local_scale=(np.float32(0.5), 1.0))
    assert type(trainer.config.lr) is float
    assert type(trainer.config.depth) is int
    assert type(trainer.config.local_scale[0]) is float
    fit(trainer, tmp_path)
    assert latest_checkpoint(tmp_path).content["config"]["lr"] == rate


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": "8"}, "batch_size must be of type int; got '8'"),
        ({"epochs": 1.5}, "epochs must be of type int; got 1.5"),
        ({"lr": None}, "lr must be of type float; got None"),
        ({"depth": True}, r"depth must be of type int \| None; got True"),
        ({"compile": 1}, "compile must be of type bool; got 1"),
    ],
)
def test_settings_of_another_type(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        TrainingConfig(**changes)


def test_what_is_no_policy_and_what_are_no_images(build: Build, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"such as AsymmetricMaskPolicy.*got RandomMasker\(0.3\)"):
        build(md.RandomMasker(0.3))
    images = [Noise()[i][0] for i in range(8)]
    with pytest.raises(TypeError, match=r"\(image, label\) pairs.*item \d is of type Image"):
        fit(build(data=images), tmp_path / "a")
    pairs = [(np.asarray(image), 0) for image in images]
    with pytest.raises(TypeError, match=r"item \d is \(ndarray, int\)"):
        fit(build(data=pairs), tmp_path / "b")


def test_a_folder_may_be_a_string(build: Build, tmp_path: Path) -> None:
    build(max_steps=1).fit(str(tmp_path), progress_bar=False)
    assert build(max_steps=1).check_resumable(str(tmp_path)).step == 1


def test_progress_without_a_terminal(
    build: Build, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines now and then; a bar would fill a scheduler's log."""
    monkeypatch.setattr("maskdistill.training.logging.LINES_EVERY", 0)
    build().fit(tmp_path)
    said = capfd.readouterr()
    assert said.err == ""
    lines = said.out.splitlines()
    assert len(lines) == 6
    assert re.fullmatch(r"step 12 of 12: loss \d\.\d{3}, \d+ images/s", lines[-1])


def test_a_classifier_is_set_aside(tmp_path: Path) -> None:
    """It lies behind the embedding; without a gradient it would stop data parallelism."""
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, depth=1, num_classes=5,
        dynamic_img_size=True,
    )  # fmt: skip
    config = TrainingConfig(**{**TINY, "max_steps": 2})
    trainer = Trainer(config, Noise(), md.AsymmetricMaskPolicy(md.RandomMasker(0.5)), backbone=vit)
    fit(trainer, tmp_path)
    student = trainer.state.student_net.backbone.backbone
    assert {n for n, p in student.named_parameters() if not p.requires_grad} == {
        "head.weight", "head.bias",
    }  # fmt: skip
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)


@pytest.mark.skipif(torch.__version__ < "2.7", reason="no autocast on the meta device before")
def test_masks_that_follow_attention_need_some(build: Build) -> None:
    with pytest.raises(ValueError, match="no attention was found"):
        build(
            md.AsymmetricMaskPolicy(md.AttentionGuidedMasker(0.3)),
            model="efficientvit_b0",
            image_size=64,
            local_size=32,
            patch_size=32,
            depth=None,
            drop_path=0.0,
        )


def test_refused_when_built(build: Build) -> None:
    with pytest.raises(ValueError, match="same number of patches in every image"):
        build(md.AsymmetricMaskPolicy(md.RandomMasker(0.5).sometimes(0.5)), apply="drop")
    growing, guided = md.RandomMasker(md.Linear(0.1, 0.9)), md.AttentionGuidedMasker(0.3)
    with pytest.raises(ValueError, match="leaves no patch of a 2x2 grid"):
        build(md.ViewPolicy.student_all_views(growing), apply="drop")
    with pytest.raises(ValueError, match="leaves the teacher without attention"):
        build(md.ViewPolicy(guided, teacher_global=md.RandomMasker(0.3)), apply="drop")
    with pytest.raises(ValueError, match="do not fill one step of 64"):
        build(batch_size=64)
    with pytest.raises(ValueError, match="2 global crops"):
        build(md.ViewPolicy(global_crops=1))
    with pytest.raises(ValueError, match="no model 'vit_tinny"):
        build(model="vit_tinny")
    for changes, message in (
        ({"image_size": 30}, "multiple of patch_size"),
        ({"local_size": 7}, "multiple of patch_size"),
        ({"lr": 0.0}, "lr must"),
        ({"epochs": 0}, "epochs must"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must"),
        ({"global_scale": (0.5, 0.1)}, "global_scale must"),
        ({"momentum": 1.5}, "momentum must"),
        ({"device": "cuda:99" if not torch.cuda.is_available() else "tpu"}, "device"),
        ({"device": "abacus"}, "device must be"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**changes)


def test_a_policy_whose_signal_nobody_supplies(build: Build) -> None:
    class Guided(md.Masker):
        @property
        def needs(self) -> frozenset[str]:
            return frozenset({"saliency"})

        def draw(self, context: md.masking.MaskContext) -> torch.Tensor:
            raise AssertionError

    with pytest.raises(ValueError, match=r"\['saliency'\].*supplies 'attention'"):
        build(md.AsymmetricMaskPolicy(Guided()))


def test_the_collapse_alarm_speaks_once_and_only_if_it_lasts() -> None:
    alarm = CollapseAlarm(out_dim=100, patience=3)
    uniform = math.log(100)
    said = [alarm.observe(loss, 0.5) for loss in (uniform, 3.0, uniform, uniform, uniform, uniform)]
    assert [message is not None for message in said] == [False] * 4 + [True, False]
    assert "uniform distribution" in (said[4] or "")
    said = [alarm.observe(3.0, 0.001) for _ in range(4)]
    assert [message is not None for message in said] == [False, False, True, False]
    assert "one point" in (said[2] or "")


def test_the_trainer_sounds_the_alarm(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_step = trainer_module.train_step

    def collapsed(*args: Any, **kwargs: Any) -> StepMetrics:
        metrics = real_step(*args, **kwargs)
        return metrics._replace(loss=torch.tensor(math.log(32)))

    monkeypatch.setattr(trainer_module, "train_step", collapsed)
    with pytest.warns(CollapseWarning, match="uniform"):
        fit(build(epochs=6, log_every=1), tmp_path)


def test_evaluations_are_recorded(build: Build, tmp_path: Path) -> None:
    fit(build(), tmp_path, evaluate=lambda vit: {"score": 1.0}, evaluate_every=5)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if "score" in line] == [5, 10, 12]


def test_metrics_cut_short_by_a_crash_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json.dumps({"step": 1}).encode() + b'\n\x00\xff\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    RunRecord(tmp_path, step=1).close()
    assert path.read_text() == '{"step": 1}\n', "what is cut short goes when the run goes on"
