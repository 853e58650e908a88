"""Encoders of others: fine-tuned by finetune, asked by tag and classify, with the same data and measures as ours."""

import io
import json

import numpy as np
import pytest
from encoders import write_encoder
from head_models import annotated_for, texts

from biomamba_jax.classify import ClassifyConfig, classify
from biomamba_jax.data.annotations import AnnotatedText, encode_words
from biomamba_jax.errors import UserError
from biomamba_jax.finetune import main as finetune
from biomamba_jax.tag import TagConfig, tag
from biomamba_jax.tasks.model import load_head

torch = pytest.importorskip("torch", reason="transformers runs on torch")
transformers = pytest.importorskip("transformers", reason="runs encoders of others")
pytest.importorskip("accelerate", reason="transformers' Trainer runs on it")
torch.set_num_threads(1)  # models this small only wait for further threads

CASES = {  # every kind of folder and every head
    "token_classifier": ("BertModel", "f1"),
    "classifier": ("RobertaForMaskedLM", "accuracy"),
    "multi_label": ("ElectraForPreTraining", "auroc"),
    "regression": ("ElectraModel", "pearson"),
    "span": ("BertForMaskedLM", "exact_match"),
}


def write_examples(path, kind, count=24):
    lines = []
    for text in annotated_for(kind, texts(count)):
        spans = [{"start": s.start, "end": s.end, "type": s.type} for s in text.spans]
        line = {"id": text.key, "text": text.text, "spans": spans, "score": text.score, "question": text.question}
        lines.append(line | ({"labels": text.labels} if kind in ("classifier", "multi_label") else {}))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def train(here, kind, *words, steps=70):
    """Fine-tune in `here` on examples of a head, which are its development split too, but for an empty line."""
    if not (here / "train.jsonl").exists():
        write_examples(here / "train.jsonl", kind)
        (here / "dev.jsonl").write_text((here / "train.jsonl").read_text() + "\n")
    given = [f"--init_from=hf:{here / 'base'}", f"--run_dir={here / 'run'}", f"--head={kind}", "--data.format=spans"]
    given += [f"--data.files=[{here / 'train.jsonl'}]", f"--data.development=[{here / 'dev.jsonl'}]"]
    given += ["--data.batch_size=12", f"--train.steps={steps}", "--train.log_every=40", "--train.eval_every=35"]
    finetune([*given, "--optimizer.learning_rate=5e-3", "--optimizer.weight_decay=0", "--tensorboard=false", *words])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of each head."""
    here = tmp_path_factory.mktemp("encoders")
    for kind, (name, _) in CASES.items():
        write_encoder(here / kind / "base", name, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        train(here / kind, kind, steps=240 if kind in ("classifier", "multi_label") else 70)
    return here


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_every_head_learns_its_sentences_and_is_measured_as_ours(trained, kind):
    [(name, measured)] = json.loads((trained / kind / "run" / "results.json").read_text()).items()
    assert name == "spans development" and measured["texts"] == 24
    assert measured[CASES[kind][1]] > (0.9 if kind in ("classifier", "multi_label") else 0.99)
    path = trained / kind / "run" / "predictions" / "spans-development.jsonl"
    assert len(path.read_text().splitlines()) == 24
    logged = [json.loads(line) for line in (trained / kind / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["loss"] for line in logged if line["split"] == "validation"]
    assert len(held_out) > 1 and held_out[0] > min(held_out[1:])


@pytest.mark.slow
def test_tags_are_those_of_transformers_own_class_on_the_last_token_of_each_word(trained):
    folder, wanted = trained / "token_classifier" / "run", [text.text for text in texts(30)]
    model = load_head(folder)
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(folder)
    out = io.StringIO()
    tag(TagConfig(str(folder)), wanted, out)
    for text, line in zip(wanted, map(json.loads, out.getvalue().splitlines()), strict=True):
        [words] = encode_words([text], model.tokenizer)
        ids = torch.tensor([[model.tokenizer.start_id, *words.ids, model.tokenizer.end_id]])
        with torch.no_grad():
            tags = theirs(ids).logits[0].argmax(-1)
        starts = {
            words.words[i][0] for i, at in enumerate(words.last) if theirs.config.id2label[int(tags[at + 1])][0] == "B"
        }
        assert {span["start"] for span in line["spans"]} == starts
        assert all(span["text"] == text[span["start"] : span["end"]] for span in line["spans"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classifier", "multi_label"])
def test_classify_reads_an_encoder_s_run(trained, kind):
    examples, out = annotated_for(kind, texts(24)), io.StringIO()
    classify(ClassifyConfig(str(trained / kind / "run")), [json.dumps({"prompt": t.text}) for t in examples], out)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    key = "predicted_label" if kind == "classifier" else "predicted_labels"
    saved = (trained / kind / "run" / "predictions" / "spans-development.jsonl").read_text().splitlines()
    names = "prediction" if kind == "classifier" else "labels"
    assert [line[key] for line in lines] == [json.loads(line)[names] for line in saved]
    assert set(lines[0]["probabilities"]) == {label for text in examples for label in text.labels}


@pytest.mark.slow
def test_a_long_text_is_tagged_to_its_end_and_an_answer_is_in_what_was_read(trained):
    model = load_head(trained / "token_classifier" / "run")
    long = " ".join(text.text for text in texts(24))
    [spans] = model.tag([long])
    assert spans[-1].end > 0.9 * len(long)
    reader = load_head(trained / "span" / "run")
    [found] = reader.annotate([AnnotatedText("", long, question="the?")])
    [words] = encode_words([long], reader.tokenizer)
    read = max(end for (_, end), last in zip(words.words, words.last, strict=True) if last < reader.limit)
    assert found.spans and all(span.end <= read for span in found.spans)
    assert reader.annotate([AnnotatedText("", "", question="the?")])[0].spans == ()


@pytest.mark.slow
def test_a_question_and_its_text_are_two_segments(trained):
    model = load_head(trained / "span" / "run")
    end = model.tokenizer.end_id
    kinds = model.inputs([[1, 9, 9, end, 8, 8, end], [1, 9, end, 8, end]])["token_type_ids"].tolist()
    assert kinds == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]]
    assert model.tokenizer.encode_batch(["the?\n"]) == [[*model.tokenizer.encode_batch(["the?"])[0], end]]


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is_and_other_settings_are_refused(trained, capsys):
    here = trained / "classifier"
    before = (here / "run" / "model.safetensors").stat().st_mtime_ns
    train(here, "classifier", steps=240)
    assert (here / "run" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"run: train\.seed was 0, is 1; give another run_dir"):
        train(here, "classifier", "--train.seed=1", steps=240)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora.rank=4"], "lora.rank = 4: must be 0 for an encoder"),
        (["--reading=echo"], "reading = 'echo': must be once for an encoder"),
        (["--optimizer.ema=0.9"], "optimizer.ema = 0.9: must be 0 for an encoder"),
    ],
)
def test_settings_of_our_models_alone_are_refused(tmp_path, words, message):
    write_encoder(tmp_path / "base", "BertModel")
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        train(tmp_path, "classifier", *words)


@pytest.mark.slow
def test_a_damaged_checkpoint_of_an_encoder_is_one_line(tmp_path):
    write_encoder(tmp_path / "base", "BertModel")
    checkpoint = tmp_path / "run" / "trainer" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{")
    with pytest.raises(UserError, match=r"run/trainer: its newest checkpoint cannot be resumed \(.*; remove it"):
        train(tmp_path, "classifier", steps=1)


def test_weights_that_only_a_new_head_may_lack(tmp_path):
    import safetensors.numpy

    folder = write_encoder(tmp_path / "base", "BertModel")
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    safetensors.numpy.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"init_from: .* lacks bert\.encoder\.layer\.1\.output\.dense\.weight of a \w+, which"
    ):
        train(tmp_path, "classifier")


def test_a_classifier_without_the_weights_below_its_head_is_refused(tmp_path):
    import safetensors.numpy

    folder = write_encoder(tmp_path / "bert", "BertForSequenceClassification")
    assert load_head(folder).classify(["insulin"])
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    del weights["bert.pooler.dense.weight"]
    safetensors.numpy.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks bert\.pooler\.dense\.weight of a \w+, which would be drawn at random"):
        load_head(folder)


@pytest.mark.parametrize("labels", [["LABEL_0", "LABEL_1"], ["Disease", "O"], ["U-Disease", "O"]])
def test_labels_that_are_not_tags_of_entities_are_refused(tmp_path, labels):
    folder = write_encoder(tmp_path / "bert", "BertForTokenClassification", id2label=dict(enumerate(labels)))
    with pytest.raises(UserError, match=rf"config\.json: id2label: labels = .*{labels[0]}.*: must be O or tags"):
        load_head(folder)


def test_a_decoder_without_a_padding_id_classifies_several_texts(tmp_path):
    write_encoder(tmp_path / "gpt2", "RobertaModel")  # for its tokenizer
    sizes = {"vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 62, "num_labels": 3}
    transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    model = load_head(f"hf:{tmp_path / 'gpt2'}")
    together, alone = model.classify(["insulin", "glucose in mice"]), model.classify(["insulin"])
    assert together[0].probabilities == pytest.approx(alone[0].probabilities, abs=1e-5)


def test_one_logit_is_a_score_as_in_transformers_and_no_class(tmp_path):
    folder = write_encoder(tmp_path / "bert", "BertForSequenceClassification", num_labels=1)
    with pytest.raises(UserError, match="its head is a regression, not a classifier"):
        load_head(folder).classify(["insulin"])


def test_a_seed_draws_the_head_and_orders_the_texts(tmp_path):
    write_encoder(tmp_path / "base", "BertModel")
    found = {}
    for seed in (0, 0, 1):
        train(tmp_path, "classifier", f"--train.seed={seed}", f"--run_dir={tmp_path / f'run{len(found)}'}", steps=2)
        model = load_head(tmp_path / f"run{len(found)}")
        found[len(found)] = model.model.classifier.weight.detach().numpy()
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 1e-3
