"""Runs a script that was written for CUDA, such as facebookresearch/dino's, on a CPU.

    torchrun --nproc-per-node 1 examples/recipe_dino_shim.py CLONE/main_dino.py ARGUMENTS...

No part of the recipe: ``recipe_dino.py`` starts the original through this file only where there is
no CUDA device, so that the recipe can be tried there, or no network. The original stays as it is;
what it calls in torch is replaced before it starts, all but the last two only without a device:

- ``.cuda()``, ``torch.cuda.set_device`` and ``torch.cuda.synchronize`` do nothing; ``"cuda"`` as
  a device is the CPU;
- process groups are of gloo instead of NCCL, and DDP gets no ``device_ids``;
- batch norms are not synchronised, which no ViT has;
- ``torch.hub.list``, by which the original asks the network for the names of XCiT, lists nothing;
- Python's ``random``, which the original does not seed, starts from 0: runs can be compared.
"""

from __future__ import annotations

import random
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # before anything is replaced: it looks torch's functions up by their names
import torch.distributed as dist
from torch import nn


def without_cuda() -> None:
    """Replace what needs a CUDA device, in this process and for good."""
    tensor = torch.tensor
    init_process_group = dist.init_process_group
    data_parallel = nn.parallel.DistributedDataParallel

    def stay(self: Any, *_: Any, **__: Any) -> Any:
        return self

    def nothing() -> Any:  # a new one each time: torch.compile files functions by identity
        return lambda *_, **__: None

    def tensor_here(*values: Any, **settings: Any) -> torch.Tensor:
        if str(settings.get("device", "")).startswith("cuda"):
            settings["device"] = "cpu"
        return tensor(*values, **settings)

    def init_gloo(*_: Any, backend: str = "gloo", **settings: Any) -> None:
        init_process_group(backend="gloo", **settings)

    def parallel(module: nn.Module, device_ids: Any = None, **settings: Any) -> nn.Module:
        return data_parallel(module, **settings)

    replacements: list[tuple[Any, str, Any]] = [
        (torch.Tensor, "cuda", stay),
        (nn.Module, "cuda", stay),
        (torch.cuda, "set_device", nothing()),
        (torch.cuda, "synchronize", nothing()),
        (torch, "tensor", tensor_here),
        (dist, "init_process_group", init_gloo),
        (nn.parallel, "DistributedDataParallel", parallel),
        (nn.SyncBatchNorm, "convert_sync_batchnorm", stay),
    ]
    for owner, name, replacement in replacements:
        setattr(owner, name, replacement)


def without_network() -> None:
    """Let ``torch.hub.list`` list nothing, in this process and for good."""

    def nothing(*_: Any, **__: Any) -> list[str]:
        return []

    torch.hub.list = nothing


def main(script: Path, arguments: list[str]) -> None:
    """Run a script as if it had been started itself, without what is missing here."""
    if not torch.cuda.is_available():
        without_cuda()
    without_network()
    random.seed(0)
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("give the script to run, and its arguments")
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
