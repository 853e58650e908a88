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
from biomamba_jax.interop import read_model, write_model
from biomamba_jax.interop.names import foreign_tensors
from biomamba_jax.model.decode import InferenceModel
from biomamba_jax.model.mamba3 import Mamba3Mixer
from biomamba_jax.model.state import MixerState, empty_state
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


def authors(n, p, ranks, heads, length, groups=1, **options) -> tuple[ModelConfig, int]:
    """A mixer of a test of the authors', and the length of its rows."""
    sizes = {"d_model": 64, "expand": heads * p // 64, "d_state": n, "headdim": p, "n_groups": groups}
    return ModelConfig(kind="mamba3", n_layers=1, vocab_size=16, mimo_rank=ranks, **sizes, **options), length


# Their kernels' tests, row by row of the batch: test_mamba3_siso.py, test_mamba3_mimo.py and test_mamba3_mimo_step.py.
MIMO_SIZES = [
    *((16, 64, 4), (32, 64, 4), (64, 64, 4), (128, 64, 4), (256, 64, 4), (64, 128, 4), (128, 32, 4), (128, 128, 4)),
    *((128, 64, 8), (128, 64, 2), (128, 64, 1)),
]
AUTHORS = {
    "siso step": authors(128, 64, None, 64, 32),
    "siso step, norm": authors(128, 64, None, 64, 32, outproj_norm=True),
    "mimo step": authors(128, 64, 4, 64, 32),
    "mimo step, norm": authors(128, 64, 4, 64, 32, outproj_norm=True),
    "mimo smoke": authors(64, 32, 4, 8, 64, rope_fraction=1.0),
}
LONG = {"siso": authors(128, 64, None, 32, 2345, groups=4)}
LONG |= {f"mimo N{n} P{p} R{ranks}": authors(n, p, ranks, 16, 2048) for n, p, ranks in MIMO_SIZES}
MIXERS = AUTHORS | {f"ours: {name}": (config, 37) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("name", [*MIXERS, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
def test_a_mixers_outputs_and_states_are_those_of_the_step_and_chunk_references(name):
    """From a state and to a state, in float64, at the sizes of the authors' tests and at ours."""
    config, length = (MIXERS | LONG)[name]
    weights, random = random_weights(config), np.random.default_rng(2)
    flat = leaves_by_path(weights.params)
    tensors = {tensor.key: tensor.build(flat) for tensor in foreign_tensors(config, "mamba_ssm")}
    prefix = "backbone.layers.0.mixer."
    released = {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
    inputs = random.standard_normal((length, config.d_model))
    before = mamba3_reference.State(*map(random.standard_normal, map(np.shape, mamba3_reference.empty_state(config))))
    order = np.arange(config.state_size)  # of the state's dimensions: their rotating pairs are neighbours in SISO
    if config.mimo_rank is None:
        order = order.reshape(-1, 2).T.ravel()
    with jax.enable_x64(True):
        graph = nnx.graphdef(nnx.eval_shape(lambda: Mamba3Mixer(config, dtype=jnp.float64, rngs=nnx.Rngs(0))))
        params = jax.tree.map(lambda x: x[0].astype(np.float64), weights.params["layers"]["mixer"])
        state = MixerState(
            before.ssm[None, ..., order],
            angle=before.angle[None],
            last_x=before.last_v[None],
            last_B=before.last_k[None, ..., order],
        )
        run = jax.jit(lambda params, inputs, state: nnx.merge(graph, params)(inputs, state, None))
        y, after = jax.device_get(run(params, inputs[None], state))
    for recurrence in (mamba3_reference.token_by_token, mamba3_reference.in_chunks):
        want_y, want = mamba3_reference.mixer(config, released, inputs, before, recurrence)
        pairs = {
            "y": (y[0], want_y),
            "angle": (np.exp(1j * after.angle[0]), np.exp(1j * want.angle)),
            "ssm": (after.ssm[0], want.ssm[..., order]),
            "last x": (after.last_x[0], want.last_v),
            "last B": (after.last_B[0], want.last_k[..., order]),
        }
        for part, (got, wanted) in pairs.items():
            error = np.max(np.abs(got - wanted)) / np.max(np.abs(wanted))
            assert error <= 1e-6, f"{recurrence.__name__}: {part} is off by {error:.1e}"


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
def test_prefill_in_one_call_or_in_two_and_decoding_give_the_plain_loops_logits_from_the_authors_layout(name, tmp_path):
    folder = tmp_path / "released"
    write_model(random_weights(CONFIGS[name]), folder, "mamba_ssm")
    text = np.random.default_rng(1).integers(0, 64, 24, np.int32)
    want = mamba3_reference.language_model(CONFIGS[name], load_file(folder / "model.safetensors"), text)
    weights = read_model(folder)
    model = InferenceModel.from_params(weights.config, weights.params, jnp.float32)
    call = jax.jit(lambda model, tokens, states: model.hidden(tokens, states))
    for lengths in ((24,), (12, 12), (12, *[1] * 12)):
        states = (empty_state(weights.config, 1, jnp.float32),) * weights.config.n_layers
        parts = []
        for part in np.split(text, np.cumsum(lengths)[:-1]):
            hidden, states = call(model, part[None], states)
            parts.append(hidden[0])
        got = model.logits(jnp.asarray(np.concatenate(parts)))
        assert np.max(np.abs(got - want)) <= 1e-5 * np.max(np.abs(want)), lengths


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
