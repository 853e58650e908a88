"""Embeddings: transformers' hidden states pooled in float64, whatever the batch, the row or the length."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import CONFIGS, train_tokenizer, write_tiny_model

import biomamba_jax
from biomamba_jax.config.embed import EmbeddingConfig
from biomamba_jax.errors import UserError
from biomamba_jax.interop import read_model, write_model

TEXTS = ["insulin", "the patients were given insulin, and serum glucose fell", "", "β-cell mice (p<0.05). " * 4]
POOLINGS = ("mean", "last", "weighted")


@pytest.fixture(scope="module", params=list(CONFIGS))
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    native = write_tiny_model(path / "native", request.param, train_tokenizer(path), spread=1)
    write_model(read_model(native), path / "hf", "hf")
    return path


@pytest.fixture(scope="module")
def model(folder):
    return biomamba_jax.load(folder / "native")


def test_embeddings_are_the_pooled_hidden_states_of_transformers(folder, model):
    import torch
    import transformers

    reference = transformers.AutoModel.from_pretrained(folder / "hf")
    for text, *found in zip(TEXTS, *(model.embed(TEXTS, pooling=pooling) for pooling in POOLINGS), strict=True):
        ids = [model.tokenizer.start_id, *model.tokenizer.encode_batch([text])[0]]
        with torch.no_grad():
            states = reference(torch.tensor([ids])).last_hidden_state[0].double().numpy()
        of_text = states[1:] if len(ids) > 1 else states
        positions = np.arange(1, len(of_text) + 1)
        expected = [of_text.mean(0), of_text[-1], positions @ of_text / positions.sum()]
        for vector, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(vector, wanted, atol=2e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_text_in_many_rows_equals_the_text_in_one(model, pooling):
    whole = model.embed(TEXTS, pooling=pooling)
    np.testing.assert_allclose(model.embed(TEXTS, pooling=pooling, chunk=16), whole, atol=1e-5)
    assert np.abs(whole[0] - whole[3]).max() > 0.05


def test_a_text_does_not_depend_on_the_others_of_its_batch(model):
    together = model.embed(TEXTS, chunk=16, batch_size=3)
    alone = np.concatenate([model.embed(text, chunk=16) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_hidden_states_that_are_nan_are_refused(tmp_path):
    folder = write_tiny_model(tmp_path / "broken", "mamba2", train_tokenizer(tmp_path), spread=float("nan"))
    with pytest.raises(UserError, match="NaN or infinite"):
        biomamba_jax.load(folder).embed("insulin")


def test_a_text_of_any_length_is_computed_by_the_programs_of_one_row(model, caplog):
    def compiled(rows: int) -> int:
        with jax.log_compiles():
            model.embedder(EmbeddingConfig(chunk=64)).of_ids([[model.tokenizer.start_id, *[5] * (64 * rows - 1)]])
        return sum("_weighted_sums" in record.getMessage() for record in caplog.records)

    two = compiled(2)
    assert two > 0
    assert compiled(40) == two


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's account of memory")
def test_a_hundred_thousand_tokens_take_the_memory_of_ten_thousand(model):
    embedder = model.embedder(EmbeddingConfig(chunk=1024))

    def growth(tokens: int) -> int:
        """Return the bytes by which the process's memory grows at most."""
        rows = [[model.tokenizer.start_id, *range(5, 105), *[7] * (tokens - 101)]]
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the current size
        before = _memory("VmRSS")
        embedder.of_ids(rows)
        return _memory("VmHWM") - before

    growth(10_000)  # compiles
    assert growth(100_000) < growth(10_000) + 10_000_000  # the states alone of 90,000 tokens are 11.5 MB a layer


def _memory(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])
