"""Text mining by the commands: finetune on annotated files, tag new text, and the head in PyTorch."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from head_models import head_of, model_of, texts
from safetensors.numpy import save_file
from tiny_models import WORDS, train_tokenizer, write_tiny_model

import biomamba_jax
from biomamba_jax.config import ExamplesConfig
from biomamba_jax.convert import main as convert
from biomamba_jax.data.annotation_files import read_annotated
from biomamba_jax.data.annotations import AnnotatedText, encode_words
from biomamba_jax.errors import UserError
from biomamba_jax.finetune import main as finetune
from biomamba_jax.interop import Weights, read_model, write_model
from biomamba_jax.interop.heads import split
from biomamba_jax.tag import TagConfig, tag

SETTINGS = (
    "--init_from=base --run_dir=run --data.sequence_length=48 --data.batch_size=8 --tensorboard=false "
    "--optimizer.learning_rate=2e-2 --optimizer.weight_decay=0 --train.log_every=20 --train.eval_every=40"
).split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run that has learnt fifty sentences, written as CoNLL's columns, with LoRA and two backbones."""
    here = tmp_path_factory.mktemp("mining")
    tokenizer = train_tokenizer(here)
    write_tiny_model(here / "base", "mamba1", tokenizer, spread=1)
    lines = []
    for text in texts(50):
        starts = {span.start: span.type for span in text.spans}
        place = 0
        for word in text.text.split():
            lines.append(f"{word}\t{'B-' + starts[place] if place in starts else 'O'}")
            place += len(word) + 1
        lines.append("")
    (here / "train.tsv").write_text("\n".join(lines))
    (here / "devel.tsv").write_text("\n".join(["", *lines]))
    before = os.getcwd()
    os.chdir(here)
    try:
        data = ["--data.format=conll", "--data.files=[train.tsv]", "--data.development=[devel.tsv]"]
        head = ["--head=token_classifier", "--reading=bidirectional", "--lora.rank=8", "--lora.targets=[_proj]"]
        finetune([*SETTINGS, *data, *head, "--train.steps=240"])
        convert(["--input=run", "--output=hf", "--to=hf"])
        convert(["--input=run", "--output=native", "--to=native"])
    finally:
        os.chdir(before)
    return here


@pytest.mark.slow
def test_entities_are_learnt_from_columns_and_measured(trained):
    [(name, measured)] = json.loads((trained / "run" / "results.json").read_text()).items()
    assert name == "conll development" and measured["texts"] == 50
    assert measured["f1"] == measured["f1_low"] == 1.0 and set(measured["types"]) == {"Chemical", "Disease", "Species"}
    lines = [
        json.loads(line) for line in (trained / "run/predictions/conll-development.jsonl").read_text().splitlines()
    ]
    assert all(line["spans"] == line["gold"]["spans"] for line in lines)


