"""Killed at random moments, a run that goes on ends with the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from maskdistill.training.checkpoint import latest_checkpoint
from tests.training.conftest import assert_same

ROOT = Path(__file__).parents[2]


def kill_runs(folder: Path, kills: int, **options: int) -> None:
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.training.kills",
            str(folder),
            "--kills",
            str(kills),
            *arguments,
        ],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},  # what has used CUDA cannot be forked
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["kills"] == kills
    assert seen["writing"] >= kills // 5, "many of them in the middle of a checkpoint"
    assert seen["kills"] - seen["writing"] >= kills // 5
    assert seen["none"] <= kills // 2, "most of them when something was to lose"
    assert 0 < seen["lost"] <= 3, "at most an interval between checkpoints"


def test_killed_10_times(tmp_path: Path) -> None:
    kill_runs(tmp_path, 10)


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_100_times(tmp_path: Path, workers: int) -> None:
    kill_runs(tmp_path, 100, seed=1, workers=workers)


RUN = """
import os, signal, sys
from pathlib import Path
import torch
import maskdistill as md
from maskdistill.training import Trainer, TrainingConfig
from maskdistill.training.checkpoint import choose_folder
from maskdistill.training.distributed import Agreement
from maskdistill.training.distributed import restarts, start_processes
from tests.training.conftest import TINY, Noise

torch.set_num_threads(1)
processes = start_processes("cpu")
policy = md.AsymmetricMaskPolicy(md.RandomMasker(0.5))
trainer = Trainer(TrainingConfig(**{**TINY, "batch_size": 2}), Noise(), policy, processes=processes)
agreement = Agreement(processes)
restart = any(count for (count,) in agreement.gather([restarts()]))
given = Path(sys.argv[2]) if len(sys.argv) > 2 else None
out, resume = agreement.by_main(lambda: choose_folder(given, "run", restart=restart))
real = trainer._run_step

def dying(crops):
    if (trainer.step, processes.rank, resume) == (5, 1, False) and sys.argv[1] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(crops)

trainer._run_step = dying
trainer.fit(out, resume=resume, progress_bar=False)
print("resumed", resume, flush=True)
"""


@pytest.mark.long
def test_torchrun_goes_on_after_a_process_dies(tmp_path: Path) -> None:
    """By itself, in the folder that it had chosen, to the same weights."""
    (tmp_path / "run.py").write_text(RUN)
    ends = []
    for name in ("live", "die"):
        (tmp_path / name).mkdir()
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
             "--max-restarts", "1", str(tmp_path / "run.py"), name],
            cwd=tmp_path / name,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"resumed {name == 'die'}" in done.stdout
        found = latest_checkpoint(tmp_path / name / "runs" / "run")
        ends.append({**found.content["student"], **found.content["objective"]})
    assert_same(*ends)


@pytest.mark.long
def test_nodes_find_each_other_again(tmp_path: Path) -> None:
    """Each counts its own restarts, and only one of them calls it a restart."""
    (tmp_path / "run.py").write_text(RUN)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "test",
        "--max-restarts", "1", str(tmp_path / "run.py"), "die", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {
        **os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # fmt: skip
    nodes = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    try:
        said = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert all("resumed True" in words for words in said)
    assert latest_checkpoint(tmp_path / "out").step == 12
