"""Training with Triton's kernels, interpreted, beside XLA's form and the plain loop."""

import numpy as np
import pytest

from tests.ops import triton_interpreter, triton_training
from tests.ops.triton_interpreter import needs_triton

STEPS = 50


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_fifty_steps_give_the_same_losses_as_xla_and_the_plain_loop(kind):
    want = triton_training.losses(kind, "reference", STEPS)
    assert want[-1] < 0.6 * want[0]  # there is something to learn, and it was learnt
    # Differences of rounding (1e-5, the ops' tolerance in float32) grow from step to step.
    np.testing.assert_allclose(triton_training.losses(kind, "xla", STEPS), want, rtol=1e-3)
    np.testing.assert_allclose(triton_interpreter.losses(kind, STEPS), want, rtol=1e-3)
