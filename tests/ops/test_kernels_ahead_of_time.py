"""Every TPU kernel through the real compiler for every generation of chip, at the shapes of all ten published sizes.

The TPUs are not there: libtpu compiles for them on any machine.
"""

import pytest

from biomamba_jax.planning import kernels
from biomamba_jax.planning.ahead_of_time import Request, estimates
from tests.compilers import needs_libtpu

pytestmark = [pytest.mark.ahead_of_time, needs_libtpu]

TOPOLOGIES = ("v4:2x2x1", "v5e:1x1", "v5p:2x2x1", "v6e:1x1", "tpu7x:2x2x1")
D_INNER = (1536, 2048, 3072, 4096, 5120)  # of the published sizes of all kinds; Mamba-3 has the first four
OPS = {
    "mamba1": {"selective_scan": 0, "causal_conv1d": 0},
    "mamba2": {"ssd": 0, "causal_conv1d": 2 * 128},
    "mamba3": {"ssd_mamba3": 0, "rotary_embedding": 0},
}
"""The heavy operations of a mixer, and the channels of each beside d_inner: Mamba-2 convolves B and C too."""


def mixer(kind: str, d_inner: int, segments: bool, devices):
    """A builder: values and gradients of a mixer's heavy operations, in bfloat16 on one row of 512 tokens."""
    shape = {"rows": 1, "length": 512, "segments": segments, "gradient": True, "devices": devices}
    built = [kernels.build(op, "pallas_tpu", channels=d_inner + more, **shape) for op, more in OPS[kind].items()]

    def run(*arguments):
        return [function(*given) for (function, _), given in zip(built, arguments, strict=True)]

    return run, tuple(given for _, given in built)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("kind", OPS)
def test_forward_and_backward_compile_at_every_published_size_with_and_without_segments(kind, topology):
    requests = [
        Request(
            topology,
            "tests.ops.test_kernels_ahead_of_time:mixer",
            {"kind": kind, "d_inner": d_inner, "segments": segments},
        )
        for d_inner in D_INNER
        for segments in (True, False)
    ]
    for request, estimate in zip(requests, estimates(requests), strict=True):
        assert estimate.error is None, f"{request}: {estimate.error}"
