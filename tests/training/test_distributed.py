"""Several processes, or several parts of a batch, make the step of one process.

One pair of gloo processes does everything, since starting them takes longest.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor

import maskdistill as md
from maskdistill.training import Trainer, TrainingConfig, latest_checkpoint, train_step
from maskdistill.training.checkpoint import restore_state, state_content
from maskdistill.training.distributed import Processes, can_shard_on_cpu, gathered, is_sharded
from maskdistill.training.job import JobConfig, run_job
from maskdistill.training.logging import PREFIX, read_metrics
from tests.training.conftest import TINY, Noise, assert_same, weights

Build = Callable[..., Trainer]
STEPS = 10
RUNS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, accumulated": {"accumulate": 2},
    "fsdp": {"sharding": "fsdp"},
    "fsdp, accumulated": {"sharding": "fsdp", "accumulate": 2},
    "sinkhorn": {"centering": "sinkhorn_knopp"},
    "ibot": {"objective": "dino+ibot", "sharding": "fsdp", "accumulate": 2},
    "ibot, sinkhorn, own head": {
        "objective": "dino+ibot",
        "centering": "sinkhorn_knopp",
        "patch_head": "own",
    },
    "msn": {"objective": "msn"},
}
# Settings that change the result; the others change how it is computed.
OF_THE_RESULT = {"centering", "objective", "patch_head"}
if not can_shard_on_cpu():
    RUNS = {name: changes for name, changes in RUNS.items() if "sharding" not in changes}
sharded = pytest.mark.skipif(not can_shard_on_cpu(), reason="this torch shards on GPUs alone")


def trained(processes: Processes, policy: md.ViewPolicy | None = None, **changes: Any) -> Trainer:
    """Train for ten steps on eight images a step, over all processes."""
    settings = {**TINY, "drop_path": 0.0, "epochs": 20, **changes}
    settings["batch_size"] = 8 // processes.world
    if policy is None:  # no draw, so that all processes hide the same
        still = md.masking.CheckerboardMasker(random=False)
        policy = md.ViewPolicy(student_global=still if "objective" in changes else None)
    trainer = Trainer(TrainingConfig(**settings), Noise(), policy, processes=processes)
    for step, crops in zip(range(STEPS), trainer._batches(), strict=False):
        trainer.step = step
        trainer._run_step(crops)
    return trainer


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Return all weights and the centre, gathered from where they are spread."""
    found: dict[str, Tensor] = gathered(weights(trainer))
    return found


def masks_of(trainer: Trainer) -> list[Tensor]:
    """Return the masks that a rank draws in two steps."""
    seen: list[Tensor] = []
    backbone = trainer.state.student_net.backbone
    backbone.register_forward_pre_hook(
        lambda module, inputs: None if inputs[1] is None else seen.append(inputs[1].mask)
    )
    for step, crops in zip(range(2), trainer._batches(), strict=False):
        trainer.step = step
        trainer._run_step(crops)
    return seen


def work(rank: int, folder: str) -> None:
    """Do all runs in one of two processes; the first writes down what came out."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    processes = Processes(rank, 2, torch.device("cpu"))
    for name, changes in RUNS.items():
        trainer = trained(processes, **changes)
        found = everything(trainer)
        if rank == 0:
            torch.save(found, Path(folder) / f"{name}.pt")
        if name == "fsdp":
            resharded(trainer, folder)
    policy = md.AsymmetricMaskPolicy(md.RandomMasker(0.5))
    config = TrainingConfig(**{**TINY, "batch_size": 4})
    for attempt in range(2):
        trainer = Trainer(config, Noise(), policy, processes=processes)
        torch.save(masks_of(trainer), Path(folder) / f"masks {rank} {attempt}.pt")
    jobs(rank, folder)
    dist.destroy_process_group()


def jobs(rank: int, folder: str) -> None:
    """Run the main job: attention guides the masks, all judge, and weights may be spread."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    for sharding in ("ddp", "fsdp") if can_shard_on_cpu() else ("ddp",):
        settings = {**TINY, "max_steps": 2, "sharding": sharding, "drop_path": 0.0}
        run_job(
            JobConfig(
                **settings,
                masker="AttentionGuidedMasker(0.5)",
                scenes=33,
                knn_train=22,
                knn_val=5,  # an odd number, so that the shares differ
                evaluations=0,
                out=Path(folder) / sharding,
            )
        )


