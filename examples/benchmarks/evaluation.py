"""How long the instruments take, and how much memory.

    /usr/bin/time -v python examples/benchmarks/evaluation.py knn
    python examples/benchmarks/evaluation.py knn --dino CLONE

The features are random, which takes k-NN as long as any others. With a clone of
facebookresearch/dino, its own ``knn_classifier`` runs on the same features, and what both find is
compared.
"""

from __future__ import annotations

import ast
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro

from maskdistill.evaluation.knn import knn_accuracies

KS = (10, 20, 100, 200)


@dataclass(frozen=True)
class Settings:
    """What to time."""

    instrument: tyro.conf.Positional[Literal["knn"]] = "knn"
    """Which instrument."""
    train: int = 50_000
    """Images in the bank."""
    test: int = 10_000
    """Images to classify."""
    width: int = 192
    """Dimensions of a feature."""
    classes: int = 100
    """Number of classes."""
    chunk: int = 1024
    """Test images at a time."""
    threads: int = 2
    """CPU threads."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the features lie."""
    dino: Path | None = None
    """A clone of facebookresearch/dino to compare with."""


def features_of(s: Settings) -> tuple[torch.Tensor, ...]:
    """Draw features around the centres of classes, too near each other to be easy."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(s.classes, s.width, generator=generator)
    drawn: list[torch.Tensor] = []
    for count in (s.train, s.test):
        labels = torch.arange(count) % s.classes
        noise = torch.randn(count, s.width, generator=generator)
        drawn += [noise.mul_(4).add_(centers[labels]).to(s.device), labels.to(s.device)]
    return tuple(drawn)


def knn_classifier_of(clone: Path) -> Callable[..., tuple[float, float]]:
    """Return the original's function, without importing the rest of its script."""
    tree = ast.parse((clone / "eval_knn.py").read_text())
    tree.body = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "knn_classifier"
    ]
    namespace: dict[str, Any] = {"torch": torch}
    exec(compile(tree, str(clone / "eval_knn.py"), "exec"), namespace)
    function: Callable[..., tuple[float, float]] = namespace["knn_classifier"]
    return function


def peak_memory() -> float:
    """Return the greatest memory of this process so far, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main(s: Settings) -> None:
    """Time k-NN, and the original's if it is there."""
    torch.set_num_threads(s.threads)
    data = features_of(s)
    before = peak_memory()
    start = time.perf_counter()
    ours = knn_accuracies(*data, ks=KS, chunk=s.chunk)
    seconds = time.perf_counter() - start
    print(f"torch {torch.__version__}, {s.threads} threads on {s.device}; {s}")
    print(f"k-NN, all k: {seconds:.1f} s, {peak_memory():.2f} GB ({before:.2f} GB before)")
    print("  " + ", ".join(f"k={k}: {accuracy:.2%}" for k, accuracy in ours.items()))
    if s.dino is None:
        return
    theirs = knn_classifier_of(s.dino)
    train, train_labels, test, test_labels = data
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    start = time.perf_counter()
    found = {k: theirs(train, train_labels, test, test_labels, k, 0.07)[0] / 100 for k in KS}
    seconds = time.perf_counter() - start
    print(f"facebookresearch/dino, all k: {seconds:.1f} s, {peak_memory():.2f} GB at most by now")
    print("  " + ", ".join(f"k={k}: {accuracy:.2%}" for k, accuracy in found.items()))
    print(f"greatest difference: {max(abs(ours[k] - found[k]) for k in KS):.2e}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
