"""`linear_cross_entropy` compiled for chips that are not there: its memory, and no array of [tokens, vocabulary].

8,192 tokens of 768 channels and 50,288 ids, the 130m shape, whose float32 logits would take 1.65 GB.
"""

from typing import Any

import pytest

from biomamba_jax.planning.ahead_of_time import Request, estimates
from biomamba_jax.planning.kernels import VOCABULARY
from tests import h100
from tests.compilers import needs_libtpu

pytestmark = pytest.mark.ahead_of_time

BUILDER = "biomamba_jax.planning.kernels:build"
TOKENS, WIDTH = 8192, 768
CHUNK = 2048  # tokens whose logits XLA's form has at once


def arguments(implementation: str | None, gradient: bool) -> dict[str, Any]:
    shape = {"rows": 8, "length": TOKENS // 8, "channels": 2 * WIDTH, "segments": False}
    return {"op": "linear_cross_entropy", "implementation": implementation, "gradient": gradient, **shape}


@needs_libtpu
def test_on_v5e_the_largest_array_is_a_chunk_of_logits_or_with_the_kernels_the_head_itself():
    cases = [(name, gradient) for name in (None, "pallas_tpu") for gradient in (False, True)] + [("reference", False)]
    found = estimates([Request("v5e:1x1", BUILDER, arguments(*case)) for case in cases])
    memory = {case: (one.largest_array, one.temporary_bytes) for case, one in zip(cases, found, strict=True)}
    assert all(one.error is None for one in found), found
    head = 50 * 1024 * WIDTH  # in whole blocks of ids
    for gradient, chunked, kernels in ((False, 0.5e9, 0.1e9), (True, 0.5e9, 0.12e9)):
        assert memory[None, gradient][0] == CHUNK * VOCABULARY and memory[None, gradient][1] < chunked
        assert memory["pallas_tpu", gradient][0] == head and memory["pallas_tpu", gradient][1] < kernels
    assert memory["reference", False][0] >= TOKENS * 50_277  # the logits of all tokens, if there were any


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "with gradients"])
def test_on_an_h100_the_largest_array_is_a_chunk_of_logits(gradient):
    program = h100.compiled(BUILDER, **arguments(None, gradient))
    assert CHUNK * VOCABULARY <= program.largest_array < CHUNK * (VOCABULARY + 8)  # padded for the tensor cores
    assert program.temporary_bytes < 1e9
