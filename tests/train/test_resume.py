"""A run that is killed and started again ends with the same bits as one that was not."""

import dataclasses
import os
import random
import resource
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


def start(folder: Path, name: str, *more: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "biomamba_jax.pretrain", "--config", "config.yaml", "--run_dir", name, *more]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, **streams, **options)


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


def same_bits(whole: Path, survivor: Path) -> None:
    metrics = [(run / "metrics.jsonl").read_bytes() for run in (whole, survivor)]
    assert metrics[0] == metrics[1]
    states = [final_state(run) for run in (whole, survivor)]
    for ours, theirs in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(ours, theirs)


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

    same_bits(tmp_path / "whole", tmp_path / "killed")


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


STORM = ["--data.num_workers=2", "--train.accumulation=2", "--checkpoint.keep_best=true", "--checkpoint.keep_last=3"]


def children(pid: int) -> list[int]:
    """Data workers: the processes that `pid` spawned."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            command = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == pid and b"spawn_main" in command:
            found.append(int(status.parent.name))
    return found


def ended(process: subprocess.Popen, *statuses: int) -> str:
    _, errors = process.communicate(timeout=120)
    assert process.returncode in statuses and b"Traceback" not in errors, errors.decode()[-3000:]
    return errors.decode()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_a_storm_of_kills_and_signals_at_random_moments_changes_no_bit(tmp_path, kind):
    """SIGKILL of the run, SIGTERM and SIGINT to its process group, and SIGKILL of a data worker, 30, 10 and 10 times.

    The moments cover start-up, compilation, evaluation and saving.
    """
    write_config(tmp_path, kind)
    other = write_shards(tmp_path / "other", seed=1)
    mixture = f"{{a: {{path: {tmp_path / 'shards'}, weight: 3}}, b: {{path: {other}}}}}"
    settings = [*STORM, f"--data.mixture.sources={mixture}"]
    finish(start(tmp_path, "whole", *settings))

    draw = random.Random(kind)
    blows = ["kill"] * 30 + ["group"] * 10 + ["worker"] * 10
    draw.shuffle(blows)
    for blow in blows:
        process = start(tmp_path, "storm", *settings, start_new_session=True)
        if blow == "worker":
            wait_for(process, lambda: len(children(process.pid)) == 2)  # noqa: B023
        deadline = time.monotonic() + draw.uniform(0, 12 if blow == "kill" else 4) + 4 * (blow == "group")
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if process.poll() is not None:  # it was done before
            ended(process, 0)
            continue
        if blow == "kill":
            process.kill()
            ended(process, -signal.SIGKILL)
        elif blow == "group":
            number = draw.choice([signal.SIGTERM, signal.SIGINT])
            os.killpg(process.pid, number)
            ended(process, 0, 128 + number, -number)
        elif victims := children(process.pid):
            os.kill(draw.choice(victims), signal.SIGKILL)
            errors = ended(process, 0, 1)
            assert process.returncode == 0 or "give a smaller data.num_workers" in errors
    finish(start(tmp_path, "storm", *settings))
    same_bits(tmp_path / "whole", tmp_path / "storm")


@pytest.mark.slow
def test_a_killed_data_worker_leaves_the_newest_state_saved(tmp_path):
    write_config(tmp_path, "mamba2")
    process = start(tmp_path, "run", f"--train.steps={ENDLESS}", "--checkpoint.every=500000")
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert wait_for(process, lambda: metrics.exists() and b'"step": 21,' in metrics.read_bytes())
    os.kill(children(process.pid)[0], signal.SIGKILL)
    (last,) = [line for line in ended(process, 1).splitlines() if line.startswith("error: ")]
    (step,) = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert step > 20 and f"step {step:,} is saved" in last and "data.num_workers" in last


@pytest.mark.long
def test_a_full_disk_ends_a_run_with_the_remedy_and_the_same_command_goes_on_to_the_same_bits(tmp_path):
    """A limit on the size of files stands for the disk: writing fails in the same calls.

    tensorstore prints tracebacks of its own callbacks before the last line.
    """
    write_config(tmp_path, "mamba2")
    finish(start(tmp_path, "whole"))
    limit = 20_000  # bytes: room for the settings and the metrics, not for the arrays of a checkpoint or the report
    process = start(
        tmp_path, "full", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    )
    last = process.communicate(timeout=120)[1].decode().splitlines()[-1]
    assert process.returncode == 1
    assert "full: cannot be written (File too large); free space" in last
    finish(start(tmp_path, "full"))
    same_bits(tmp_path / "whole", tmp_path / "full")
