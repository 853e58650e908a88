"""Which implementation None stands for, and what a named one that cannot run says."""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from biomamba_jax.errors import UserError
from biomamba_jax.ops import causal_conv1d, dispatch, selective_scan, ssd
from biomamba_jax.ops.ssd import api as ssd_api

IMPLEMENTATIONS = {name: (lambda name=name: name) for name in ("xla", "pallas_tpu", "pallas_gpu", "triton")}


@pytest.fixture(autouse=True)
def triton_is_there(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_unavailable_reason", lambda: None)


def chosen(platform, capability=None, implementation=None, **rest) -> str:
    with dispatch.target_platform(platform, capability):
        return dispatch.choose("op", implementation, IMPLEMENTATIONS, **rest)()


@pytest.mark.parametrize(
    ("platform", "capability", "name"),
    [
        ("cpu", None, "xla"),
        ("tpu", None, "pallas_tpu"),
        ("gpu", 90, "pallas_gpu"),
        ("gpu", 80, "triton"),
        ("gpu", 89, "triton"),
        ("gpu", 100, "triton"),  # without wgmma
        ("gpu", 75, "xla"),
        ("gpu", None, "xla"),
    ],
)
def test_none_is_the_best_that_runs_on_the_device(platform, capability, name):
    assert chosen(platform, capability) == name


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_does_not_suit_the_arrays_is_passed_over_and_refused_by_name():
    unsupported = {"pallas_gpu": lambda: "headdim is 32, not 64"}
    assert chosen("gpu", 90, unsupported=unsupported) == "triton"
    with pytest.raises(UserError, match="op: implementation 'pallas_gpu' cannot be used: headdim is 32, not 64; give"):
        chosen("gpu", 90, "pallas_gpu", unsupported=unsupported)


def test_a_preferred_one_goes_before_the_platforms_first_where_it_can_run_and_no_name_is_given():
    assert chosen("gpu", 90, prefer="triton") == "triton" and chosen("tpu", prefer="xla") == "xla"
    assert chosen("gpu", 90, prefer="triton", unsupported={"triton": lambda: "too wide"}) == "pallas_gpu"
    assert chosen("gpu", 90, "pallas_gpu", prefer="triton") == "pallas_gpu"


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("rows", "heads", "dtype", "name"),
    [
        (1, 24, jnp.bfloat16, "triton"),
        (2, 24, jnp.bfloat16, "pallas_gpu"),
        (1, 32, jnp.bfloat16, "pallas_gpu"),
        (1, 24, jnp.float32, "pallas_gpu"),  # not measured
    ],
)
def test_on_hopper_ssd_of_a_single_row_is_tritons(rows, heads, dtype, name, monkeypatch):
    stubs = {n: (lambda *_, n=n: (n, None)) for n in ("xla", "pallas_gpu", "triton")}
    monkeypatch.setattr(ssd_api, "_IMPLEMENTATIONS", stubs)
    x, b, dt = (jnp.zeros((rows, 128, *shape), dtype) for shape in ((heads, 64), (1, 128), (heads,)))
    with dispatch.target_platform("gpu", 90):
        assert ssd(x, dt, jnp.zeros(heads), b, b) == name
        assert ssd(x, dt, jnp.zeros(heads), b, b, implementation="pallas_gpu") == "pallas_gpu"


def scan_of(channels, states, dtype=jnp.bfloat16):
    wide, narrow = (jax.ShapeDtypeStruct((1, 32, n), dtype) for n in (channels, states))
    return selective_scan, (wide, wide, jax.ShapeDtypeStruct((channels, states), jnp.float32), narrow, narrow)


def convolution_of(width, dtype=jnp.bfloat16):
    return causal_conv1d, tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in ((1, 32, 256), (256, width)))


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (scan_of(5120, 48), None),
        (scan_of(2560, 128), "d_state is 128, more than 48"),
        (scan_of(10240, 48), "a state of 10240 x 48 has more than 262,144 values, which VMEM may not hold"),
        (scan_of(256, 16, jnp.float64), "it computes in float32, and x is float64"),
        (convolution_of(9), None),
        (convolution_of(10), "it is made for widths up to 9, not 10"),
        (convolution_of(4, jnp.float64), "it computes in float32, and x is float64"),
    ],
)
def test_on_tpu_arrays_that_do_not_suit_the_kernels_go_to_xla_and_are_refused_by_name(case, reason):
    op, arguments = case
    with jax.enable_x64(True), dispatch.target_platform("tpu"):
        kernels = str(jax.make_jaxpr(lambda *a: op(*a))(*arguments)).count("pallas_call")
        assert kernels == (reason is None)
        if reason:
            with pytest.raises(UserError, match=f"implementation 'pallas_tpu' cannot be used: {reason}; give"):
                jax.eval_shape(partial(op, implementation="pallas_tpu"), *arguments)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("platform", "capability", "name", "reason"),
    [
        ("cpu", None, "triton", "it needs a GPU, and this program is for cpu"),
        ("cpu", None, "pallas_tpu", "it needs a TPU, and this program is for cpu"),
        ("gpu", 75, "triton", "it needs a GPU of sm_80 or newer, and this one is sm_75"),
        ("gpu", 80, "pallas_gpu", "it needs a GPU of sm_90 to below sm_100, and this one is sm_80"),
        ("gpu", None, "triton", "the compute capability of the GPU is unknown"),
    ],
)
def test_a_named_one_that_cannot_run_says_why(platform, capability, name, reason):
    with pytest.raises(UserError, match=f"op: implementation '{name}' cannot be used: {reason}"):
        chosen(platform, capability, name)


def test_the_choice_is_logged_once_with_what_was_passed_over(caplog):
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        chosen("gpu", 80)
        chosen("gpu", 80)
    assert [record.message for record in caplog.records] == [
        "op: using implementation 'triton' on gpu (not 'pallas_gpu': it needs a GPU of sm_90 to below sm_100, and this "
        "one is sm_80)"
    ]


@pytest.mark.parametrize(
    ("jax", "jax_triton", "reason"),
    [
        ("0.10.2", "0.3.1", None),
        ("0.11.2", "0.4.1", None),
        ("0.10.2", "0.4.1", "jax 0.10.2 needs jax-triton 0.3.1, and 0.4.1 is installed: remedy"),
        ("0.11.2", "0.3.1", "jax 0.11.2 needs jax-triton 0.4.1, and 0.3.1 is installed: remedy"),
        ("0.12.0.1", "0.4.1", "no jax-triton is known to work with jax 0.12.0.1: remedy"),
    ],
)
def test_only_pairs_of_jax_and_jax_triton_that_work_are_taken(jax, jax_triton, reason):
    assert dispatch._version_mismatch(jax, jax_triton, "remedy") == reason


@pytest.mark.parametrize(("version", "number"), [("9.0", 90), ("12.1", 121), ("gfx942", None), ("", None)])
def test_the_compute_capability_is_read_from_the_device(version, number):
    assert dispatch._capability_number(version) == number
