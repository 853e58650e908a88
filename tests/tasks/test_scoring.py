"""Scorers: continuations by any program, and any model of a folder in the same terms."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers
from random_weights import random_weights
from tiny_models import CONFIGS, WORDS, train_tokenizer, write_tiny_model

import biomamba_jax
from biomamba_jax.config import EvaluateConfig
from biomamba_jax.errors import UserError
from biomamba_jax.interop import read_model, write_model
from biomamba_jax.tasks.load_scorer import load_scorer
from biomamba_jax.tasks.scoring import Request
from biomamba_jax.tasks.transformers_scorer import _windows

REQUESTS = [
    Request("the patients with type 2 diabetes were given", (" insulin", " serum glucose fell", " β")),
    Request("mice ", ("cell", "glucose")),
    Request("", ("insulin",)),
    Request("serum glucose fell in β-cell mice (p<0.05). " * 4, (" the", " the patients")),
]
TEXTS = [" ".join(np.random.default_rng(i).choice(WORDS, 3 + 9 * i)) for i in range(6)]


def config(**settings):
    return EvaluateConfig(models={"m": "x"}, domains={"d": {"path": "x"}}, **{"batch_size": 2, "window": 32} | settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    native = write_tiny_model(path / "native", "mamba2", train_tokenizer(path))
    write_model(read_model(native), path / "hf", "hf")
    return path


@pytest.fixture(scope="module")
def ours(folder):
    return load_scorer("ours", str(folder / "native"), config())


@pytest.fixture(scope="module")
def theirs(folder):
    pytest.importorskip("transformers", reason="runs other people's models")
    return load_scorer("theirs", f"hf:{folder / 'hf'}", config())


def test_a_continuation_is_scored_as_in_one_pass_over_the_whole_text(folder, ours):
    texts = [request.context + text for request in REQUESTS for text in request.continuations]
    wholes = iter(biomamba_jax.load(folder / "native").logprobs(texts))
    for results in ours.continuations(REQUESTS):
        for found in results:
            whole = next(wholes).logprobs
            assert found.logprobs == pytest.approx(whole[len(whole) - len(found.logprobs) :], rel=1e-4, abs=1e-4)


def test_batches_do_not_change_scores(folder, ours):
    alone = load_scorer("ours", str(folder / "native"), config(batch_size=1))
    for one, other in zip(ours.continuations(REQUESTS), alone.continuations(REQUESTS), strict=True):
        assert [c.total for c in one] == pytest.approx([c.total for c in other], rel=1e-5)


def test_transformers_gives_the_same_scores_of_the_exported_model(ours, theirs):
    for one, other in zip(ours.continuations(REQUESTS), theirs.continuations(REQUESTS), strict=True):
        assert [c.logprobs for c in one] == [pytest.approx(c.logprobs, abs=2e-4) for c in other]
        assert [c.greedy for c in one] == [c.greedy for c in other]
    for (i, mine), (j, foreign) in zip(sorted(ours.documents(TEXTS)), sorted(theirs.documents(TEXTS)), strict=True):
        assert i == j
        np.testing.assert_allclose(mine, foreign, atol=2e-4)


def test_what_a_report_says_of_a_model_tells_who_ran_it(ours, theirs):
    assert (ours.facts.run_by, theirs.facts.run_by) == ("biomamba-jax", "transformers")
    assert ours.facts.parameters == theirs.facts.parameters
    assert ours.facts.context == "the whole document"


@pytest.mark.parametrize(("length", "limit"), [(2, 8), (8, 8), (9, 8), (50, 8), (51, 9), (3, 2)])
def test_windows_predict_every_token_once_from_half_a_window_at_least(length, limit):
    predicted = []
    for begin, new, end in _windows(length, limit):
        assert end - begin <= limit and new - begin >= min(new, limit // 2)
        predicted += range(new, end)
    assert predicted == list(range(1, length))


def word_level_tokenizer(special):
    """A tokenizer whose tokens are whole words, so that text comes back as the tokens it was made of."""
    vocabulary = {token: i for i, token in enumerate([*special, "[UNK]", *dict.fromkeys(WORDS)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return tokenizer, vocabulary


def test_text_that_the_model_would_write_itself_is_known_as_such(tmp_path):
    tokenizer, vocabulary = word_level_tokenizer(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    weights = random_weights(dataclasses.replace(CONFIGS["mamba1"], vocab_size=len(vocabulary)))
    write_model(dataclasses.replace(weights, tokenizer_file=tmp_path / "tokenizer.json"), tmp_path / "m", "native")
    scorer = load_scorer("m", str(tmp_path / "m"), config())
    own = scorer.generate(["the patients"], 3, [])[0]
    other = " ".join(["", *reversed(own.split())])
    ((first, second, shorter),) = scorer.continuations(
        [Request("the patients", (own, other + " mice", own[:-1] + "?"))]
    )
    assert first.greedy and not second.greedy and not shorter.greedy


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A random BERT of 16 positions with a tokenizer of whole words."""
    transformers = pytest.importorskip("transformers", reason="runs other people's models")
    torch = pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("bert")
    tokenizer, vocabulary = word_level_tokenizer(["[PAD]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=16, **sizes)
    transformers.BertForMaskedLM(config).save_pretrained(path)
    return path


def test_a_masked_model_predicts_each_token_from_both_sides(bert):
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    scorer = load_scorer("bert", str(bert), config())
    assert scorer.facts.kind == "masked"
    text = "the patients with type 2"
    ((_, found),) = scorer.documents([text])
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    for place in range(1, ids.shape[1] - 1):
        masked = ids.clone()
        masked[0, place] = tokenizer.mask_token_id
        with torch.no_grad():
            expected = -model(masked).logits[0, place].log_softmax(-1)[ids[0, place]]
        assert found[place - 1] == pytest.approx(float(expected), abs=1e-5)
    assert len(found) == 5


def test_a_masked_model_reads_long_documents_in_windows_and_does_not_generate(bert):
    scorer = load_scorer("bert", str(bert), config())
    ((_, found),) = scorer.documents(["the " * 40])
    assert len(found) == 40
    (answers,) = scorer.continuations([Request("the " * 40, (" patients with", " insulin"))])
    assert [len(answer.logprobs) for answer in answers] == [2, 1]
    with pytest.raises(UserError, match="cannot generate"):
        scorer.generate(["the"], 3, [])


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A random GPT-2 of 16 positions."""
    transformers = pytest.importorskip("transformers", reason="runs other people's models")
    torch = pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("gpt2")
    tokenizer, vocabulary = word_level_tokenizer(["<|endoftext|>"])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(vocabulary), **sizes)).save_pretrained(path)
    return path


def test_a_transformer_scores_documents_longer_than_its_positions(gpt2):
    scorer = load_scorer("gpt2", str(gpt2), config())
    found = dict(scorer.documents(["the " * 3, "the patients " * 30]))
    assert [len(found[0]), len(found[1])] == [4, 61]
    assert np.isfinite(found[1]).all() and scorer.facts.context.startswith("up to 16 tokens")


def test_a_token_of_a_long_document_is_predicted_from_the_window_in_which_it_is_new(gpt2):
    """Windows of 16: tokens 0-15, then the last 8 of each of 8-23, 16-31, ..., and of 46-61 what is left."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = " ".join(np.random.default_rng(0).choice(WORDS, 60))
    ((_, found),) = load_scorer("gpt2", str(gpt2), config()).documents([text])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(gpt2).eval(), AutoTokenizer.from_pretrained(gpt2)
    eos = tokenizer.eos_token_id
    ids = torch.tensor([eos, *tokenizer(text, add_special_tokens=False)["input_ids"], eos])
    for token in range(1, 62):
        begin = 0 if token < 16 else min(token // 8 * 8 - 8, 46)
        with torch.no_grad():
            logits = model(ids[None, begin:token]).logits[0, -1]
        assert found[token - 1] == pytest.approx(-float(logits.log_softmax(-1)[ids[token]]), abs=1e-5)


def test_a_transformer_generates_and_scores_answers_behind_prompts_longer_than_its_positions(gpt2):
    scorer = load_scorer("gpt2", str(gpt2), config())
    (answers,) = scorer.continuations([Request("the " * 40, (" patients with", " insulin"))])
    assert [len(answer.logprobs) for answer in answers] == [2, 1]
    assert len(scorer.generate(["the " * 40], 3, [])[0].split()) <= 3


def test_a_folder_without_a_model_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_scorer("m", str(tmp_path / "nothing"), config())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    pytest.importorskip("transformers", reason="says what is wrong")
    with pytest.raises(UserError, match=r"models\.m: transformers cannot load"):
        load_scorer("m", str(tmp_path), config())
