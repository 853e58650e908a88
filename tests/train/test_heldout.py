"""Held-out loss: of every token of the split, in nats, and in bits per byte of its text."""

import math

import jax
import numpy as np
import pytest
from random_weights import random_weights
from synthetic import write_shards

from biomamba_jax.config import DataConfig, ModelConfig
from biomamba_jax.data.shards import Manifest
from biomamba_jax.parallel.mesh import make_mesh
from biomamba_jax.train.heldout import held_out_evaluator
from biomamba_jax.train.program import abstract_model

MODEL = ModelConfig(d_model=16, n_layers=1, vocab_size=31, headdim=8, d_state=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_shards(tmp_path_factory.mktemp("held out") / "shards")
    return DataConfig(path=str(folder), sequence_length=32, batch_size=2)


@pytest.mark.parametrize("count", [None, 1])
def test_a_model_that_knows_nothing_needs_log_v_nats_per_token_and_log2_v_bits(data, count):
    graph, layout = abstract_model(MODEL, make_mesh(devices=jax.devices()[:1]))
    params = random_weights(MODEL).params
    params["embedding"] = np.zeros((32, 16), np.float32)  # the head too: all logits are 0
    found = held_out_evaluator(graph, data, layout, count)(params)
    info = Manifest.load(data.path).splits["validation"]
    assert found["loss"] == pytest.approx(math.log(31), rel=1e-5)
    assert found["perplexity"] == pytest.approx(31, rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(math.log2(31) * info.tokens / info.bytes, rel=1e-5)
    assert (found["tokens"] == info.tokens) == (count is None)
