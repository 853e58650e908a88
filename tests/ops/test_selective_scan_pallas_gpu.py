"""The Mosaic GPU kernels of `selective_scan`: numbers by Pallas's interpreter against the plain loop in float64, and
programs by the compiler for an H100 that is not there."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biomamba_jax.errors import UserError
from biomamba_jax.ops import dispatch, selective_scan
from biomamba_jax.ops.selective_scan import pallas_gpu
from biomamba_jax.ops.selective_scan.inputs import Inputs
from tests import h100
from tests.ops import mosaic_interpreter
from tests.ops.oracles import in_dtype, segment_layouts, with_one_small
from tests.ops.test_selective_scan import (
    ACTIVATIONS,
    ARRAYS,
    CHANNEL_AXES,
    PER_CHANNEL,
    Shape,
    assert_equal_the_plain_loop,
    random_inputs,
    small_steps,
)

# All of it padded; states pass from the first 32 steps to the rest.
ODD = Shape(rows=2, length=37, channels=6, d_state=4)
TWO_TILES = Shape(rows=1, length=35, channels=70, d_state=17)  # of 64 channels in two groups; two registers a group


@cache
def interpreted(*, with_ids: bool):
    def compute(inputs, segment_ids):
        def run(arrays):
            scan = partial(pallas_gpu.selective_scan, interpret=mosaic_interpreter.parameters())
            return scan(Inputs(**arrays, segment_ids=segment_ids if with_ids else None))

        (y, final_state), pull_back = jax.vjp(run, {a: inputs[a] for a in ARRAYS if a in inputs})
        (gradients,) = pull_back((inputs["dy"].astype(y.dtype), inputs["d_final_state"]))
        return {"y": y, "final_state": final_state}, gradients

    return jax.jit(compute, compiler_options=mosaic_interpreter.COMPILER_OPTIONS)


def assert_equals_the_plain_loop(inputs: dict[str, jax.Array], segment_ids, dtype: str, per=None) -> None:
    results = interpreted(with_ids=segment_ids is not None)(inputs, segment_ids)
    assert_equal_the_plain_loop(results, inputs, segment_ids, dtype, per)


@pytest.mark.slow
@settings(max_examples=2)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_equals_the_plain_loop_in_values_and_all_gradients(data, seed):
    segment_ids = data.draw(segment_layouts(ODD.rows, ODD.length))
    assert_equals_the_plain_loop(in_dtype(random_inputs(ODD, seed), "float32", ACTIVATIONS), segment_ids, "float32")


@pytest.mark.long
def test_tiles_of_channels_and_many_states_add_up():
    segment_ids = np.repeat([[5, 2, 5]], [3, 30, 2], axis=1).astype(np.int32)
    assert_equals_the_plain_loop(in_dtype(random_inputs(TWO_TILES, 1), "float32", ACTIVATIONS), segment_ids, "float32")


def test_bfloat16_inputs_lose_no_more_than_the_rounding_of_the_results():
    segment_ids = np.repeat([[1, 2]], [20, 17], axis=1).repeat(2, axis=0).astype(np.int32)
    assert_equals_the_plain_loop(in_dtype(random_inputs(ODD, 2), "bfloat16", ACTIVATIONS), segment_ids, "bfloat16")


def test_every_channel_is_right_on_its_own_scale():
    inputs = in_dtype(with_one_small(random_inputs(ODD, 10), CHANNEL_AXES), "float32", ACTIVATIONS)
    segment_ids = np.repeat([[0, 1]], [11, 26], axis=1).repeat(2, axis=0).astype(np.int32)
    assert_equals_the_plain_loop(inputs, segment_ids, "float32", PER_CHANNEL)


def test_small_steps_have_their_gradient_channel_by_channel():
    inputs = in_dtype(small_steps(ODD, 11), "float32", ACTIVATIONS)
    segment_ids = np.repeat([[0, 1]], [11, 26], axis=1).repeat(2, axis=0).astype(np.int32)
    assert_equals_the_plain_loop(inputs, segment_ids, "float32", PER_CHANNEL | {"dt_bias": 0})


def test_everything_optional_can_be_left_out():
    inputs = in_dtype(random_inputs(ODD, 3), "float32", ACTIVATIONS)
    for name in ("D", "z", "dt_bias", "initial_state"):
        del inputs[name]
    assert_equals_the_plain_loop(inputs, None, "float32")


def test_extreme_decays_stay_finite_and_right():
    inputs = random_inputs(ODD, 4)
    inputs["dt"] *= 20  # steps from 1e-30 to 100
    inputs["A"] = -np.logspace(-6, 6, 24).reshape(6, 4)
    segment_ids = np.repeat((np.arange(37, dtype=np.int32)[None] > 20).astype(np.int32), 2, axis=0)
    assert_equals_the_plain_loop(in_dtype(inputs, "float32", ACTIVATIONS), segment_ids, "float32")


def test_no_gradient_passes_a_change_of_segment():
    inputs = in_dtype(random_inputs(ODD, 5), "float32", ACTIVATIONS)
    inputs["A"] = jnp.zeros_like(inputs["A"])  # a decay rate of zero is reset like any other
    inputs["dy"] = inputs["dy"].at[:, :20].set(0)
    segment_ids = np.repeat((np.arange(37, dtype=np.int32) >= 20)[None], 2, axis=0).astype(np.int32)
    _, gradients = interpreted(with_ids=True)(inputs, segment_ids)
    for name in ("x", "dt", "B", "C", "z"):
        assert not np.any(gradients[name][:, :20]), name
    assert not np.any(gradients["initial_state"])


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("dtype", "d_state", "target", "reason"),
    [
        ("float32", 4, ("cpu", None), "needs a GPU, and this program is for cpu"),
        ("float32", 4, ("gpu", 80), "this one is sm_80"),
        ("float32", 65, ("gpu", 90), "d_state is 65, more than 64"),
        ("int32", 4, ("gpu", 90), "x is int32"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(dtype, d_state, target, reason):
    inputs = random_inputs(ODD._replace(d_state=d_state), 6)
    arrays = {name: jnp.asarray(inputs[name], dtype) for name in ("x", "dt", "A", "B", "C")}
    with dispatch.target_platform(*target), pytest.raises(UserError, match=reason):
        selective_scan(**arrays, implementation="pallas_gpu")


def gradients_at_130m(devices, segments: bool, gated: bool, d_state: int = 16, dtype: str = "bfloat16"):
    """A builder: values and all gradients in a batch of 8 x 1,024, as in a training step of Mamba-1 130m."""
    del devices
    wide, narrow = (jax.ShapeDtypeStruct((8, 1024, n), dtype) for n in (1536, d_state))
    vector, A = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1536,), (1536, d_state)))
    arrays = {"x": wide, "dt": wide, "A": A, "B": narrow, "C": narrow, "D": vector, "dt_bias": vector}
    if gated:
        arrays["z"] = wide
    ids = jax.ShapeDtypeStruct((8, 1024), jnp.int32) if segments else None

    def run(arrays, ids):
        y, pull_back = jax.vjp(lambda v: selective_scan(**v, segment_ids=ids, implementation="pallas_gpu"), arrays)
        return y, pull_back(y)

    return run, (arrays, ids)


LARGEST = pytest.param(
    64,
    "float32",
    marks=pytest.mark.xfail(
        jax.__version_info__ >= (0, 12),
        reason="jax 0.12 stores no such states without bank conflicts; the [gpu] extra installs an older one",
        strict=True,
    ),
)


@pytest.mark.parametrize(("d_state", "dtype"), [(16, "bfloat16"), (32, "float32"), LARGEST])
def test_they_lower_for_hopper_wherever_jax_is_and_fit_into_shared_memory(d_state, dtype):
    function, arguments = gradients_at_130m(None, segments=True, gated=True, d_state=d_state, dtype=dtype)
    with dispatch.target_platform("gpu", 90):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 2


@pytest.mark.ahead_of_time
@pytest.mark.parametrize("general", [True, False])
def test_they_compile_for_an_h100_and_keep_their_values_in_registers(general):
    program = h100.compiled(
        "tests.ops.test_selective_scan_pallas_gpu:gradients_at_130m", segments=general, gated=general
    )
    kernels = {kernel.name.removesuffix("_mosaic_gpu_kernel"): kernel for kernel in program.kernels}
    assert set(kernels) == {"selective_scan_forward", "selective_scan_backward"}
    assert [kernel.spilled_bytes for kernel in program.kernels] == [0, 0]
    # As many as let four blocks (forward) and two (backward) of 128 threads share a multiprocessor.
    assert kernels["selective_scan_forward"].registers <= 128
    assert kernels["selective_scan_backward"].registers <= 200
