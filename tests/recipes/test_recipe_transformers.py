"""The recipe for Hugging Face's transformers: its models under masks, and its five lines."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import maskdistill as md

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
KINDS = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
PREFIX = {"vit": 1, "dinov2": 1, "dinov2_with_registers": 5, "dinov3_vit": 3}
FORMS = ("token", "drop", "pixel")
POLICY = md.AsymmetricMaskPolicy(md.RandomMasker(0.3))
SIZE, PATCH = 32, 8


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import recipe_transformers

    return recipe_transformers


def build(kind: str, **settings: Any) -> Any:
    """A tiny model whose weights are all of a size that shows, biases and tokens too."""
    if kind == "dinov3_vit":
        settings["num_register_tokens"] = 2
    config = transformers.AutoConfig.for_model(
        kind, image_size=SIZE, patch_size=PATCH, hidden_size=24, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=48, **settings,
    )  # fmt: skip
    extra = {"add_pooling_layer": False, "use_mask_token": True} if kind == "vit" else {}
    model = transformers.AutoModel.from_config(config, **extra)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def first_layer(model: nn.Module) -> str:
    return next(n for n, _ in model.named_modules() if n.endswith(("layer.0", "layers.0")))


def wrapped(kind: str, apply: str = "token") -> Any:
    model = build(kind)
    first = first_layer(model) if apply == "drop" else None
    return md.MaskedViT(model, apply, first_block=first).eval()  # type: ignore[arg-type]


def options(kind: str) -> dict[str, bool]:
    return {"interpolate_pos_encoding": True} if kind == "vit" else {}


def crops(batch: int = 3) -> list[Tensor]:
    sizes = (SIZE, SIZE, SIZE // 2, SIZE // 2)
    return [torch.randn(batch, 3, size, size) for size in sizes]


SOUND = [(kind, form) for kind in KINDS for form in FORMS if (kind, form) != ("dinov3_vit", "drop")]


# --- The models


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_our_mask_is_their_mask(kind: str) -> None:
    vit, images = wrapped(kind), crops()[0]
    mask = POLICY(crops(), PATCH).student[0]
    assert vit.patch_size == (PATCH, PATCH)
    assert vit.prefix_tokens == PREFIX[kind]
    theirs = vit.backbone(images, bool_masked_pos=mask).last_hidden_state
    assert torch.equal(vit(images, mask).last_hidden_state, theirs)
    assert torch.equal(vit.embed(images, mask), theirs[:, 0])
    other = md.mask_pixels(images, mask, PATCH, "noise")
    assert torch.equal(vit(other, mask).last_hidden_state, theirs), "hidden patches are not seen"
    assert not torch.allclose(theirs, vit(images).last_hidden_state)


@pytest.mark.parametrize(("kind", "apply"), SOUND)
@torch.no_grad()
def test_without_a_mask_nothing_changes(kind: str, apply: str) -> None:
    torch.manual_seed(1)
    vit = wrapped(kind, apply)
    torch.manual_seed(1)
    bare = build(kind)
    assert set(vit.state_dict()) == set(bare.state_dict()), "these models have a mask token"
    vit.load_state_dict(bare.state_dict())
    for crop in crops():
        expected = bare(crop, **options(kind)).last_hidden_state
        assert torch.equal(vit(crop, **options(kind)).last_hidden_state, expected)


@torch.no_grad()
def test_a_model_without_a_mask_token_gets_one() -> None:
    config = build("vit").config
    bare = transformers.ViTModel(config, add_pooling_layer=False).eval()
    keys = set(bare.state_dict())
    vit = md.MaskedViT(bare)
    assert set(vit.state_dict()) - keys == {"mask_token"}
    mask = POLICY(crops(), PATCH).student[0]
    vit(crops()[0], mask)
    transformers.ViTModel(config, add_pooling_layer=False).load_state_dict(
        {key: value for key, value in vit.state_dict().items() if key != "mask_token"}
    )


@pytest.mark.parametrize("kind", ["vit", "dinov2", "dinov2_with_registers"])
@torch.no_grad()
def test_dropping_is_running_on_the_rest_alone(kind: str) -> None:
    vit, images = wrapped(kind, "drop"), crops()[0]
    mask = POLICY(crops(), PATCH).student[0]
    assert mask is not None
    model = vit.backbone
    layers = model.get_submodule(first_layer(model).rpartition(".")[0])
    out = vit(images, mask).last_hidden_state
    prefix = PREFIX[kind]
    for row in range(3):
        tokens = model.embeddings(images[row : row + 1])
        kept = torch.cat([torch.ones(prefix, dtype=torch.bool), ~mask[row]])
        tokens = tokens[:, kept]
        for layer in layers:
            result = layer(tokens)
            tokens = result if isinstance(result, Tensor) else result[0]
        torch.testing.assert_close(out[row], model.layernorm(tokens)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_attention_is_theirs(kind: str) -> None:
    """Recorded from a model that runs fused, it is what an unfused one returns."""
    vit, images = wrapped(kind), crops()[0]
    ours = vit.attention(images)
    vit.backbone.set_attn_implementation("eager")
    theirs = vit(images, output_attentions=True).attentions[-1][:, :, 0, PREFIX[kind] :]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_dropping_is_refused_where_positions_go_beside_the_tokens() -> None:
    model = build("dinov3_vit")
    with pytest.raises(ValueError, match=r"rotary position embedding.*not sound.*apply='token'"):
        md.MaskedViT(model, "drop", first_block=first_layer(model))


@pytest.mark.parametrize(
    ("kind", "apply"), [("vit", "drop"), ("dinov2", "pixel"), ("dinov3_vit", "token")]
)
def test_compiles(kind: str, apply: str) -> None:
    vit, images = wrapped(kind, apply), crops()[0]
    masks = POLICY(crops(), PATCH)
    torch._dynamo.reset()
    compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")
    for mask in (None, masks.student_masks[0]):
        out = compiled(images, mask).last_hidden_state
        expected = vit(images, mask).last_hidden_state
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


# --- In a loop of DINO's


@pytest.mark.parametrize(("kind", "apply"), SOUND)
def test_only_the_students_global_crops_change(kind: str, apply: str) -> None:
    student = wrapped(kind, apply)
    teacher = copy.deepcopy(student)
    views = crops()
    masks = POLICY(views, PATCH)
    clean = [teacher.embed(view, **options(kind)) for view in views]
    with student.masking(masks.student):
        out = [student(view, **options(kind)).last_hidden_state[:, 0] for view in views]
        again = [teacher.embed(view, **options(kind)) for view in views[:2]]
    assert all(map(torch.equal, again, clean)), "the teacher saw a mask"
    assert [torch.equal(a, b) for a, b in zip(out, clean, strict=True)] == [False] * 2 + [True] * 2
    torch.stack(out).sum().backward()
    if apply == "token":
        assert student.mask_token is not teacher.mask_token
        assert student.mask_token.grad.abs().sum() > 0
        assert teacher.mask_token.grad is None


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("kind", "apply"), SOUND)
def test_no_parameter_is_unused(kind: str, apply: str) -> None:
    """Also in steps that mask nothing."""
    vit = wrapped(kind, apply).train()
    if apply != "token":  # their own mask token, which the bare model does not use either
        vit.backbone.embeddings.mask_token.requires_grad_(False)
    student: Any = DistributedDataParallel(vit)
    views = crops()
    for policy in (POLICY, md.ViewPolicy.none(), POLICY, md.ViewPolicy.none()):
        with vit.masking(policy(views, PATCH).student):
            out = [student(view, **options(kind)).last_hidden_state for view in views]
        torch.cat([tokens[:, :5].flatten(1) for tokens in out]).sum().backward()
        assert all(p.grad is not None for p in vit.parameters() if p.requires_grad)


# --- The script


def run(code: str, *arguments: str) -> list[str]:
    """Run the text of the script, and return the losses that it prints."""
    command = [sys.executable, "-", "--steps", "2", "--batch-size", "2", *arguments]
    done = subprocess.run(command, input=code, capture_output=True, text=True, check=True)
    return re.findall(r"loss (\d[\d.]+)", done.stdout)


def test_five_lines_change_the_loop() -> None:
    """The diff in the docs is of the script, which runs before and after."""
    after = (ROOT / "examples" / "recipe_transformers.py").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "recipes" / "transformers.md").read_text(encoding="utf-8")
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert sum(line.startswith("+") for line in diff.splitlines()) == 5
    before = after
    for hunk in re.split(r"^ \.\.\.$", diff, flags=re.MULTILINE):
        lines = hunk.strip("\n").splitlines()
        old = "".join(line[1:] + "\n" for line in lines if line.startswith("-"))
        new = "".join(line[1:] + "\n" for line in lines if line.startswith("+"))
        assert before.count(new) == 1, new
        before = before.replace(new, old)
    assert not re.search(r"(?<![.\w])md\.", before)
    assert "mask" not in before.partition("for step")[2]
    losses = [run(code) for code in (before, after)]
    assert len(losses[0]) == len(losses[1]) == 2
    assert losses[0] != losses[1]


def test_the_script_runs(script: types.ModuleType) -> None:
    code = Path(script.__file__ or "").read_text(encoding="utf-8")
    masker = "BlockMasker(0.4).exactly(0.4)"
    assert len(run(code, "--model", "vit", "--apply", "drop", "--masker", masker)) == 2


def test_saved_models_come_and_go(script: types.ModuleType, tmp_path: Path) -> None:
    bare, images = build("dinov2"), crops()[0]
    bare.save_pretrained(tmp_path / "in")
    vit = md.MaskedViT(script.build(str(tmp_path / "in"))).eval()
    assert torch.equal(vit.embed(images), bare(images).last_hidden_state[:, 0])
    with torch.no_grad():
        vit.mask_token.add_(1.0)
    vit.backbone.save_pretrained(tmp_path / "out")
    after = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert torch.equal(after.embeddings.mask_token, vit.mask_token)
    assert set(script.KINDS) == set(KINDS)
