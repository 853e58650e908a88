"""Our models and transformers' own, on the folder that `write_model` exports: the same function and gradients."""

import dataclasses
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import random_weights

from biomamba_jax.config import ModelConfig
from biomamba_jax.interop import Weights, write_model
from biomamba_jax.interop.names import foreign_tensors
from biomamba_jax.model import LanguageModel
from biomamba_jax.parallel.sharding import leaves_by_path

torch = pytest.importorskip("torch", reason="the oracle is transformers on torch")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers on torch")

MAMBA1 = ModelConfig(kind="mamba1", d_model=32, n_layers=3, vocab_size=64, d_state=16)
MAMBA2 = ModelConfig(kind="mamba2", d_model=64, n_layers=3, vocab_size=64, d_state=16, headdim=32)
SHAPES = {
    "mamba1": MAMBA1,
    "mamba1, untied, vocabulary of 61 rows": dataclasses.replace(
        MAMBA1, tie_embeddings=False, vocab_size=61, pad_vocab_multiple=1
    ),
    "mamba1, expand 3, no conv bias": dataclasses.replace(MAMBA1, expand=3, conv_bias=False),
    "mamba1, d_state 64, dt_rank 5, conv width 3": dataclasses.replace(MAMBA1, d_state=64, dt_rank=5, d_conv=3),
    "mamba1, biases": dataclasses.replace(MAMBA1, bias=True),
    "mamba2": MAMBA2,
    "mamba2, 2 groups, untied": dataclasses.replace(MAMBA2, n_groups=2, tie_embeddings=False),
    "mamba2, 4 groups, d_state 64": dataclasses.replace(MAMBA2, n_groups=4, d_state=64),
    "mamba2, expand 3, vocabulary of 61 rows": dataclasses.replace(
        MAMBA2, expand=3, vocab_size=61, pad_vocab_multiple=1
    ),
    "mamba2, no conv bias, biases, headdim 16": dataclasses.replace(MAMBA2, conv_bias=False, bias=True, headdim=16),
}
PUBLISHED = {
    "mamba1": ModelConfig(kind="mamba1", d_model=768, n_layers=24, vocab_size=50277, pad_vocab_multiple=8),
    "mamba2": ModelConfig(kind="mamba2", d_model=768, n_layers=24, vocab_size=50277, pad_vocab_multiple=16),
}


def export(weights: Weights, folder: Path, dtype: torch.dtype = torch.float32):
    """What transformers loads from our export."""
    if not folder.exists():
        write_model(weights, folder, "hf")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def tokens(config: ModelConfig, rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, config.known_vocab, (rows, length), dtype=np.int32)


def our_logits(weights: Weights, text: np.ndarray, dtype: jnp.dtype = jnp.float32) -> np.ndarray:
    graph = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(weights.config, dtype=dtype, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), weights.params)
    logits = jax.jit(lambda p: nnx.merge(graph, p)(jnp.asarray(text))[0])(params)
    return np.asarray(logits)[..., : weights.config.known_vocab]  # an export has no rows of padding


def their_logits(model, text: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(text, dtype=torch.long)).logits.numpy()


@contextmanager
def casts_to_double():
    """transformers casts to float32 by name, in the middle of a float64 model too: those names mean float64 here."""
    with (
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        mock.patch.object(torch, "float32", torch.float64),
    ):
        yield


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_those_of_transformers(shape, tmp_path):
    weights = random_weights(SHAPES[shape])
    text = tokens(weights.config, 2, 45)
    ours, theirs = our_logits(weights, text), their_logits(export(weights, tmp_path / "hf"), text)
    assert np.abs(theirs).max() > 0.1  # there is something to compare
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", [MAMBA1, dataclasses.replace(MAMBA2, n_groups=2)], ids=["mamba1", "mamba2"])
def test_gradients_of_the_loss_equal_those_of_transformers(config, tmp_path):
    weights = random_weights(config)
    text = tokens(config, 2, 40)
    graph = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))

    @jax.jit
    @jax.grad
    def gradients(params):
        logits, _ = nnx.merge(graph, params)(jnp.asarray(text))
        log_p = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(log_p, jnp.asarray(text)[:, 1:, None], -1).mean()

    ours = leaves_by_path(gradients(jax.tree.map(jnp.asarray, weights.params)))
    model = export(weights, tmp_path / "hf")
    labels = torch.as_tensor(text, dtype=torch.long)
    model(labels, labels=labels).loss.backward()
    theirs = {path: np.zeros(x.shape, np.float32) for path, x in ours.items()}
    named = dict(model.named_parameters())
    for tensor in foreign_tensors(config, "hf"):
        tensor.read_into(theirs, named[tensor.key].grad.numpy())
    for path, expected in theirs.items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(ours[path], expected, atol=1e-4 * scale, rtol=0, err_msg=path)


def rounding_of_products(width: int) -> float:
    """Rounding error of JAX's float32 matrix products on this CPU, in units of torch's.

    The two libraries add `width` terms in different orders; on an AMD Milan (AVX2) JAX's error is twice torch's.
    """
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=shape).astype(np.float32) for shape in ((512, width), (width, width)))
    exact = x.astype(np.float64) @ w.astype(np.float64)
    products = np.asarray(jax.jit(jnp.dot)(x, w)), (torch.as_tensor(x) @ torch.as_tensor(w)).numpy()
    ours, theirs = (np.sqrt(np.mean((product - exact) ** 2)) for product in products)
    return ours / theirs


@pytest.mark.long
@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_130m_shape_is_exact_in_float64_and_rounds_like_transformers_in_float32(kind, tmp_path):
    weights = random_weights(PUBLISHED[kind])
    text = tokens(weights.config, 1, 512)
    with jax.enable_x64(True):
        exact = our_logits(weights, text, jnp.float64)
    in_double = export(weights, tmp_path / "hf", torch.float64)
    with casts_to_double():
        theirs_exact = their_logits(in_double, text)
    np.testing.assert_allclose(exact, theirs_exact, atol=1e-6, rtol=0)
    print(f"{kind}, float64: distance {np.abs(exact - theirs_exact).max():.1e} of {np.abs(exact).max():.1f}")
    ours = np.abs(our_logits(weights, text) - exact).max()
    theirs = np.abs(their_logits(export(weights, tmp_path / "hf"), text) - exact).max()
    products = rounding_of_products(weights.config.d_model)
    print(f"{kind}: distance to float64 of ours {ours:.2e}, of transformers {theirs:.2e}; products {products:.2f}x")
    assert ours <= 2 * max(1.0, products) * theirs


def test_no_tensor_of_an_export_is_left_to_chance(tmp_path):
    weights = random_weights(MAMBA2)
    write_model(weights, tmp_path / "hf", "hf")
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