@pytest.mark.slow
def test_a_run_its_exports_and_pytorch_tag_alike(trained, monkeypatch):
    torch = pytest.importorskip("torch", reason="transformers runs on torch")
    transformers = pytest.importorskip("transformers", reason="the head's code is for transformers")
    monkeypatch.chdir(trained)  # where the adapters' base is
    wanted = [text.text for text in texts(8)]
    expected = biomamba_jax.load(trained / "run").tag(wanted)
    assert sum(map(len, expected)) > 5
    for folder in ("native", "hf"):
        assert biomamba_jax.load(trained / folder).tag(wanted) == expected
    model = biomamba_jax.load(trained / "hf")
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(trained / "hf", trust_remote_code=True)
    ids = [words.ids for words in encode_words(wanted, model.tokenizer)]
    for row, ours in zip(ids, model.head_model.logits(ids), strict=True):
        with torch.no_grad():
            logits = theirs(torch.tensor([row]), labels=torch.zeros(1, len(row), dtype=torch.long)).logits[0]
        np.testing.assert_allclose(logits.numpy(), ours, atol=1e-4)
    theirs.save_pretrained(trained / "saved")
    again = transformers.AutoModelForTokenClassification.from_pretrained(trained / "saved", trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(again(torch.tensor([row])).logits[0], logits)


@pytest.mark.parametrize(
    ("kind", "reading"), [("multi_label", "echo"), ("span", "once"), ("regression", "bidirectional")]
)
def test_each_head_gives_in_pytorch_what_it_gives_here(tmp_path, kind, reading):
    torch = pytest.importorskip("torch", reason="transformers runs on torch")
    transformers = pytest.importorskip("transformers", reason="the head's code is for transformers")
    tokenizer, head = train_tokenizer(tmp_path), head_of(kind, reading)
    config, params = model_of("mamba1", tokenizer, head)
    own, found = split(params, head)
    write_model(Weights(config, own, tokenizer.path, head=found), tmp_path / "hf", "hf")
    auto = getattr(transformers, f"AutoModelFor{'QuestionAnswering' if kind == 'span' else 'SequenceClassification'}")
    theirs = auto.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    rows = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")([t.text for t in texts(3)], padding=True)
    with torch.no_grad():
        out = theirs(torch.tensor(rows["input_ids"]), torch.tensor(rows["attention_mask"]))
    ours = biomamba_jax.load(tmp_path / "hf").head_model.logits(tokenizer.encode_batch([t.text for t in texts(3)]))
    for index, logits in enumerate(ours):
        if kind == "span":
            both = torch.stack([out.start_logits[index], out.end_logits[index]], -1)
            np.testing.assert_allclose(both[-len(logits) :].numpy(), logits, atol=1e-4)  # behind the start token
        else:
            np.testing.assert_allclose(out.logits[index].numpy(), logits[-1], atol=1e-4)


# --- tag -------------------------------------------------------------------------------------------------------------


def tagged(trained, **settings):
    out = io.StringIO()
    tag(TagConfig(str(trained / "native"), **settings), ["serum glucose, <b>&amp;\n", "\n", "no mice\n"], out)
    return out.getvalue()


@pytest.mark.slow
def test_tag_writes_the_spans_of_each_line(trained):
    first, second = [json.loads(line) for line in tagged(trained).splitlines()]
    assert (first["key"], first["text"], second["key"]) == ("1", "serum glucose, <b>&amp;", "3")
    assert all(s["text"] == first["text"][s["start"] : s["end"]] for s in first["spans"])
    expected = biomamba_jax.load(trained / "native").tag(["no mice"])[0]
    assert [(s["start"], s["end"], s["type"]) for s in second["spans"]] == [span[:3] for span in expected]


@pytest.mark.slow
def test_tag_keeps_the_keys_of_json_lines_and_reads_what_it_wrote_as_pubtator(trained, tmp_path):
    (tmp_path / "in.jsonl").write_text(
        json.dumps({"id": "a", "year": 1999, "title": "insulin fell", "body": "in mice"})
    )
    where = {"file": str(tmp_path / "in.jsonl"), "text": "{title}\n{body}"}
    [line] = [json.loads(line) for line in tagged(trained, **where).splitlines()]
    assert (line["key"], line["year"], line["text"]) == ("a", 1999, "insulin fell\nin mice")
    (tmp_path / "in.CSV").write_text("id,title,body\na,insulin fell,in mice\n")
    [of_table] = [json.loads(row) for row in tagged(trained, **where | {"file": str(tmp_path / "in.CSV")}).splitlines()]
    assert (of_table["key"], of_table["spans"]) == ("a", line["spans"])
    tagged(trained, **where, to="pubtator", output=str(tmp_path / "out.txt"))
    [again] = read_annotated(str(tmp_path / "out.txt"), ExamplesConfig(format="pubtator"))
    assert again.text == line["text"]
    assert [span[:3] for span in again.spans] == [(s["start"], s["end"], s["type"]) for s in line["spans"]]


@pytest.mark.slow
def test_pubtator_keeps_the_offsets_of_a_text_with_other_line_ends_and_tabs(trained, tmp_path):
    text = "insulin fell\r\nin\u2028mice\twith\x85diabetes"
    (tmp_path / "in.jsonl").write_text(json.dumps({"key": None, "id": None, "text": text}))
    line = json.loads(tagged(trained, file=str(tmp_path / "in.jsonl")))
    tagged(trained, file=str(tmp_path / "in.jsonl"), to="pubtator", output=str(tmp_path / "out.txt"))
    assert len((tmp_path / "out.txt").read_text().splitlines()) == 3 + len(line["spans"])  # an empty one ends it
    [again] = read_annotated(str(tmp_path / "out.txt"), ExamplesConfig(format="pubtator"))
    assert (again.key, again.text.split(), len(again.text)) == ("1", text.split(), len(text))
    assert [span[:3] for span in again.spans] == [(s["start"], s["end"], s["type"]) for s in line["spans"]]
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "a|t", "text": text}))
    with pytest.raises(UserError, match=r"key 'a\|t': PubTator has no place for it"):
        tagged(trained, file=str(tmp_path / "in.jsonl"), to="pubtator")


