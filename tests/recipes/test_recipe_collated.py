"""The recipe for DINOv2 and DINOv3: its diffs, in the original's own training loop.

The runs need a clone: MASKDISTILL_DINOV2 is the folder of a checkout of facebookresearch/dinov2.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CLONE = Path(os.environ.get("MASKDISTILL_DINOV2", "."))
FILE = "dinov2/train/train.py"

needs_clone = pytest.mark.skipif(
    not (CLONE / FILE).is_file(), reason="MASKDISTILL_DINOV2 does not say where a clone is"
)


def diffs() -> list[str]:
    """The diffs of the docs: masks drawn in the step, and masks drawn in the loader."""
    page = (ROOT / "docs" / "recipes" / "collated.md").read_text(encoding="utf-8")
    return re.findall(r"^```diff\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def test_at_most_five_lines_change() -> None:
    counts = []
    for diff in diffs():
        changed = re.findall(r"^[+-](?![+-]{2}).*", diff, re.MULTILINE)
        counts.append(len(changed))
        assert all(line.startswith("+") for line in changed), "nothing is taken away"
    assert counts == [4, 3]


def run(folder: Path, diff: str, *arguments: str) -> list[dict[str, Any]]:
    """Patch a copy of the clone, train, and return what was seen in each step."""
    shutil.copytree(CLONE / "dinov2", folder / "dinov2")
    apply = ["git", "-C", str(folder), "apply", "--verbose", "-"]
    subprocess.run(apply, input=diff, text=True, check=True, capture_output=True)
    assert "md." in (folder / FILE).read_text()
    done = subprocess.run(
        [sys.executable, "-m", "tests.recipes.dinov2_run", str(folder), *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    steps: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return steps


@needs_clone
@pytest.mark.parametrize("more", [[], ["--separate-head"]], ids=["one head", "two heads"])
def test_the_original_trains_on_our_masks(tmp_path: Path, more: list[str]) -> None:
    """The mask token learns, the teacher's never, and both diffs do the same."""
    in_step, in_loader = (
        run(tmp_path / name, diff, "--steps", "10", *more)
        for name, diff in zip(("step", "loader"), diffs(), strict=True)
    )
    assert in_step == in_loader
    assert len(in_step) == 10
    for step in in_step:
        assert step["hidden"] == [5] * 8, "of 4 images in 2 crops of 16 patches, at ratio 0.3"
        assert step["student_gradient"]
        assert not step["teacher_gradient"]
    if not more:
        first, last = in_step[0]["ibot_loss"], in_step[-1]["ibot_loss"]
        assert (first, last) == pytest.approx((3.037, 2.890), abs=0.02)


@needs_clone
def test_a_step_that_hides_nothing_breaks_the_original(tmp_path: Path) -> None:
    """What the docs warn of: its centre is NaN from then on."""
    diff = diffs()[0].replace("md.RandomMasker(0.3)", "md.RandomMasker(0.3).sometimes(0.1)")
    with pytest.raises(AssertionError, match=r"in do_train\s+raise AssertionError"):
        run(tmp_path / "clone", diff, "--steps", "10")
