"""Adapters: what they are put on, that they start as nothing, and that merged and apart they compute the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from random_weights import random_weights

from biomamba_jax.config import ModelConfig
from biomamba_jax.errors import UserError
from biomamba_jax.model import LanguageModel
from biomamba_jax.model.language_model import Block
from biomamba_jax.model.lora import adapted_paths, drop_inputs, init_adapters, merge

CONFIGS = {
    "mamba1": ModelConfig(kind="mamba1", d_model=16, n_layers=3, d_state=4, vocab_size=32),
    "mamba2": ModelConfig(kind="mamba2", d_model=16, n_layers=3, d_state=4, headdim=8, vocab_size=32),
}
ALL = {
    "mamba1": ["in_x", "in_z", "x_proj", "dt_proj", "out"],
    "mamba2": ["in_z", "in_x", "in_bc", "in_dt", "out"],
}
SCALE = 1.7


def random_adapters(params, targets, rank):
    """Adapters whose B is not zero."""
    adapters = init_adapters(params, targets, rank, jax.random.key(0))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: (0.3 * random.standard_normal(x.shape)).astype(x.dtype), adapters)


def model_of(config, params):
    return nnx.merge(
        nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))), jax.tree.map(jnp.asarray, params)
    )


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_targets_are_found_by_their_paths_and_by_their_released_names(kind):
    params = random_weights(CONFIGS[kind]).params
    names = [f"layers/mixer/{name}/kernel" for name in ALL[kind]]
    assert set(adapted_paths(params, ["in_proj|x_proj|dt_proj|out_proj"])) == set(names)
    assert adapted_paths(params, ["out_proj"]) == adapted_paths(params, [r"mixer/out/"]) == ["layers/mixer/out/kernel"]
    assert adapted_paths(params, ["^embedding$"]) == ["embedding"]


@pytest.mark.parametrize("target", ["x_proj", "norm", "conv", "A_log", "typo"])
def test_a_target_that_matches_no_matrix_is_refused_with_those_there_are(target):
    params = random_weights(CONFIGS["mamba2"]).params
    with pytest.raises(UserError, match=rf"lora.targets: '{target}' matches no matrix.*layers/mixer/in_proj/kernel"):
        adapted_paths(params, ["in_proj", target])


def test_a_target_that_is_no_regular_expression_is_refused():
    with pytest.raises(UserError, match=r"lora.targets: '\(' is not a valid regular expression"):
        adapted_paths(random_weights(CONFIGS["mamba2"]).params, ["("])


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_new_adapters_change_nothing(kind):
    params = random_weights(CONFIGS[kind]).params
    adapters = init_adapters(params, ["_proj"], 1, jax.random.key(0))
    for ours, theirs in zip(*map(jax.tree.leaves, (merge(params, adapters, SCALE), params)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_merged_and_unmerged_logits_agree(kind):
    """Unmerged as the paper draws it: y = x W + scale (x A) B, in each projection of each layer."""
    config = CONFIGS[kind]
    params = random_weights(config).params
    adapters = random_adapters(params, ["_proj"], 1)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 32, (2, 21)))

    graph = nnx.graphdef(nnx.eval_shape(lambda: Block(config, dtype=jnp.float32, rngs=nnx.Rngs(0))))

    @jax.jit
    def run_layer(params, adapters, h):
        block = nnx.merge(graph, params)
        for name in ALL[kind]:
            linear, pair = getattr(block.mixer, name), adapters["mixer"][name]["kernel"]
            setattr(block.mixer, name, Unmerged(linear, pair["a"], pair["b"]))
        return block(h, None, None)[0]

    h = params["embedding"][tokens]
    for layer in range(config.n_layers):
        h = run_layer(*(jax.tree.map(lambda x, i=layer: x[i], tree["layers"]) for tree in (params, adapters)), h)
    unmerged = model_of(config, params).norm_f(h) @ params["embedding"].T

    run = jax.jit(lambda params: model_of(config, params)(tokens)[0])
    merged, plain = run(merge(params, adapters, SCALE)), run(params)
    np.testing.assert_allclose(merged, unmerged, atol=1e-5, rtol=1e-5)
    assert np.abs(merged - plain).max() > 0.1


class Unmerged(nnx.Linear):
    """A projection next to its adapter."""

    def __init__(self, linear, a, b):
        self.linear, self.a, self.b = linear, nnx.Param(a), nnx.Param(b)

    @property
    def kernel(self):
        raise AssertionError("a projection was read past its adapter")

    def __call__(self, x):
        return self.linear(x) + SCALE * (x @ self.a[...]) @ self.b[...]


def test_tied_and_untied_embeddings_can_be_adapted():
    config = dataclasses.replace(CONFIGS["mamba2"], tie_embeddings=False)
    params = random_weights(config).params
    adapters = random_adapters(params, ["embedding", "lm_head"], 2)
    merged = merge(params, adapters, SCALE)
    for name in ("embedding", "lm_head"):
        pair = adapters[name]
        np.testing.assert_allclose(merged[name], params[name] + SCALE * (pair["a"] @ pair["b"]), rtol=1e-5, atol=1e-6)


def test_what_is_no_pair_is_put_in_as_it_is():
    params = random_weights(CONFIGS["mamba2"]).params
    merged = merge(params, {"classifier": jnp.ones((3, 16))}, SCALE)
    assert flatten_dict(merged, sep="/").keys() == flatten_dict(params, sep="/").keys() | {"classifier"}


def test_dropout_leaves_out_whole_input_channels_and_keeps_the_mean():
    params = random_weights(dataclasses.replace(CONFIGS["mamba2"], d_model=64)).params
    adapters = random_adapters(params, ["in_x"], 2)
    a = adapters["layers"]["mixer"]["in_x"]["kernel"]["a"]
    drop = jax.jit(lambda key: drop_inputs(adapters, 0.25, key)["layers"]["mixer"]["in_x"]["kernel"])
    dropped = np.stack([drop(jax.random.key(seed))["a"] for seed in range(400)])
    rows = np.abs(dropped).max(-1) == 0
    assert 0.23 < rows.mean() < 0.27
    np.testing.assert_allclose(dropped[0][~rows[0]], (a / 0.75)[~rows[0]], rtol=1e-6)
    np.testing.assert_allclose(dropped.mean(0), a, atol=0.15)
    np.testing.assert_array_equal(drop(jax.random.key(0))["b"], adapters["layers"]["mixer"]["in_x"]["kernel"]["b"])