@pytest.mark.slow
def test_records_of_pubmed_that_are_not_tagged_are_counted(trained, shared_data, capsys):
    tagged(trained, file=str(shared_data / "pubmed_xml" / "pubmed_sample_versions_deletes.xml"))
    assert "left out: " in capsys.readouterr().err


@pytest.mark.slow
def test_tag_reads_pubmed_and_highlights_spans_in_escaped_html(trained, tmp_path, shared_data):
    tagged(trained, to="html", output=str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert "<mark" in page and "&lt;" in page and "<b>" not in page
    xml = str(shared_data / "pubmed_xml" / "pubmed_sample_versions_deletes.xml")
    lines = [json.loads(line) for line in tagged(trained, file=xml).splitlines()]
    assert lines and all(line["key"].isdigit() and line["text"] for line in lines)


@pytest.mark.slow
def test_a_long_text_is_tagged_as_in_one_piece(trained):
    model = biomamba_jax.load(trained / "native")
    text = AnnotatedText("", " ".join(text.text for text in texts(50)))
    [whole] = model.head_model.annotate([text])
    model.head_model._window = 64
    [windows] = model.head_model.annotate([text])
    assert whole == windows and len(whole.spans) > 20


# --- Errors and earlier formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "line", "words", "message"),
    [
        (
            "token_classifier",
            {"entities": [[0, 7, "Chemical"]]},
            [],
            "labels of the texts are O; check",
        ),
        ("classifier", {"label": "x"}, [], "nothing to learn, the labels of the texts are x; check"),
        ("multi_label", {}, [], "labels of the texts are missing; check"),
        (
            "token_classifier",
            {"spans": [{"start": 0, "end": 7, "type": "Gene"}]},
            ["--data.types=gene"],
            "of type gene",
        ),
        ("token_classifier", {"spans": [{"start": 0, "end": 7, "type": "A"}]}, ["--labels=[O,B-A,A]"], "must be O or"),
        ("classifier", {"label": "x"}, ["--labels=[x,y,x]"], "labels = .*: must differ from each other"),
    ],
)
def test_a_head_without_anything_to_learn_is_refused(tmp_path, monkeypatch, head, line, words, message):
    monkeypatch.chdir(tmp_path)
    write_tiny_model(Path("base"), "mamba2", train_tokenizer(tmp_path))
    lines = [json.dumps({"text": text.text} | line) + "\n" for text in texts(20)]
    Path("train.jsonl").write_text("".join(lines))
    with pytest.raises(UserError, match=message):
        finetune([*SETTINGS, f"--head={head}", "--data.format=spans", "--data.files=[train.jsonl]", *words])
    assert not list(Path("run").glob("checkpoints/*"))


