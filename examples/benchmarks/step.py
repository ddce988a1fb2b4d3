"""How fast a training step is, beside facebookresearch/dino's own.

    git clone https://github.com/facebookresearch/dino CLONE
    python examples/benchmarks/step.py --dino CLONE
    python examples/benchmarks/step.py --dino CLONE --device cuda --image-size 224 --local-size 96

Both train the same ViT, head and crops with the same optimiser; the original's step is its own
``train_one_epoch``, unmodified, over one batch at a time. All variants run by turns in one process,
and what counts is the ratio of medians. On a GPU the original runs in float16, its default there,
and the model's floating-point operations per second are set against the rate that a large matrix
product reaches on that device.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro
from timing import by_turns, faster, machine, main_dino_of, seconds, table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import maskdistill as md
from maskdistill.training import StepSettings, TrainingConfig, train_step
from maskdistill.training.distributed import Processes
from maskdistill.training.trainer import build_state

sys.path.append(str(Path(__file__).parents[1]))
from recipe_dino import COMMIT
from recipe_dino_shim import without_cuda, without_network

THREADS = 2


@dataclass(frozen=True)
class Settings:
    """What to time, and how."""

    dino: Path
    """A clone of facebookresearch/dino."""
    model: Literal["tiny", "small", "base"] = "tiny"
    """Size of the ViT."""
    image_size: int = 64
    """Pixels of a side of the two global crops."""
    local_size: int = 24
    """Pixels of a side of the local crops."""
    local_crops: int = 6
    """Local crops of each image."""
    patch_size: int = 8
    """Pixels of a side of a patch."""
    batch: int = 32
    """Images per step."""
    out_dim: int = 4096
    """Prototypes."""
    rounds: int = 15
    """How often each variant is timed, by turns."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    compile: bool = False
    """Time compiled blocks as well."""


Step = Callable[[Sequence[Tensor]], object]


class _Alone(nn.Module):
    """Stands for the original's DDP wrapper, without its cost."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, crops: Sequence[Tensor]) -> Any:
        return self.module(crops)


def original(s: Settings) -> Step:
    """Return the original's own step."""
    sys.path.insert(0, str(main_dino_of(s.dino).parent))
    import main_dino  # type: ignore[import-not-found]
    import utils  # type: ignore[import-not-found]
    import vision_transformer as vits  # type: ignore[import-not-found]

    build, size = getattr(vits, f"vit_{s.model}"), {"patch_size": s.patch_size}
    student = build(**size, img_size=[s.image_size], drop_path_rate=0.1)
    teacher = build(**size, img_size=[s.image_size])
    width = student.embed_dim
    student = _Alone(utils.MultiCropWrapper(student, vits.DINOHead(width, s.out_dim)))
    teacher = utils.MultiCropWrapper(teacher, vits.DINOHead(width, s.out_dim))
    student, teacher = student.to(s.device), teacher.to(s.device)
    teacher.load_state_dict(student.module.state_dict())
    teacher.requires_grad_(False)
    loss = main_dino.DINOLoss(s.out_dim, 2 + s.local_crops, 0.04, 0.04, 0, 2).to(s.device)
    optimizer = torch.optim.AdamW(utils.get_params_groups(student))
    scaler = torch.cuda.amp.GradScaler() if s.device == "cuda" else None
    arguments = Namespace(epochs=2, clip_grad=3.0, freeze_last_layer=1)
    schedules = [1e-4, 1e-4], [0.04, 0.04], [0.996, 0.996]

    def step(crops: Sequence[Tensor]) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a line per epoch
            main_dino.train_one_epoch(
                student, teacher, teacher, loss, [(crops, 0)], optimizer, *schedules, 1, scaler,
                arguments,
            )  # fmt: skip

    return step


def ours(
    s: Settings,
    precision: Literal["float32", "bfloat16"],
    drop: float = 0.0,
    compiled: bool = False,
) -> Step:
    """Return our step, of the same networks."""
    config = TrainingConfig(
        model=f"vit_{s.model}_patch16_224",
        image_size=s.image_size,
        local_size=s.local_size,
        local_crops=s.local_crops,
        patch_size=s.patch_size,
        batch_size=s.batch,
        out_dim=s.out_dim,
        apply="drop" if drop else "token",
        precision=precision,
        device=s.device,
        compile=compiled,
    ).resolved(s.batch * 100)
    policy = md.AsymmetricMaskPolicy(md.RandomMasker(drop)) if drop else md.ViewPolicy.none()
    state = build_state(config, policy, Processes(0, 1, torch.device(s.device)))
    state.student.train()
    settings = StepSettings(
        lr=1e-4,
        weight_decay=0.04,
        momentum=0.996,
        teacher_temp=0.04,
        amp_dtype=torch.bfloat16 if precision == "bfloat16" else None,
    )
    return lambda crops: train_step(state, crops, policy, settings)


def variants(s: Settings) -> dict[str, Step]:
    """Return all that is timed; the first is what the others are compared to."""
    steps = {
        "the original": original(s),
        "float32": ours(s, "float32"),
        "bfloat16": ours(s, "bfloat16"),
        "bfloat16, half of the student's global tokens dropped": ours(s, "bfloat16", drop=0.5),
    }
    if s.compile:
        steps["float32, compiled"] = ours(s, "float32", compiled=True)
        steps["bfloat16, compiled"] = ours(s, "bfloat16", compiled=True)
    return steps


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Return the operations per second of a large matrix product, the best of ten."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(10))


def main(s: Settings) -> None:
    """Time all variants and print a table."""
    torch.set_num_threads(THREADS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    dist.init_process_group("nccl" if s.device == "cuda" else "gloo", rank=0, world_size=1)
    without_network()
    if s.device == "cpu":
        without_cuda()
    torch.manual_seed(0)
    sizes = [s.image_size] * 2 + [s.local_size] * s.local_crops
    crops = [torch.randn(s.batch, 3, size, size, device=s.device) for size in sizes]
    steps = variants(s)
    for step in steps.values():
        for _ in range(2):
            step(crops)
    with FlopCounterMode(display=False) as counter:
        steps["the original"](crops)
    operations = counter.get_total_flops()
    rates = {dtype: matrix_rate(s.device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    taken = by_turns(
        {name: partial(seconds, partial(step, crops), s.device) for name, step in steps.items()},
        s.rounds,
    )

    print(machine(s.device), s, sep="\n")
    print(f"original: commit {COMMIT[:7]} expected; {operations / 1e9:.0f} GFLOP in a step\n")
    rows = []
    for name, times in taken.items():
        half = name.startswith("bfloat16") or (name == "the original" and s.device == "cuda")
        share = operations / median(times) / rates[torch.bfloat16 if half else torch.float32]
        rows.append((
            name, *faster(taken["the original"], times), f"{s.batch / median(times):.0f}",
            "" if "dropped" in name else f"{share:.0%}",
        ))  # fmt: skip
    head = ("step", "ratio", "quartiles", "images/s", "FLOP/s, share of a matrix product's")
    print(*table(head, rows), sep="\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
