"""The pages of the documentation do what they say.

Blocks fenced as ``python`` run, in order, in one namespace per page and in an empty folder. A
``text`` block right after one holds what it prints, and is compared.

These fences do not run: ``console`` starts whole training runs, needs data that is not here, or
installs; ``diff`` is a change to a block that does run, and is checked against it; ``text`` is
output or a layout on disk; ``toml`` is read by tests/comparing; ``py`` is a line to be put into
one of the library's own files, or needs several processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
import textwrap
import types
from pathlib import Path

import pytest

from maskdistill import presets

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
WITH_CODE = {
    "adding-a-masker.md", "checkpoints.md", "choosing.md", "compare.md", "concepts.md", "data.md",
    "geometry.md", "index.md", "learned.md", "models.md", "objectives.md", "pictures.md",
    "quickstart.md", "recipes/collated.md", "recipes/index.md", "trainer.md", "views.md",
}  # fmt: skip
WITH_CODE |= {
    f"evaluation/{name}.md"
    for name in (
        "attention", "discovery", "features", "few-shot", "health", "knn", "linear", "robustness",
    )
}  # fmt: skip
WITH_CODE |= {f"methods/{name}.md" for name in presets.NAMES}
# Made from the docstrings, which are tested where they stand; pictures; measurements; and diffs of
# other people's code, which tests/recipes compares with what the examples apply.
WITHOUT_CODE = {
    "api.md",
    "architecture.md",
    "command-line.md",
    "distributed.md",
    "evaluation/index.md",
    "fine-tuning.md",
    "gallery.md",
    "speed.md",
} | {f"recipes/{name}.md" for name in ("dino", "lightly", "lightning", "transformers")}

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<kind>[\w-]+)[^\n]*\n(?P<body>.*?)^(?P=indent)```[ ]*$\n?",
    re.MULTILINE | re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its kind, its text, its first line's number, and what stands before it."""

    kind: str
    body: str
    line: int
    gap: str


def blocks(page: str) -> list[Block]:
    text = (DOCS / page).read_text(encoding="utf-8")
    found, end = [], 0
    for fence in _FENCE.finditer(text):
        line = text.count("\n", 0, fence.start("body"))
        gap, end = text[end : fence.start()], fence.end()
        found.append(Block(fence["kind"], textwrap.dedent(fence["body"]), line, gap))
    return found


def run(code: str, line: int, page: str, namespace: dict[str, object]) -> str:
    """Run a block; tracebacks name the page and its line. Returns what was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * line + code, DOCS / page, "exec"), namespace)
    return printed.getvalue()


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A module of its own, so that classes of a page can be looked up, as in a script."""
    module = types.ModuleType("a_page_of_the_docs")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    return vars(module)


def test_every_page_is_expected() -> None:
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert pages == WITH_CODE | WITHOUT_CODE


@pytest.mark.parametrize("page", sorted(WITH_CODE))
def test_the_code_of_a_page_runs(page: str, namespace: dict[str, object]) -> None:
    found = blocks(page)
    assert any(block.kind == "python" for block in found), f"{page} has no python blocks"
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.kind != "python":
            continue
        printed = run(block.body, block.line, page, namespace)
        if after is not None and after.kind == "text" and not after.gap.strip():
            assert lines(printed) == lines(after.body), f"{page}, line {after.line}"


@pytest.mark.parametrize("page", sorted(WITHOUT_CODE))
def test_a_page_without_code_has_none(page: str) -> None:
    assert not [block for block in blocks(page) if block.kind == "python"]


def test_no_fence_is_misspelt() -> None:
    kinds = {block.kind for page in WITH_CODE | WITHOUT_CODE for block in blocks(page)}
    assert kinds <= {"python", "py", "text", "console", "diff", "toml"}
    for page in WITH_CODE | WITHOUT_CODE:
        text = (DOCS / page).read_text(encoding="utf-8")
        assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(blocks(page)), page


def test_five_lines_change_a_loop(namespace: dict[str, object]) -> None:
    """The quickstart's diff is of the loop below it, which runs before and after."""
    page = "quickstart.md"
    found = blocks(page)
    at = next(i for i, block in enumerate(found) if block.kind == "diff")
    diff, loop = found[at].body.splitlines(), found[at + 1]
    assert loop.kind == "python"
    assert sum(line.startswith("+") for line in diff) == 5
    before = loop.body
    for hunk in re.split(r"^ \.\.\.$", found[at].body, flags=re.MULTILINE):
        changed = hunk.strip("\n").splitlines()
        old = "".join(line[1:] + "\n" for line in changed if line.startswith("-"))
        new = "".join(line[1:] + "\n" for line in changed if line.startswith("+"))
        assert before.count(new) == 1, new
        before = before.replace(new, old)
    assert "md." not in before
    run(before, loop.line, page, namespace)


def test_the_settings_are_complete() -> None:
    """docs/trainer.md names every setting of a run, with its default."""
    from maskdistill.training.config import JobConfig

    text = (DOCS / "trainer.md").read_text(encoding="utf-8")
    section = text.partition("\n## Settings\n")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"`(\w+)=([^`]+)`[,.]", section))
    wanted = {field.name: repr(field.default) for field in dataclasses.fields(JobConfig)}
    assert rows == wanted, "please correct the settings in docs/trainer.md"


def test_the_api_page_is_complete() -> None:
    """docs/api.md has every public name of the library and of its documented modules."""
    import maskdistill
    from maskdistill import comparing, data, evaluation, masking, models, plotting, training

    listed = set(
        re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    # The top level stands for the rooms that it has a name from.
    rooms = (maskdistill, masking, models, training, evaluation, data, comparing, plotting)
    public = {
        f"{maskdistill.__name__ if name in maskdistill.__all__ else module.__name__}.{name}"
        for module in rooms
        for name in module.__all__
        if not isinstance(getattr(module, name), types.ModuleType)  # its names are listed alone
    }
    assert not public - listed, "please add these to docs/api.md"


def test_the_report_in_the_docs_stands_alone() -> None:
    """It is as `maskdistill compare` wrote it: nothing is loaded, and no machine is named."""
    page = (DOCS / "reports/scenes.html").read_text(encoding="utf-8")
    assert "reports/scenes.html" in (DOCS / "compare.md").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|srcset)="([^"]*)"', page)
    assert len(sources) > 20
    assert all(source.startswith("data:image/") for source in sources)
    text = re.sub(r'"data:[^"]*"', "", page)
    assert not re.search(r"<script|<link|url\(|@import|https?://", text)
    assert not re.search(r"/(?:home|tmp|root|work|Users)/", text)