def resharded(trainer: Trainer, folder: str) -> None:
    """Load the gathered state of a sharded run into a fresh one, and go on with both."""
    state = trainer.state
    assert is_sharded(state.student_net.parameters())
    assert is_sharded(state.teacher.parameters())
    content = state_content(state)
    file = Path(folder) / "content.pt"
    if trainer.processes.rank == 0:
        assert not is_sharded(content["student"].values())
        torch.save(content, file)
    else:  # what does not fit one process is not gathered into each
        assert content["student"]["backbone.cls_token"] is None
    dist.barrier()
    content = torch.load(file)
    again = Trainer(trainer.config, Noise(), trainer.policy, processes=trainer.processes)
    restore_state(again.state, content)
    crops = [torch.randn(4, 3, 16, 16) for _ in range(2)] + [torch.randn(4, 3, 8, 8)]
    for one in (trainer, again):
        train_step(one.state, crops, one.policy, one.settings(STEPS))
    for name, one in (("going on", trainer), ("resumed", again)):
        found = everything(one)
        if trainer.processes.rank == 0:
            torch.save(found, Path(folder) / f"{name}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (str(path),), nprocs=2)
    return path


def alone(**changes: Any) -> dict[str, Tensor]:
    return everything(trained(Processes(0, 1, torch.device("cpu")), **changes))


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_make_the_step_of_one(folder: Path, name: str) -> None:
    one = alone(**{k: v for k, v in RUNS[name].items() if k in OF_THE_RESULT})
    two = torch.load(folder / f"{name}.pt")
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-5, msg=key)


def test_masks_differ_by_rank_and_can_be_repeated(folder: Path) -> None:
    def masks(rank: int, attempt: int) -> Tensor:
        return torch.stack(torch.load(folder / f"masks {rank} {attempt}.pt"))

    assert masks(0, 0).shape == (2, 8, 16)
    assert torch.equal(masks(0, 0), masks(0, 1))
    assert torch.equal(masks(1, 0), masks(1, 1))
    assert not torch.equal(masks(0, 0), masks(1, 0))
    assert not torch.equal(masks(0, 0)[0], masks(0, 0)[1])


@sharded
def test_the_job_is_the_same_however_weights_lie(folder: Path) -> None:
    summaries = [
        json.loads((folder / name / "summary.json").read_text()) for name in ("ddp", "fsdp")
    ]
    ddp, fsdp = (latest_checkpoint(folder / name).content for name in ("ddp", "fsdp"))
    assert ddp["step"] == fsdp["step"] == 2
    for role in ("student", "teacher"):
        assert ddp[role].keys() == fsdp[role].keys()
        for key, value in ddp[role].items():
            torch.testing.assert_close(fsdp[role][key], value, rtol=0, atol=1e-5)
    for key in ("knn", "knn_random_init", "knn_train_images", "processes"):
        assert summaries[0][key] == summaries[1][key]
    lines = [read_metrics(folder / name / "metrics.jsonl") for name in ("ddp", "fsdp")]
    signs = [{k: v for k, v in line[0].items() if k.startswith(PREFIX)} for line in lines]
    assert f"{PREFIX}masked_loss" in signs[0]
    assert signs[1] == pytest.approx(signs[0], abs=1e-4), "all processes looked"
    one, two = (load_file(folder / name / "backbone.safetensors") for name in ("ddp", "fsdp"))
    assert one.keys() == two.keys()


@sharded
def test_a_sharded_state_can_be_put_back(folder: Path) -> None:
    assert_same(torch.load(folder / "resumed.pt"), torch.load(folder / "going on.pt"))


@pytest.mark.parametrize(
    ("policy", "objective"),
    [
        (md.ViewPolicy.symmetric(md.RandomMasker(md.Uniform(0.1, 0.7))), "dino"),
        (md.AsymmetricMaskPolicy(md.AttentionGuidedMasker(0.5, temperature=0.1)), "dino"),
        (md.AsymmetricMaskPolicy(md.BlockMasker(0.4).sometimes(0.5)), "dino+ibot"),
    ],
    ids=["random", "attention", "patches"],
)
def test_parts_of_a_batch_make_its_step(policy: md.ViewPolicy, objective: str) -> None:
    """Masks, the centres and the average are the whole batch's."""
    processes = Processes(0, 1, torch.device("cpu"))
    whole = trained(processes, policy, objective=objective)
    split = trained(processes, policy, objective=objective, accumulate=4)
    for key, value in everything(whole).items():
        torch.testing.assert_close(everything(split)[key], value, rtol=0, atol=1e-5, msg=key)


def test_parts_must_be_equal(build: Build) -> None:
    with pytest.raises(ValueError, match=r"multiple of accumulate \(3\)"):
        build(accumulate=3)
    trainer = build()
    settings = dataclasses.replace(trainer.settings(0), accumulate=3)
    crops = [torch.zeros(4, 3, 16, 16)] * 2
    with pytest.raises(ValueError, match="4 images does not divide into accumulate=3"):
        train_step(trainer.state, crops, trainer.policy, settings)
    for objective in ("dino+koleo", "msn"):
        with pytest.raises(ValueError, match="compares the images of a whole batch"):
            build(accumulate=2, objective=objective)
    with pytest.raises(ValueError, match="sharding must be one of"):
        build(sharding="zero")
