"""`python -m benchmarks kernels` and the compiling for absent TPUs below it."""

import importlib.util

import pytest

from benchmarks import __main__ as benchmark
from benchmarks.kernels import KernelsBenchmark, Line, both_directions
from biomamba_jax.errors import UserError
from biomamba_jax.planning.ahead_of_time import Request, compiler_environment, estimates
from tests.compilers import needs_libtpu


def test_ops_are_chosen_for_a_tpu_only_and_the_mixer_needs_its_kernels_before_it():
    with pytest.raises(UserError, match="only a TPU target chooses ops, not gpu"):
        KernelsBenchmark(target="gpu", ops=["ssd"])
    with pytest.raises(UserError, match="mamba3 needs ssd_mamba3 and rotary_embedding before it"):
        KernelsBenchmark(ops=["mamba3", "ssd_mamba3", "rotary_embedding"])


def test_without_libtpu_the_remedy_is_named_and_channels_that_are_no_whole_heads_are_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs libtpu: pip install 'biomamba-jax\[tpu-compiler\]'"):
        benchmark.main(["kernels"])
    with pytest.raises(UserError, match=r"channels = 100: must be a multiple of the head size 64"):
        benchmark.main(["kernels", "--channels", "100"])


def test_flags_for_cpus_do_not_reach_the_compiler_for_tpus_which_would_end_at_them(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_dump_to=here")
    assert compiler_environment()["XLA_FLAGS"] == "--xla_dump_to=here"


def test_both_directions_of_a_kernel_together_have_the_floors_of_both_and_the_memory_of_the_program_with_both():
    forward = Line("ssd", "pallas_tpu", "forward", 1.0, None, 0.5, memory_floor=0.1, temporary_bytes=3)
    backward = Line("ssd", "pallas_tpu", "backward", 3.0, None, 1.5, memory_floor=0.4, temporary_bytes=5)
    both = both_directions(forward, backward)
    assert (both.seconds, both.matrix_floor, both.vector_floor, both.memory_floor) == (4.0, 2.0, None, 0.4)
    assert both.share_of_floor == 0.5 and both.temporary_bytes == 5


@pytest.mark.ahead_of_time
@needs_libtpu
def test_a_program_too_large_for_the_chip_is_an_answer_and_a_broken_builder_an_error():
    shape = {"rows": 4096, "length": 8192, "channels": 1536, "segments": False}
    arguments = {"op": "causal_conv1d", "implementation": "xla", "gradient": False, **shape}
    (estimate,) = estimates([Request("v5e:1x1", "biomamba_jax.planning.kernels:build", arguments)])
    assert "RESOURCE_EXHAUSTED" in estimate.error
    with pytest.raises(UserError, match=r"process ended: .*no_such_builder"):
        estimates([Request("v5e:1x1", "biomamba_jax.planning.kernels:no_such_builder", {})])


@pytest.mark.ahead_of_time
@needs_libtpu
def test_the_table_lists_kernels_and_alternatives_beside_their_floors(capsys):
    benchmark.main(["kernels", "--target", "v5e", "--rows", "1"])
    printed = capsys.readouterr().out
    for word in ("selective_scan", "ssd", "causal_conv1d", "pallas_tpu", "xla", "compiler estimates"):
        assert word in printed
