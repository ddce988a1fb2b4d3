"""The public names, the floors, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import maskdistill as md

PACKAGE = Path(md.__file__).parent

PUBLIC = sorted(
    [
        "AsymmetricMaskPolicy",
        "AttentionGuidedMasker",
        "AttentionHintMasker",
        "BernoulliMasker",
        "BlockMasker",
        "CheckerboardMasker",
        "ClusterMasker",
        "ColorNoiseMasker",
        "Cosine",
        "DINOHead",
        "DINOLoss",
        "DPPMasker",
        "GridMasker",
        "LearnedMasker",
        "Linear",
        "MaskContext",
        "MaskedViT",
        "Masker",
        "Mixture",
        "MultiBlockMasker",
        "MultiCropWrapper",
        "NoMasker",
        "PartMasker",
        "Quadratic",
        "RandomMasker",
        "SceneMasker",
        "SignalMasker",
        "SingleBlockMasker",
        "SquaresMasker",
        "Steps",
        "Stratified",
        "Uniform",
        "ViewMasks",
        "ViewPolicy",
        "WarmUp",
        "carry_signal",
        "mask_pixels",
        "LoadedWeights",
        "MaskCollate",
        "collated_masks",
        "create_backbone",
        "load_weights",
        "parse_masker",
        "presets",
        "supported_models",
    ]  # one literal list, to be read
)

# A module imports only from floors below its own; within a package, modules may import each other.
FLOORS = {
    "masking": 1, "models": 2, "objectives": 1, "data": 1,
    "policies": 2, "presets": 3, "collating": 3, "evaluation": 3, "plotting": 3,
    "training": 4, "comparing": 5, "commands": 6, "cli": 7, "__main__": 8,
}  # fmt: skip
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("maskdistill"):
            parts = (node.module or "").split(".")
            rooms |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            rooms |= {n[1] if len(n) > 1 else "*" for n in names if n[0] == "maskdistill"}
    return rooms


def test_public_names() -> None:
    assert sorted(md.__all__) == PUBLIC
    assert all(getattr(md, name).__doc__ for name in PUBLIC)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_the_floors(path: Path) -> None:
    here = room(path)
    for other in imported_rooms(path) - {here}:
        if other == "*":  # the version
            continue
        assert FLOORS[other] < FLOORS[here], (
            f"{here} (floor {FLOORS[here]}) imports {other} (floor {FLOORS[other]})"
        )


def test_masking_needs_torch_alone() -> None:
    for path in (PACKAGE / "masking").glob("*.py"):
        assert imported_rooms(path) <= {"masking"}, path.name


def test_importing_is_light() -> None:
    code = """if True:
        import sys, torch, einops
        before = set(sys.modules)
        import maskdistill
        print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))"""
    added = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {"timm", "torchvision", "matplotlib", "tensorboard", "pyarrow", "PIL", "tyro", "tqdm",
             "webdataset", "wandb", "jinja2", "scipy", "sklearn"}  # fmt: skip
    assert "maskdistill" in added
    assert not heavy & set(added)
