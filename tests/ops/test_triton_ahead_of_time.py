"""The Triton kernels of all ops compiled for GPUs that are not there: spills, registers, shared memory, PTX version."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from benchmarks.triton_static import Usage, usages
from tests.compilers import needs_jax_triton, needs_triton
from tests.ops.gpu_lowering import KERNELS

BATCH = {"rows": 8, "length": 1024, "channels": 1536, "segments": True}
OPS = ("selective_scan", "ssd", "causal_conv1d")
LEAST_SHARED_BYTES = 101_376  # of a program on sm_86, sm_89 and sm_120; by NVIDIA's tables others have more
# Registers of a thread on sm_80, sm_90 and sm_100 by triton 3.9.0 and its assembler, a few more than were reached; 255
# is the most that there are.
MOST_REGISTERS = {
    "selective_scan_forward": (200, 204, 212),
    "selective_scan_backward": (255, 255, 255),
    "ssd_states": (136, 136, 128),
    "ssd_outputs": (255, 144, 176),
    "ssd_state_gradients": (136, 112, 112),
    "ssd_token_gradients": (255, 255, 232),
    "ssd_shared_gradients": (255, 255, 216),
    "causal_conv1d_forward": (96, 96, 96),
    "causal_conv1d_backward": (184, 192, 192),
}
# Bytes of a thread's registers kept in memory for a while: on sm_80 products are fed from registers.
MOST_SPILLED = {
    ("selective_scan_backward", 80): 48,
    ("ssd_token_gradients", 80): 296,
    ("ssd_token_gradients", 90): 16,
}


@cache
def compiled(capability: int) -> list[Usage]:
    return [usage for _, usage in usages(OPS, capability, **BATCH)]


@needs_triton
@pytest.mark.ahead_of_time
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_no_forward_kernel_spills_and_all_fit_on_every_gpu(capability):
    for usage in compiled(capability):
        assert usage.spilled_bytes <= MOST_SPILLED.get((usage.kernel, capability), 0), usage
        assert usage.registers <= MOST_REGISTERS[usage.kernel][(80, 90, 100).index(capability)], usage
        assert usage.shared_bytes <= LEAST_SHARED_BYTES, usage


@needs_triton
@pytest.mark.ahead_of_time
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_ptx_is_of_a_version_that_cuda_12_9_can_assemble(capability):
    assert {usage.ptx_version for usage in compiled(capability)} == {"8.8"}


@needs_triton
@needs_jax_triton
@pytest.mark.ahead_of_time
@pytest.mark.parametrize("capability", [80, 90])
def test_gradients_lower_to_kernels_for_cuda_in_that_version_too(capability):
    words = [sys.executable, "-m", "tests.ops.gpu_lowering", str(capability)]
    printed = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert printed.returncode == 0, printed.stderr
    assert json.loads(printed.stdout.splitlines()[-1])["triton"] == KERNELS["triton"]
