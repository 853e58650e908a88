"""An exported folder works in transformers with no extra step: model, tokenizer and text-generation pipeline."""

import dataclasses

import numpy as np
import pytest
from random_weights import random_weights
from test_parity import our_logits
from tiny_models import sentences

import biomamba_jax
from biomamba_jax.config import ModelConfig
from biomamba_jax.config.prepare import TokenizerTraining
from biomamba_jax.data.tokenizer import EOS, load_tokenizer, train_sentencepiece
from biomamba_jax.interop import read_model, write_model
from biomamba_jax.interop.tokenizers import from_sentencepiece

transformers = pytest.importorskip("transformers", reason="what is exported is for transformers")
torch = pytest.importorskip("torch", reason="transformers runs on torch")

TEXTS = [
    "Serum TNF-α rose 2.5-fold (p < 0.001) in 1,024 patients.",
    "Two  spaces,   three; one at each end ",
    " leading space",
    "lines\nand\n\nparagraphs\r\nand\ttabs",
    "Ångström, naïve, e\u0301, ﬁ, ½, µg·mL⁻¹, 37 °C",
    "日本語 🧬🧬 Ελληνικά кириллица",
    "<0x0A> and ▁ as text",
    "<unk> <s> </s> <|endoftext|>",
    "\x00\x01 \u00a0\u2009",
    "1234567890" * 5,
    "x" * 400,
    " ",
    "",
]


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    """As `prepare --train-tokenizer` makes them, from made-up sentences."""
    random = np.random.default_rng(0)
    words = [
        "cell",
        "serum",
        "α",
        "rats",
        "the",
        "of",
        "in",
        "(p",
        "<",
        "0.05)",
        "Ελλ",
        "increase",
        "inhibitor",
        "line",
    ]
    texts = [" ".join(random.choice(words, 30)) + ".\n" for _ in range(300)]
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(texts, 300, path)
    return path


@pytest.fixture(scope="module", params=["mamba1", "mamba2"])
def exported(request, sentencepiece_file, tmp_path_factory):
    config = ModelConfig(kind=request.param, d_model=64, n_layers=2, vocab_size=300, headdim=32, d_state=16)
    weights = dataclasses.replace(random_weights(config), tokenizer_file=sentencepiece_file)
    folder = tmp_path_factory.mktemp("export") / "hf"
    write_model(weights, folder, "hf")
    return weights, folder


def test_a_sentencepiece_model_becomes_a_fast_tokenizer_with_the_same_ids(exported, sentencepiece_file):
    ours = load_tokenizer(sentencepiece_file)
    theirs = transformers.AutoTokenizer.from_pretrained(exported[1])
    assert theirs.is_fast
    for text in TEXTS:
        [ids] = ours.encode_batch([text])
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        assert theirs.decode(ids) == ours.decode(ids)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("split_digits", [True, False])
def test_every_tokenizer_that_prepare_can_train_leaves_with_the_same_ids(kind, byte_fallback, split_digits, tmp_path):
    settings = {"tokenizer_byte_fallback": byte_fallback, "tokenizer_split_digits": split_digits}
    training = TokenizerTraining(train_tokenizer=300 if byte_fallback else 45, tokenizer_kind=kind, **settings)
    texts = [f"{text} 1200 <unk> 12" for text in sentences()]
    ours = train_sentencepiece(texts, training, tmp_path / "tokenizer.model")
    theirs = from_sentencepiece(ours.path)
    theirs.encode_special_tokens = True  # as tokenizer_config.json states
    for text in [*TEXTS, *texts[:50]]:
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode_batch([text])[0], text


def test_every_text_starts_with_the_start_symbol_of_training(exported):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported[1])
    assert tokenizer("serum").input_ids[0] == tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    assert tokenizer.eos_token == EOS


def test_a_gpt_neox_tokenizer_is_passed_on_as_it_is(shared_data, tmp_path):
    file = shared_data / "tokenizers" / "gpt_neox_20b_tokenizer.json"
    config = ModelConfig(kind="mamba2", d_model=32, n_layers=1, vocab_size=50277, headdim=16, d_state=16)
    write_model(dataclasses.replace(random_weights(config), tokenizer_file=file), tmp_path / "hf", "hf")
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == file.read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("yes no maybe").input_ids == load_tokenizer(file).encode_batch(["yes no maybe"])[0]
    assert tokenizer.encode(" yes") == [4754] and tokenizer.eos_token_id == 0
    assert read_model(tmp_path / "hf").config.vocab_size == 50277


def test_the_pipeline_writes_the_text_that_our_logits_choose(exported):
    weights, folder = exported
    generate = transformers.pipeline("text-generation", model=str(folder))
    prompt, new = "serum of rats", 8
    [result] = generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, return_tensors=True)
    ids = result["generated_token_ids"]
    logits = our_logits(weights, np.asarray([ids], np.int32))[0, :, 1 : weights.config.known_vocab]
    assert ids[-new:] == (1 + logits[-new - 1 : -1].argmax(-1)).tolist()  # min_new_tokens: no end of text, id 0


def test_rows_that_only_pad_the_embedding_stay_here_so_that_likelihoods_agree(exported, tmp_path):
    weights, folder = exported
    write_model(weights, tmp_path / "native", "native")
    [ours] = biomamba_jax.load(tmp_path / "native").logprobs("serum of rats (p < 0.05) line")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.as_tensor(
        [transformers.AutoTokenizer.from_pretrained(folder)("serum of rats (p < 0.05) line").input_ids]
    )
    with torch.no_grad():
        theirs = torch.log_softmax(model(ids).logits[0, :-1].double(), -1)
    assert theirs.shape[-1] == weights.config.known_vocab < weights.config.padded_vocab
    np.testing.assert_allclose(ours.logprobs, theirs.gather(-1, ids[0, 1:, None])[:, 0].numpy(), atol=1e-5, rtol=0)


def test_a_vocabulary_that_grew_in_transformers_is_read_back_with_its_new_tokens(exported, tmp_path):
    _, folder = exported
    model, tokenizer = (
        load.from_pretrained(folder) for load in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    )
    tokenizer.add_tokens(["<ask>", "<say>", "<end>"])
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "grown")
    tokenizer.save_pretrained(tmp_path / "grown")
    ids = [[300, 5, 302, 7]]
    ours = biomamba_jax.load(tmp_path / "grown")
    assert ours.config.known_vocab == 303
    with torch.no_grad():
        theirs = model(torch.as_tensor(ids)).logits.numpy()
    np.testing.assert_allclose(ours.logits(ids)[..., :303], theirs, atol=1e-4)


def test_a_sentencepiece_model_of_another_make_is_refused(tmp_path):
    import sentencepiece

    from biomamba_jax.errors import UserError

    words = [f"{a}{b}{c}" for a in "abcdefgh" for b in "aeiou" for c in "klmnp"]
    (tmp_path / "corpus.txt").write_text("\n".join(" ".join(words[i::7]) for i in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "other"), vocab_size=60, model_type="bpe"
    )
    with pytest.raises(UserError, match=r"other\.model: cannot be converted to tokenizer\.json"):
        from_sentencepiece(tmp_path / "other.model")
