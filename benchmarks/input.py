"""Times the batches of one host of a pod: reading, packing, and reading ahead."""

import dataclasses
import time

from biomamba_jax.config.checks import PositiveFloat, PositiveInt, Settings
from biomamba_jax.data.packing import DEFAULT_WINDOW
from biomamba_jax.data.pipeline import TrainIterator
from biomamba_jax.data.shards import open_split
from biomamba_jax.tables import summary_table


@dataclasses.dataclass(frozen=True)
class InputBenchmark(Settings):
    """Settings of `python -m benchmarks input`."""

    path: str = "data/quickstart"
    """Shards."""
    hosts: PositiveInt = 64
    """Hosts of the pod, of which the first is timed."""
    batch_size: PositiveInt = 4
    """Rows of this host in a step: one a chip on a host of four."""
    sequence_length: PositiveInt = 2048
    """Tokens of a row."""
    window: PositiveInt = DEFAULT_WINDOW
    """Documents packed together."""
    num_workers: int = 0
    """Worker processes; 0: a thread."""
    seconds: PositiveFloat = 10.0
    """Time to measure, after a warm-up of a second."""


@dataclasses.dataclass(frozen=True)
class InputSpeed:
    """Throughput of one host."""

    tokens_per_second: float
    """Tokens in rows of this host, padding included."""
    cpu_share: float
    """CPU time of this process and its threads over the time measured; workers are not in it."""


def measure_input(config: InputBenchmark) -> InputSpeed:
    """Print and return the speed of one host's batches."""
    _, documents = open_split(config.path, "train")
    sizes = {"sequence_length": config.sequence_length, "window": config.window, "batch_size": config.batch_size}
    with TrainIterator(documents, seed=0, process_count=config.hosts, num_workers=config.num_workers, **sizes) as rows:
        _steps(rows, 1.0)
        before = time.perf_counter(), time.process_time()
        steps = _steps(rows, config.seconds)
        seconds, cpu = time.perf_counter() - before[0], time.process_time() - before[1]
    found = InputSpeed(steps * config.batch_size * config.sequence_length / seconds, cpu / seconds)
    summary_table(
        f"One of {config.hosts} hosts, {config.batch_size} x {config.sequence_length:,} tokens a step",
        ("", "M tokens/s"),
        [
            ("this host", f"{found.tokens_per_second / 1e6:,.2f}"),
            ("all hosts at this speed", f"{config.hosts * found.tokens_per_second / 1e6:,.1f}"),
            ("all hosts, per CPU-second", f"{config.hosts * found.tokens_per_second / found.cpu_share / 1e6:,.1f}"),
        ],
    )
    return found


def _steps(rows: TrainIterator, seconds: float) -> int:
    """Return how many batches came in `seconds`."""
    end, steps = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        next(rows)
        steps += 1
    return steps
