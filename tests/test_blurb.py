"""BLURB: its average by hand, what is missing or of another size named, and every kind of model through all of it."""

import json

import lxml.html
import pytest
from encoders import write_encoder
from tiny_models import train_tokenizer, write_tiny_model

from biomamba_jax import blurb
from biomamba_jax.blurb import SETS, macro_word_f1, report_of
from biomamba_jax.errors import UserError
from biomamba_jax.evaluate import main as evaluate


def results(figure=lambda name: 0.5, sizes=None):
    """Measures of one model's only run on every set of `figure` that is not None."""
    found = {}
    for name, each in SETS.items():
        if (value := figure(name)) is not None:
            size = (sizes or {}).get(name, each.size)
            found[name] = {
                "m": [{each.measure: value, "gold": size if each.type in ("entities", "PICO") else -1, "texts": size}]
            }
    return found


def test_the_score_is_the_mean_over_types_of_the_mean_over_their_sets():
    figures = dict(zip(SETS, (1.0, 0.8, 0.6, 0.4, 0.2, 0.3, 0.9, 0.6, 0.3, -0.2, 0.7, 0.5, 1.0), strict=True))
    report = report_of(results(figures.get), [])
    assert report["averages"]["m"] == pytest.approx((0.6 + 0.3 + 0.6 - 0.2 + 0.7 + 0.75) / 6)
    assert report["average"] == "BLURB score" and not report["not_as_published"]


def test_without_a_set_or_with_another_test_split_it_is_not_the_score():
    here = results(lambda name: 0.5 if name in ("HoC", "GAD") else None)
    report = report_of(here, [name for name in SETS if name not in here])
    assert "these 2 sets: not the BLURB score" in report["average"]
    assert report["not_as_published"]["ChemProt"] == "not there" and len(report["not_as_published"]) == 11
    report = report_of(results(sizes={"HoC": 4947}), [])
    assert "not the BLURB score" in report["average"]
    assert report["not_as_published"] == {"HoC": "its test split has 4,947 items, the published one 371"}


def test_a_figure_is_the_mean_over_seeds_with_their_range():
    here = results(lambda name: 0.2 if name == "BIOSSES" else None)
    here["BIOSSES"]["m"] += [here["BIOSSES"]["m"][0] | {"pearson": value} for value in (0.7, None)]  # None: constant
    found = report_of(here, [])["sets"]["BIOSSES"]["models"]["m"]
    assert (found["mean"], found["low"], found["high"]) == (pytest.approx(0.3), 0.0, 0.7)


def test_pico_counts_the_words_of_each_type():
    line = {"text": "ten old men took two pills", "gold": {"spans": [[0, 11, "P", []], [17, 26, "I", []]]}}
    line["spans"] = [[4, 11, "P", []], [12, 26, "I", []]]
    assert macro_word_f1([line]) == pytest.approx((2 * 2 / (2 + 3) + 2 * 2 / (3 + 2)) / 2)


@pytest.fixture
def data(tmp_path):
    """NCBI-disease and BIOSSES by their formats, and a folder without a test split."""
    sentences = ["the\tO\nmice\tO\nhad\tO\ndiabetes\tB-Disease\n", "serum\tO\nglucose\tO\nfell\tO\n"]
    pairs = [{"text": "mice fell\nthe mice fell", "score": 4.0}, {"text": "mice fell\ninsulin", "score": 0.5}]
    for folder, ending, texts in (
        ("ncbi_disease", "tsv", ["\n".join(sentences * n) for n in (3, 2, 1)]),
        ("biosses", "jsonl", ["".join(json.dumps(p) + "\n" for p in pairs * n) for n in (3, 2, 1)]),
    ):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for split, text in zip(("Train", "devel", "TestSet"), texts, strict=True):
            (tmp_path / "data" / folder / f"{split}.{ending}").write_text(text)
    (tmp_path / "data" / "ddi").mkdir()
    (tmp_path / "data" / "ddi" / "train.txt").write_text("")
    return tmp_path


@pytest.mark.slow
def test_our_models_and_each_kind_of_encoder_are_columns_of_one_table(data, monkeypatch, capsys):
    pytest.importorskip("accelerate", reason="transformers' Trainer runs on it")
    monkeypatch.chdir(data)
    write_tiny_model(data / "ours", "mamba2", train_tokenizer(data))
    models = ["--models.ours", "ours"]
    for name in ("BertModel", "ElectraForPreTraining", "RobertaForMaskedLM"):
        write_encoder(data / name, name)
        models += [f"--models.{name}", f"hf:{name}"]
    given = [*models, "--suite", "blurb", "--blurb.data", "data", "--blurb.seeds", "1", "--output", "out"]
    evaluate([*given, "--blurb.steps", "2"])
    report = json.loads((data / "out" / "report.json").read_text())
    assert list(report["sets"]) == ["NCBI-disease", "BIOSSES"] and "DDI" in report["not_as_published"]
    for of_set in report["sets"].values():
        assert list(of_set["models"]) == ["ours", "BertModel", "ElectraForPreTraining", "RobertaForMaskedLM"]
    run = report["sets"]["NCBI-disease"]["models"]["BertModel"]["runs"][0]
    assert run == json.loads((data / "out/runs/BertModel/NCBI-disease-0/results.json").read_text())["conll test"]
    assert run["texts"] == 2 and run["gold"] == 1
    page = lxml.html.parse(str(data / "out" / "report.html")).getroot()
    rows = [[cell.text_content() for cell in row] for row in page.xpath("//tr")]
    assert rows[0][2:] == list(report["averages"]) and ["DDI", "not there"] in rows
    assert "NCBI-disease: f1" in capsys.readouterr().out
    # A second start trains nothing; other settings are refused.
    monkeypatch.setattr(blurb, "train_and_answer", None)
    evaluate([*given, "--blurb.steps", "2"])
    assert json.loads((data / "out" / "report.json").read_text())["averages"] == report["averages"]
    with pytest.raises(UserError, match="was trained with another train"):
        evaluate([*given, "--blurb.steps", "3"])
    with pytest.raises(UserError, match="was trained with another data"):
        evaluate([*given, "--blurb.steps", "2", "--blurb.batch_size", "3"])
    (data / "out/runs/BertModel/NCBI-disease-0/results.json").write_text("{}")
    with pytest.raises(UserError, match=r"results\.json: holds no f1 of a test split"):
        evaluate([*given, "--blurb.steps", "2"])


def test_a_folder_without_any_set_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"blurb\.data = .*: has none of bc5cdr, "):
        evaluate(
            ["--models.m", "x", "--suite", "blurb", "--blurb.data", str(tmp_path), "--output", str(tmp_path / "o")]
        )
