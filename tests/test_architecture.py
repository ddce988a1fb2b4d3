"""The house: its public names, its floors, its reading map, and what importing it costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import maskdistill as md

PACKAGE = Path(md.__file__).parent
ROOT = PACKAGE.parent

PUBLIC = """
    AsymmetricMaskPolicy AttentionGuidedMasker BlockMasker DINOHead DINOLoss Linear MaskCollate
    MaskedViT Masker Mixture MultiCropWrapper NoMasker RandomMasker SceneMasker SignalMasker
    Stratified Uniform ViewMasks ViewPolicy create_backbone load_weights mask_pixels parse_masker
    collating masking models objectives policies presets
""".split()  # noqa: SIM905  # one literal list, to be read

# A module imports only from floors below its own. docs/architecture.md shows the same table.
FLOORS = (
    {"masking", "objectives", "data"},
    {"models", "policies"},
    {"presets", "collating", "evaluation", "plotting"},
    {"training"},
    {"comparing"},
    {"cli"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS, start=1) for room in rooms}


def imports_of(path: Path) -> set[Path]:
    """Return the library's files that a file imports anywhere in it, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("maskdistill"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {file_of(name) or file_of(str(node.module)) for name in names}
        elif isinstance(node, ast.Import):
            found |= {file_of(a.name) for a in node.names if a.name.startswith("maskdistill.")}
    return {each for each in found if each is not None} - {PACKAGE / "__init__.py"}


def file_of(name: str) -> Path | None:
    """Return the file of a module's dotted name, if it is one."""
    place = ROOT.joinpath(*name.split("."))
    candidates = (place.with_suffix(".py"), place / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def room(path: Path) -> str:
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "cli" if name == "__main__" else name


IMPORTS = {path: imports_of(path) for path in PACKAGE.rglob("*.py")}
INSIDE = {
    path: found
    for path, found in IMPORTS.items()
    if path.parent != PACKAGE or path.stem != "__init__"
}


def test_public_names() -> None:
    assert sorted(md.__all__) == sorted(PUBLIC)
    assert all(getattr(md, name).__doc__ for name in PUBLIC)


def test_imports_go_down_the_floors() -> None:
    climbs = [
        f"{path.relative_to(PACKAGE)} (floor {FLOOR[room(path)]}) imports "
        f"{other.relative_to(PACKAGE)} (floor {FLOOR[room(other)]})"
        for path, others in INSIDE.items()
        for other in others
        if room(other) != room(path) and FLOOR[room(other)] >= FLOOR[room(path)]
    ]
    assert not climbs


def test_no_modules_import_each_other() -> None:
    # A room's __init__ stands for those who ask the room for a name; its own files do not.
    graph = {
        path: {o for o in others if not (o.name == "__init__.py" and o.parent in path.parents)}
        for path, others in INSIDE.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = " -> ".join(str(path.relative_to(PACKAGE)) for path in error.args[1])
        pytest.fail(f"modules import each other: {circle}")


def test_masking_needs_torch_alone() -> None:
    for path in (PACKAGE / "masking").glob("*.py"):
        assert {room(other) for other in INSIDE[path]} <= {"masking"}, path.name


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


# Packages that are imported under another name than the one that pip knows.
IMPORTED_AS = {"pillow": "PIL", "scikit-learn": "sklearn"}


def test_what_is_imported_is_declared() -> None:
    text = (ROOT / "pyproject.toml").read_text().split("docs = [")[0]
    names = re.findall(r'"([a-z0-9-]+)(?:>=|\[)', text)
    declared = {IMPORTED_AS.get(name, name) for name in names} | {"maskdistill"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [str(node.module)]
            top = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names
            assert top <= declared, f"{path.name} imports {top - declared}, which no extra names"


# --- The README's reading map


def reading_map() -> list[tuple[Path, int, set[Path]]]:
    """Return each listed file, its lines, and the unlisted files that it is said to stand on."""
    row = re.compile(
        r"^\| \[[^]]+\]\((maskdistill/\S+\.py)\) \| (\d+) \|.*\|([^|]*)\|$", re.MULTILINE
    )
    return [
        (ROOT / name, int(lines), {PACKAGE / each for each in re.findall(r"`(\S+?\.py)`", below)})
        for name, lines, below in row.findall((ROOT / "README.md").read_text())
    ]


def test_the_reading_map_is_true() -> None:
    listed: set[Path] = set()
    total = 0
    for path, lines, below in reading_map():
        now = len(path.read_text().splitlines())
        assert abs(now / lines - 1) < 0.1, f"{path.name} has {now} lines by now"
        reached = set()
        for other in IMPORTS[path]:  # a name from a room is what its __init__ has it from
            reached |= IMPORTS[other] & (listed | below) if other.name == "__init__.py" else {other}
        unlisted = reached - listed - below
        assert not unlisted, (
            f"{path.name} needs {sorted(p.name for p in unlisted)}, not listed before"
        )
        assert all(each.is_file() for each in below)
        listed.add(path)
        total += now
    assert 5 <= len(listed) <= 10
    assert total <= 3500


def test_the_architecture_page_shows_these_floors() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    assert len(text.splitlines()) <= 120
    rows = re.findall(r"^\| (\d) \| (.+?) \|", text, re.MULTILINE)
    shown = {int(number): set(re.findall(r"`(\w+?)/?`", rooms)) for number, rooms in rows}
    assert shown == dict(enumerate(FLOORS, start=1))
