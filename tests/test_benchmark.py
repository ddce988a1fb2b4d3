"""The benchmark of the maskers runs to its end, whatever is there; how fast is not tested."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples/benchmarks"
TINY = ["--batch", "2", "--grid", "4", "4", "--rounds", "2", "--seconds", "0"]

DINOV2 = """
import numpy as np

class MaskingGenerator:
    def __init__(self, grid, max_num_patches):
        self.grid = grid

    def __call__(self, hidden):
        assert hidden == 8
        return np.zeros(self.grid, dtype=bool)
"""
CAPI = """
import datasets, jaxtyping as jt, torchvision
from torchvision.datasets import VisionDataset
from nowhere.else_ import thing

class Folder(VisionDataset): ...
"""
CAPI_STUBBED = """
import random
import datasets, numpy as np, jaxtyping as jt
from torchvision.datasets import VisionDataset

class Folder(VisionDataset): ...

class UniformMasking:
    def __init__(self, grid):
        self.grid = grid

    def __call__(self, hidden) -> jt.Bool[np.ndarray, "h w"]:
        return np.zeros(self.grid, dtype=bool)
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("masks")


@pytest.fixture
def peers(tmp_path: Path) -> Path:
    """A folder of clones: one that draws, one that draws in part, one that cannot be imported."""
    files = {
        "dinov2/dinov2/data/masking.py": DINOV2,
        "capi/data.py": CAPI_STUBBED,
        "franca/franca/data/masking.py": CAPI,
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    return tmp_path


def everything(script: ModuleType, path: Path, *arguments: str) -> dict[str, Any]:
    assert script.main([*TINY, *arguments, "--json", str(path)]) == 0
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_as_a_script_without_peers() -> None:
    ran = subprocess.run(
        [sys.executable, EXAMPLES / "masks.py", *TINY, "--only", "capi", "Checker"],
        capture_output=True, text=True, check=True, cwd=EXAMPLES.parent,
    ).stdout  # fmt: skip
    assert "git clone --depth 1 https://github.com/facebookresearch/capi PEERS/capi" in ran
    assert "CheckerboardMasker" in ran
    assert "torch " + torch.__version__ in ran


def test_every_peer_is_timed_or_listed(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = everything(script, tmp_path / "all.json", "--peers", str(tmp_path))
    timed = {pair["name"] for pair in content["pairs"]}
    assert timed | content["skipped"].keys() == {peer.name for peer in script.PEERS}
    assert not timed & content["skipped"].keys()
    assert len(content["ours"]) == len(script.OURS) - 1
    assert all(len(pair["times"]) == 2 for pair in content["ours"])
    out = capsys.readouterr().out
    assert all(name in out for name in content["skipped"])
    assert all(len(line) <= 100 for line in out.splitlines() if str(tmp_path) not in line)


def test_peers_in_a_folder(
    script: ModuleType, peers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = everything(
        script, peers / "all.json", "--peers", str(peers), "--only", "dinov2", "capi", "franca"
    )
    assert [pair["name"] for pair in content["pairs"]] == ["DINOv2", "CAPI uniform"]
    assert content["skipped"]["Franca inverse block"].startswith(
        "franca/data/masking.py refused: ModuleNotFoundError"
    )
    assert "BlockMasking" in content["skipped"]["CAPI block"]
    out = capsys.readouterr().out
    assert "goals met: " in out
    assert "max_patches=8, exact=False" in out  # whose generator is which of ours


def test_installed_packages(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utils = tmp_path / "lightly_train/_methods/dinov2/utils.py"
    utils.parent.mkdir(parents=True)
    utils.write_text(DINOV2)
    (tmp_path / "lightly_train/__init__.py").write_text("raise ImportError('it needs much more')")
    monkeypatch.syspath_prepend(str(tmp_path))
    content = everything(script, tmp_path / "all.json", "--only", "lightly-train")
    assert [pair["name"] for pair in content["pairs"]] == ["lightly-train"]


def test_stubs_leave_no_trace(script: ModuleType, peers: Path) -> None:
    load = importlib.import_module("peers").load

    before = {name: sys.modules.get(name) for name in ("torchvision", "datasets", "jaxtyping")}
    finders = list(sys.meta_path)
    load(peers / "capi/data.py", ("torchvision", "datasets", "jaxtyping"))
    assert {name: sys.modules.get(name) for name in before} == before
    assert sys.meta_path == finders


def test_scaling_and_markdown(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, "BATCHES", (1, 2, 4))
    monkeypatch.setattr(script, "GRIDS", (2, 4))
    content = everything(
        script, tmp_path / "all.json", "--scaling", "--markdown", "--only", "Checkerboard"
    )
    assert [g["sizes"] for g in content["scaling"]] == [[1, 2, 4], [4, 16]]
    assert "| ms over batch | 1 | 2 | 4 | slope | last |" in capsys.readouterr().out


def test_verdicts(script: ModuleType) -> None:
    def pair(goal: float | None) -> Any:
        return script.Pair("ours", "theirs", (1.0, 2.0, 9.0), (20.0, 10.0, 20.0), goal)

    assert [pair(goal).verdict for goal in (None, 10, 11)] == ["", "10x met", "11x MISSED"]
    linear = script.Growth("ours", "batch", (1, 10, 100), (1.0, 10.0, 100.0))
    square = script.Growth("ours", "batch", (1, 10, 100), (1.0, 10.0, 1000.0))
    assert (linear.slope, linear.superlinear) == (pytest.approx(1.0), False)
    assert (square.last_slope, square.superlinear) == (pytest.approx(2.0), True)


@pytest.mark.parametrize(
    "arguments", [["--ratio", "2"], ["--batch", "0"], ["--only", "nobody"]], ids=" ".join
)
def test_refuses(
    script: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([*TINY, *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("side", [4, 7, 14])
def test_both_sides_hide_the_same_number(script: ModuleType, ratio: float, side: int) -> None:
    request = script.Request(1, (side, side), ratio, "cpu")
    patches = side * side
    assert request.hidden == int(ratio * patches)
    assert int(request.share * patches) == int(request.share * patches + 0.5) == request.hidden
