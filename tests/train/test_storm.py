"""Runs and exports survive being killed, signalled and starved of disk at random moments, to the bit."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from random_weights import same_weights
from run_processes import children, command, contents, ended, finish, refused, same_bits, start, wait_for, write_config
from synthetic import write_shards
from tiny_models import train_tokenizer, write_tiny_model

from biomamba_jax.interop import read_model

pytestmark = pytest.mark.long

STEPS = 120
SETTINGS = (
    f"--train.steps={STEPS} --train.eval_every=6 --checkpoint.every=4 --checkpoint.keep_best --checkpoint.keep_last=3 "
    "--data.num_workers=2 --train.accumulation=2"
).split()
KILLS, GROUPS, WORKERS, EXPORTS = 24, 10, 10, 6  # kills of each model; exports to each format


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder of a model to export."""
    folder = tmp_path_factory.mktemp("model")
    return write_tiny_model(folder / "native", "mamba2", train_tokenizer(folder))


@pytest.fixture(params=["mamba1", "mamba2"])
def whole(request, tmp_path_factory) -> tuple[Path, list[str], float]:
    """A folder with a config and its run `whole`, the run's settings, and the seconds that a start of it takes."""
    folder = tmp_path_factory.mktemp(request.param)
    write_config(folder, request.param)
    other = write_shards(folder / "other", seed=1)
    mixture = f"{{a: {{path: {folder / 'shards'}, weight: 3}}, b: {{path: {other}}}}}"
    settings = [*SETTINGS, f"--data.mixture.sources={mixture}"]
    finish(start(folder, "whole", *settings))
    begun = time.monotonic()
    finish(start(folder, "short", *settings, "--train.steps=20"))
    return folder, settings, time.monotonic() - begun


def end_at(process: subprocess.Popen, moment: float) -> bool:
    """Wait until the moment; True if the process is alive then."""
    while process.poll() is None and time.monotonic() < moment:
        time.sleep(0.005)
    return process.poll() is None


def test_a_storm_of_kills_and_signals_at_random_moments_changes_no_bit(whole, tmp_path):
    """SIGKILL of the run, SIGTERM and SIGINT to its process group, and SIGKILL of a data worker.

    From the run's lock on, which covers compilation (every sixth start finds no compiled program), evaluation, saving.
    """
    folder, settings, seconds = whole
    draw = random.Random(folder.name)
    blows = ["kill"] * KILLS
    if "mamba2" in folder.name:
        blows += ["group"] * GROUPS + ["worker"] * WORKERS
    draw.shuffle(blows)
    struck = 0
    while struck < len(blows):
        blow, anew = blows[struck], struck % 6 == 5
        env = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / f"compiled{struck}")} if anew else {}
        lock = folder / "storm" / "lock"
        before = lock.stat().st_mtime_ns if lock.exists() else 0
        process = start(folder, "storm", *settings, start_new_session=True, env=env)
        if blow == "worker":
            wait_for(process, lambda: len(children(process.pid)) == 2)  # noqa: B023
        else:
            wait_for(process, lambda: lock.exists() and lock.stat().st_mtime_ns > before)  # noqa: B023
        if not end_at(process, time.monotonic() + draw.uniform(0, seconds * (2 if anew else 1))):
            ended(process, 0)  # it was done before: from the beginning
            same_bits(folder / "whole", folder / "storm", STEPS)
            shutil.rmtree(folder / "storm")
            continue
        struck += 1
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
    finish(start(folder, "storm", *settings))
    same_bits(folder / "whole", folder / "storm", STEPS)


def test_an_export_that_is_killed_at_random_moments_is_whole_or_not_there(model, tmp_path):
    draw = random.Random(0)
    for to in ("hf", "native"):
        words = ["--input", model, "--to", to, "--output"]
        begun = time.monotonic()
        finish(command(tmp_path, "convert", *words, f"expected-{to}"))
        seconds = time.monotonic() - begun
        for _ in range(EXPORTS):
            process = command(tmp_path, "convert", *words, to)
            end_at(process, time.monotonic() + draw.uniform(seconds / 3, seconds))
            process.kill()
            ended(process, 0, -signal.SIGKILL)
            if (tmp_path / to).exists():
                assert same_model(tmp_path / to, tmp_path / f"expected-{to}")
                shutil.rmtree(tmp_path / to)
        finish(command(tmp_path, "convert", *words, to))
        assert same_model(tmp_path / to, tmp_path / f"expected-{to}")
    assert not list(tmp_path.glob(".new-*"))


def same_model(left: Path, right: Path) -> bool:
    """Compare sizes and weights to the bit; reading them compares all files with their digests."""
    return same_weights(read_model(left), read_model(right))


# --- A full disk -----------------------------------------------------------------------------------------------------


