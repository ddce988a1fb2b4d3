"""The recipe for facebookresearch/dino: its diff, and its five lines on a stand-in.

The lines under test are taken from the diff that the example applies and the docs show. With a
clone at the recipe's commit they run in the real thing, as a user runs them:

    MASKDISTILL_DINO=CLONE pytest tests/recipes/test_recipe_dino.py
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import maskdistill as md
from tests.recipes.dino_stand_in import BATCH, GLOBAL, LOCAL, PATCH, Crops, Vit

ROOT = Path(__file__).parents[2]
CLONE = Path(os.environ.get("MASKDISTILL_DINO") or "no-clone").resolve()
FORMS = ("token", "drop", "pixel")
of_each_form = pytest.mark.parametrize("apply", FORMS)
with_clone = pytest.mark.skipif(
    not (CLONE / "main_dino.py").is_file(), reason="MASKDISTILL_DINO names no clone of DINO"
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import recipe_dino

    return recipe_dino


def hunks(diff: str) -> list[list[str]]:
    return [part.splitlines() for part in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]]


def added(diff: str) -> list[str]:
    """Return the added lines of each hunk, as code that runs on its own."""
    lines = [[line[1:] for line in hunk if line[0] == "+"] for hunk in hunks(diff)]
    return [textwrap.dedent("\n".join(hunk)) for hunk in lines]


# --- The diff


def test_five_lines_change(script: types.ModuleType) -> None:
    for apply in FORMS:
        assert sum(piece.count("\n") + 1 for piece in added(script.recipe(apply))) == 5


def test_the_docs_show_the_diff_that_is_applied(script: types.ModuleType) -> None:
    page = (ROOT / "docs" / "recipes" / "dino.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```diff\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    wraps = [f"+    {added(script.recipe(form))[1]}\n" for form in ("drop", "pixel")]
    assert shown == [script.DIFF, "".join(wraps), script.GUIDED_STEP]
    assert script.COMMIT[:7] in page


@pytest.mark.parametrize(
    "masker",
    [
        "(BlockMasker(Uniform(0.1, 0.5)) | ~RandomMasker(0.9)).exactly(0.3)",
        "Mixture({AttentionGuidedMasker(0.4, hide='least'): 0.5, NoMasker(): 0.5})",
    ],
)
def test_any_masker_becomes_code(script: types.ModuleType, masker: str) -> None:
    wanted = md.parse_masker(masker)
    diff = script.recipe("token", wanted)
    space: dict[str, Any] = {"md": md}
    exec(next(piece for piece in added(diff) if "policy =" in piece), space)
    assert space["policy"] == md.AsymmetricMaskPolicy(wanted)
    assert ("record_attention" in diff) == ("Attention" in masker)


def test_what_the_loop_cannot_give_is_refused(script: types.ModuleType) -> None:
    with pytest.raises(ValueError, match="needs boxes, flipped, which the original's loop does no"):
        script.recipe("token", md.SceneMasker(md.RandomMasker(0.3)))
    with pytest.raises(ValueError, match="apply must be one of token, drop, pixel; got 'blur'"):
        script.recipe("blur")


@pytest.fixture
def clone(script: types.ModuleType, tmp_path: Path) -> Path:
    """A folder whose ``main_dino.py`` has the lines that the diff is about, and others between."""
    parts = hunks(script.recipe())
    parts[-1].insert(0, "         with torch.cuda.amp.autocast(fp16_scaler is not None):")
    kept = [[line[1:] for line in part if line[0] != "+"] for part in parts]
    text = "\n".join(f"# part {i}\n" + "\n".join(lines) for i, lines in enumerate(kept))
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "main_dino.py").write_text(text + "\n# end\n", encoding="utf-8")
    return tmp_path / "clone"


def run_main(script: types.ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe_dino.py", *map(str, arguments)])
    script.main()


@pytest.mark.parametrize("masker", ["RandomMasker(0.3)", "AttentionGuidedMasker(0.4)"])
def test_git_applies_what_is_written(
    script: types.ModuleType, clone: Path, monkeypatch: pytest.MonkeyPatch, masker: str
) -> None:
    patch, main = clone.with_name("dino.patch"), clone / "main_dino.py"
    before = main.read_text(encoding="utf-8")
    run_main(script, monkeypatch, "--dino", clone, "--masker", masker, "--diff-only", patch)
    assert main.read_text(encoding="utf-8") == before
    subprocess.run(["git", "apply", str(patch)], cwd=clone, check=True)
    expected = before
    for hunk in hunks(script.recipe("token", md.parse_masker(masker))):
        old, new = ("\n".join(x[1:] for x in hunk if x[0] != sign) for sign in "+-")
        assert expected.count(old) == 1
        expected = expected.replace(old, new)
    assert main.read_text(encoding="utf-8") == expected


def test_what_is_no_clone_of_this_version_is_refused(
    script: types.ModuleType, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = clone.with_name("out")
    (out / "dino").mkdir(parents=True)
    (out / "dino" / "of an earlier run").touch()
    with pytest.raises(ValueError, match=r"dino is not empty; give an --output that is new"):
        run_main(script, monkeypatch, "--dino", clone, "--output", out)
    with pytest.raises(ValueError, match=r"has no main_dino\.py, so it is no clone"):
        run_main(script, monkeypatch, "--dino", out)
    text = (clone / "main_dino.py").read_text(encoding="utf-8")
    (clone / "main_dino.py").write_text(text.replace("import utils", "import util"))
    with pytest.raises(ValueError, match=r"(?s)main_dino\.py.*check out commit 7c446df, or put"):
        run_main(script, monkeypatch, "--dino", clone, "--diff-only", out / "patch")


def test_the_scenes_of_a_short_run(script: types.ModuleType, tmp_path: Path) -> None:
    script.write_scenes(tmp_path, 6)
    assert len(list(tmp_path.glob("*/*.png"))) == 6


# --- The lines, on a stand-in for the original


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of one, for DDP."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def images() -> list[Tensor]:
    sizes = [GLOBAL] * 2 + [LOCAL] * 2
    return [torch.randn(BATCH, 3, size, size) for size in sizes]


class Loop:
    """What the recipe's lines do to a student and a teacher, run as they stand in the diff."""

    def __init__(self, diff: str) -> None:
        wrapper, policy, self.forward = added(diff)[1:]
        self.bare = Crops(Vit())
        student, teacher = copy.deepcopy(self.bare), Crops(Vit())
        args = types.SimpleNamespace(patch_size=PATCH)
        self.space: dict[str, Any] = {"student": student, "teacher": teacher, "args": args}
        self.run(added(diff)[0])
        self.run(wrapper)
        self.student, self.teacher = student, teacher
        self.keys = [f"backbone.{key}" for key in Vit().state_dict()]
        self.keys += ["head.weight", "head.bias"]
        self.space["student"] = DistributedDataParallel(student)
        self.space["teacher_without_ddp"] = teacher
        teacher.load_state_dict(self.space["student"].module.state_dict())
        teacher.requires_grad_(False)
        self.run(policy)

    def run(self, code: str) -> None:
        exec(code, self.space)

    def step(self, images: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the student's and the teacher's output."""
        self.space["images"] = images
        self.space["teacher_output"] = self.teacher(images[:2])
        self.run(self.forward)
        return self.space["student_output"], self.space["teacher_output"]


@pytest.fixture
def loop(script: types.ModuleType, group: None) -> Callable[..., Loop]:
    return lambda apply="token", masker=None: Loop(script.recipe(apply, masker))


def seen_tokens(net: nn.Module) -> list[Tensor]:
    """Collect what comes into the first block, forward by forward."""
    seen: list[Tensor] = []
    block: Any = net.get_submodule("blocks.0.norm1")
    block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    return seen


@of_each_form
def test_masks_follow_the_groups(
    loop: Callable[..., Loop], images: list[Tensor], apply: str
) -> None:
    run = loop(apply, md.RandomMasker(0.25))
    whole, masked = seen_tokens(run.bare.backbone), seen_tokens(run.student.backbone.backbone)
    torch.manual_seed(1)
    run.step(images)
    run.bare(images)
    torch.manual_seed(1)
    masks = run.space["policy"](images, PATCH).student
    mask = torch.cat(masks[:2])
    assert mask.sum(dim=1).tolist() == [4] * 2 * BATCH
    assert masks[2:] == [None, None]
    assert [len(tokens) for tokens in masked] == [2 * BATCH, 2 * BATCH]
    visible = torch.cat([torch.ones(2 * BATCH, 1, dtype=torch.bool), ~mask], dim=1)
    if apply == "drop":
        assert torch.equal(masked[0].flatten(0, 1), whole[0][visible])
    else:
        assert torch.equal(masked[0][visible], whole[0][visible])
        assert not torch.isclose(masked[0][~visible], whole[0][~visible]).all(dim=-1).any()
    if apply == "token":  # zeros at first: only the position is left
        places = run.bare.backbone.positions(GLOBAL // PATCH).expand(2 * BATCH, -1, -1)
        assert torch.equal(masked[0][~visible], places[~visible])
    assert torch.equal(masked[1], whole[1])  # the local crops


@of_each_form
def test_the_teacher_is_clean(loop: Callable[..., Loop], images: list[Tensor], apply: str) -> None:
    run = loop(apply)
    student, teacher = run.step(images)
    expected = run.bare(images)
    assert torch.equal(teacher, expected[: 2 * BATCH])
    assert torch.equal(student[2 * BATCH :], expected[2 * BATCH :])
    assert not torch.isclose(student, expected)[: 2 * BATCH].all(dim=-1).any()


@of_each_form
def test_without_masks_it_is_the_original(
    loop: Callable[..., Loop], images: list[Tensor], apply: str
) -> None:
    run = loop(apply, md.NoMasker())
    assert torch.equal(run.step(images)[0], run.bare(images))
    assert torch.equal(run.student(images), run.bare(images))


@of_each_form
def test_keys_stay_as_they_are(loop: Callable[..., Loop], apply: str) -> None:
    run = loop(apply)
    assert list(run.bare.state_dict()) == run.keys
    token = ["backbone.mask_token"] if apply == "token" else []
    for net in (run.student, run.teacher):
        assert sorted(net.state_dict()) == sorted([*run.keys, *token])
    pairs = zip(run.student.parameters(), run.teacher.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    # As the original's scripts for evaluation read a checkpoint.
    weights = {k.replace("backbone.", ""): v for k, v in run.teacher.state_dict().items()}
    report = Vit().load_state_dict(weights, strict=False)
    assert not report.missing_keys
    assert sorted(report.unexpected_keys) == sorted(
        ["head.weight", "head.bias"] + ["mask_token"] * len(token)
    )


@of_each_form
def test_every_parameter_gets_a_gradient(
    loop: Callable[..., Loop], images: list[Tensor], apply: str
) -> None:
    """DDP refuses a second step after one in which a parameter was not used."""
    run = loop(apply)
    policies = [md.ViewPolicy.none(), run.space["policy"], md.ViewPolicy.none()]
    for policy in policies:
        run.space["policy"] = policy
        run.student.zero_grad(set_to_none=True)
        student, teacher = run.step(images)
        (student.square().sum() - teacher.sum()).backward()
        assert all(p.grad is not None for p in run.student.parameters())
        assert all(p.grad is None for p in run.teacher.parameters())
        if apply == "token":
            moves = bool(run.student.backbone.mask_token.grad.abs().sum() > 0)
            assert moves == (policy is policies[1])


def test_masks_follow_the_teachers_attention(
    loop: Callable[..., Loop], images: list[Tensor]
) -> None:
    run = loop("token", md.AttentionGuidedMasker(0.25))
    masked = seen_tokens(run.student.backbone.backbone)
    with torch.no_grad():
        run.step(images)
    mask = torch.cat(run.space["masks"][:2])
    attention = run.space["seen"].attention.mean(dim=1)
    assert attention.shape == mask.shape == (2 * BATCH, 16)
    hidden = attention.masked_fill(~mask, torch.inf).amin(dim=1)
    assert (hidden >= attention.masked_fill(mask, -torch.inf).amax(dim=1)).all()
    places = run.bare.backbone.positions(GLOBAL // PATCH).expand(2 * BATCH, -1, -1)
    assert torch.equal(masked[0][:, 1:][mask], places[:, 1:][mask])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.6
def test_the_compiled_backbone_gives_the_same(
    loop: Callable[..., Loop], images: list[Tensor]
) -> None:
    run = loop()
    torch.manual_seed(1)
    expected = run.step(images)[0]
    torch.compiler.reset()
    run.student.backbone.backbone.compile(backend="eager")
    torch.manual_seed(1)
    torch.testing.assert_close(run.step(images)[0], expected, rtol=1e-4, atol=1e-4)


# --- In the original itself


def train(output: Path, *arguments: str) -> list[float]:
    """Run the example on the clone for two steps, and return the losses that it logged."""
    command = [sys.executable, str(ROOT / "examples" / "recipe_dino.py"), "--dino", str(CLONE)]
    command += ["--output", str(output), *arguments, "--", "--epochs", "2"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not run.returncode, run.stdout + run.stderr
    log = (output / "run" / "log.txt").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["train_loss"] for line in log]


def checkpoint_in(output: Path) -> dict[str, Any]:
    return torch.load(output / "run" / "checkpoint.pth", weights_only=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, Any]]:
    """The losses and the checkpoint of the original as it is."""
    output = tmp_path_factory.mktemp("plain")
    return train(output, "--unmodified"), checkpoint_in(output)


@with_clone
@of_each_form
def test_without_masks_it_trains_as_the_original(
    tmp_path: Path, plain: tuple[list[float], dict[str, Any]], apply: str
) -> None:
    losses, expected = plain
    assert train(tmp_path, "--masker", "NoMasker()", "--apply", apply) == losses
    saved = checkpoint_in(tmp_path)
    for role in ("student", "teacher"):
        assert all(torch.equal(saved[role][key], expected[role][key]) for key in expected[role])


@with_clone
@of_each_form
def test_it_trains_with_masks(
    tmp_path: Path, plain: tuple[list[float], dict[str, Any]], apply: str
) -> None:
    losses, expected = plain
    masked = train(tmp_path, "--apply", apply)
    assert torch.tensor(masked).isfinite().all()
    assert masked[0] != losses[0]
    saved = checkpoint_in(tmp_path)
    for role, prefix in (("student", "module."), ("teacher", "")):
        token = {f"{prefix}backbone.mask_token"} if apply == "token" else set()
        assert saved[role].keys() == expected[role].keys() | token
        assert all(saved[role][key].abs().sum() > 0 for key in token)  # it was zero


@with_clone
def test_its_evaluation_loads_the_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, "--masker", "AttentionGuidedMasker(0.4)")
    code = (
        "import sys, utils, vision_transformer as vits\n"
        "vit = vits.vit_tiny(patch_size=16, num_classes=0)\n"
        "utils.load_pretrained_weights(vit, sys.argv[1], 'teacher', 'vit_tiny', 16)\n"
    )
    checkpoint = tmp_path / "run" / "checkpoint.pth"
    told = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint)],
        cwd=CLONE, capture_output=True, text=True, check=True,
        env={**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    ).stdout  # fmt: skip
    assert "missing_keys=[]" in told
    unexpected = set(re.findall(r"'([\w.]+)'", told.split("unexpected_keys=")[1]))
    assert {key.split(".")[0] for key in unexpected} == {"mask_token", "head"}


@with_clone
def test_it_trains_in_two_processes(tmp_path: Path) -> None:
    masked = train(tmp_path, "--processes", "2")
    assert torch.tensor(masked).isfinite().all()
