"""The README's commands are those that are tested."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("pip ")]


def test_exactly_two_set_up_commands() -> None:
    run, test = commands()
    assert run == 'pip install -e ".[train]" && python examples/dino_tiny_miniimagenet.py'
    assert test == 'pip install -e ".[test]" && pytest'


def test_ci_runs_the_test_command() -> None:
    ci = (ROOT / ".ci" / "run").read_text().replace("pip install -q", "pip install")
    assert commands()[1] in ci


def test_readme_says_what_it_is_not() -> None:
    assert "2210.10615" in (ROOT / "README.md").read_text()


def test_nothing_is_left_to_fill_in() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    left = [page.name for page in pages if re.search(r"@@[A-Z]+@@", page.read_text("utf-8"))]
    assert not left
