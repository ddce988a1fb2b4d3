"""How long k-NN takes, and how much memory.

    /usr/bin/time -v python examples/benchmarks/knn.py --threads 1
    python examples/benchmarks/knn.py --dino CLONE

Classifies 10,000 random features of 192 dimensions by 50,000 others, which takes as long as any.
With a clone of facebookresearch/dino, its own ``knn_classifier`` runs on the same features, and
what both find is compared.
"""

from __future__ import annotations

import argparse
import ast
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from maskdistill.evaluation.knn import knn_accuracies

KS = (10, 20, 100, 200)
BANK, QUERIES, WIDTH, CLASSES = 50_000, 10_000, 192, 100


def make_features() -> tuple[torch.Tensor, ...]:
    """Make features around the centres of classes, too near each other to be easy."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(CLASSES, WIDTH, generator=generator)
    made: list[torch.Tensor] = []
    for count in (BANK, QUERIES):
        labels = torch.arange(count) % CLASSES
        noise = torch.randn(count, WIDTH, generator=generator)
        made += [noise.mul_(4).add_(centers[labels]), labels]
    return tuple(made)


def knn_classifier_of(clone: Path) -> Callable[..., tuple[float, float]]:
    """Return the original's function, without importing the rest of its script."""
    tree = ast.parse((clone / "eval_knn.py").read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", "") == "knn_classifier"]
    namespace: dict[str, Any] = {"torch": torch}
    exec(compile(tree, str(clone / "eval_knn.py"), "exec"), namespace)
    function: Callable[..., tuple[float, float]] = namespace["knn_classifier"]
    return function


def report(name: str, find: Callable[[], dict[int, float]]) -> dict[int, float]:
    """Time a search for all k, and print what it found and the process's memory until then."""
    start = time.perf_counter()
    found = find()
    taken = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    accuracies = ", ".join(f"k={k}: {accuracy:.2%}" for k, accuracy in found.items())
    print(f"{name}: {taken:.1f} s, at most {memory:.2f} GB by now; {accuracies}")
    return found


def main() -> None:
    """Time k-NN, and the original's if it is there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--dino", type=Path, help="a clone of facebookresearch/dino")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train, train_labels, test, test_labels = data = make_features()
    ours = report("maskdistill", lambda: knn_accuracies(*data, ks=KS))
    if options.dino is not None:
        theirs = knn_classifier_of(options.dino)
        train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
        found = report(
            "facebookresearch/dino",
            lambda: {
                k: theirs(train, train_labels, test, test_labels, k, 0.07)[0] / 100 for k in KS
            },
        )
        print(f"greatest difference: {max(abs(ours[k] - found[k]) for k in KS):.2e}")


if __name__ == "__main__":
    main()
