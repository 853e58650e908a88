"""Several processes, as several hosts would run them, train as one does, end together, and hand over to any number."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from synthetic import write_shards

import biomamba_jax
from biomamba_jax.interop import read_model
from biomamba_jax.parallel.distributed import STOPPED
from biomamba_jax.train.metrics import read_metrics

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
ENDS_WITHIN = 60
"""Seconds after the death of one process in which all others have ended; much of it is waiting for a busy machine."""


def settings(folder: Path, steps: int, **more: object) -> list[str]:
    fixed = (
        f"--data.path={folder / 'shards'} --data.sequence_length=32 --data.batch_size=8 --data.num_workers=0 "
        "--model.kind=mamba2 --model.d_model=16 --model.n_layers=2 --model.headdim=8 --model.d_state=4 "
        f"--optimizer.learning_rate=1e-2 --train.log_every=1 --train.steps={steps} --tensorboard=false"
    ).split()
    return fixed + [f"--{key}={value}" for key, value in more.items()]


def start(
    count: int,
    arguments: list[str],
    *of_the_last: str,
    folder: Path = ROOT,
    another: Path | None = None,
    code: Path = ROOT,
) -> list[subprocess.Popen]:
    """`count` processes that train together in a folder; the last one has arguments, folder and code of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    running = []
    for index in range(count):
        joined = []
        if count > 1:
            joined = [f"--distributed.coordinator=localhost:{port}", f"--distributed.processes={count}"]
            joined += [f"--distributed.process_id={index}", "--distributed.heartbeat_timeout=10"]
        last = index == count - 1
        environment = os.environ | {"PYTHONPATH": str(code if last else ROOT), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "biomamba_jax.pretrain", *arguments, *joined, *(of_the_last if last else ())]
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        running.append(
            subprocess.Popen(command, env=environment, cwd=another if last and another else folder, **streams)
        )
    return running


def finish(running: list[subprocess.Popen], status: int = 0) -> None:
    errors = [process.communicate(timeout=400)[1].decode()[-3000:] for process in running]
    assert [process.returncode for process in running] == [status] * len(running), "\n".join(errors)


def wait_for(path: Path, running: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in running), running[0].stderr.read().decode()[-3000:]
        time.sleep(0.05)


def same_metrics(run: Path, expected: Path) -> None:
    lines = [[line for line in read_metrics(folder) if line["split"] == "train"] for folder in (run, expected)]
    assert len(lines[0]) == len(lines[1]) > 0
    for got, want in zip(*lines, strict=True):
        assert (got["step"], got["tokens"]) == (want["step"], want["tokens"])
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)


