"""The Triton kernels of all ops compiled for GPUs that are not there: spills, registers, shared memory, PTX version."""

import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from biomamba_jax import benchmark
from biomamba_jax.measure.triton_static import Usage, usages
from tests.ops.triton_interpreter import needs_triton

needs_jax_triton = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("jax_triton", "jax_cuda12_plugin")),
    reason="needs jax-triton and jax's plugin for CUDA: pip install 'biomamba-jax[gpu]'",
)

BATCH = {"rows": 8, "length": 1024, "channels": 1536, "segments": True}
OPS = ("selective_scan", "ssd", "causal_conv1d")
LEAST_SHARED_BYTES = 101_376  # of a program on sm_86, sm_89 and sm_120; by NVIDIA's tables others have more
FORWARD = {"selective_scan_forward", "ssd_states", "ssd_outputs", "causal_conv1d_forward"}
# Registers of a thread, as reached with triton 3.9.0 and a few more; 255 is the most that there are.
MOST_REGISTERS: dict[str, dict[int, int]] = {}


@cache
def compiled(capability: int) -> list[Usage]:
    return [usage for _, usage in usages(OPS, capability, **BATCH)]


@needs_triton
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_no_kernel_of_a_forward_pass_spills_and_all_fit_on_every_gpu(capability):
    for usage in compiled(capability):
        assert usage.spilled_bytes == 0, usage
        assert usage.shared_bytes <= LEAST_SHARED_BYTES, usage


@needs_triton
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_ptx_is_of_a_version_that_cuda_12_9_can_assemble(capability):
    assert {usage.ptx_version for usage in compiled(capability)} == {"8.8"}


@needs_triton
@needs_jax_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_gradients_lower_to_kernels_for_cuda_in_that_version_too(capability):
    words = [sys.executable, "-m", "tests.ops.triton_lowering", str(capability)]
    printed = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert printed.returncode == 0, printed.stderr
    versions = json.loads(printed.stdout.splitlines()[-1])
    assert versions == {"selective_scan": ["8.8"] * 2, "ssd": ["8.8"] * 5, "causal_conv1d": ["8.8"] * 2}


@needs_triton
def test_the_table_for_an_absent_gpu_lists_every_kernel(capsys):
    benchmark.main(["kernels", "--target", "sm_90", "--rows", "1"])
    printed = capsys.readouterr().out
    for usage in compiled(90):
        assert usage.kernel in printed


def test_without_a_gpu_the_timing_says_so_in_one_line():
    from biomamba_jax.errors import UserError

    with pytest.raises(UserError, match=r"target gpu: JAX finds no GPU in this machine .* give --target sm_80"):
        benchmark.main(["kernels", "--target", "gpu"])
