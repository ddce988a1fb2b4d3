"""The benchmarks of masks and views run to their end, whatever is there; how fast is not tested."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples/benchmarks"

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
import datasets, numpy as np, jaxtyping as jt
from torchvision.datasets import VisionDataset

class Folder(VisionDataset): ...

class UniformMasking:
    def __init__(self, grid):
        self.grid = grid

    def __call__(self, hidden) -> jt.Bool[np.ndarray, "h w"]:
        return np.zeros(self.grid, dtype=bool)
"""
DINO = """
class Resize:
    size = (0, 0)

class Pipeline:
    def __init__(self):
        self.transforms = [Resize()]

class DataAugmentationDINO:
    def __init__(self, global_scale, local_scale, count):
        assert (global_scale, local_scale) == ((0.4, 1.0), (0.05, 0.4))
        self.count = count
        self.global_transfo1, self.global_transfo2, self.local_transfo = (
            Pipeline() for _ in range(3))

    def __call__(self, image):
        assert image.mode == "RGB"
        assert self.global_transfo2.transforms[0].size[0] in (64, 224)
        assert self.local_transfo.transforms[0].size[0] in (24, 96)
        return [image] * (2 + self.count)
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.fixture
def peers(tmp_path: Path) -> Path:
    """A folder of clones: one that draws, one that draws in part, one that cannot be imported."""
    files = {
        "dinov2/dinov2/data/masking.py": DINOV2,
        "capi/data.py": CAPI,
        "franca/franca/data/masking.py": "from nowhere.else_ import thing",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    return tmp_path


def run_masks(masks: ModuleType, **settings: Any) -> None:
    masks.main(masks.Settings(**{"batch": 2, "grid": (4, 4), "rounds": 2, "least": 0, **settings}))


def test_every_peer_is_timed_or_listed(
    script: Callable[[str], ModuleType], peers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = script("masks")
    run_masks(masks, peers=peers)
    out = capsys.readouterr().out
    for peer in masks.PEERS:
        assert f"\n| {peer.name} |" in out or f"\n- {peer.name}: " in out
    assert "\n| DINOv2 | `BlockMasker(0.5, max_patches=8, exact=False)` |" in out
    assert "\n| CAPI uniform | `RandomMasker(0.5)` |" in out
    assert "- Franca inverse block: franca/data/masking.py refused: ModuleNotFoundError" in out
    assert "BlockMasking" in next(line for line in out.splitlines() if "- CAPI block:" in line)
    assert "git clone --depth 1 https://github.com/facebookresearch/mae" in out
    assert "goals met: " in out
    assert out.count("\n| `") == len(masks.OURS) - 1


def test_installed_packages(
    script: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    utils = tmp_path / "lightly_train/_methods/dinov2/utils.py"
    utils.parent.mkdir(parents=True)
    utils.write_text(DINOV2)
    (tmp_path / "lightly_train/__init__.py").write_text("raise ImportError('it needs much more')")
    monkeypatch.syspath_prepend(str(tmp_path))
    run_masks(script("masks"), only=("lightly-train",))
    assert "\n| lightly-train |" in capsys.readouterr().out


def test_stubs_leave_no_trace(script: Callable[[str], ModuleType], peers: Path) -> None:
    stubs = ("torchvision", "datasets", "jaxtyping")
    before, finders = {name: sys.modules.get(name) for name in stubs}, list(sys.meta_path)
    script("peers").load(peers / "capi/data.py", stubs)
    assert {name: sys.modules.get(name) for name in before} == before
    assert sys.meta_path == finders


def test_growth(
    script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    masks = script("masks")
    assert masks.slopes((1, 10, 100), (1.0, 10.0, 100.0)) == pytest.approx((1.0, 1.0))
    assert masks.slopes((1, 10, 100), (1.0, 10.0, 1000.0))[1] == pytest.approx(2.0)
    monkeypatch.setattr(masks, "BATCHES", (1, 2, 4))
    monkeypatch.setattr(masks, "GRIDS", (2, 4))
    run_masks(masks, scaling=True, only=("Checkerboard",))
    out = capsys.readouterr().out
    assert "| ms over batch | 1 | 2 | 4 | slope | last |" in out
    assert "| ms over patches | 4 | 16 | slope | last |" in out
    with pytest.raises(SystemExit, match="nothing has a name that contains"):
        run_masks(masks, only=("nobody",))


def test_both_sides_hide_the_same_number(script: Callable[[str], ModuleType]) -> None:
    for ratio in (0.0, 0.1, 0.3, 0.5, 0.75, 1.0):
        for side in (4, 7, 14):
            request = script("peers").Request(1, (side, side), ratio, "cpu")
            patches = side * side
            assert request.hidden == int(ratio * patches)
            assert int(request.share * patches) == int(request.share * patches + 0.5)
            assert int(request.share * patches) == request.hidden


def test_views_with_a_clone_and_without(
    script: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    views = script("views")
    with pytest.raises(SystemExit, match=r"no main_dino\.py.*git clone"):
        views.main(views.Settings(dino=tmp_path, images=2, rounds=2))
    with pytest.raises(SystemExit, match="no .jpg"):
        views.main(views.Settings(data=tmp_path, images=2, rounds=2))
    (tmp_path / "main_dino.py").write_text(DINO)
    monkeypatch.delitem(sys.modules, "main_dino", raising=False)
    views.main(views.Settings(dino=tmp_path, images=2, rounds=2, resident=True))
    sys.modules.pop("main_dino")
    out = capsys.readouterr().out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 8
    assert all(float(row[2]) > 0 for row in rows)
    assert [row[3] for row in rows if row[1] == "facebookresearch/dino"] == ["1", "1"]
    assert str(tmp_path) not in sys.path


def test_jpegs_of_ones_own(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    views = script("views")
    made = views.jpegs(views.SMALL, 3, None)
    assert views.Encoded(made)[0][0].size == (84, 84)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/one.JPG").write_bytes(made[1])
    assert views.jpegs(views.SMALL, 2, tmp_path) == [made[1]] * 2
