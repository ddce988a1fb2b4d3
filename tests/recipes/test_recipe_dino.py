"""The recipe for facebookresearch/dino: its diff, and its five lines on a stand-in.

The lines under test are taken from the diff that the example applies and the docs show.
test_recipe_dino_clone.py runs them in the real thing.
"""

from __future__ import annotations

import copy
import re
import shutil
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
FORMS = ("token", "drop", "pixel")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import recipe_dino

    return recipe_dino


def added(diff: str) -> list[str]:
    """Return the added lines of each hunk, as code that runs on its own."""
    hunks = re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]
    lines = [[line[1:] for line in hunk.splitlines() if line[0] == "+"] for hunk in hunks]
    return [textwrap.dedent("\n".join(hunk)) for hunk in lines]


# --- The diff


@pytest.mark.parametrize("apply", FORMS)
def test_five_lines_change(script: types.ModuleType, apply: str) -> None:
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
        "BlockMasker(0.4).sometimes(0.5)",
        "(BlockMasker(Uniform(0.1, 0.5)) | ~RandomMasker(0.9)).exactly(0.3)",
        "Mixture({RandomMasker(Linear(0.1, 0.5)): 0.5, NoMasker(): 0.5})",
        "AttentionGuidedMasker(0.4, hide='least')",
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
def original(script: types.ModuleType) -> str:
    """A text with the lines that the diffs are about, and others between them."""
    hunks = re.split(r"^@@.*\n", script.recipe("token"), flags=re.MULTILINE)[1:]
    hunks[-1] = "         with torch.cuda.amp.autocast(fp16_scaler is not None):\n" + hunks[-1]
    kept = [[line[1:] for line in hunk.splitlines() if line[0] != "+"] for hunk in hunks]
    return (
        "\n".join(f"# part {i}\n" + "\n".join(lines) for i, lines in enumerate(kept)) + "\n# end\n"
    )


