"""The evaluate command: models side by side, every figure with its interval, on one page and in JSON."""

import dataclasses
import json
import random
from collections import Counter

import lxml.html
import pytest
import tokenizers
from random_weights import random_weights
from tiny_models import CONFIGS, WORDS, train_tokenizer, write_tiny_model

from biomamba_jax.command_line import parse
from biomamba_jax.config import BioASQConfig, DomainConfig, EvaluateConfig, PubMedQAConfig
from biomamba_jax.errors import UserError
from biomamba_jax.evaluate import evaluate, main
from biomamba_jax.folders import locked
from biomamba_jax.interop import write_model

QUICK = {"resamples": 50, "window": 64, "batch_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, a text, PubMedQA's 1,000 labels on made-up questions, and two BioASQ files."""
    path = tmp_path_factory.mktemp("evaluate")
    tokenizer = train_tokenizer(path)
    for seed, name in enumerate(("one", "two")):  # of one shape: what is compiled for one serves the other
        weights = random_weights(dataclasses.replace(CONFIGS["mamba2"], vocab_size=tokenizer.vocab_size), seed)
        write_model(dataclasses.replace(weights, tokenizer_file=tokenizer.path), path / name, "native")
    draw = random.Random(0)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=draw.randint(2, 60)))}) for _ in range(12)]
    (path / "text.jsonl").write_text("\n".join(lines))
    answers = ["yes"] * 55 + ["no"] * 34 + ["maybe"] * 11
    entries = {
        str(i): {"QUESTION": "insulin?", "CONTEXTS": [" ".join(draw.choices(WORDS, k=6))], "final_decision": answer}
        for i, answer in enumerate(answers)
    }
    (path / "pqal.json").write_text(json.dumps(entries))
    for batch in (1, 2):
        questions = [
            {"id": f"{batch}y", "type": "yesno", "body": "mice?", "exact_answer": "yes", "snippets": ["glucose"]},
            {"id": f"{batch}n", "type": "yesno", "body": "cell?", "exact_answer": "no", "snippets": []},
            {"id": f"{batch}f", "type": "factoid", "body": "which?", "exact_answer": [["insulin"]]},
            {"id": f"{batch}l", "type": "list", "body": "which?", "exact_answer": [["mice"], ["cell"]]},
            {"id": f"{batch}s", "type": "summary", "body": "what?", "ideal_answer": ["glucose fell"]},
        ]
        (path / f"B{batch}.json").write_text(json.dumps({"questions": questions}))
    return path


def config(folder, output, **settings):
    given = {
        "models": {"one": str(folder / "one"), "two": str(folder / "two")},
        "domains": {
            "made-up": DomainConfig(path=str(folder / "text.jsonl")),
            "bioasq": DomainConfig(path=[str(folder / "B1.json"), str(folder / "B2.json")]),
        },
        "pubmedqa": PubMedQAConfig(path=str(folder / "pqal.json"), thresholds="macro_f1"),
        "bioasq": BioASQConfig(path=[str(folder / "B1.json"), str(folder / "B2.json")], max_new_tokens=8),
    }
    return EvaluateConfig(output=str(output), **QUICK | given | settings)


@pytest.fixture(scope="module")
def output(folder):
    evaluate(config(folder, folder / "out"))
    return folder / "out"


@pytest.fixture(scope="module")
def report(output):
    return json.loads((output / "report.json").read_text())


def test_every_domain_and_measure_has_each_model_with_an_interval(report):
    for domain in ("made-up", "bioasq"):
        for model in ("one", "two"):
            found = report["domains"][domain]["models"][model]
            for measure in ("cross_entropy", "perplexity", "bits_per_byte", "bits_per_word"):
                assert found[measure]["low"] < found[measure]["value"] < found[measure]["high"]
    assert report["domains"]["bioasq"]["documents"] == 10


def test_models_with_one_tokenizer_are_compared_on_the_same_resampled_documents(report):
    pair = report["domains"]["made-up"]["comparisons"]["two"]
    one, two = (report["domains"]["made-up"]["models"][model] for model in ("one", "two"))
    assert pair["reference"] == "one"
    ratio = one["perplexity"]["value"] / two["perplexity"]["value"]
    assert pair["perplexity_ratio"]["value"] == pytest.approx(ratio, rel=1e-6)
    difference = two["bits_per_byte"]["value"] - one["bits_per_byte"]["value"]
    assert pair["bits_per_byte"]["value"] == pytest.approx(difference, rel=1e-6)


