"""The Lightning module of the examples: who is masked, what repeats, what a checkpoint holds."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import maskdistill as md
from maskdistill.data import Scenes, derive_seed, normalize
from maskdistill.models import create_backbone
from maskdistill.training import StepSettings, TrainState, train_step
from maskdistill.training.config import cosine_with_warmup

# On its way in it warns of its own use of torch, and it warns of few workers and a frozen teacher.
pytestmark = pytest.mark.filterwarnings("ignore")
lightning = pytest.importorskip("lightning", reason="needs lightning")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The example, with 16 scenes in the place of 5000."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import recipe_lightning

    monkeypatch.setattr(recipe_lightning, "Scenes", lambda *_: Scenes(16, 48))
    return recipe_lightning


class Watch(lightning.Callback):
    """Keeps what the networks were given and what the gradients were."""

    def __init__(self) -> None:
        self.student: list[list[Tensor | None]] = []
        self.crops: list[Tensor] = []
        self.teacher: list[Any] = []
        self.teacher_modes: list[bool] = []
        self.without: list[set[str]] = []
        self.losses: list[float] = []

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        def student(_: Any, given: tuple[Any, ...]) -> None:
            self.student.append([None if m is None else m.mask for m in given[1]])
            self.crops.append(given[0][0])

        def teacher(net: Any, given: tuple[Any, ...]) -> None:
            self.teacher.append(given[1:])
            self.teacher_modes.append(any(part.training for part in net.modules()))

        module.student.register_forward_pre_hook(student)
        module.teacher.register_forward_pre_hook(teacher)

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        named = module.named_parameters()
        self.without.append({n for n, p in named if p.requires_grad and p.grad is None})

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def module_of(script: types.ModuleType, **settings: Any) -> Any:
    return script.MaskedDINO(**{"depth": 2, "out_dim": 32, "hidden_dim": 32, **settings})


def data_of(script: types.ModuleType, **settings: Any) -> Any:
    return script.CropData(**{"batch_size": 4, "local_crops": 2, **settings})


def fit(module: Any, data: Any, ckpt_path: Path | None = None, **settings: Any) -> Watch:
    watch = Watch()
    callbacks = [watch, *settings.pop("callbacks", [])]
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=3.0, use_distributed_sampler=False,
        callbacks=callbacks, **{"enable_checkpointing": False, "max_steps": 2, **settings},
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return watch


def assert_equal_states(one: Any, other: Any) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


# --- Who is masked


@pytest.mark.parametrize("apply", ["token", "drop", "pixel"])
def test_only_the_students_global_views_are_masked(script: types.ModuleType, apply: str) -> None:
    module = module_of(script, apply=apply)
    before = {name: p.clone() for name, p in module.named_parameters()}
    watch = fit(module, data_of(script))
    for masks in watch.student:
        assert [None if m is None else int(m.sum()) for m in masks] == [4 * 5, 4 * 5, None, None]
    assert watch.teacher == [(), ()]  # no masks at all
    assert watch.teacher_modes == [False, False]
    assert watch.without == [set(), set()]
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    last = {f"student.{n}" for n, _ in module.student.named_parameters() if "last_layer" in n}
    trained = {f"student.{n}" for n, p in module.student.named_parameters() if p.requires_grad}
    assert trained - last <= moved  # the prototypes rest in the first epoch
    assert not last & moved
    assert (module.student.backbone.mask_token is not None) == (apply == "token")


def test_a_run_without_masks_leaves_no_parameter_unused(script: types.ModuleType) -> None:
    module = module_of(script)
    module.policy = md.ViewPolicy.none()
    watch = fit(module, data_of(script))
    assert watch.student == [[None] * 4] * 2
    assert watch.without == [set(), set()]
    assert not module.student.backbone.mask_token.grad.any()


# --- What repeats


def test_runs_repeat_whatever_the_workers(script: types.ModuleType) -> None:
    first, second = module_of(script), module_of(script)
    one = fit(first, data_of(script))
    torch.manual_seed(1234)
    other = fit(second, data_of(script, workers=2))
    assert one.losses == other.losses
    assert_equal_states(first, second)


def test_masks_differ_by_rank_step_and_seed(
    script: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def masks(**settings: Any) -> Tensor:
        watch = fit(module_of(script, **settings), data_of(script))
        return torch.stack([torch.cat(step[:2]) for step in watch.student])  # type: ignore[arg-type]

    here = masks()
    assert not torch.equal(here[0], here[1])
    assert not torch.equal(here, masks(seed=1))
    monkeypatch.setattr(script.MaskedDINO, "global_rank", property(lambda self: 1))
    assert not torch.equal(here, masks())


def test_ranks_share_out_the_images(script: types.ModuleType) -> None:
    seen = []
    for rank in range(2):
        data = data_of(script)
        data.trainer = types.SimpleNamespace(global_rank=rank, world_size=2)
        batches = data.train_dataloader().batch_sampler
        batches.set_epoch(3)
        assert len(batches) == 2
        seen += [item for batch in batches for item in batch]
    assert sorted(seen) == [(3, index) for index in range(16)]


def test_a_resumed_run_ends_as_an_unbroken_one(script: types.ModuleType, tmp_path: Path) -> None:
    saver = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True
    )
    whole = module_of(script, freeze_last_layer=0)
    settings: dict[str, Any] = {"max_steps": -1, "max_epochs": 2, "enable_checkpointing": True}
    fit(whole, data_of(script), callbacks=[saver], **settings)
    resumed = script.MaskedDINO.load_from_checkpoint(tmp_path / "epoch=0.ckpt")
    assert resumed.hparams == whole.hparams
    fit(
        resumed, data_of(script), tmp_path / "epoch=0.ckpt",
        **{**settings, "enable_checkpointing": False},
    )  # fmt: skip
    assert_equal_states(whole, resumed)


@pytest.mark.parametrize("masker", ["RandomMasker(0.3)", "AttentionGuidedMasker(0.25)"])
def test_a_step_is_the_librarys_own(script: types.ModuleType, masker: str) -> None:
    """``train_step`` makes the same losses and weights of the same batches, bit by bit."""
    module = module_of(script, masker=masker, freeze_last_layer=0)
    twin = module_of(script, masker=masker)
    watch = fit(module, data_of(script), max_steps=3)
    data = data_of(script)
    data.trainer = types.SimpleNamespace(global_rank=0, world_size=1)
    optimizer = twin.configure_optimizers()
    state = TrainState(twin.student.train(), twin.teacher, twin.objective, optimizer)
    for step, crops in zip(range(3), data.train_dataloader(), strict=False):
        torch.manual_seed(derive_seed("drop path", 0, 0, step, 0))
        metrics = train_step(
            state,
            [normalize(crop) for crop in crops.images],
            twin.policy,
            StepSettings(
                lr=cosine_with_warmup(step, 3, 1e-3, 1e-6), teacher_temp=0.03, progress=step / 3,
                weight_decay=cosine_with_warmup(step, 3, 0.04, 0.4),
                momentum=cosine_with_warmup(step, 3, 0.99, 1.0),
            ),
            torch.Generator().manual_seed(derive_seed("masks", 0, 0, step, 0)),
        )  # fmt: skip
        assert float(metrics.loss) == watch.losses[step]
    assert_equal_states(twin, module)


# --- What it leaves, and how it is started


def test_the_teacher_loads_into_timm(script: types.ModuleType) -> None:
    module = module_of(script)
    plain = create_backbone("vit_tiny_patch16_224", 32, 8, depth=2).eval()
    keys = {f"backbone.{key}" for key in plain.state_dict()}
    held = set(module.student.state_dict())
    assert {key for key in held if key.startswith("backbone.")} - keys == {"backbone.mask_token"}
    assert keys <= held
    fit(module, data_of(script), max_steps=1)
    images = torch.randn(2, 3, 32, 32)
    expected = module.teacher.backbone(images)
    plain.load_state_dict(module.teacher.backbone.unwrap().state_dict())
    assert torch.equal(plain(images), expected)


def test_compiled_is_as_eager(script: types.ModuleType) -> None:
    eager, compiled = module_of(script), module_of(script)
    compiled.student.backbone.compile(backend="eager")
    expected = fit(eager, data_of(script)).losses
    assert fit(compiled, data_of(script)).losses == pytest.approx(expected, abs=1e-4)
    assert compiled.state_dict().keys() == eager.state_dict().keys()


def test_accumulating_moves_the_teacher_once_a_step(
    script: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    update = script.update_average
    monkeypatch.setattr(script, "update_average", lambda *a: (calls.append(a), update(*a)))
    watch = fit(module_of(script), data_of(script), max_steps=2, accumulate_grad_batches=2)
    assert (len(watch.losses), len(calls)) == (4, 2)
    masks = [torch.cat(step[:2]) for step in watch.student]  # type: ignore[arg-type]
    assert not torch.equal(masks[0], masks[1])


def test_the_docs_show_the_step(script: types.ModuleType) -> None:
    page = (ROOT / "docs" / "recipes" / "lightning.md").read_text(encoding="utf-8")
    source = inspect.getsource(script.MaskedDINO.training_step)
    assert f"```py\n{inspect.cleandoc(source)}\n```" in page
    commands = re.findall(r"^python examples/recipe_lightning.py(.*)$", page, re.MULTILINE)
    options = {word for line in commands for word in line.split() if word.startswith("--")}
    known = {f"--{name}" for name in script.OPTIONS} | {"--data", "--out", "--compile"}
    assert options <= known


@pytest.mark.long
@pytest.mark.parametrize(
    "more", [[], ["--apply", "drop", "--masker", "AttentionGuidedMasker(0.4)"]]
)
def test_two_processes(tmp_path: Path, more: list[str]) -> None:
    command = [sys.executable, str(ROOT / "examples" / "recipe_lightning.py"), "--devices", "2"]
    command += ["--accelerator", "cpu", "--max-steps", "3", "--batch-size", "4", *more]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert not run.returncode, run.stdout + run.stderr
    assert "`max_steps=3` reached" in run.stdout + run.stderr