def final_state(run: Path) -> dict:
    step = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # whatever devices saved it
    handlers = {"state": ocp.StandardCheckpointHandler()}
    with ocp.CheckpointManager((run / "checkpoints").absolute(), item_handlers=handlers) as manager:
        saved = manager.item_metadata(step)["state"]
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), saved)
        return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))["state"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A folder with shards and the run of one process."""
    folder = tmp_path_factory.mktemp("processes")
    write_shards(folder / "shards")
    finish(start(1, settings(folder, 12, run_dir=folder / "one")))
    return folder


@pytest.mark.parametrize(("count", "mesh"), [(2, {}), (4, {"mesh.fsdp": 2}), (4, {"mesh.data": 1, "mesh.sequence": 4})])
def test_several_processes_report_the_metrics_of_one(alone, tmp_path, count, mesh):
    finish(start(count, settings(alone, 12, run_dir=tmp_path / "run", **mesh)))
    same_metrics(tmp_path / "run", alone / "one")
    read, saved = read_model(tmp_path / "run").params, final_state(tmp_path / "run")["params"]
    jax.tree.map(np.testing.assert_array_equal, read, saved)  # a run directory like any other


def test_the_checkpoint_of_four_processes_goes_on_in_one_and_then_in_two_where_it_stopped(alone, tmp_path):
    # train.steps only says where each of them stops: the learning rate does not depend on it.
    same = {"schedule.kind": "constant", "schedule.warmup_fraction": 0}
    for count, steps, mesh in ((4, 4, {"mesh.fsdp": 4, "mesh.data": 1}), (1, 8, {}), (2, 12, {"mesh.tensor": 2})):
        finish(start(count, settings(alone, steps, run_dir=tmp_path / "run", **same, **mesh)))
    finish(start(1, settings(alone, 12, run_dir=tmp_path / "one", **same)))
    same_metrics(tmp_path / "run", tmp_path / "one")


@pytest.mark.parametrize(("count", "kills"), [(2, 1), (2, 4), (4, 5)])
def test_when_one_process_is_killed_at_any_moment_the_others_end_with_a_reason_and_a_restart_is_exact(
    alone, tmp_path, count, kills
):
    arguments = [*settings(alone, 60, **{"checkpoint.every": 3}), "--distributed.start_timeout=20"]
    begun = time.monotonic()
    finish(start(count, [*arguments, f"--run_dir={tmp_path / 'whole'}"]))
    seconds, draw, run = time.monotonic() - begun, random.Random(10 * count + kills), tmp_path / "killed"
    while kills:
        running = start(count, [*arguments, f"--run_dir={run}"])
        time.sleep(draw.uniform(0, seconds))
        if any(process.poll() is not None for process in running):  # from the beginning
            finish(running)
            shutil.rmtree(run)
            continue
        kills -= 1
        killed = running.pop(draw.randrange(count))
        killed.kill()
        died = time.monotonic()
        for process in running:
            errors = process.communicate(timeout=ENDS_WITHIN + died - time.monotonic())[1].decode()
            assert "Traceback" not in errors, errors[-3000:]
            if process.returncode == -signal.SIGABRT:  # by JAX's runtime, which was starting or lost process 0
                assert "another task died" in errors
            else:
                assert process.returncode == 1
                assert re.match(r"error: process \d of \d (lost|exits|failed)", errors.splitlines()[-1]), errors[-3000:]
        print(f"ended after {time.monotonic() - died:.1f} s:", errors[:300])
        killed.communicate()
    finish(start(count, [*arguments, f"--run_dir={run}"]))
    metrics = [(each / "metrics.jsonl").read_bytes() for each in (tmp_path / "whole", run)]
    assert metrics[0] == metrics[1]
    states = [final_state(each) for each in (tmp_path / "whole", run)]
    for ours, theirs in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_request_to_one_process_lets_all_save_the_same_step_and_leave_as_stopped(alone, tmp_path):
    arguments = [*settings(alone, 2000, **{"checkpoint.every": 2000}), f"--run_dir={tmp_path / 'run'}"]
    running = start(2, arguments)
    wait_for(tmp_path / "run" / "timing.jsonl", running)
    running[1].send_signal(signal.SIGTERM)
    finish(running, STOPPED)
    (step,) = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
    assert 0 < step < 2000
    assert read_metrics(tmp_path / "run")[-1]["step"] <= step


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("train.seed", "1", "0"),
        ("data.path", '"elsewhere"', '"shards"'),
        ("the manifest in shards", '"sha256 [0-9a-f]{12}"', '"sha256 [0-9a-f]{12}"'),  # of the same name on its host
        ("biomamba_jax", r'"9\.9 \(code .*\)"', rf'"{re.escape(biomamba_jax.__version__)} \(code .*\)"'),
    ],
)
def test_a_process_with_another_config_data_or_version_is_refused_and_all_say_both(alone, tmp_path, name, ours, theirs):
    write_shards(tmp_path / "host" / "shards", seed=1)
    shutil.copytree(ROOT / "biomamba_jax", tmp_path / "biomamba_jax")
    init = tmp_path / "biomamba_jax" / "__init__.py"
    init.write_text(init.read_text().replace(f'"{biomamba_jax.__version__}"', '"9.9"'))
    more: dict = {
        "the manifest in shards": {"another": tmp_path / "host"},
        "biomamba_jax": {"code": tmp_path},
    }.get(name, {})
    last = {"train.seed": ["--train.seed=1"], "data.path": ["--data.path=elsewhere"]}.get(name, [])
    arguments = [*settings(alone, 12, run_dir=tmp_path / "run"), "--data.path=shards"]
    running = start(2, arguments, *last, folder=alone, **more)
    errors = [process.communicate(timeout=ENDS_WITHIN)[1].decode() for process in running]
    assert [process.returncode for process in running] == [1, 1]
    for text in errors:
        assert re.search(rf"process 1 of 2 failed: {name} is {ours} in this process, {theirs} in process 0", text), text
