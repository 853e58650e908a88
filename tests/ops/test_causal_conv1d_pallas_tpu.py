"""The TPU kernels of `causal_conv1d`: interpreted on the CPU against the plain loop, and compiled with no TPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from biomamba_jax.errors import UserError
from biomamba_jax.ops import causal_conv1d, dispatch
from biomamba_jax.ops.causal_conv1d import pallas_tpu
from biomamba_jax.ops.causal_conv1d.inputs import Inputs
from tests.ops.oracles import in_dtype, segment_layouts
from tests.ops.test_causal_conv1d import ACTIVATIONS, ARRAYS, SHAPES, Shape, assert_equals_oracle, random_inputs

interpreted = partial(assert_equals_oracle, implementation="pallas_tpu")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@settings(max_examples=4)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_equals_the_plain_loop_in_values_and_all_gradients(shape, data, seed):
    segment_ids = data.draw(segment_layouts(shape.rows, shape.length))
    interpreted(in_dtype(random_inputs(shape, seed), "float32", ACTIVATIONS), segment_ids, "float32")


@settings(max_examples=4)
@given(segment_ids=segment_layouts(2, 19), seed=st.integers(0, 2**32 - 1))
def test_bfloat16_inputs_lose_no_more_than_the_rounding_of_the_results(segment_ids, seed):
    interpreted(in_dtype(random_inputs(SHAPES[0], seed), "bfloat16", ACTIVATIONS), segment_ids, "bfloat16")


def test_taps_reach_over_the_edges_of_chunks_and_tiles_are_independent(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "_CHUNK", 16)
    monkeypatch.setattr(pallas_tpu, "_TILE", 128)
    inputs = in_dtype(random_inputs(Shape(rows=2, length=40, channels=130, width=4), 0), "float32", ACTIVATIONS)
    segment_ids = np.repeat((np.arange(40, dtype=np.int32) // 17)[None], 2, axis=0)
    interpreted(inputs, segment_ids, "float32")


def test_activation_bias_segments_and_state_can_be_left_out():
    inputs = in_dtype(random_inputs(SHAPES[0], 1), "float32", ACTIVATIONS)
    del inputs["bias"], inputs["initial_state"]
    interpreted(inputs, None, "float32", activation=None)


def test_the_race_detector_reports_none(monkeypatch):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # no public way to the verdict yet

    monkeypatch.setattr(pallas_tpu, "_CHUNK", 16)
    inputs = in_dtype(random_inputs(Shape(rows=1, length=32, channels=128, width=4), 2), "float32", ACTIVATIONS)
    given = Inputs(**{name: inputs[name] for name in ARRAYS})
    checked = partial(pallas_tpu.causal_conv1d, activation="silu", interpret=pltpu.InterpretParams(detect_races=True))
    y, pull_back = jax.vjp(lambda x: jax.jit(checked)(given._replace(x=x))[0], given.x)
    jax.block_until_ready(pull_back(y))
    assert interpret_pallas_call.races.races_found is False


def test_a_tpu_program_takes_the_kernels_but_not_for_a_few_tokens():
    inputs = in_dtype(random_inputs(Shape(rows=1, length=64, channels=8, width=4), 3), "float32", ACTIVATIONS)
    x, weight = inputs["x"], inputs["weight"]
    with dispatch.target_platform("tpu"):
        assert "pallas_call" in str(jax.make_jaxpr(causal_conv1d)(x, weight))
        assert "pallas_call" not in str(jax.make_jaxpr(causal_conv1d)(x[:, :1], weight))


@pytest.mark.usefixtures("unchecked_shapes")
def test_without_a_tpu_the_kernels_refuse_and_say_why():
    with pytest.raises(UserError, match="'pallas_tpu' cannot be used: it needs a TPU, and this program is for cpu"):
        causal_conv1d(jnp.zeros((1, 64, 8)), jnp.zeros((8, 4)), implementation="pallas_tpu")