class SmallDisk:
    """A file system in memory, which can grow."""

    def __init__(self, path: Path):
        self.path = path

    def mount(self, size: int, *options: str) -> bool:
        """Mount it, or change its size, in bytes; False where that is not allowed."""
        words = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(self.path)]
        return subprocess.run(words, capture_output=True).returncode == 0

    def make_room(self) -> None:
        """Give it more than anything here takes."""
        assert self.mount(1 << 28, "remount")

    def clear(self) -> None:
        """Remove everything."""
        subprocess.run(["umount", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk")
    disk.path.mkdir()
    if not disk.mount(1 << 20):
        pytest.skip("a small file system cannot be mounted here, which takes root")
    disk.clear()
    yield disk
    subprocess.run(["umount", str(disk.path)], capture_output=True)


def size_of(folder: Path) -> int:
    """Bytes that a folder takes on such a disk."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in (folder, *folder.rglob("*")))


def sizes(draw: random.Random, most: int, count: int) -> list[int]:
    """Random sizes below `most`, one in each part of that range."""
    return [int(most * draw.uniform(part, part + 1) / count) & -4096 for part in range(count)]


def test_a_disk_that_fills_up_ends_a_run_in_one_line_and_the_same_command_goes_on_to_the_same_bits(disk, tmp_path):
    """In settings, metrics, checkpoints or the report, whatever is written when the disk is full."""
    write_config(tmp_path, "mamba2")
    finish(start(tmp_path, "whole", "--tensorboard=true"))
    failed = 0
    for size in sizes(random.Random(0), size_of(tmp_path / "whole"), 8):
        assert disk.mount(max(size, 4096))
        process = start(tmp_path, "disk/run", "--tensorboard=true")
        lines = process.communicate(timeout=300)[1].decode().splitlines()
        line = lines[-1] if process.returncode else ""  # after tracebacks of tensorstore's own callbacks
        failed += bool(line)
        assert not line or ("disk" in line and "No space left on device" in line and "free space" in line)
        disk.make_room()
        finish(start(tmp_path, "disk/run", "--tensorboard=true"))
        same_bits(tmp_path / "whole", disk.path / "run")
        assert (disk.path / "run" / "report.html").exists()
        disk.clear()
    assert failed > 4


@pytest.mark.parametrize("to", ["hf", "native"])
def test_a_disk_that_fills_up_ends_an_export_in_one_line_and_the_same_command_writes_it(model, disk, tmp_path, to):
    words = ["--input", model, "--to", to, "--output"]
    finish(command(tmp_path, "convert", *words, f"expected-{to}"))
    for size in sizes(random.Random(to), size_of(tmp_path / f"expected-{to}"), 3):
        assert disk.mount(max(size, 4096))
        line = refused(command(tmp_path, "convert", *words, f"disk/{to}"))
        assert to in line and "No space left on device" in line
        assert not list(disk.path.iterdir())
        disk.make_room()
        finish(command(tmp_path, "convert", *words, f"disk/{to}"))
        assert same_model(disk.path / to, tmp_path / f"expected-{to}")
        disk.clear()


def test_a_disk_that_fills_up_ends_prepare_in_one_line_and_the_same_command_goes_on_to_the_same_bytes(disk, tmp_path):
    draw = random.Random(1)
    words = [f"{first}{last}" for first in "abcdefgh" for last in ("er", "in", "osis", "itis")]
    with open(tmp_path / "text.jsonl", "w") as file:
        for number in range(3000):
            file.write(f'{{"text": "{" ".join(draw.choices(words, k=60))}", "pmid": {number + 1}}}\n')
    options = ["--input", tmp_path / "text.jsonl", "--train-tokenizer", "320", "--workers", "2", "--output"]
    finish(command(tmp_path, "prepare", *options, "expected"))
    expected = contents(tmp_path / "expected")
    for size in sizes(draw, size_of(tmp_path / "expected"), 5):
        assert disk.mount(max(size, 4096))
        line = refused(command(tmp_path, "prepare", *options, "disk/shards"))
        assert "disk/shards" in line and "No space left on device" in line
        assert not (disk.path / "shards").exists()
        disk.make_room()
        finish(command(tmp_path, "prepare", *options, "disk/shards"))
        assert contents(disk.path / "shards") == expected
        disk.clear()


def test_what_cannot_be_written_to_is_read_and_a_run_in_it_is_refused_in_one_line(disk, tmp_path):
    """Shards, a run and an export on a file system that is mounted read-only."""
    assert disk.mount(1 << 26)
    write_config(disk.path, "mamba2")
    short = ["--train.steps=10", f"--data.path={disk.path / 'shards'}"]
    finish(start(disk.path, "run", *short))
    finish(command(disk.path, "convert", "--input", "run", "--output", "hf"))
    assert disk.mount(1 << 26, "remount", "ro")
    config = ["--config", disk.path / "config.yaml", *short]
    finish(command(tmp_path, "pretrain", *config, "--run_dir", "run"))
    same_bits(disk.path / "run", tmp_path / "run", 10)
    for source in ("run", "hf"):
        finish(command(tmp_path, "convert", "--input", disk.path / source, "--output", f"from-{source}"))
    assert same_model(tmp_path / "from-run", disk.path / "hf")
    assert same_model(tmp_path / "from-hf", disk.path / "hf")
    for words in (
        ["pretrain", *config, "--run_dir", "disk/run"],
        ["pretrain", *config, "--run_dir", "disk/new"],
        ["convert", "--input", "run", "--output", "disk/new"],
        ["report", "run", "--output", "disk/new.html"],
    ):
        line = refused(command(tmp_path, *words))
        assert "disk/" in line and "Read-only file system" in line
