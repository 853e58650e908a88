"""The authors' kernels beside ours: called as they want to be, played by stand-ins, and left out where they fail."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kernels_gpu
from benchmarks.cuda_baselines import CUDA_BASELINES
from benchmarks.kernels import KernelsBenchmark
from benchmarks.kernels_gpu import random_arguments
from biomamba_jax.planning.kernels import build
from tests.benchmarks import authors_kernels

SHAPE = {"rows": 2, "length": 12, "channels": 128}
TIME_LAST = ("y", "x", "dt", "B", "C", "z")  # of their selective scan
TOLERANCE = 2**-6  # of the largest value: both round results to bfloat16, and theirs some steps in between


@pytest.fixture
def installed(monkeypatch):
    authors_kernels.install(monkeypatch)


@pytest.mark.parametrize("op", CUDA_BASELINES)
def test_they_compute_the_same_values_and_gradients_from_the_same_arguments(installed, op):
    shape = SHAPE | {"segments": op != "selective_scan"}  # theirs has no resets
    arguments = random_arguments(op, 0, **shape)
    if shape["segments"]:
        arguments = (arguments[0], jnp.asarray([[1] * 5 + [2] * 7, [3] * 11 + [1]], jnp.int32), arguments[2])
    runs = CUDA_BASELINES[op].build(*arguments)
    got = {"y": runs.forward()} | runs.both()
    y, (gradients,) = jax.jit(build(op, "reference", gradient=True, devices=None, **shape)[0])(*arguments)
    assert set(got) == {"y", *gradients}
    for name, want in {"y": y, **gradients}.items():
        values = got[name].float().numpy()
        values = values.swapaxes(1, 2) if op == "selective_scan" and name in TIME_LAST else values
        want = np.asarray(want, np.float32)
        assert values.shape == want.shape
        assert np.max(np.abs(values - want)) <= TOLERANCE * np.max(np.abs(want)), name


def test_they_are_timed_and_one_that_fails_is_left_out_with_its_reason(installed, monkeypatch, capsys):
    def not_built(*_, **__):
        raise RuntimeError("selective_scan_cuda is not installed.\nReinstall")  # as mamba_ssm 2.3 is by default

    module = sys.modules["mamba_ssm.ops.selective_scan_interface"]
    monkeypatch.setattr(module, "selective_scan_fn", not_built)
    monkeypatch.setattr(kernels_gpu, "_LEAST_SECONDS", 0.0)
    settings = KernelsBenchmark(target="gpu", rows=1, length=4, channels=64)
    timed = [(found.op, found.direction) for found in kernels_gpu._baseline_timings(settings)]
    assert timed == [(op, d) for op in ("ssd", "causal_conv1d") for d in ("forward", "forward and backward")]
    reason = "selective_scan, mamba_ssm: left out: RuntimeError: selective_scan_cuda is not installed.\n"
    assert reason in capsys.readouterr().out


def test_without_the_package_that_is_said():
    assert CUDA_BASELINES["ssd"].why_absent() == "mamba_ssm not installed"