def test_documents_results_add_up_to_the_domain_s(output, report):
    lines = [json.loads(line) for line in (output / "documents" / "made-up" / "one.jsonl").read_text().splitlines()]
    found = report["domains"]["made-up"]["models"]["one"]["cross_entropy"]["value"]
    assert sum(line["nats"] for line in lines) / sum(line["tokens"] for line in lines) == pytest.approx(found)
    assert sum(line["bytes"] for line in lines) == report["domains"]["made-up"]["bytes"]


def test_pubmedqa_stands_beside_the_majority_and_keeps_every_prediction(output, report):
    task = report["tasks"]["pubmedqa"]
    assert task["questions"] == 50
    lines = [json.loads(line) for line in (output / "predictions" / "pubmedqa" / "two.jsonl").read_text().splitlines()]
    right = sum(line["truth"] == line["prediction"] for line in lines)
    assert task["models"]["two"]["measures"]["accuracy"]["value"] == pytest.approx(right / 50)
    assert set(lines[0]["scores"]) == {"yes", "no", "maybe"}
    yes = sum(line["truth"] == "yes" for line in lines)
    assert task["majority"]["measures"]["accuracy"]["value"] == pytest.approx(yes / 50)
    reference = (output / "predictions" / "pubmedqa" / "one.jsonl").read_text().splitlines()
    only_this = sum(
        line["correct"] > json.loads(other)["correct"] for line, other in zip(lines, reference, strict=True)
    )
    test = task["comparisons"]["two"]
    assert (test["reference"], test["only_this"]) == ("one", only_this)
    assert test["only_this"] != test["only_reference"]


def test_thresholds_come_from_the_development_questions(report):
    thresholds = report["tasks"]["pubmedqa"]["models"]["one"]["details"]["thresholds"]
    assert thresholds["development_questions"] == 50 and thresholds["offsets"]["yes"] == 0


def test_bioasq_is_measured_pooled_and_per_batch(report):
    found = report["tasks"]["bioasq"]["models"]["one"]
    assert found["details"]["questions_by_kind"] == {"yesno": 4, "factoid": 2, "list": 2}
    assert len(found["details"]["batches"]) == 2
    assert {"yesno_accuracy", "yesno_macro_f1", "factoid_mrr", "list_f1"} <= found["measures"].keys()


def test_the_page_has_every_model_as_a_column_and_says_why_bits_per_byte(output):
    root = lxml.html.parse(str(output / "report.html")).getroot()
    for table in root.xpath("//table"):
        assert [cell.text for cell in table.xpath("thead/tr/th")][-2:] == ["one", "two"]
    assert "Bits per byte divide" in root.text_content()
    titles = root.xpath("//figcaption/text()")
    assert titles[0] == "Bits per byte" and "Cross-entropy by position in the document: made-up" in titles


def test_the_config_that_was_used_is_kept_and_read_back(output, folder):
    again = parse(EvaluateConfig, ["--config", str(output / "config.yaml")])
    assert again == config(folder, output)


@pytest.fixture(scope="module")
def published(folder):
    evaluate(config(folder, folder / "paper", protocol="paper", models={"two": str(folder / "two")}))
    return json.loads((folder / "paper" / "report.json").read_text())


def test_protocol_paper_gives_the_published_kind_of_figures_and_says_so(published, folder):
    assert set(published["domains"]["made-up"]["paper"]["two"]) == {"cross_entropy", "perplexity", "rows", "seconds"}
    task = published["tasks"]["pubmedqa"]
    assert task["questions"] == 20 and "protocol paper" in task["title"]
    assert task["models"]["two"]["details"]["thresholds"]["chosen_by"] == "accuracy on these same questions"
    assert published["tasks"]["bioasq"]["models"]["two"]["questions"] == 4
    assert "as the published BioMamba code does" in (folder / "paper" / "report.html").read_text()


def test_the_command_prints_each_figure_and_where_the_report_is(folder, capsys):
    main(
        f"--models.two {folder / 'two'} --domains.made-up.path {folder / 'text.jsonl'} --resamples 20 --window 64 "
        f"--batch_size 4 --output {folder / 'command'}".split()
    )
    out = capsys.readouterr().out
    assert "bits per byte" in out and out.splitlines()[-1] == f"report: {folder / 'command' / 'report.html'}"


