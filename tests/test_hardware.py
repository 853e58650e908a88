"""The share of peak is computed against the right device, or not at all."""

import re

import jax.numpy as jnp
import pytest

from biomamba_jax import processor
from biomamba_jax.hardware import find_chip, measure_matmul_flops, measure_read_bandwidth, peak_flops, peak_memory_bytes


@pytest.mark.parametrize(
    ("device_kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA L4", 121),
    ],
)
def test_devices_are_known_by_the_names_jax_gives_them(device_kind, teraflops):
    assert peak_flops(device_kind, jnp.bfloat16) == pytest.approx(teraflops * 1e12)


def test_a_tpu7x_device_is_one_of_the_two_cores_of_a_chip():
    assert peak_flops("TPU7x", jnp.bfloat16) == pytest.approx(2307e12 / 2)


def test_float32_products_are_measured_against_tf32_on_gpu_and_one_bfloat16_pass_on_tpu():
    assert peak_flops("NVIDIA A100-SXM4-80GB", jnp.float32) == pytest.approx(156e12)
    assert peak_flops("TPU v5 lite", jnp.float32) == peak_flops("TPU v5 lite", jnp.bfloat16)


@pytest.mark.parametrize("device_kind", ["cpu", "TPU v9", "NVIDIA L40S", "NVIDIA A100X", "NVIDIA H200 NVL", ""])
def test_an_unknown_device_has_no_peak(device_kind):
    assert peak_flops(device_kind, jnp.bfloat16) is None


def test_a_type_without_a_matrix_unit_has_no_peak():
    assert peak_flops("Tesla V100-SXM2-16GB", jnp.bfloat16) is None
    assert peak_flops("Tesla V100-SXM2-16GB", "float16") == pytest.approx(125e12)


def test_memory_of_a_tpu_is_what_its_compiler_allows():
    chip = find_chip("TPU v5 lite")
    assert chip is not None and chip.memory_bytes == 15.75 * 2**30


def test_a_cpu_is_measured_instead():
    assert 1e8 < measure_matmul_flops(seconds=0.05, size=256) < 1e14
    assert 1e8 < measure_read_bandwidth(seconds=0.05, megabytes=32) < 1e13


def test_a_cpu_is_named_with_family_model_and_vectors(monkeypatch):
    cpu = {"model name": "AMD EPYC", "cpu family": "25", "model": "1", "flags": "fpu avx avx2 fma"}
    monkeypatch.setattr(processor, "description", lambda: cpu)
    assert re.fullmatch(r"AMD EPYC \(family 25, model 1\), AVX2, \d+ cores", processor.name())
    kind = processor.kind()
    monkeypatch.setattr(processor, "description", lambda: cpu | {"flags": "fpu avx avx2 fma avx512f"})
    assert "AVX-512" in processor.name() and processor.kind() != kind


def test_memory_in_use_at_the_peak_is_at_least_that_of_a_live_array():
    array = jnp.ones((8, 1024, 1024)).block_until_ready()
    assert peak_memory_bytes() > array.nbytes
