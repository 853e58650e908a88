"""Training runs as processes of their own, which tests kill and start again, and the comparison of what they leave."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
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

ROOT = Path(__file__).parents[1]
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
    (folder / "config.yaml").write_text(to_yaml(config))


def start(folder: Path, name: str, *more: str, **options) -> subprocess.Popen:
    """`pretrain` of the config in `folder`."""
    return command(folder, "pretrain", "--config", "config.yaml", "--run_dir", name, *more, **options)


def command(folder: Path, name: str, *arguments: str | Path, env: dict[str, str] | None = None, **options):
    """A command of the package, started in `folder`."""
    words = [sys.executable, "-m", f"biomamba_jax.{name}", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | (env or {})
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, cwd=folder, env=environment, **streams, **options)


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


def final_state(run: Path, step: int):
    with ocp.CheckpointManager(run.absolute() / "checkpoints") as manager:
        assert manager.latest_step() == step
        return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]


def same_bits(whole: Path, survivor: Path, step: int = STEPS) -> None:
    metrics = [(run / "metrics.jsonl").read_bytes() for run in (whole, survivor)]
    assert metrics[0] == metrics[1]
    states = [final_state(run, step) for run in (whole, survivor)]
    for ours, theirs in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    """Return what an ended process wrote to standard error; checks its status, and that there is no traceback."""
    _, errors = process.communicate(timeout=120)
    assert process.returncode in statuses and b"Traceback" not in errors, errors.decode()[-3000:]
    return errors.decode()


def refused(process: subprocess.Popen, *also: int) -> str:
    """The last line of a command that failed, its only one of an error; "" if it ended with a status of `also`."""
    lines = ended(process, 1, *also).splitlines()
    if process.returncode in also:
        return ""
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], "\n".join(lines)
    return lines[-1]
