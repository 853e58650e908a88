"""A run that is killed and started again ends with the same bits as one that was not."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from synthetic import write_shards

from biomamba_jax.command_line import to_yaml
from biomamba_jax.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TrainConfig,
)

STEPS = 100
ENDLESS = 10**6


def write_config(folder: Path, kind: str) -> None:
    shards = write_shards(folder / "shards")
    config = PretrainConfig(
        run_dir="run",
        model=ModelConfig(kind=kind, d_model=32, n_layers=2, d_state=8, headdim=16),
        data=DataConfig(path=str(shards), sequence_length=64, batch_size=4, num_workers=1),
        optimizer=OptimizerConfig(learning_rate=3e-3, ema=0.9),
        train=TrainConfig(steps=STEPS, log_every=7, eval_every=10),
        checkpoint=CheckpointConfig(every=10),
        tensorboard=False,
    )
    fields = dataclasses.asdict(config)
    assert fields["run_dir"] == "run"
    (folder / "config.yaml").write_text(to_yaml(config))


def start(folder: Path, name: str, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "biomamba_jax.pretrain", "--config", "config.yaml", "--run_dir", name, *more]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


def wait_for(process: subprocess.Popen, happened) -> bool:
    """False if the process ended first."""
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if happened():
            return True
        time.sleep(0.001)
    return False


def final_state(run: Path):
    with ocp.CheckpointManager(run.absolute() / "checkpoints") as manager:
        assert manager.latest_step() == STEPS
        return manager.restore(STEPS, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("mamba1", marks=pytest.mark.long), "mamba2"])
def test_a_run_killed_at_random_moments_gives_the_same_parameters_and_metrics(tmp_path, kind):
    write_config(tmp_path, kind)
    finish(start(tmp_path, "whole"))

    # SIGKILL once at a random moment of training, and once while a checkpoint is being written.
    checkpoints = tmp_path / "killed" / "checkpoints"
    moment = random.Random(kind).uniform(0, 0.5)
    process = start(tmp_path, "killed")
    assert wait_for(process, lambda: (checkpoints / "10").exists()), process.stderr.read().decode()
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = set(checkpoints.iterdir())
    process = start(tmp_path, "killed")
    assert wait_for(process, lambda: set(checkpoints.glob("*.orbax-checkpoint-tmp")) - before), "no further checkpoint"
    process.send_signal(signal.SIGKILL)
    process.wait()
    finish(start(tmp_path, "killed"))

    metrics = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("whole", "killed")]
    assert metrics[0] == metrics[1]
    states = [final_state(tmp_path / run) for run in ("whole", "killed")]
    for ours, theirs in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("request_to_stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_request_saves_and_exits_cleanly(tmp_path, request_to_stop):
    write_config(tmp_path, "mamba2")
    process = start(tmp_path, "run", f"--train.steps={ENDLESS}")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert wait_for(process, lambda: (checkpoints / "10").exists()), process.stderr.read().decode()
    process.send_signal(request_to_stop)
    finish(process)
    assert 10 <= max(int(path.name) for path in checkpoints.iterdir()) < ENDLESS
