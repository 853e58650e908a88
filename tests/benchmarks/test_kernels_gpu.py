"""`python -m benchmarks kernels` for GPUs: the one at hand, played by the CPU, and absent ones."""

import sys
import weakref

import jax
import pytest

from benchmarks import __main__ as benchmark
from benchmarks import kernels_gpu
from benchmarks.kernels import KernelsBenchmark
from biomamba_jax.errors import UserError
from tests.compilers import needs_triton

SMALL = ["--target", "gpu", "--rows", "1", "--length", "32", "--channels", "64"]


@pytest.fixture
def a_gpu_that_is_a_cpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(kernels_gpu, "_CHECK", {"rows": 2, "length": 12, "channels": 64, "segments": True})
    monkeypatch.setattr(kernels_gpu, "_LEAST_SECONDS", 0.0)


def test_without_a_gpu_or_without_triton_that_is_said_in_one_line(monkeypatch):
    with pytest.raises(UserError, match=r"target gpu: JAX finds no GPU in this machine .* give --target sm_80"):
        benchmark.main(["kernels", "--target", "gpu"])
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match=r"pip install 'biomamba-jax\[gpu\]'"):
        benchmark.main(["kernels", "--target", "sm_90"])


@pytest.mark.long
def test_every_implementation_is_checked_then_timed_and_what_cannot_run_is_named(a_gpu_that_is_a_cpu, capsys):
    benchmark.main(["kernels", *SMALL])
    printed = capsys.readouterr().out
    assert "selective_scan, triton: left out: " in printed
    assert "ssd, mamba_ssm: left out: " in printed
    for word in ("worst gradient", "forward and backward", "tokens/s", "share of bandwidth", "share of tensor cores"):
        assert word in printed


def test_what_is_wrong_or_fails_is_an_error_and_not_timed_and_the_rest_is(a_gpu_that_is_a_cpu, monkeypatch):
    found = {
        "xla": {"y": 1e-3, "A": 1e-3},
        "triton": {"y": 1e-3, "A": float("nan")},
        "pallas_gpu": kernels_gpu.Failure("ssd", "pallas_gpu", "JaxRuntimeError: no kernel image"),
    }
    timed = []
    monkeypatch.setattr(kernels_gpu, "_errors", lambda: [("ssd", *item) for item in found.items()])
    monkeypatch.setattr(kernels_gpu, "_timings", lambda settings, right: timed.extend(right) or [])
    want = "^ssd by triton is wrong by more than 3e-02; ssd by pallas_gpu fails: JaxRuntimeError: no kernel image$"
    with pytest.raises(UserError, match=want):
        benchmark.main(["kernels", *SMALL])
    assert timed == [("ssd", "xla")]


def test_an_exception_of_one_implementation_leaves_the_others(a_gpu_that_is_a_cpu, monkeypatch):
    compiled = kernels_gpu._function

    def function(op, name, *rest):
        if name == "triton":
            raise ValueError("ptxas died\nwith this")
        return compiled(op, name, *rest)

    monkeypatch.setattr(kernels_gpu, "OPS", ("causal_conv1d",))
    monkeypatch.setattr(kernels_gpu, "_present", lambda op: ["triton", "xla"])
    monkeypatch.setattr(kernels_gpu, "_function", function)
    (_, _, failure), (_, name, errors) = kernels_gpu._errors()
    assert str(failure) == "causal_conv1d by triton fails: ValueError: ptxas died"
    assert name == "xla" and set(errors) == {"y", "x", "weight", "bias"}


def test_timing_keeps_the_results_of_no_more_than_two_calls(monkeypatch):
    class Result:
        """Something that can be told to be alive."""

    alive, most = weakref.WeakSet(), []

    def run():
        result = Result()
        alive.add(result)
        most.append(len(alive))
        return result

    monkeypatch.setattr(kernels_gpu, "_LEAST_SECONDS", 1e-3)
    kernels_gpu._seconds(run, lambda result: None)
    assert len(most) > 20 and max(most) == 2


def test_the_least_work_is_inputs_and_results_once_and_the_products_of_chunks():
    settings = KernelsBenchmark(target="gpu", rows=1, length=1, channels=64)
    assert kernels_gpu.work("causal_conv1d", "forward", settings) == (2 * 2 * 64, 0)
    assert kernels_gpu.work("selective_scan", "forward and backward", settings) == (2 * (11 * 64 + 6 * 16), 0)
    products = 2 * (64 * 64 + 2 * 128 * 64 + 64 * 128)
    assert kernels_gpu.work("ssd", "forward", settings) == (2 * (2 * 64 + 2 * 128), products)
    assert kernels_gpu.work("ssd", "forward and backward", settings) == (2 * (5 * 64 + 6 * 128), 3 * products)
    two_heads = KernelsBenchmark(target="gpu", rows=1, length=1, channels=128)
    assert kernels_gpu.work("ssd_mamba3", "forward", two_heads) == (2 * (2 * 128 + 2 * 2 * 128), 2 * products)


@pytest.mark.ahead_of_time
@needs_triton
def test_the_table_for_an_absent_gpu_lists_every_kernel(capsys):
    benchmark.main(["kernels", "--target", "sm_90", "--rows", "1"])
    printed = capsys.readouterr().out
    for kernel in ("selective_scan_forward", "ssd_states", "ssd_shared_gradients", "causal_conv1d_backward"):
        assert kernel in printed
