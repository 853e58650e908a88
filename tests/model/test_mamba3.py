"""Mamba-3 against a plain loop in float64, from weights in the authors' layout; packing and decoding of all kinds are
in test_language_model.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import random_model, random_weights
from safetensors.numpy import load_file

import biomamba_jax
from biomamba_jax import convert
from biomamba_jax.config import ModelConfig
from biomamba_jax.config.generate import Sampling
from biomamba_jax.interop import write_model
from biomamba_jax.interop.names import foreign_tensors
from biomamba_jax.model.decode import InferenceModel
from biomamba_jax.model.state import empty_state
from biomamba_jax.ops.numerics import segment_cumsum
from biomamba_jax.parallel.sharding import leaves_by_path
from tests.model import mamba3_reference

SISO = ModelConfig(
    kind="mamba3", d_model=32, n_layers=2, vocab_size=64, d_state=16, headdim=16, d_intermediate=100, chunk_size=8
)
CONFIGS = {
    "siso": SISO,
    "all of the state rotates": dataclasses.replace(SISO, rope_fraction=1.0),
    "groups": dataclasses.replace(SISO, n_groups=2),
    "norm before the gate": dataclasses.replace(SISO, outproj_norm=True),
    "no MLP, slowest decay": dataclasses.replace(SISO, d_intermediate=0, a_floor=0.9),
    "mimo": dataclasses.replace(SISO, mimo_rank=3),
    "mimo, all flags": dataclasses.replace(SISO, mimo_rank=2, n_groups=2, rope_fraction=1.0, outproj_norm=True),
    "mimo of rank 1": dataclasses.replace(SISO, mimo_rank=1),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_logits_are_those_of_the_plain_loop(name):
    config = CONFIGS[name]
    weights = random_weights(config)
    flat = leaves_by_path(weights.params)
    released = {tensor.key: tensor.build(flat) for tensor in foreign_tensors(config, "mamba_ssm")}
    text = np.random.default_rng(0).integers(0, 64, 21)
    want = mamba3_reference.language_model(config, released, text)
    with jax.enable_x64(True):
        graph = nnx.graphdef(random_model(config, dtype=jnp.float64))
        params = jax.tree.map(lambda x: x.astype(np.float64), weights.params)
        logits, _ = jax.jit(lambda params: nnx.merge(graph, params)(jnp.asarray(text[None], jnp.int32)))(params)
    assert np.max(np.abs(logits[0] - want)) <= 1e-6 * np.max(np.abs(want))


@pytest.mark.parametrize("name", ["siso", "mimo"])
def test_nothing_at_all_crosses_the_end_of_a_document(name):
    """Not even a rounding error: the terms of the next document's first token and the angles of the last one."""
    model = random_model(CONFIGS[name])
    segment_ids = jnp.asarray(np.repeat([[1, 2]], [10, 14], axis=1))
    texts = np.random.default_rng(1).integers(0, 64, (2, 24), np.int32)
    call = nnx.jit(lambda model, text: model(text[None], None, segment_ids)[0][0])
    first, second = texts[0], texts[1]
    whole = call(model, first)
    for inside in (np.arange(24) < 10, np.arange(24) >= 10):
        changed = call(model, np.where(inside, first, second))
        np.testing.assert_array_equal(whole[inside], changed[inside])


def test_a_running_sum_keeps_its_digits_over_a_long_row():
    """Without its period subtracted, float32 would lose two digits of an angle of 15,000 radians."""
    terms = np.random.default_rng(0).uniform(0, 0.3, (1, 100_000, 2)).astype(np.float32)
    exact = np.cumsum(terms.astype(np.float64), axis=1)[:, -1]
    got = np.asarray(segment_cumsum(jnp.asarray(terms), period=2 * np.pi))[:, -1]
    np.testing.assert_allclose(np.exp(1j * got), np.exp(1j * exact), atol=1e-3)


@pytest.mark.parametrize("name", ["siso", "mimo, all flags"])
def test_decoding_with_a_state_gives_the_logits_of_the_whole_text(name):
    config = CONFIGS[name]
    weights = random_weights(config)
    text = jnp.asarray(np.random.default_rng(1).integers(0, 64, (2, 12), np.int32))
    want, _ = nnx.jit(lambda model: model(text))(random_model(config))
    model = InferenceModel.from_params(config, weights.params)
    call = jax.jit(lambda model, tokens, states: model.hidden(tokens, states))
    hidden, states = call(model, text[:, :9], (empty_state(config, 2, jnp.float32),) * config.n_layers)
    parts = [hidden]
    for t in range(9, 12):
        hidden, states = call(model, text[:, t : t + 1], states)
        parts.append(hidden)
    got = model.logits(jnp.asarray(np.concatenate(parts, axis=1)))
    assert np.max(np.abs(got - want)) <= 1e-5 * np.max(np.abs(want))


@pytest.mark.parametrize("name", ["siso", "mimo, all flags"])
def test_a_folder_converted_from_the_authors_layout_generates_the_plain_loops_likeliest_tokens(name, tmp_path):
    weights = random_weights(CONFIGS[name])
    weights.params["norm_f"]["weight"] *= 8  # otherwise the likeliest tokens are nearly equal
    write_model(weights, tmp_path / "released", "mamba_ssm")
    convert.main(["--input", f"{tmp_path}/released", "--output", f"{tmp_path}/native", "--to", "native"])
    released, prompts = load_file(tmp_path / "released" / "model.safetensors"), [[3, 1, 4, 15, 9], [26]]
    generated = biomamba_jax.load(tmp_path / "native").generator.decode(prompts, Sampling(max_new_tokens=8))
    for text, new in zip(prompts, generated, strict=True):
        logits = mamba3_reference.language_model(CONFIGS[name], released, np.array(text + new))[len(text) - 1 : -1]
        assert new == np.argmax(logits, axis=-1).tolist()
