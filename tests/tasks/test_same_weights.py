"""The same weights natively, as a Hugging Face folder, as mamba_ssm and run by transformers: the same figures."""

import dataclasses
import json

import numpy as np
import pytest
from random_weights import random_weights
from test_scoring import config
from tiny_models import CONFIGS, train_tokenizer

from biomamba_jax.data.tokenizer import load_tokenizer
from biomamba_jax.interop import write_model
from biomamba_jax.tasks.documents import Document
from biomamba_jax.tasks.load_scorer import load_scorer
from biomamba_jax.tasks.perplexity import measure, score_domain
from biomamba_jax.tasks.statistics import Resampling

SPELLED = [
    "🧬🧪 gene therapy 👩‍🔬 in 2021 – naïve Ångström ½ µg",
    "Пациенты с сахарным диабетом 2 типа получали инсулин; уровень глюкозы снизился.",
    "<|endoftext|> <unk> <s> a </s> <pad> [CLS] [UNK] [MASK] <0x0A> <|padding|> <|begin_of_text|>",
    "two  spaces, a tab\t and\n\nlines   \u2581 \u00a0 end",
]


@pytest.fixture(scope="module", params=["sentencepiece", "byte-level"])
def scorers(request, tmp_path_factory):
    """A random model in three formats, and its export as transformers runs it."""
    pytest.importorskip("transformers", reason="runs the export")
    folder = tmp_path_factory.mktemp("same")
    if request.param == "sentencepiece":
        tokenizer = train_tokenizer(folder)
    else:
        shared = request.getfixturevalue("shared_data")
        tokenizer = load_tokenizer(shared / "tokenizers" / "gpt_neox_20b_tokenizer.json")
    weights = random_weights(dataclasses.replace(CONFIGS["mamba2"], vocab_size=tokenizer.vocab_size))
    weights = dataclasses.replace(weights, tokenizer_file=tokenizer.path)
    found = {}
    for dialect in ("native", "hf", "mamba_ssm"):
        write_model(weights, folder / dialect, dialect)
        found[dialect] = load_scorer(dialect, str(folder / dialect), config(window=256, batch_size=8))
    return found | {"transformers": load_scorer("t", f"hf:{folder / 'hf'}", config(batch_size=8))}


def agree(scorers, texts):
    ids = {name: scorer.encode(texts) for name, scorer in scorers.items()}
    for name in scorers:
        assert ids[name] == ids["native"], name
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    scores = {name: score_domain(scorer, documents) for name, scorer in scorers.items()}
    for name, found in scores.items():
        np.testing.assert_array_equal(found.tokens, scores["native"].tokens)
        np.testing.assert_allclose(found.nats, scores["native"].nats, rtol=1e-4 if name == "transformers" else 1e-6)
    bits = {name: measure(found, Resampling(resamples=2)).bits_per_byte.value for name, found in scores.items()}
    assert max(bits.values()) - min(bits.values()) < 1e-5 * bits["native"]


def texts_of(shared_data, count):
    """Abstracts of PubMed, those of PubMedQA, and paragraphs of WikiText, whose rare words are `<unk>`."""
    questions = json.loads((shared_data / "pubmedqa" / "ori_pqal.json").read_text()).values()
    abstracts = ["\n".join([*question["CONTEXTS"], question["LONG_ANSWER"]]) for question in questions]
    wiki = (shared_data / "general" / "wikitext-2_valid.txt").read_text()
    paragraphs = [line.strip() for line in wiki.splitlines() if "<unk>" in line]
    return [*abstracts[:count], *paragraphs[: -(-count // 10)]]


def test_equal_tokens_and_bits_per_byte_on_names_of_special_tokens_emoji_and_cyrillic(scorers):
    agree(scorers, SPELLED)


def test_equal_tokens_and_bits_per_byte_on_abstracts_and_wikitext(scorers, shared_data):
    agree(scorers, texts_of(shared_data, 10))


@pytest.mark.long
def test_equal_tokens_and_bits_per_byte_on_a_thousand_abstracts_and_wikitext(scorers, shared_data):
    texts = texts_of(shared_data, 1000)
    assert len(texts) == 1100
    agree(scorers, texts)
