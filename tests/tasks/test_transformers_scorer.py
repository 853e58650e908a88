"""Other people's models: positions that are not all for text, settings of their folders, and what is refused."""

import json

import numpy as np
import pytest
import tokenizers
from test_scoring import config, word_level_tokenizer
from tiny_models import WORDS

from biomamba_jax.errors import UserError
from biomamba_jax.tasks.load_scorer import load_scorer
from biomamba_jax.tasks.scoring import Request

transformers = pytest.importorskip("transformers", reason="runs other people's models")
torch = pytest.importorskip("torch")

POSITIONS = 18
# Rows of the position embedding that a text never reaches: those up to the padding's id, which is 1.
MASKED = {
    "bert": 0,
    "electra": 0,
    "roberta": 2,
    "xlm-roberta": 2,
    "xlm-roberta-xl": 2,
    "camembert": 2,
    "roberta-prelayernorm": 2,
    "data2vec-text": 2,
    "mpnet": 2,
    "esm": 2,
}


@pytest.mark.parametrize("kind", MASKED)
def test_a_masked_model_uses_all_positions_that_it_has_and_no_more(kind, tmp_path):
    tokenizer, vocabulary = word_level_tokenizer(["<s>", "<pad>", "</s>", "<mask>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(tmp_path)
    settings = transformers.AutoConfig.for_model(
        kind, vocab_size=len(vocabulary), max_position_embeddings=POSITIONS, pad_token_id=1, mask_token_id=3,
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    )  # fmt: skip
    transformers.AutoModelForMaskedLM.from_config(settings).save_pretrained(tmp_path)
    scorer = load_scorer("m", str(tmp_path), config())
    assert scorer.facts.context == f"both sides, windows of {POSITIONS - MASKED[kind] - 2} tokens"
    ((_, nats),) = scorer.documents(["the " * 40])
    assert len(nats) == 40 and np.isfinite(nats).all()
    (answers,) = scorer.continuations([Request("the " * 40, (" patients with", " insulin"))])
    assert [len(answer.logprobs) for answer in answers] == [2, 1]


def write_gpt2(folder, missing=0, positions=64):
    """A random GPT-2 that repeats itself, its embedding short of so many rows."""
    tokenizer, vocabulary = word_level_tokenizer(["<|endoftext|>"])
    ends = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": positions, "bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(vocabulary) - missing, **sizes))
    with torch.no_grad():
        model.lm_head.weight *= 30
    model.save_pretrained(folder)
    return folder


def test_text_is_greedy_whatever_the_folder_s_own_settings_are(tmp_path):
    folder = write_gpt2(tmp_path)
    expected = load_scorer("m", str(folder), config()).generate(["the patients"], 8, [])
    path = folder / "generation_config.json"
    others = {"repetition_penalty": 3.0, "num_beams": 3, "do_sample": True, "temperature": 9.0, "min_new_tokens": 8}
    path.write_text(json.dumps(json.loads(path.read_text()) | others | {"suppress_tokens": list(range(5, 12))}))
    assert load_scorer("m", str(folder), config()).generate(["the patients"], 8, []) == expected
    path.unlink()
    assert load_scorer("m", str(folder), config()).generate(["the patients"], 8, []) == expected


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    count = len(dict.fromkeys(WORDS)) + 2
    with pytest.raises(UserError, match=rf"models\.m: .* {count} ids, .* only {count - 2} rows"):
        load_scorer("m", str(write_gpt2(tmp_path, missing=2)), config())


def test_a_transformer_of_nan_does_not_write(tmp_path):
    scorer = load_scorer("m", str(write_gpt2(tmp_path)), config())
    scorer._model.transformer.ln_f.weight.data[0] = float("nan")
    with pytest.raises(UserError, match=r"models\.m: .* gives NaN"):
        scorer.generate(["the patients"], 8, [])
