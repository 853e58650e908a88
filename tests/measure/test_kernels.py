"""`python -m biomamba_jax.benchmark kernels` and the compiling for absent TPUs below it."""

import importlib.util

import pytest

from biomamba_jax import benchmark
from biomamba_jax.errors import UserError
from biomamba_jax.measure.aot import Request, estimates

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'biomamba-jax[tpu]'"
)


def test_without_libtpu_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs libtpu: pip install 'biomamba-jax\[tpu\]'"):
        benchmark.main(["kernels"])


def test_channels_that_are_no_whole_heads_are_refused():
    with pytest.raises(UserError, match=r"channels = 100: must be a multiple of the head size 64"):
        benchmark.main(["kernels", "--channels", "100"])


@pytest.mark.ahead_of_time
@needs_libtpu
def test_a_program_too_large_for_the_chip_is_an_answer_and_a_broken_builder_an_error():
    shape = {"rows": 4096, "length": 8192, "channels": 1536, "segments": False}
    arguments = {"op": "causal_conv1d", "implementation": "xla", "gradient": False, **shape}
    (estimate,) = estimates([Request("v5e:1x1", "biomamba_jax.measure.kernels:build", arguments)])
    assert "RESOURCE_EXHAUSTED" in estimate.error
    with pytest.raises(UserError, match=r"ended after 0 of 1 programs: .*no_such_builder"):
        estimates([Request("v5e:1x1", "biomamba_jax.measure.kernels:no_such_builder", {})])


@pytest.mark.ahead_of_time
@needs_libtpu
def test_the_table_lists_kernels_and_alternatives_beside_their_floors(capsys):
    benchmark.main(["kernels", "--target", "v5e", "--rows", "1"])
    printed = capsys.readouterr().out
    for word in ("selective_scan", "ssd", "causal_conv1d", "pallas_tpu", "xla", "compiler estimates"):
        assert word in printed
