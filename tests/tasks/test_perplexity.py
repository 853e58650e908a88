"""Perplexity: the total over all tokens, whatever the batches, rows and devices, and equal to transformers' figures."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_models import WORDS, train_tokenizer, write_tiny_model

import biomamba_jax
from biomamba_jax.interop import read_model, write_model
from biomamba_jax.ops.cross_entropy import perplexity
from biomamba_jax.tasks.documents import Document
from biomamba_jax.tasks.native_scorer import NativeScorer
from biomamba_jax.tasks.perplexity import DomainScores, compare, measure, score_domain
from biomamba_jax.tasks.statistics import Resampling

QUICK = Resampling(resamples=50)


def documents(count=12, longest=60, seed=0):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest, count)
    return [Document(str(i), " ".join(random.choice(WORDS, n))) for i, n in enumerate(lengths)]


@pytest.fixture(scope="module", params=["mamba1", "mamba2"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    return write_tiny_model(path / "native", request.param, train_tokenizer(path))


@pytest.fixture(scope="module")
def model(folder):
    return biomamba_jax.load(folder)


def scorer(model, window, batch_size):
    return NativeScorer("tiny", model.generator, "tiny", window, batch_size)


@pytest.fixture(scope="module")
def scores(model):
    """In rows that every document fits into, one row at a time."""
    return score_domain(scorer(model, 256, 1), documents())


@pytest.mark.parametrize(("window", "batch_size"), [(96, 2), (16, 3)])
def test_rows_and_batches_change_nothing(model, scores, window, batch_size):
    """Documents of up to 200 tokens: packed several a row, or carried by state over a dozen rows."""
    other = score_domain(scorer(model, window, batch_size), documents())
    np.testing.assert_array_equal(other.tokens, scores.tokens)
    np.testing.assert_allclose(other.nats, scores.nats, rtol=1e-5)
    assert other.nats.sum() == pytest.approx(scores.nats.sum(), rel=1e-6)


ON_DEVICES = """
import sys
import jax
from test_perplexity import documents, scorer
import biomamba_jax
from biomamba_jax.tasks.perplexity import score_domain

assert jax.device_count() == 4
print(score_domain(scorer(biomamba_jax.load(sys.argv[1]), 96, 3), documents()).nats.sum().item())
"""


@pytest.mark.long
def test_rows_spread_over_four_devices_give_the_figures_of_one(folder, scores):
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", ON_DEVICES, str(folder)],
        env=os.environ | devices | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) == pytest.approx(scores.nats.sum(), rel=1e-6)


def test_every_token_of_a_document_counts_once_its_end_included(model, scores):
    eos = model.tokenizer.eos_id
    rows = [[eos, *ids, eos] for ids in model.tokenizer.encode_batch([document.text for document in documents()])]
    padded = [[*row, *[0] * (max(map(len, rows)) - len(row))] for row in rows]
    logits = model.logits(padded)[..., : model.tokenizer.vocab_size].astype(np.float64)
    logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logp -= logits.max(-1, keepdims=True)
    for index, row in enumerate(rows):
        assert scores.tokens[index] == len(row) - 1
        assert -logp[index, np.arange(len(row) - 1), row[1:]].sum() == pytest.approx(scores.nats[index], rel=1e-5)


def test_cross_entropy_is_that_of_transformers_on_the_exported_model(folder, scores, tmp_path):
    torch = pytest.importorskip("torch", reason="the oracle runs on torch")
    transformers = pytest.importorskip("transformers", reason="the oracle")
    write_model(read_model(folder), tmp_path / "hf", "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    nats = tokens = 0.0
    for document in documents():
        ids = [tokenizer.eos_token_id, *tokenizer(document.text, add_special_tokens=False).input_ids]
        ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = theirs(ids).logits[0, :-1, : len(tokenizer)]  # the rows behind these stand for no token
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    assert measure(scores, QUICK).cross_entropy.value == pytest.approx(nats / tokens, abs=1e-4)


def made_up(nats, tokens, num_bytes=None):
    nats, tokens = np.array(nats, float), np.array(tokens)
    num_bytes = tokens * 4 if num_bytes is None else np.array(num_bytes)
    return DomainScores(nats, tokens, num_bytes, tokens // 2, nats[:1], tokens[:1], 1.0)


def test_perplexity_is_not_the_mean_of_batch_means():
    """The mistake of the published code: a batch of one hard short document weighs as much as one of long easy ones."""
    scores = made_up(nats=[10.0, 990.0, 990.0], tokens=[2, 990, 990])
    of_batches = math.exp(np.mean([10.0 / 2, (990.0 + 990.0) / (990 + 990)]))
    found = measure(scores, QUICK).perplexity.value
    assert found == pytest.approx(math.exp(1990 / 1982))
    assert of_batches > 7 * found


def test_bits_per_byte_and_word_divide_the_same_total_by_what_no_tokenizer_changes():
    coarse = measure(made_up(nats=[100.0, 50.0], tokens=[40, 20], num_bytes=[120, 80]), QUICK)
    fine = measure(made_up(nats=[100.0, 50.0], tokens=[80, 40], num_bytes=[120, 80]), QUICK)
    assert coarse.bits_per_byte.value == fine.bits_per_byte.value == pytest.approx(150 / 200 / math.log(2))
    assert coarse.perplexity.value > fine.perplexity.value
    assert coarse.bits_per_word.value == pytest.approx(150 / 30 / math.log(2))


def test_positions_count_from_the_document_s_beginning_in_doubling_ranges(model, scores):
    positions = measure(scores, QUICK).positions
    assert [(p["from"], p["to"]) for p in positions[:5]] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]
    assert positions[0]["tokens"] == len(documents())
    assert sum(p["tokens"] for p in positions) == scores.tokens.sum()
    assert sum(p["tokens"] * p["cross_entropy"] for p in positions) == pytest.approx(scores.nats.sum())


def test_a_comparison_resamples_both_models_documents_together():
    random = np.random.default_rng(0)
    tokens = random.integers(20, 400, 50)
    first = made_up(nats=tokens * random.uniform(2, 6, 50), tokens=tokens)
    second = made_up(nats=first.nats - tokens * math.log(4), tokens=tokens)
    found = compare("first", first, second, QUICK)
    assert found.perplexity_ratio.value == pytest.approx(4)
    assert found.perplexity_ratio.low == pytest.approx(4) == found.perplexity_ratio.high
    assert found.bits_per_byte.value == pytest.approx(-2 / 4)


def test_perplexities_of_different_tokenizers_are_not_compared():
    found = compare("a", made_up([10.0, 20.0], [5, 9]), made_up([9.0, 21.0], [5, 10], [20, 36]), QUICK)
    assert found.perplexity_ratio is None
    assert found.bits_per_byte.value == pytest.approx(0)


def test_the_perplexity_of_nan_is_nan_and_of_an_overflow_infinite():
    assert math.isnan(perplexity(math.nan)) and perplexity(800) == math.inf and perplexity(-math.inf) == 0
