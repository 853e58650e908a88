"""`linear_cross_entropy` compiled for chips that are not there: memory without an array of [tokens, vocabulary].

8,192 tokens of 768 channels and 50,288 ids, the 130m shape, whose float32 logits would take 1.65 GB.
"""

from typing import Any

import pytest

from biomamba_jax.planning.ahead_of_time import Request, estimates
from tests import h100
from tests.compilers import needs_libtpu

pytestmark = pytest.mark.ahead_of_time

BUILDER = "biomamba_jax.planning.kernels:build"
TOKENS, WIDTH = 8192, 768
LOGITS = TOKENS * 50_288  # elements


def arguments(implementation: str | None, gradient: bool) -> dict[str, Any]:
    shape = {"rows": 8, "length": TOKENS // 8, "channels": 2 * WIDTH, "segments": False}
    return {"op": "linear_cross_entropy", "implementation": implementation, "gradient": gradient, **shape}


@needs_libtpu
def test_on_v5e_temporary_memory_has_no_room_for_the_logits_and_with_the_kernels_none_for_a_chunk_of_them():
    cases = [(name, gradient) for name in (None, "pallas_tpu") for gradient in (False, True)] + [("reference", False)]
    found = estimates([Request("v5e:1x1", BUILDER, arguments(*case)) for case in cases])
    assert all(one.error is None for one in found), found
    memory = {case: one.temporary_bytes for case, one in zip(cases, found, strict=True)}
    for gradient in (False, True):
        assert memory[None, gradient] < 0.5e9 < 2 * LOGITS  # of bfloat16
        assert memory["pallas_tpu", gradient] < 0.12e9
    assert memory["reference", False] > 4 * LOGITS  # of float32


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "with gradients"])
def test_on_an_h100_temporary_memory_has_no_room_for_the_logits(gradient):
    assert h100.compiled(BUILDER, **arguments(None, gradient)).temporary_bytes < 0.75e9 < 2 * LOGITS  # of bfloat16
