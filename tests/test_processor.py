"""Freed memory is kept for the next allocation on a CPU, unless the environment says otherwise."""

import ctypes
import os
import subprocess
import sys

import pytest

from biomamba_jax.processor import keep_freed_memory

PAGE_FAULTS = """
import resource
from biomamba_jax.processor import keep_freed_memory
keep_freed_memory()
def faults_of_a_block():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 40_000_000
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults_of_a_block(), faults_of_a_block())
"""

BEFORE_JAX = """
import sys
from biomamba_jax import processor
processor.keep_freed_memory = lambda: sys.exit("jax" in sys.modules)
from biomamba_jax.{command} import main
main({argv})
"""


def _calls_of_the_c_library(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    calls: list[str | None] = []
    monkeypatch.setattr(ctypes, "CDLL", calls.append)
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return calls


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc's memory can be kept")
def test_a_block_as_large_as_a_freed_one_takes_its_pages():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environment |= {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PAGE_FAULTS], env=environment, capture_output=True, text=True, check=True
    )
    first, second = map(int, done.stdout.split())
    assert second < min(first, 10)


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_environment_states_is_left_as_it_is(monkeypatch, name):
    calls = _calls_of_the_c_library(monkeypatch)
    monkeypatch.setenv(name, "1")
    keep_freed_memory()
    assert calls == []


def test_a_process_that_may_use_an_accelerator_is_left_as_it_is(monkeypatch):
    calls = _calls_of_the_c_library(monkeypatch)
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr("biomamba_jax.processor.find_spec", lambda name: name == "libtpu")
    keep_freed_memory()
    assert calls == []


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        ("pretrain", ["--data.path=x"]),
        ("finetune", ["--init_from=x", "--data.files=x"]),
        ("evaluate", ["--models.m=x", "--domains.d.path=x"]),
        ("embed", ["--model=x", "--input=x", "--output=x"]),
    ],
)
def test_commands_that_compute_keep_it_before_jax_can_start_threads(command, argv):
    code = BEFORE_JAX.format(command=command, argv=argv)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
