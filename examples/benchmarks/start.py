"""How long a user waits: for `import maskdistill`, and for the example's first training step.

    python examples/benchmarks/start.py

Each import runs in a fresh interpreter, with and without maskdistill by turns; the first step is
timed from the start of its process, and is over when its loss is known. The files of all of them
are in the system's cache, but for the first ones.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from timing import by_turns, machine

EXAMPLE = Path(__file__).parents[1] / "dino_tiny_miniimagenet.py"
IMPORTS, STARTS = 11, 3

_IMPORT = """
import time
start = time.perf_counter()
import {}
print(time.perf_counter() - start)
"""

# Stops the example where its first step ends: the loss is the last thing that a step computes.
_FIRST_STEP = """
import os, runpy, sys, time
from maskdistill.training import Trainer
step = Trainer._run_step
def first(self, crops):
    metrics = step(self, crops)
    float(metrics.loss)
    print("FIRST STEP", time.time(), flush=True)
    os._exit(0)
Trainer._run_step = first
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def import_seconds(modules: str) -> float:
    """Time imports in a fresh interpreter."""
    return float(output_of([sys.executable, "-c", _IMPORT.format(modules)]).split()[-1])


def first_step_seconds() -> float:
    """Time the example from the start of its process to its first step's loss."""
    code = _FIRST_STEP.replace("sys.argv[0]", repr(str(EXAMPLE)))
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        said = output_of([sys.executable, "-c", code, "--out", f"{folder}/run"])
    moments = [line.split()[-1] for line in said.splitlines() if line.startswith("FIRST STEP")]
    if not moments:
        raise RuntimeError(f"the example ended before its first step; it said:\n{said}")
    return float(moments[0]) - start


def output_of(command: list[str]) -> str:
    """Run a command and return what it prints."""
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command[:2])} failed:\n{run.stderr[-2000:]}")
    return run.stdout


def main() -> None:
    """Print both figures."""
    print(machine())
    modules = ("torch", "torch, maskdistill")
    taken = by_turns({m: lambda m=m: import_seconds(m) for m in modules}, IMPORTS)  # type: ignore[misc]
    alone, both = taken.values()
    added = median(b - a for a, b in zip(alone, both, strict=True))
    print(f"import torch: {median(alone):.2f} s; maskdistill adds {added:.2f} s")
    first = [first_step_seconds() for _ in range(STARTS)]
    print(
        f"first step of {EXAMPLE.name} done {median(first):.1f} s after its start "
        f"({', '.join(f'{seconds:.1f}' for seconds in first)})"
    )


if __name__ == "__main__":
    main()
