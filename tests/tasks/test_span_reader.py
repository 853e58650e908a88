"""Models that mark an answer's span in a passage: what they can be asked, and the answers that they give."""

import json
import math

import pytest
import tokenizers
from test_scoring import config, word_level_tokenizer
from tiny_models import WORDS

from biomamba_jax import evaluate
from biomamba_jax.config import BioASQConfig, EvaluateConfig
from biomamba_jax.errors import UserError
from biomamba_jax.tasks.load_scorer import load_scorer

transformers = pytest.importorskip("transformers", reason="runs other people's models")
torch = pytest.importorskip("torch")

QUESTION = "were mice given insulin"
PASSAGES = ["the patients were given insulin , and glucose fell", "serum in mice", " ".join(WORDS * 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random BERT for question answering with 32 positions."""
    folder = tmp_path_factory.mktemp("spans")
    tokenizer, vocabulary = word_level_tokenizer(["[PAD]", "[CLS]", "[SEP]"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = transformers.BertForQuestionAnswering(
        transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **sizes)
    )
    with torch.no_grad():
        model.qa_outputs.weight *= 40
    model.save_pretrained(folder)
    return folder


def asked(tmp_path, **more):
    questions = [
        {"id": str(n), "type": "factoid", "body": QUESTION, "snippets": [{"text": p}], "exact_answer": [["insulin"]]}
        for n, p in enumerate(PASSAGES)
    ]
    (tmp_path / "golden.json").write_text(json.dumps({"questions": questions}))
    return {"path": [str(tmp_path / "golden.json")], "types": ["factoid"]} | more


def settings(tmp_path, **more):
    return EvaluateConfig(models={"m": "x"}, bioasq=BioASQConfig(**asked(tmp_path, **more)))


def reader(folder, tmp_path):
    return load_scorer("m", str(folder), settings(tmp_path))


def plain(folder, passage):
    """Every span of a passage that fits into one window with the question, by its probability: a loop."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(QUESTION, passage, return_tensors="pt", return_offsets_mapping=True)
    offsets, parts = inputs.pop("offset_mapping")[0].tolist(), inputs.sequence_ids(0)
    out = transformers.AutoModelForQuestionAnswering.from_pretrained(folder)(**inputs)
    found = {}
    for first, part in enumerate(parts):
        for last in range(first, len(parts)):
            if part == parts[last] == 1:
                probability = 1.0
                for logits, place in ((out.start_logits[0], first), (out.end_logits[0], last)):
                    counted = [math.exp(x) for x, p in zip(logits.tolist(), parts, strict=True) if p == 1]
                    probability *= math.exp(logits.tolist()[place]) / (sum(counted) + math.exp(logits.tolist()[0]))
                text = passage[offsets[first][0] : offsets[last][1]]
                found[text] = max(found.get(text, 0.0), probability)
    return found


def test_answers_are_the_likeliest_spans_of_all_passages(folder, tmp_path):
    expected = plain(folder, PASSAGES[0])
    for text, probability in plain(folder, PASSAGES[1]).items():
        expected[text] = max(expected.get(text, 0.0), probability)
    best = sorted(expected, key=expected.__getitem__, reverse=True)[:5]
    assert reader(folder, tmp_path).spans(QUESTION, PASSAGES[:2]) == best


def test_a_long_passage_is_read_to_its_end(folder, tmp_path):
    """Its last words are in another window than its first ones."""
    model = reader(folder, tmp_path)
    windows = {text for text, _ in model._spans_of(QUESTION, PASSAGES[2])}
    assert any(PASSAGES[2].endswith(text) or PASSAGES[2].rindex(text) > len(PASSAGES[2]) / 2 for text in windows)
    assert all(text in PASSAGES[2] for text in windows) and len(windows) > 5


def test_factoids_are_measured_as_those_of_other_models(folder, tmp_path, capsys):
    written = {"models": {"spans": str(folder)}, "bioasq": asked(tmp_path), "output": str(tmp_path / "ev")}
    (tmp_path / "c.yaml").write_text(json.dumps(written | {"resamples": 20}))
    evaluate.main(["--config", str(tmp_path / "c.yaml")])
    report = json.loads((tmp_path / "ev" / "report.json").read_text())
    assert report["models"]["spans"]["kind"] == "span"
    found = {name: each["value"] for name, each in report["tasks"]["bioasq"]["models"]["spans"]["measures"].items()}
    assert set(found) == {"factoid_strict_accuracy", "factoid_lenient_accuracy", "factoid_mrr"}
    lines = (tmp_path / "ev" / "predictions" / "bioasq" / "spans.jsonl").read_text().splitlines()
    predictions = [json.loads(line)["prediction"] for line in lines]
    model = reader(folder, tmp_path)
    assert predictions == [model.spans(QUESTION, [passage]) for passage in PASSAGES]
    assert found["factoid_lenient_accuracy"] == pytest.approx(sum("insulin" in each for each in predictions) / 3)


def test_what_it_cannot_be_asked_is_refused_with_what_it_can(folder, tmp_path):
    for asked_of_it in (config(), settings(tmp_path, types=["factoid", "list"])):
        with pytest.raises(
            UserError, match=r"a BertForQuestionAnswering: .* BioASQ's factoids: set bioasq\.types \[factoid\]"
        ):
            load_scorer("m", str(folder), asked_of_it)


def test_missing_weights_are_named(folder, tmp_path):
    model = transformers.AutoModel.from_pretrained(folder)
    model.config.architectures = ["BertForQuestionAnswering"]
    model.save_pretrained(tmp_path / "bare")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "bare")
    raw = json.loads((tmp_path / "bare" / "config.json").read_text())
    (tmp_path / "bare" / "config.json").write_text(json.dumps(raw | {"architectures": ["BertForQuestionAnswering"]}))
    with pytest.raises(UserError, match=r"lacks qa_outputs\.bias .*trained weights for question answering"):
        reader(tmp_path / "bare", tmp_path)
