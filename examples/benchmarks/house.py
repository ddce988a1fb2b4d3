"""How large the library is, and how it hangs together: the figures of docs/architecture.md.

python examples/benchmarks/house.py                # this tree
python examples/benchmarks/house.py OTHER_TREE     # another checkout, to compare
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path


def figures(root: Path) -> Iterator[tuple[str, int]]:
    """Count what there is in a tree: name and number."""
    library = sorted((root / "maskdistill").rglob("*.py"))
    tests = sorted((root / "tests").rglob("*.py"))
    trees = [ast.parse(path.read_text()) for path in library]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    exported = ast.parse((root / "maskdistill/__init__.py").read_text())
    yield "library: files", len(library)
    yield "library: lines", lines_of(library)
    yield "library: longest file", max(lines_of([path]) for path in library)
    yield (
        "library: top-level names without an underscore",
        sum(
            isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")
            for tree in trees
            for node in tree.body
        ),
    )
    yield "library: raise statements", sum(isinstance(node, ast.Raise) for node in nodes)
    yield (
        "library: mentions of Any",
        sum(isinstance(node, ast.Name) and node.id == "Any" for node in nodes),
    )
    yield (
        "library: imports of its own inside functions",
        sum(
            isinstance(node, ast.ImportFrom)
            and (node.module or "").startswith("maskdistill")
            and node.col_offset > 0
            for node in nodes
        ),
    )
    yield (
        "names in maskdistill.__all__",
        next(
            len(node.value.elts)
            for node in exported.body
            if isinstance(node, ast.Assign)
            and getattr(node.targets[0], "id", "") == "__all__"
            and isinstance(node.value, ast.List)
        ),
    )
    yield "tests: files", len(tests)
    yield "tests: lines", lines_of(tests)
    yield (
        "tests: monkeypatched places",
        sum(len(re.findall(r"monkeypatch\.\w+\(", path.read_text())) for path in tests),
    )
    yield "README: lines", lines_of([root / "README.md"])
    yield (
        "docs: words",
        sum(len(page.read_text().split()) for page in (root / "docs").rglob("*.md")),
    )


def lines_of(paths: list[Path]) -> int:
    """Count lines."""
    return sum(len(path.read_text().splitlines()) for path in paths)


if __name__ == "__main__":
    for name, number in figures(Path(sys.argv[1]) if len(sys.argv) > 1 else Path()):
        print(f"{name:<50} {number:>7,}")
