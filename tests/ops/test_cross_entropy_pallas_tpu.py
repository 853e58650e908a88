"""The TPU kernels of `linear_cross_entropy`: interpreted on the CPU against full logits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from biomamba_jax.errors import UserError
from biomamba_jax.ops import dispatch, linear_cross_entropy
from biomamba_jax.ops.cross_entropy import pallas_tpu
from biomamba_jax.ops.cross_entropy.loss import LossOptions
from tests.devices import on_devices
from tests.ops.test_cross_entropy import Case, assert_close, in_dtype, random_inputs, sums_and_gradients
from tests.tolerances import TOLERANCES

CASES = {
    "two ragged blocks of tokens and of ids": (Case(600, 24, 1300, 1290, None, 0.1, 1e-2), "float32"),
    "three blocks of each, the last ones ragged": (Case(1100, 40, 2200, 2190, None, 0.1, 1e-2), "bfloat16"),
    "one ragged block, every id valid": (Case(40, 130, 300, 300, None, 0.0, 0.0), "bfloat16"),
    "blocks of padding alone, all of the target smoothed": (Case(9, 8, 2500, 3, None, 1.0, 1e-3), "float32"),
}


def interpreted(case: Case):
    """`sums_and_gradients` by the kernels."""
    options = LossOptions(case.valid, case.label_smoothing, case.z_loss)

    def loss(hidden, weight, targets, weights):
        sums = pallas_tpu.linear_cross_entropy(hidden, weight, targets, weights, options, interpret=True)
        return 3 * sums.loss, sums

    compute = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return lambda inputs: compute(*(inputs[name] for name in ("hidden", "weight", "targets", "weights")))


def assert_equals_full_logits(case: Case, inputs, results, dtype: str) -> None:
    """Compares (_, sums), gradients with the oracle's in float64 on the same inputs."""
    (_, sums), gradients = results
    with jax.enable_x64(True):
        exact = inputs | {name: inputs[name].astype(jnp.float64) for name in ("hidden", "weight")}
        (_, want), want_gradients = sums_and_gradients(case, "reference")(exact)
    tolerance = TOLERANCES["linear_cross_entropy", dtype]
    for value, expected in zip(sums, want, strict=True):
        assert_close(value, expected, tolerance.value)
    for gradient, expected in zip(gradients, want_gradients, strict=True):
        assert_close(gradient, expected, tolerance.gradient)


def inputs_of(case: Case, seed: int, dtype: str = "float32") -> dict[str, jax.Array]:
    """Random inputs; every second hidden state is its target's row, so that some predictions are right.

    The weight is one of `dtype`, whose rounding, the same in every implementation, moves logits of such a size by more
    than the tolerance.
    """
    inputs = random_inputs(case, seed)
    inputs["weight"] = np.asarray(jnp.asarray(inputs["weight"], dtype), np.float64)
    inputs["hidden"][::2] = inputs["weight"][inputs["targets"][::2]]
    return in_dtype(inputs, dtype)


@pytest.mark.parametrize(("case", "dtype"), CASES.values(), ids=CASES)
def test_sums_and_gradients_match_full_logits(case, dtype):
    inputs = inputs_of(case, 1, dtype)
    results = interpreted(case)(inputs)
    assert [g.dtype for g in results[1]] == [inputs["hidden"].dtype, inputs["weight"].dtype]
    assert_equals_full_logits(case, inputs, results, dtype)


def test_rows_of_padding_take_no_part_whatever_they_hold_and_huge_logits_stay_finite():
    case = Case(40, 24, 300, 290, None, 0.1, 0.0)
    inputs = in_dtype(random_inputs(case, 2, scale=1e5), "float32")
    compute = interpreted(case)
    (_, sums), gradients = compute(inputs)
    assert all(np.all(np.isfinite(v)) for v in (*sums, *gradients))
    inputs["weight"] = inputs["weight"].at[case.valid :].set(np.nan)
    (_, changed), changed_gradients = compute(inputs)
    jax.tree.map(np.testing.assert_array_equal, (sums, gradients), (changed, changed_gradients))
    assert np.all(gradients[1][case.valid :] == 0)


@on_devices(4)
def test_a_vocabulary_sharded_over_devices_of_which_one_has_padding_alone_gives_the_same():
    case = Case(70, 24, 1200, 700, None, 0.1, 1e-2)
    inputs = inputs_of(case, 3)
    options = LossOptions(case.valid, case.label_smoothing, case.z_loss, axis="tensor")

    def local(hidden, weight, targets, weights):
        def loss(hidden, weight):
            sums = pallas_tpu.linear_cross_entropy(hidden, weight, targets, weights, options, interpret=True)
            return 3 * sums.loss, sums

        results, (d_hidden, d_weight) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, weight)
        return results, (jax.lax.psum(d_hidden, "tensor"), d_weight)

    mesh, sharded = Mesh(np.asarray(jax.devices()), ("tensor",)), P("tensor")
    specs = {"in_specs": (P(), sharded, P(), P()), "out_specs": (P(), (P(), sharded))}
    compute = jax.jit(jax.shard_map(local, mesh=mesh, check_vma=False, **specs))
    results = compute(*(inputs[name] for name in ("hidden", "weight", "targets", "weights")))
    assert_equals_full_logits(case, inputs, results, "float32")


def test_a_tpu_program_takes_the_kernels_where_they_are_named_and_another_program_cannot():
    hidden, targets, weight = jnp.zeros((1024, 64), jnp.bfloat16), jnp.zeros(1024, jnp.int32), jnp.zeros((8192, 64))
    named = partial(linear_cross_entropy, implementation="pallas_tpu")
    with dispatch.target_platform("tpu"):
        assert "pallas_call" in str(jax.make_jaxpr(named)(hidden, weight, targets))
        assert "pallas_call" not in str(jax.make_jaxpr(linear_cross_entropy)(hidden, weight, targets))
    with pytest.raises(UserError, match="'pallas_tpu' cannot be used: it needs a TPU, and this program is for cpu"):
        named(hidden, weight, targets)
