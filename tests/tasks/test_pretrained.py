"""Encoders of other projects: the mean of their hidden states, all positions that they have, and what is refused."""

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from test_scoring import word_level_tokenizer

from biomamba_jax.config.embed import EmbeddingConfig
from biomamba_jax.errors import UserError
from biomamba_jax.tasks.pretrained import Encoder

transformers = pytest.importorskip("transformers", reason="runs other people's models")
torch = pytest.importorskip("torch")

LIMITS = {"bert": 18, "electra": 18, "roberta": 16}
TEXTS = ["insulin", "the patients were given insulin", "the " * 40]


def write(folder, kind):
    """A random encoder without a head, of 18 positions."""
    tokenizer, vocabulary = word_level_tokenizer(["<s>", "<pad>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    settings = transformers.AutoConfig.for_model(
        kind, vocab_size=len(vocabulary), max_position_embeddings=18, pad_token_id=1,
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(settings).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", LIMITS)
def test_an_embedding_is_the_mean_over_the_text_alone_and_long_texts_are_cut_and_counted(kind, tmp_path):
    model = write(tmp_path, kind)
    encoder = Encoder("m", tmp_path, EmbeddingConfig())
    found = encoder(TEXTS)
    for text, vector in zip(TEXTS, found, strict=True):
        ids = encoder._tokenizer(text, truncation=True, max_length=LIMITS[kind], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = model(ids).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(vector, expected, atol=1e-5)
    assert (encoder.limit, encoder.cut) == (LIMITS[kind], 1)


def test_a_folder_that_lacks_a_weight_and_another_pooling_are_refused(tmp_path):
    model = write(tmp_path, "bert")
    with pytest.raises(UserError, match="leave out pooling last"):
        Encoder("m", tmp_path, EmbeddingConfig(pooling="last"))
    file = tmp_path / "model.safetensors"
    weights = {name: value.numpy() for name, value in model.state_dict().items() if "pooler" not in name}
    safetensors.numpy.save_file(weights, file, {"format": "pt"})
    Encoder("m", tmp_path, EmbeddingConfig())
    del weights["embeddings.word_embeddings.weight"]
    safetensors.numpy.save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match="word_embeddings"):
        Encoder("m", tmp_path, EmbeddingConfig())


def test_an_encoder_of_nan_gives_no_embedding(tmp_path):
    write(tmp_path, "bert")
    encoder = Encoder("m", tmp_path, EmbeddingConfig())
    encoder._model.encoder.layer[0].output.dense.weight.data[0] = float("nan")
    with pytest.raises(UserError, match=r"models\.m: its hidden states are NaN"):
        encoder(TEXTS)
