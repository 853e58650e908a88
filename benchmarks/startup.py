"""Measures what a command takes before its arguments are parsed."""

import resource
import subprocess
import sys
from dataclasses import dataclass

from biomamba_jax.__main__ import COMMANDS
from biomamba_jax.config.checks import PositiveInt, Settings
from biomamba_jax.tables import summary_table


@dataclass(frozen=True)
class StartupBenchmark(Settings):
    """Settings of the benchmark."""

    repeats: PositiveInt = 3
    """Number of times that each command is run; the fastest counts."""


def measure_startup(config: StartupBenchmark) -> dict[str, float]:
    """Print and return the CPU seconds of `--help` of each command."""
    seconds = {name: min(_help_seconds(name) for _ in range(config.repeats)) for name in COMMANDS}
    rows = [(name, f"{value:.2f}") for name, value in seconds.items()]
    summary_table("CPU time of --help", ("command", "seconds"), rows)
    return seconds


def _help_seconds(command: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", f"biomamba_jax.{command}", "--help"], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
