"""Arithmetic, kernels and kept activations are read from a program's trace."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from biomamba_jax.ops import dispatch, selective_scan, ssd
from biomamba_jax.planning.costs import program_costs

LAYERS, ROWS, WIDTH = 5, 8, 16


def stack(x, weights, policy=jax.checkpoint_policies.everything_saveable):
    def layer(x, w):
        return jnp.sin(x @ w), None

    return jnp.sum(jax.lax.scan(jax.checkpoint(layer, policy=policy), x, weights)[0])


X, WEIGHTS = jnp.ones((ROWS, WIDTH)), jnp.ones((LAYERS, WIDTH, WIDTH))
PRODUCT = 2 * ROWS * WIDTH * WIDTH
ONE_DEVICE = Mesh(np.array(jax.devices()[:1]), ("data",))


def gradient(policy):
    return jax.grad(lambda x, w: stack(x, w, getattr(jax.checkpoint_policies, policy)), argnums=(0, 1))


def test_products_in_a_loop_count_as_often_as_it_runs():
    assert program_costs(jax.make_jaxpr(stack)(X, WEIGHTS)).flops == LAYERS * PRODUCT


@pytest.mark.parametrize(("policy", "products"), [("everything_saveable", 3), ("nothing_saveable", 4)])
def test_a_gradient_costs_three_products_and_recomputation_one_more(policy, products):
    assert program_costs(jax.make_jaxpr(gradient(policy))(X, WEIGHTS)).flops == products * LAYERS * PRODUCT


def test_saved_activations_are_what_the_loop_over_layers_stacks():
    everywhere = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec(), "check_vma": False}
    whole = jax.shard_map(gradient("nothing_saveable"), mesh=ONE_DEVICE, **everywhere)
    costs = program_costs(jax.make_jaxpr(whole)(X, WEIGHTS), layers=LAYERS)
    assert costs.saved_bytes == 4 * LAYERS * X.size  # each layer's input


def double(x_ref, y_ref):
    y_ref[...] = x_ref[...] + x_ref[...]


def square(x_ref, y_ref):
    y_ref[...] = x_ref[...] @ x_ref[...]


def call(kernel, x, **options):
    block, grid = pl.BlockSpec((16, 16), lambda i: (i, 0)), (x.shape[0] // 16,)
    options |= {"out_shape": x, "grid": grid, "in_specs": [block], "out_specs": block, "name": kernel.__name__}
    return pl.pallas_call(kernel, **options)(x)


def guarded(x_ref, y_ref):
    @pl.when(pl.program_id(0) == 0)
    def _():
        y_ref[...] = jnp.exp(x_ref[...])

    def step(_, total):
        return total * x_ref[...] + 1.0

    y_ref[...] = jax.lax.fori_loop(0, 7, step, 0.0 + x_ref[...])


def test_costs_of_kernels_are_read_from_their_bodies():
    x = jnp.ones((64, 16))
    both_cores = pltpu.CompilerParams(dimension_semantics=("parallel",))

    def program(x):
        return call(guarded, call(square, call(double, call(double, x))), compiler_params=both_cores)

    costs = program_costs(jax.make_jaxpr(program)(x))
    by_name = {kernel.name: kernel for kernel in costs.kernels}
    double_, square_, guarded_ = (by_name[name] for name in ("double", "square", "guarded"))
    assert (double_.calls, double_.vector_operations, double_.flops, double_.parallel) == (2, x.size, 0, 1)
    assert double_.bytes == 2 * 4 * x.size
    assert (square_.calls, square_.flops, square_.vector_operations) == (1, 4 * 2 * 16**3, 0)
    assert (guarded_.vector_operations, guarded_.parallel) == (7 * 2 * x.size, 4)  # not what only the first block does
    assert costs.flops == square_.flops


def test_the_vector_work_of_the_scan_counts_all_that_is_fused_into_it():
    rows, length, channels, d_state = 2, 256, 512, 16
    wide, states = ((rows, length, channels), jnp.bfloat16), ((rows, length, d_state), jnp.bfloat16)
    vector = ((channels,), jnp.float32)
    arguments = [wide, wide, ((channels, d_state), jnp.float32), states, states, vector, wide, vector]

    def operations(D, z, dt_bias):
        with dispatch.target_platform("tpu"):
            shapes = [jax.ShapeDtypeStruct(*a) for a in arguments]
            run = lambda *a: selective_scan(*a[:5], a[5] if D else None, z=a[6] if z else None, dt_bias=a[7])  # noqa: E731
            (kernel,) = program_costs(jax.make_jaxpr(run)(*shapes)).kernels
        assert kernel.parallel == rows
        return kernel.vector_operations / (rows * length * channels)

    # Of each state: exponent and its exp2, decay, input, sum, output; half an addition of outputs, then the sum over
    # eight sublanes. Softplus, skip and gate come on top.
    recurrence = d_state * 6.5 + 7 / 8 * 8
    assert recurrence < operations(D=True, z=False, dt_bias=True) < recurrence + 32
    assert operations(D=True, z=True, dt_bias=True) >= operations(D=True, z=False, dt_bias=True) + 3  # z sigmoid(z) y


def gradient_costs(op, arguments, *platform):
    """Of values and all gradients."""
    shapes = tuple(jax.ShapeDtypeStruct(*a) for a in arguments)
    with dispatch.target_platform(*platform):
        return program_costs(jax.make_jaxpr(lambda a: jax.vjp(lambda a: op(*a), a)[1](a[0]))(shapes))


@pytest.mark.parametrize("groups", [1, 8])
def test_ssd_on_hopper_costs_its_products_and_its_traffic(groups):
    rows, length, heads, headdim, states, chunk = 2, 256, 8, 64, 128, 64
    wide, narrow = (rows, length, heads, headdim), (rows, length, groups, states)
    half, single = jnp.bfloat16, jnp.float32
    arguments = ((wide, half), (wide[:3], half), ((heads,), single), (narrow, half), (narrow, half))
    costs = gradient_costs(partial(ssd, implementation="pallas_gpu"), arguments, "gpu", 90)
    # In units of two FLOPs a token and head; both sides of the gradient multiply scores once for a group's heads.
    square, by_state, through = chunk * headdim, chunk * states, states * headdim
    wanted = {
        "ssd_forward": by_state + square + 2 * through,
        "ssd_backward_states": through,
        "ssd_backward": 2 * (2 * square + 2 * through) + 4 * by_state * groups / heads,
    }
    tokens = rows * length * heads
    assert {kernel.name: kernel.flops / (2 * tokens) for kernel in costs.kernels} == wanted
    assert costs.flops == sum(kernel.flops for kernel in costs.kernels)
    values = rows * length * (heads * headdim + 2 * groups * states)
    assert all(kernel.calls == 1 and kernel.bytes > 2 * values for kernel in costs.kernels)


def test_the_scan_on_hopper_moves_about_what_it_moves_on_tpu():
    rows, length, channels, states = 2, 256, 128, 16
    wide, narrow = (rows, length, channels), (rows, length, states)
    half = jnp.bfloat16
    arguments = ((wide, half), (wide, half), ((channels, states), jnp.float32), (narrow, half), (narrow, half))
    gpu, tpu = (gradient_costs(selective_scan, arguments, *p).kernels for p in (("gpu", 90), ("tpu", None)))
    assert [kernel.name for kernel in gpu] == ["selective_scan_forward", "selective_scan_backward"]
    assert [kernel.bytes for kernel in gpu] == pytest.approx([kernel.bytes for kernel in tpu], rel=0.2)


def test_work_outside_shard_map_is_divided_over_the_devices_and_work_inside_is_per_device():
    spec = PartitionSpec("data")
    inside = jax.shard_map(lambda x, w: x @ w, mesh=ONE_DEVICE, in_specs=(spec, PartitionSpec()), out_specs=spec)
    jaxpr = jax.make_jaxpr(lambda x, w: (inside(x, w), x @ w))(X, WEIGHTS[0])
    assert program_costs(jaxpr, devices=4).flops == PRODUCT + PRODUCT / 4