def test_generated_answers_are_read_as_answers(folder):
    asked = PubMedQAConfig(path=str(folder / "pqal.json"), method="generation", max_questions=6)
    only = {"domains": {}, "bioasq": BioASQConfig(), "models": {"two": str(folder / "two")}}
    evaluate(config(folder, folder / "generated", pubmedqa=asked, **only))
    lines = (folder / "generated" / "predictions" / "pubmedqa" / "two.jsonl").read_text().splitlines()
    assert len(lines) == 6
    for line in map(json.loads, lines):
        assert line["prediction"] in ("yes", "no", "maybe", "none") and isinstance(line["text"], str)


def test_what_is_not_asked_is_said_and_counted(folder, capsys):
    asked = PubMedQAConfig(path=str(folder / "pqal.json"), max_questions=10)
    text = {"made-up": DomainConfig(path=str(folder / "text.jsonl"), max_documents=5)}
    evaluate(config(folder, folder / "sample", pubmedqa=asked, domains=text, models={"two": str(folder / "two")}))
    out = capsys.readouterr().out
    assert "made-up: documents left out: 7 not in the sample" in out
    assert "left out: 7 not in the sample" in (folder / "sample" / "report.html").read_text()
    assert "pubmedqa: questions left out: 40 not in the sample" in out
    assert "bioasq: questions left out: 2 summary" in out
    tasks = json.loads((folder / "sample" / "report.json").read_text())["tasks"]
    assert tasks["pubmedqa"]["title"].endswith("a sample of 10 questions stratified by answer (seed 0)")
    assert tasks["bioasq"]["left_out"] == {"summary": 2}
    lines = (folder / "sample" / "predictions" / "pubmedqa" / "two.jsonl").read_text().splitlines()
    found = Counter(json.loads(line)["truth"] for line in lines)
    assert found["yes"] in (5, 6) and found["no"] in (3, 4) and found["maybe"] == 1 and found.total() == 10


