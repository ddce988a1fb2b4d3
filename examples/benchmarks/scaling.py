"""How the rate of training grows with the number of GPUs, from what a step and an all-reduce cost.

    torchrun --nproc-per-node 2 examples/benchmarks/scaling.py            # measures, and computes
    python examples/benchmarks/scaling.py --step-ms 180 --node-gbs 300 --network-gbs 40   # computes

Under ``torchrun`` it times a step of one process alone, the same step under DDP, and all-reduces of
several sizes, to which latency and bandwidth are fitted. What it then computes for 8, 64 and 512
GPUs is a model, not a measurement; how far it is off is shown for the processes that are there.

The model. A step takes S seconds alone, of which the backward pass is a share b. N processes, G of
them per node, average M bytes of gradients by a ring inside each node and rings between nodes:

    A(N) = 2 (g-1)/g M / B_node + 2 (n-1)/n M / (g B_net) + 2 (g-1) L_node + 2 (n-1) L_net

with g = min(N, G) and n = N / g nodes. DDP hides all of it behind the backward pass but the last
bucket (25 MB), so a step takes S + max(A - b S, A * 25 MB / M), and besides the all-reduce of the
centre, which nothing hides.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
import tyro
from timing import machine, table
from torch import Tensor

import maskdistill as md
from maskdistill.training import TrainingConfig, TrainState, train_step
from maskdistill.training.distributed import Processes, start_processes
from maskdistill.training.step import StepSettings
from maskdistill.training.trainer import build_state

BUCKET = 25e6
"""Bytes that DDP sends at a time."""
PER_NODE, BACKWARD = 8, 0.5
"""GPUs in a node; share of a step in which gradients can be sent, the student's backward pass."""
GLOBAL_BATCH = 1024
"""Images per step over all GPUs, for the second table."""
ROUNDS = 7
POLICY = md.AsymmetricMaskPolicy(md.RandomMasker(0.3))


@dataclass(frozen=True)
class Settings:
    """What to train, and what is known of the machines."""

    model: str = "vit_tiny_patch16_224"
    """A ViT by its name in timm."""
    image_size: int = 64
    """Pixels of a side of the two global crops."""
    local_size: int = 24
    """Pixels of a side of the local crops."""
    local_crops: int = 6
    """Local crops of each image."""
    patch_size: int = 8
    """Pixels of a side of a patch."""
    batch: int = 8
    """Images per step and process."""
    out_dim: int = 4096
    """Prototypes."""
    step_ms: float | None = None
    """Milliseconds of a step alone; None measures it here."""
    node_gbs: float | None = None
    """Gigabytes per second of an all-reduce inside a node; None takes what is measured here."""
    node_us: float | None = None
    """Microseconds of a hop inside a node; None takes what is measured here."""
    network_gbs: float = 40.0
    """Gigabytes per second between nodes, per node (400 Gbit/s and some loss). An assumption."""
    network_us: float = 10.0
    """Microseconds of a hop between nodes. An assumption."""


