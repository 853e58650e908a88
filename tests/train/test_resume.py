"""A run that is killed and started again ends with the same bits as one that was not."""

import os
import random
import signal
import time

import pytest
from run_processes import ENDLESS, children, ended, finish, same_bits, start, wait_for, write_config


@pytest.mark.long
@pytest.mark.parametrize("kind", ["mamba1", "mamba2", "mamba3"])
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


@pytest.mark.long  # test_pretrain.py does the same in its own process
@pytest.mark.parametrize("request_to_stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_request_saves_and_exits_cleanly(tmp_path, request_to_stop):
    write_config(tmp_path, "mamba2")
    process = start(tmp_path, "run", f"--train.steps={ENDLESS}")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert wait_for(process, lambda: (checkpoints / "10").exists()), process.stderr.read().decode()
    process.send_signal(request_to_stop)
    finish(process)
    assert 10 <= max(int(path.name) for path in checkpoints.iterdir()) < ENDLESS


@pytest.mark.long
def test_a_killed_data_worker_leaves_the_newest_state_saved(tmp_path):
    write_config(tmp_path, "mamba2")
    process = start(tmp_path, "run", f"--train.steps={ENDLESS}", "--checkpoint.every=500000")
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert wait_for(process, lambda: metrics.exists() and b'"step": 21,' in metrics.read_bytes())
    os.kill(children(process.pid)[0], signal.SIGKILL)
    (last,) = [line for line in ended(process, 1).splitlines() if line.startswith("error: ")]
    (step,) = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert step > 20 and f"step {step:,} is saved" in last and "data.num_workers" in last