@pytest.fixture(scope="module")
def lossy(folder):
    """A model whose tokenizer of whole words knows half of the words."""
    known = {word: i for i, word in enumerate(["<|endoftext|>", "[UNK]", *dict.fromkeys(WORDS)][: 2 + len(WORDS) // 2])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    weights = random_weights(dataclasses.replace(CONFIGS["mamba2"], vocab_size=len(known)))
    write_model(dataclasses.replace(weights, tokenizer_file=folder / "tokenizer.json"), folder / "lossy", "native")
    return folder / "lossy"


def test_a_model_whose_tokenizer_does_not_spell_the_text_is_shown_but_not_compared(folder, lossy, capsys):
    models = {"one": str(folder / "one"), "lossy": str(lossy), "two": str(folder / "two")}
    only = {"domains": {"made-up": DomainConfig(path=str(folder / "text.jsonl"))}, "pubmedqa": PubMedQAConfig()}
    evaluate(config(folder, folder / "spelled", models=models, bioasq=BioASQConfig(), **only))
    domain = json.loads((folder / "spelled" / "report.json").read_text())["domains"]["made-up"]
    assert domain["unspelled"]["one"] == domain["unspelled"]["two"] == 0 < 0.2 < domain["unspelled"]["lossy"] < 0.8
    assert set(domain["models"]) == {"one", "lossy", "two"} and set(domain["comparisons"]) == {"two"}
    (line,) = [each for each in capsys.readouterr().out.splitlines() if each.startswith("lossy on")]
    assert line.endswith(f"{100 * domain['unspelled']['lossy']:.2f} % of bytes not spelled: not compared")


def test_a_model_that_spells_nothing_of_a_text_is_refused(folder, lossy, tmp_path):
    (tmp_path / "t.txt").write_text("Глюкоза и инсулин\n")
    only = {"domains": {"russian": DomainConfig(path=str(tmp_path / "t.txt"))}, "pubmedqa": PubMedQAConfig()}
    with pytest.raises(UserError, match=r"models\.m: the tokenizer of .*lossy spells nothing of domains\.russian"):
        evaluate(config(folder, tmp_path / "out", models={"m": str(lossy)}, bioasq=BioASQConfig(), **only))


def test_protocol_paper_v1_shows_padded_and_honest_figures_of_the_same_weights(folder, capsys):
    only = {"domains": {"made-up": DomainConfig(path=str(folder / "text.jsonl"))}, "pubmedqa": PubMedQAConfig()}
    evaluate(config(folder, folder / "v1", protocol="paper_v1", bioasq=BioASQConfig(), **only))
    domain = json.loads((folder / "v1" / "report.json").read_text())["domains"]["made-up"]
    padded, honest = domain["paper_v1"], domain["models"]
    assert 0.5 < padded["one"]["padding"] < 1 and padded["one"]["rows"] == 12
    assert padded["one"]["text_cross_entropy"] == pytest.approx(honest["one"]["cross_entropy"]["value"], rel=0.2)
    ratio = padded["one"]["perplexity"] / padded["two"]["perplexity"]
    assert f"two on made-up: one's perplexity over its own: {ratio:.1f} by paper_v1" in capsys.readouterr().out
    assert "perplexity with padding in the loss (protocol paper_v1)" in (folder / "v1" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--models.m nowhere --domains.d.path x.txt", "x.txt: cannot be read"),
        ("--domains.d.path x.txt", "models = {}: name a model"),
        ("--models.m nowhere", "nothing to measure"),
        ("--models.m nowhere --domains.d.path x.txt --reference n", "reference = 'n': must be one of m"),
        ("--models.m x --pubmedqa.path x --pubmedqa.prompt {context}", "must contain {question}"),
        ("--models.m x --pubmedqa.path x --pubmedqa.prompt {question}{answer}", "may name {question}, {context}"),
        ("--models.m x --pubmedqa.path x --pubmedqa.prompt {question:d}", "without a format after"),
        ("--models.m x --pubmedqa.path x --pubmedqa.prompt {question!r}", "without a format after"),
        (
            "--models.m x --bioasq.path [x] --bioasq.thresholds accuracy",
            "needs method likelihood and",
        ),
        ("--models.m x --domains.d.path x --widnow 3", "did you mean '--window'"),
    ],
)
def test_wrong_settings_end_in_one_line_that_names_the_key(tmp_path, arguments, message):
    with pytest.raises(UserError) as error:
        main([*arguments.split(), "--output", str(tmp_path / "out")])
    assert message in " ".join(str(error.value).split())


def test_two_evaluations_into_one_folder_are_refused(folder, tmp_path):
    with locked(tmp_path / "out"), pytest.raises(UserError, match="out: another run uses it"):
        evaluate(config(folder, tmp_path / "out"))


def test_nothing_is_measured_before_all_inputs_are_read(folder, tmp_path):
    broken = BioASQConfig(path=[str(tmp_path / "missing.json")])
    with pytest.raises(UserError, match=r"missing\.json: cannot be read"):
        evaluate(config(folder, tmp_path / "out", bioasq=broken))
    assert not (tmp_path / "out" / "documents").exists()


@pytest.mark.parametrize("protocol", ["standard", "paper"])
@pytest.mark.parametrize("task", ["domains", "pubmedqa", "generation"])
def test_a_model_of_nan_gets_no_figures_but_an_error_that_names_it(folder, tmp_path, protocol, task):
    broken = write_tiny_model(tmp_path / "m", "mamba2", train_tokenizer(tmp_path), spread=float("nan"))
    given = {"models": {"broken": str(broken)}, "domains": {}, "pubmedqa": PubMedQAConfig(), "bioasq": BioASQConfig()}
    asked = {
        "domains": {"domains": {"made-up": DomainConfig(path=str(folder / "text.jsonl"))}},
        "pubmedqa": {"pubmedqa": PubMedQAConfig(path=str(folder / "pqal.json"))},
        "generation": {"bioasq": BioASQConfig(path=[str(folder / "B1.json")], method="generation", max_new_tokens=8)},
    }[task]
    with pytest.raises(UserError, match=f"{broken}.* NaN "):
        evaluate(config(folder, tmp_path / "out", protocol=protocol, **given | asked))


def test_a_run_that_fails_leaves_an_earlier_report_and_its_config(folder, tmp_path):
    only = {"domains": {"made-up": DomainConfig(path=str(folder / "text.jsonl"))}, "pubmedqa": PubMedQAConfig()}
    first = config(folder, tmp_path, models={"two": str(folder / "two")}, bioasq=BioASQConfig(), **only)
    evaluate(first)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="no such folder"):
        evaluate(dataclasses.replace(first, models={"three": str(folder / "three")}))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
