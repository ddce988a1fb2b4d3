"""The benchmark of the views runs to its end, whatever is there; how fast is not tested."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples/benchmarks"

CLONE = """
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
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "main_dino", raising=False)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    benchmark_views = importlib.import_module("views")

    assert torch.get_num_threads() == threads
    return benchmark_views


def test_with_a_clone(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "main_dino.py").write_text(CLONE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    script.main(script.Settings(dino=tmp_path, images=2, rounds=2, resident=True))
    sys.modules.pop("main_dino")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 8
    assert all(float(row.split("|")[3]) > 0 for row in rows)
    assert sum("facebookresearch/dino" in row and "| 1.00 |" in row for row in rows) == 2
    assert str(tmp_path) not in sys.path


def test_without_a_clone(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(script.Settings(case="small", images=2, rounds=2))
    out = capsys.readouterr().out
    assert "git clone --depth 1 https://github.com/facebookresearch/dino" in out
    with pytest.raises(SystemExit, match=r"no main_dino\.py"):
        script.main(script.Settings(dino=tmp_path, images=2, rounds=2))
    with pytest.raises(SystemExit, match="no .jpg"):
        script.main(script.Settings(data=tmp_path, case="small", images=2, rounds=2))


def test_files_of_ones_own(script: ModuleType, tmp_path: Path) -> None:
    case = script.CASES["small"]
    made = script.jpegs(case, 3, None)
    assert script.Encoded(made)[0][0].size == (84, 84)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/one.JPG").write_bytes(made[1])
    assert script.jpegs(case, 2, tmp_path) == [made[1]] * 2