@pytest.mark.parametrize("masker", ["RandomMasker(0.3)", "AttentionGuidedMasker(0.4)"])
def test_the_diff_applies(script: types.ModuleType, original: str, masker: str) -> None:
    diff = script.recipe("token", md.parse_masker(masker))
    patched = script.apply_diff(diff, original)
    lines = [line for piece in re.findall(r"^\+(?!\+\+)(.*)$", diff, re.M) for line in [piece]]
    assert [line for line in patched.splitlines() if line in lines] == lines
    gone = set(original.splitlines()) - set(patched.splitlines())
    assert gone == set(re.findall(r"^-(?!--)(.*)$", diff, re.M)) - set(lines)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_applies_what_is_written(
    script: types.ModuleType, original: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone, patch = tmp_path / "clone", tmp_path / "dino.patch"
    clone.mkdir()
    (clone / "main_dino.py").write_text(original, encoding="utf-8")
    command = ["recipe_dino.py", "--dino", str(clone), "--diff-only", str(patch)]
    monkeypatch.setattr(sys, "argv", command)
    script.main()
    assert (clone / "main_dino.py").read_text(encoding="utf-8") == original
    subprocess.run(["git", "apply", str(patch)], cwd=clone, check=True)
    expected = script.apply_diff(script.DIFF, original)
    assert (clone / "main_dino.py").read_text(encoding="utf-8") == expected


@pytest.mark.parametrize(
    "line",
    [
        "import utils",
        "    # move networks to gpu",
        "    metric_logger = utils.MetricLogger(delimiter=\"  \")",
        "            student_output = student(images)",
    ],
)  # fmt: skip
def test_a_line_that_is_not_there_is_named(
    script: types.ModuleType, original: str, line: str
) -> None:
    other = original.replace(line + "\n", line + "  # changed\n")
    with pytest.raises(ValueError, match=re.escape(f"has no line {line.strip()!r} where")):
        script.apply_diff(script.DIFF, other)


def test_a_second_place_is_refused(script: types.ModuleType, original: str) -> None:
    with pytest.raises(ValueError, match="'import utils', and those after it, 2 times"):
        script.apply_diff(script.DIFF, original * 2)


def test_a_folder_that_is_no_clone_is_refused(script: types.ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no main_dino\.py, so it is no clone"):
        script.patch_copy(tmp_path, tmp_path / "copy", script.DIFF)


def test_an_output_in_use_is_refused(
    script: types.ModuleType, original: str, tmp_path: Path
) -> None:
    (tmp_path / "main_dino.py").write_text(original, encoding="utf-8")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint.pth").touch()
    with pytest.raises(ValueError, match=r"out is not empty; give an --output that is new"):
        script.patch_copy(tmp_path, tmp_path / "out", script.DIFF)


def test_the_images_of_a_short_run(script: types.ModuleType, tmp_path: Path) -> None:
    script.write_images(tmp_path / "all", 6)
    assert len(list((tmp_path / "all").glob("*/*.png"))) == 6
    script.write_images(tmp_path / "some", 3, tmp_path / "all")
    assert len({path.parent for path in (tmp_path / "some").glob("*/*.png")}) == 3
    with pytest.raises(ValueError, match="holds 3 images, fewer than the 4 of a batch"):
        script.write_images(tmp_path / "none", 4, tmp_path / "some")


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


@pytest.mark.parametrize("apply", FORMS)
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


@pytest.mark.parametrize("apply", FORMS)
def test_the_teacher_is_clean(loop: Callable[..., Loop], images: list[Tensor], apply: str) -> None:
    run = loop(apply)
    student, teacher = run.step(images)
    expected = run.bare(images)
    assert torch.equal(teacher, expected[: 2 * BATCH])
    assert torch.equal(student[2 * BATCH :], expected[2 * BATCH :])
    assert not torch.isclose(student, expected)[: 2 * BATCH].all(dim=-1).any()


@pytest.mark.parametrize("apply", FORMS)
@pytest.mark.parametrize("masker", ["NoMasker()", "RandomMasker(0.0)"])
def test_without_masks_it_is_the_original(
    loop: Callable[..., Loop], images: list[Tensor], apply: str, masker: str
) -> None:
    run = loop(apply, md.parse_masker(masker))
    assert torch.equal(run.step(images)[0], run.bare(images))
    assert torch.equal(run.student(images), run.bare(images))


@pytest.mark.parametrize("apply", FORMS)
def test_keys_stay_as_they_are(loop: Callable[..., Loop], apply: str) -> None:
    run = loop(apply)
    assert list(run.bare.state_dict()) == run.keys
    token = ["backbone.mask_token"] if apply == "token" else []
    for net in (run.student, run.teacher):
        assert sorted(net.state_dict()) == sorted([*run.keys, *token])
    pairs = zip(run.student.named_parameters(), run.teacher.named_parameters(), strict=True)
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)
    # As the original's scripts for evaluation read a checkpoint.
    weights = {k.replace("backbone.", ""): v for k, v in run.teacher.state_dict().items()}
    report = Vit().load_state_dict(weights, strict=False)
    assert not report.missing_keys
    assert sorted(report.unexpected_keys) == sorted(
        ["head.weight", "head.bias"] + ["mask_token"] * len(token)
    )


@pytest.mark.parametrize("apply", FORMS)
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
@pytest.mark.parametrize("apply", FORMS)
def test_the_compiled_backbone_gives_the_same(
    loop: Callable[..., Loop], images: list[Tensor], apply: str
) -> None:
    run = loop(apply)
    torch.manual_seed(1)
    expected = run.step(images)[0]
    torch.compiler.reset()
    run.student.backbone.backbone.compile(backend="eager")
    torch.manual_seed(1)
    torch.testing.assert_close(run.step(images)[0], expected, rtol=1e-4, atol=1e-4)
