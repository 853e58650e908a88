"""Training with the kernels, interpreted, beside XLA's form and the plain loop: the same losses step by step."""

import numpy as np
import pytest

from tests.compilers import needs_triton
from tests.ops import kernel_training, mosaic_interpreter, triton_interpreter

STEPS = 50
# Differences of rounding (1e-5, the ops' tolerance in float32) grow from step to step.
TOLERANCE = 1e-3

pytestmark = [pytest.mark.long, pytest.mark.parametrize("kind", ["mamba1", "mamba2"])]


def plain(kind: str, kernels: str) -> list[float]:
    """Losses by the plain loop at sizes that those kernels take, which XLA's form is held to besides."""
    sizes = kernel_training.SIZES[kernels]
    want = kernel_training.losses(kind, "reference", STEPS, sizes)
    assert want[-1] < 0.6 * want[0]  # there is something to learn, and it was learnt
    np.testing.assert_allclose(kernel_training.losses(kind, "xla", STEPS, sizes), want, rtol=TOLERANCE)
    return want


@needs_triton
def test_fifty_steps_with_triton_give_the_losses_of_xla_and_the_plain_loop(kind):
    got = triton_interpreter.losses(kind, STEPS)
    np.testing.assert_allclose(got, plain(kind, "triton"), rtol=TOLERANCE)


def test_fifty_steps_with_the_tpu_kernels_give_the_losses_of_xla_and_the_plain_loop(kind):
    got = kernel_training.losses(
        kind,
        "pallas_tpu",
        STEPS,
        kernel_training.SIZES["pallas_tpu"],
        options={"interpret": True},
        compiler_options=mosaic_interpreter.COMPILER_OPTIONS,
    )
    np.testing.assert_allclose(got, plain(kind, "pallas_tpu"), rtol=TOLERANCE)


def test_fifty_steps_with_mosaic_gpu_give_the_losses_of_xla_and_the_plain_loop(kind):
    got = mosaic_interpreter.losses(kind, STEPS)
    np.testing.assert_allclose(got, plain(kind, "pallas_gpu"), rtol=TOLERANCE)
