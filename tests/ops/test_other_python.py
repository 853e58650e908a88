"""The GPU kernels lowered by the other of the two Pythons that are supported, with its own JAX, jax-triton and flax."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from biomamba_jax.planning.ahead_of_time import compiler_environment
from tests.ops.gpu_lowering import KERNELS

OTHER = "3.12" if sys.version_info < (3, 12) else "3.11"
VARIABLE = "BIOMAMBA_OTHER_PYTHON"
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.long


def run(python: str, *words: str) -> subprocess.CompletedProcess:
    environment = compiler_environment() | {"PYTHONPATH": str(ROOT)}  # its JAX does not know all flags of ours
    return subprocess.run([python, *words], capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.fixture(scope="module")
def python() -> str:
    path = os.environ.get(VARIABLE) or shutil.which(f"python{OTHER}")
    if path is None:
        pytest.skip(f"needs Python {OTHER} beside this one, or its path in {VARIABLE}")
    asked = run(path, "-c", "import sys, jax_triton, jax_cuda12_plugin; print('%d.%d' % sys.version_info[:2])")
    if asked.returncode != 0:
        pytest.skip(
            f"{path} lacks the [gpu] extra: python{OTHER} -m venv OTHER && OTHER/bin/pip install '.[gpu]', then"
            f" {VARIABLE}=OTHER/bin/python"
        )
    assert asked.stdout.split() == [OTHER], f"{VARIABLE} must be a Python {OTHER}"
    return path


@pytest.mark.parametrize("capability", [80, 90])
def test_gradients_lower_to_kernels_for_cuda_in_a_version_that_its_assembler_knows(python, capability):
    lowered = run(python, "-m", "tests.ops.gpu_lowering", str(capability))
    assert lowered.returncode == 0, lowered.stderr[-2000:]
    printed = json.loads(lowered.stdout.splitlines()[-1])
    assert printed == {name: kernels for name, kernels in KERNELS.items() if name == "triton" or capability == 90}