def test_a_classifier_of_an_earlier_version_is_still_read(tmp_path):
    write_tiny_model(tmp_path / "m", "mamba1", train_tokenizer(tmp_path))
    weight = np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)
    metadata = {"format": "pt", "labels": json.dumps(["no", "yes"])}
    save_file({"weight": weight}, tmp_path / "m" / "classifier.safetensors", metadata)
    head = read_model(tmp_path / "m").head
    assert head.config.labels == ("no", "yes") and head.config.kind == "classifier" and not head.bias.any()
    np.testing.assert_array_equal(head.weight, weight)
    with pytest.raises(UserError, match="its head is a classifier, not a token_classifier"):
        biomamba_jax.load(tmp_path / "m").tag("text")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--data.format=conll"], "data.format = 'conll': needs a head"),
        (["--reading=echo"], "reading = 'echo': needs a head"),
        (["--data.types=Disease"], r"data.types = .'Disease'.: has no effect with data.format examples"),
        (
            ["--head=classifier", "--data.format=tsv", "--data.relation=CID"],
            "data.relation = 'CID': has no effect with",
        ),
        (
            ["--head=span", "--data.format=squad", "--data.negative=no"],
            "data.negative = 'no': has no effect with .* span",
        ),
        (["--pubmedqa.max_questions=3"], "pubmedqa.max_questions = 3: counts in `evaluate`, not here"),
        (["--head=span", "--loss.z_loss=0.1"], "loss.z_loss = 0.1: must be 0 for head span"),
        (["--head=multi_label", "--data.format=tsv", "--data.test=[a.tsv]"], "is byte for byte a.tsv"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "base", "mamba1", train_tokenizer(tmp_path))
    Path("a.tsv").write_text("the mice\tx\n")
    Path("b.tsv").write_text("the cell\tx\n")
    with pytest.raises(UserError, match=message):
        finetune([*SETTINGS, "--data.files=[b.tsv]", "--data.development=[a.tsv]", "--train.steps=1", *settings])


def test_results_of_a_finished_run_stay_those_of_the_data_that_its_config_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tiny_model(Path("base"), "mamba2", train_tokenizer(tmp_path))
    lines = [json.dumps({"text": text.text, "label": text.text[0]}) + "\n" for text in texts(20)]
    Path("train.jsonl").write_text("".join(lines))
    Path("test.jsonl").write_text(lines[0] + lines[1])
    given = [*SETTINGS, "--head=classifier", "--data.format=spans", "--data.files=train.jsonl", "--train.steps=1"]
    finetune(given)
    before = Path("run/results.json").read_text()
    Path("run/results.json").unlink()
    finetune([*given, "--data.batch_size=4", "--optimizer.learning_rate=1"])  # nothing that the results depend on
    assert Path("run/results.json").read_text() == before
    with pytest.raises(
        UserError, match=r"run: is finished, and was trained with another data\.test; give another run_dir"
    ):
        finetune([*given, "--data.test=test.jsonl"])
    assert Path("run/results.json").read_text() == before


def test_relations_of_documents_are_learnt_as_pairs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "base", "mamba1", train_tokenizer(tmp_path), spread=1)
    documents = [
        f"{key}|t|the insulin\n{key}|a|fell in {word}\n{key}\t4\t11\tinsulin\tChemical\tC1\n"
        f"{key}\t20\t{20 + len(word)}\t{word}\tDisease\tD{key}\n{key}\tCID\tC1\tD{key}\n{key}\tCID\tC9\tD{key}\n"
        for key, word in enumerate(WORDS)
    ]
    Path("train.txt").write_text("\n".join(documents))
    Path("test.txt").write_text("\n".join(documents[:4]))
    data = "--data.format=pubtator --data.relation=CID --data.negative=none --data.files=[train.txt]"
    data += " --data.test=[test.txt] --data.development_fraction=0.3"
    finetune([*SETTINGS, *data.split(), "--head=classifier", "--train.steps=20"])
    measured = json.loads(Path("run/results.json").read_text())["pubtator test"]
    # Every pair is related here; the concept C9 is never mentioned, so that half of the relations cannot be found.
    assert (measured["texts"], measured["gold"], measured["correct"], measured["predicted"]) == (4, 8, 4, 4)
    assert measured["f1"] == pytest.approx(2 / 3)
