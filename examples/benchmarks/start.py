"""How long a user waits: for `import maskdistill`, and for the example's first training step.

    python examples/benchmarks/start.py
    python examples/benchmarks/start.py --example-arguments --data PATH --image-size 64

Each import runs in a fresh interpreter, with and without maskdistill by turns; the first step is
timed from the start of its process, and is over when its loss is known. The files of all of them
are in the system's cache, but for the first ones.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import tyro

EXAMPLE = Path(__file__).with_name("dino_tiny_miniimagenet.py")

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


@dataclass(frozen=True)
class Settings:
    """How often, and what."""

    rounds: int = 11
    """Imports of each kind."""
    starts: int = 3
    """Starts of the example."""
    example_arguments: tuple[str, ...] = ()
    """Passed to the example, after all other options."""


def main(settings: Settings) -> None:
    """Print both figures."""
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}")
    alone, both = [], []
    for _ in range(settings.rounds):
        alone.append(_import_seconds("torch"))
        both.append(_import_seconds("torch, maskdistill"))
    added = median(b - a for a, b in zip(alone, both, strict=True))
    print(f"import torch: {median(alone):.2f} s; maskdistill adds {added:.2f} s")
    first = [_first_step_seconds(settings.example_arguments) for _ in range(settings.starts)]
    print(
        f"first step of {EXAMPLE.name} done {median(first):.1f} s after its start "
        f"({', '.join(f'{seconds:.1f}' for seconds in first)})"
    )


def _import_seconds(modules: str) -> float:
    return float(_output([sys.executable, "-c", _IMPORT.format(modules)]).split()[-1])


def _first_step_seconds(arguments: tuple[str, ...]) -> float:
    code = _FIRST_STEP.replace("sys.argv[0]", repr(str(EXAMPLE)))
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "run")
        start = time.time()
        said = _output([sys.executable, "-c", code, "--out", out, *arguments])
    moments = [line.split()[-1] for line in said.splitlines() if line.startswith("FIRST STEP")]
    if not moments:
        raise RuntimeError(f"the example ended before its first step; it said:\n{said}")
    return float(moments[0]) - start


def _output(command: list[str]) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command[:2])} failed:\n{run.stderr[-2000:]}")
    return run.stdout


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