@dataclass(frozen=True)
class Costs:
    """What a step and its communication cost, in seconds and bytes."""

    step: float
    gradients: float
    centre: float
    node_rate: float
    node_hop: float
    network_rate: float
    network_hop: float

    def all_reduce(self, size: float, processes: int) -> float:
        """Return the seconds of an all-reduce of so many bytes."""
        inside = min(processes, PER_NODE)
        nodes = max(processes // inside, 1)
        return (
            2 * (inside - 1) / inside * size / self.node_rate
            + 2 * (nodes - 1) / nodes * size / (inside * self.network_rate / PER_NODE)
            + 2 * (inside - 1) * self.node_hop
            + 2 * (nodes - 1) * self.network_hop
        )

    def step_of(self, processes: int, share: float = 1.0) -> float:
        """Return the seconds of a step, whose own work is a share of the one measured."""
        if processes == 1:
            return self.step * share
        sending = self.all_reduce(self.gradients, processes)
        last = sending * min(BUCKET / self.gradients, 1)
        hidden = BACKWARD * self.step * share
        exposed = max(sending - hidden, last)
        return self.step * share + exposed + self.all_reduce(self.centre, processes)


def timed(call: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Return the median seconds of a call, the slowest process's."""
    taken = []
    for _ in range(rounds + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        if dist.is_initialized():
            dist.barrier()
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    longest = torch.tensor(median(taken[2:]), device=device)
    if dist.is_initialized():
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return float(longest)


def build(s: Settings, processes: Processes) -> TrainState:
    """Build the networks."""
    config = TrainingConfig(
        model=s.model,
        image_size=s.image_size,
        local_size=s.local_size,
        local_crops=s.local_crops,
        patch_size=s.patch_size,
        batch_size=s.batch,
        out_dim=s.out_dim,
    ).resolved(s.batch * 1000)
    return build_state(config, POLICY, processes)


def step_seconds(s: Settings, state: TrainState, processes: Processes) -> float:
    """Time a step."""
    half = torch.bfloat16 if processes.device.type == "cuda" else None
    settings = StepSettings(1e-4, 0.04, 0.996, 0.04, amp_dtype=half)
    sizes = [s.image_size] * 2 + [s.local_size] * s.local_crops
    crops = [torch.randn(s.batch, 3, size, size, device=processes.device) for size in sizes]
    state.student.train()
    return timed(lambda: train_step(state, crops, POLICY, settings), ROUNDS, processes.device)


def fit_all_reduce(processes: Processes) -> tuple[float, float]:
    """Return bytes per second and seconds per hop of the all-reduces of this machine."""
    small: Tensor = torch.zeros(1, device=processes.device)
    large = torch.zeros(16_000_000 // 4, device=processes.device)
    hops, world = 2 * (processes.world - 1), processes.world
    hop = timed(lambda: dist.all_reduce(small), 20 * ROUNDS, processes.device) / hops
    whole = timed(lambda: dist.all_reduce(large), ROUNDS, processes.device)
    return 2 * (world - 1) / world * 16e6 / max(whole - hops * hop, 1e-9), hop


def report(costs: Costs, batch: int) -> Iterator[str]:
    """Lay out the rates of many GPUs, with a fixed batch on each, and with one over all."""
    one = batch / costs.step_of(1)
    fixed, shared = [], []
    for gpus in (1, 8, 64, 512):
        rate = gpus * batch / costs.step_of(gpus)
        fixed.append((gpus, f"{rate:,.0f}", f"{rate / one / gpus:.0%}"))
        rate = GLOBAL_BATCH / costs.step_of(gpus, GLOBAL_BATCH / gpus / batch)
        shared.append((gpus, GLOBAL_BATCH // gpus, f"{rate:,.0f}", f"{rate / one / gpus:.0%}"))
    yield f"\n{batch} images per GPU, whatever their number\n"
    yield from table(("GPUs", "images/s", "of ideal"), fixed)
    yield f"\n{GLOBAL_BATCH} images over all GPUs\n"
    yield from table(("GPUs", "images per GPU", "images/s", "of ideal"), shared)


def main(s: Settings) -> None:
    """Measure what can be measured here, and compute the rest."""
    torch.set_num_threads(1)
    world = os.environ.pop("WORLD_SIZE", "1")  # alone means that not even the centre is shared
    alone = start_processes()
    state = build(s, alone)
    seconds = step_seconds(s, state, alone) if s.step_ms is None else s.step_ms / 1000
    os.environ["WORLD_SIZE"] = world
    processes = start_processes()
    parameters = [p for p in state.student.parameters() if p.requires_grad]
    rate, hop = 50e9, 5e-6  # without a peer to measure: one GPU's share of a fast link
    if processes.world > 1:
        rate, hop = fit_all_reduce(processes)
    costs = Costs(
        step=seconds,
        gradients=4.0 * sum(p.numel() for p in parameters),
        centre=4.0 * s.out_dim,
        node_rate=rate if s.node_gbs is None else s.node_gbs * 1e9,
        node_hop=hop if s.node_us is None else s.node_us / 1e6,
        network_rate=s.network_gbs * 1e9,
        network_hop=s.network_us / 1e6,
    )
    if processes.world > 1:
        together = step_seconds(s, build(s, processes), processes)
    if processes.is_main:
        where = "measured" if s.step_ms is None else "given"
        print(machine(processes.device.type), s, sep="\n", end="\n\n")
        print(
            f"a step alone, {where}: {1000 * costs.step:.1f} ms; "
            f"{costs.gradients / 1e6:.0f} MB of gradients"
        )
        print(
            f"an all-reduce inside a node: {costs.node_rate / 1e9:.2f} GB/s, "
            f"{1e6 * costs.node_hop:.0f} us a hop"
        )
        if processes.world > 1:
            print(
                f"{processes.world} processes: a step of {1000 * together:.1f} ms measured, "
                f"{1000 * costs.step_of(processes.world):.1f} ms by the model"
            )
        print(*report(costs, s.batch), sep="\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
