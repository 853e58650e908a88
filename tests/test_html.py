"""Pages and tables: what users name is shown as they named it."""

import json
import re

import lxml.html
import numpy as np
import pytest
from matplotlib.figure import Figure

from biomamba_jax import html
from biomamba_jax.config import EvaluateConfig
from biomamba_jax.data import inspection
from biomamba_jax.data.shards import Manifest, SplitInfo, TokenizerInfo
from biomamba_jax.tables import Table, print_tables, summary_table
from biomamba_jax.tasks import evaluation_report
from biomamba_jax.tasks.evaluation import Domain, Evaluation, McNemar, Task
from biomamba_jax.tasks.perplexity import DomainMeasures
from biomamba_jax.tasks.question_answering import TaskResult
from biomamba_jax.tasks.scoring import ModelFacts
from biomamba_jax.tasks.statistics import Estimate
from biomamba_jax.train.report import record_start, write_report

NAMES = ["a&b$_x$", "<script>", '_a&amp;b "c" <b>{{ 7 * 7 }}']


def root_of(path):
    """The page, of which nothing runs and nothing is fetched."""
    root = lxml.html.parse(str(path)).getroot()
    assert not root.xpath("//script | //link | //img | //iframe | //object | //use[not(starts-with(@*, '#'))]")
    assert not [value for value in root.xpath("//@src | //@href") if not value.startswith("#")]
    assert "@import" not in path.read_text()
    return root


def cells(table):
    return [[" ".join(cell.text_content().split()) for cell in row] for row in table.xpath(".//tr")]


def table_under(root, title):
    return cells(root.xpath(f"//section[h2='{title}']//table")[0])


@pytest.mark.parametrize("name", [*NAMES, "a$b$c", "_base", "$", "plain"])
def test_a_name_is_a_plot_s_title_tick_and_label_as_it_is(name):
    def draw(axes):
        axes.plot([1, 2], label=html.legend_label(name))
        axes.set_xticks([0], [name])
        axes.legend()

    plot = html.plot(name, draw)
    texts = [text.text_content().lstrip("\u200b") for text in lxml.html.fromstring(plot.svg).xpath("//text")]
    assert plot.title == name and texts.count(name) == 2


def test_a_logarithmic_axis_has_plain_numbers_and_the_plot_the_colour_of_the_page():
    def draw(axes):
        axes.plot([1, 1000], [3, 4])
        axes.set_xscale("log")

    svg = html.plot("title", draw).svg
    texts = [text.text_content() for text in lxml.html.fromstring(svg).xpath("//text")]
    assert "1,000" in texts and "10" in texts and "currentColor" in svg and "123456" not in svg


def test_a_long_curve_has_as_many_points_as_are_seen_and_none_of_its_spikes_is_lost():
    def heights(xs, ys):
        """Vertical places of the curve, which is the longest path of the plot."""
        svg = html.plot("title", lambda axes: axes.plot(xs, ys)).svg
        curve = max(re.findall(r' d="([^"]*)"', svg), key=len)
        return [float(height) for height in re.findall(r"[ML] \S+ (\S+)", curve)]

    xs, ys = np.arange(100_000), np.random.default_rng(0).normal(size=100_000)
    ys[12_345], ys[77_777], ys[-1] = 20, -30, 10
    found, spikes = heights(xs, ys), heights([0, 12_345, 77_777, 99_999, 0] * 50, [0, 20, -30, 10, 0] * 50)
    assert 500 < len(found) < 5000
    np.testing.assert_allclose([min(found), max(found), found[-1]], [min(spikes), max(spikes), spikes[3]], atol=0.5)


@pytest.mark.parametrize("name", NAMES)
def test_a_training_run_s_page_shows_names_as_they_are(tmp_path, name):
    run_dir = tmp_path / name
    run_dir.mkdir()
    record_start(run_dir, 0)
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 1, "split": "validation", "perplexity": 2.0}) + "\n")
    baseline = {"name": name, "split": "validation", "perplexity": 3.0}
    (run_dir / "baselines.json").write_text(json.dumps([baseline]))
    (run_dir / "config.yaml").write_text(f"path: {name}\n")
    root = root_of(write_report(run_dir))
    assert root.findtext(".//h1") == root.findtext(".//title") == run_dir.name
    assert table_under(root, "Held-out text")[1] == ["validation", name, "3.00"]
    assert root.findtext(".//pre") == f"path: {name}\n"


def results(names, **settings):
    """An evaluation with figures that are all different."""
    config = EvaluateConfig(models=dict.fromkeys(names, "x"), domains={"d": {"path": "x"}}, **settings)
    found = Evaluation(config, names[0], environment={"host": names[0], "versions": {"jax": "1", "flax": "2"}})
    domain = found.domains["d"] = Domain(["x"], documents=1200, bytes=34567, words=890)
    majority = TaskResult({"accuracy": Estimate(0.5, 0.4, 0.6)}, [], 40, 0, 0, {"classes": {"maybe": {"f1": 0.9}}})
    task = found.tasks["t"] = Task("A task", 40, majority)
    domain.left_out, task.left_out = {"unspelled": 3}, {"summary": 4}
    for i, name in enumerate(names):
        domain.unspelled[name] = 0.123 * (i == 1)
        domain.not_compared += [name] * (i == 1)
        found.models[name] = ModelFacts(
            name, f"/{i}", "masked" if i == 2 else "causal", "biomamba-jax", 1_234_567 + i, "bpe", "all", "float32"
        )
        domain.models[name] = DomainMeasures(
            cross_entropy=Estimate(2.5 + i, 2.25, 2.75),
            perplexity=Estimate(12_345.6 + i, 11.0, float("inf")),
            bits_per_byte=Estimate(0.75 + i, 0.5, 1.0),
            bits_per_word=Estimate(15.125, 14.0, 16.0),
            tokens=9876 + i,
            tokens_per_second=4321.4,
            positions=[{"from": 0, "to": 0, "tokens": 5, "cross_entropy": 3.0}] * 2,
        )
        batches = {f"/in/B{b}.json": {"accuracy": Estimate(0.1 * b + 0.01 * i, 0.0, 1.0)} for b in (1, 2)}
        details = {"classes": {"yes": {"f1": 0.25}}, "batches": batches}
        if i == 0:
            details["thresholds"] = {"chosen_by": "macro_f1", "cross_validated_accuracy": 0.625}
        measures = {"accuracy": Estimate(0.7, 0.65, 0.8), "macro_f1": Estimate(0.375)}
        task.models[name] = TaskResult(measures, [], 40, seconds=8.0, answered=60, details=details)
    for name in names[1:2]:
        task.comparisons[name] = McNemar(names[0], only_this=7, only_reference=3, p_value=0.34375)
    return found


def test_an_evaluation_s_page_has_each_figure_with_its_unit_and_its_interval_in_each_model_s_column(tmp_path):
    evaluation_report.write(results(["one", "two", "three"]), tmp_path)
    root = root_of(tmp_path / "report.html")
    models = table_under(root, "Models")
    assert models[:2] == [["", "one", "two", "three (pseudo)"], ["path", "/0", "/1", "/2"]]
    assert models[4] == ["parameters", "1,234,567", "1,234,568", "1,234,569"]
    assert table_under(root, "Text domains") == [
        ["", "one", "two", "three (pseudo)"],
        ["d: 1,200 documents, 34,567 bytes, 890 words; left out: 3 unspelled"],
        ["bits per byte", "0.7500 [0.5000, 1.0000]", "1.7500 [0.5000, 1.0000]", "2.7500 [0.5000, 1.0000]"],
        ["bits per word"] + ["15.12 [14.00, 16.00]"] * 3,
        ["perplexity per token", "12,346 [11.00, ∞]", "12,347 [11.00, ∞]", "12,348 [11.00, ∞]"],
        [
            "cross-entropy, nats per token",
            "2.5000 [2.2500, 2.7500]",
            "3.5000 [2.2500, 2.7500]",
            "4.5000 [2.2500, 2.7500]",
        ],
        ["tokens", "9,876", "9,877", "9,878"],
        ["tokens per second", "4,321", "4,321", "4,321"],
        ["bytes that the tokenizer does not spell", "0.00 %", "12.30 %, not compared", "0.00 %"],
    ]
    assert table_under(root, "A task") == [
        ["", "majority", "one", "two", "three (pseudo)"],
        ["accuracy", "50.0 % [40.0 %, 60.0 %]"] + ["70.0 % [65.0 %, 80.0 %]"] * 3,
        ["macro F1", "–", "37.5 %", "37.5 %", "37.5 %"],
        ["F1 of yes", "–", "25.0 %", "25.0 %", "25.0 %"],
        ["only this model right / only one right, McNemar", "–", "–", "7 / 3, p = 0.344", "–"],
        ["thresholds", "–", "by macro_f1", "–", "–"],
        ["accuracy on development questions, cross-validated", "–", "62.5 %", "–", "–"],
        ["questions", "40", "40", "40", "40"],
        ["left out: summary", "4", "4", "4", "4"],
        ["questions per second", "–", "7.5", "7.5", "7.5"],
        ["B1.json"],
        ["accuracy", "–", "10.0 % [0.0 %, 100.0 %]", "11.0 % [0.0 %, 100.0 %]", "12.0 % [0.0 %, 100.0 %]"],
        ["B2.json"],
        ["accuracy", "–", "20.0 % [0.0 %, 100.0 %]", "21.0 % [0.0 %, 100.0 %]", "22.0 % [0.0 %, 100.0 %]"],
    ]
    text = " ".join(root.text_content().split())
    assert "3 models · 95% intervals in brackets" in text and "jax 1 · flax 2" in text
    assert "Columns marked pseudo" in text and "as the published BioMamba code does" not in text


def test_a_model_called_majority_keeps_its_own_column_and_test(tmp_path):
    evaluation_report.write(results(["one", "majority"]), tmp_path)
    task = table_under(root_of(tmp_path / "report.html"), "A task")
    assert task[0] == ["", "majority", "one", "majority"]
    assert task[1][1:] == ["50.0 % [40.0 %, 60.0 %]"] + ["70.0 % [65.0 %, 80.0 %]"] * 2
    assert task[4][1:] == ["–", "–", "7 / 3, p = 0.344"]


def test_the_level_of_the_intervals_is_not_rounded(tmp_path):
    evaluation_report.write(results(["one"], confidence=0.995), tmp_path)
    root = root_of(tmp_path / "report.html")
    assert "99.5% intervals" in root.findtext(".//header/p")
    assert "pseudo" not in root.text_content().partition("Environment")[0]


@pytest.fixture
def axes(monkeypatch):
    """The axes of plots drawn in this test, by title."""
    found = {}

    def draw_only(title, draw):
        found[title] = Figure().add_subplot()
        draw(found[title])
        return html.Plot(title, "")

    monkeypatch.setattr(html, "plot", draw_only)
    return found


def test_intervals_are_drawn_around_their_figures(axes):
    evaluation_report._intervals_plot("t", ["a", "b"], [("m", [Estimate(0.5, 0.25, 1.0), Estimate(0.75)])])
    (bars,) = axes["t"].containers
    assert [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()] == [[0.25, 1.0], [0.75, 0.75]]
    assert bars.lines[0].get_ydata().tolist() == [0.5, 0.75]


def test_losses_are_drawn_at_the_middle_of_their_positions_counted_from_one(axes, tmp_path):
    found = results(["one"])
    ranges = [(0, 0, 9.0), (1, 1, 8.0), (2, 3, 7.0)]
    found.domains["d"].models["one"].positions[:] = [
        {"from": first, "to": last, "tokens": 1, "cross_entropy": loss} for first, last, loss in ranges
    ]
    evaluation_report.write(found, tmp_path)
    (line,) = axes["Cross-entropy by position in the document: d"].lines
    assert line.get_xdata().tolist() == [1, 2, 3.5] and line.get_ydata().tolist() == [9, 8, 7]


@pytest.mark.parametrize("name", NAMES)
def test_an_evaluation_s_page_shows_names_as_they_are(tmp_path, name):
    evaluation_report.write(results([name, "two"]), tmp_path)
    root = root_of(tmp_path / "report.html")
    assert table_under(root, "Text domains")[0] == ["", name, "two"]
    texts = [text.text_content().lstrip("\u200b") for text in root.xpath("//figure//text")]
    assert texts.count(name) == 3 and f"only {name} right, McNemar" in root.text_content()
    assert root.xpath("//dd")[0].text == name


def found_shards(name):
    manifest = Manifest(
        TokenizerInfo(name, "0" * 64, "tokenizer.model", 12_345, 2),
        {"train": SplitInfo(1300, 45_600, 98_040, 4), "test": SplitInfo(0, 0, 0, 0)},
        {"no_abstract": 1700, "retracted": 0},
        [{"name": name, "sha256": "", "records": 1000}, {"name": "b.xml.gz", "sha256": "", "records": 2000}],
        {"input": name},
    )
    return inspection.Inspection(
        name=name,
        manifest=manifest,
        split="train",
        lengths=np.array([100, 1024, 3000], np.uint32),
        sequence_length=1024,
        packed=0.98765,
        markup=inspection.Markup(checked=2000, tags=20, entities=5),
        samples=[inspection.Sample(name, 1234, name + "x" * 5000, "after")],
        removed={"near_duplicate": 1234},
        mixture=[
            inspection.SourceShare(name, 30_000, 0.75, 1500, 2.5),
            inspection.SourceShare("b", 10_000, 0.25, 1, 0.1),
        ],
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_inspection_s_page_has_each_figure_under_its_column_and_names_as_they_are(tmp_path, name):
    inspection.write_html(found_shards(name), tmp_path / "text.html")
    root = root_of(tmp_path / "text.html")
    assert root.findtext(".//header/h1") == name
    assert root.findtext(".//header/p") == f"files read: 2 · {name}, 12,345 ids"
    assert table_under(root, "Records") == [
        ["records", "number", "meaning"],
        ["read", "3,000", ""],
        ["no_abstract", "-1,700", "no abstract or text"],
        ["kept", "1,300", ""],
    ]
    assert table_under(root, "Splits") == [
        ["split", "documents", "tokens", "bytes", "bytes/token", "shards"],
        ["train", "1,300", "45,600", "98,040", "2.15", "4"],
        ["test", "0", "0", "0", "–", "0"],
    ]
    assert table_under(root, "Mixture")[1:] == [
        [name, "30,000", "75.00 %", "1,500", "2.500"],
        ["b", "10,000", "25.00 %", "1", "0.100"],
    ]
    assert [item.text for item in root.xpath("//li")] == [
        "rows of 1,024: 98.77 % full when packed; 33.33 % of the documents are longer",
        "of 2,000 documents 20 (1.000 %) have tags left and 5 (0.250 %) entities; in the MedRAG corpus of "
        "PubMed's 2021 files 27 % and 18 %",
        "removed.jsonl lists 1,234 as near_duplicate",
    ]
    assert [plot.text for plot in root.xpath("//figcaption")] == [
        "Documents by length",
        "Left out, by reason",
        "Mixture",
    ]
    assert name in [text.text_content() for text in root.xpath("//figure//text")]
    assert root.findtext(".//h3") == f"{name}, 1,234 tokens"
    before, after, settings = (pre.text for pre in root.xpath("//pre"))
    assert before == (name + "x" * 5000)[:3000] and after == "after" and json.loads(settings) == {"input": name}


def test_a_table_s_figures_stand_right_and_its_emphasized_rows_in_bold():
    source = "{% from 'macros.html.jinja' import table %}{{ table(content) }}"
    content = Table(
        ["name", "n", "note"], [["a", 1234, None], ["heading"], ["b", ("5", "[4, 6]"), "x"]], "", (0, 2), (2,)
    )
    root = lxml.html.fromstring(html.TEMPLATES.from_string(source).render(content=content))
    assert cells(root) == [["name", "n", "note"], ["a", "1,234", "–"], ["heading"], ["b", "5 [4, 6]", "x"]]
    assert [cell.text_content() for cell in root.xpath("//*[@class='number']")] == ["n", "1,234", "5 [4, 6]"]
    assert [row.text_content().split() for row in root.xpath("//tr[@class='emphasized']")] == [
        ["b", "5", "[4,", "6]", "x"]
    ]


def test_a_summary_table_is_not_squeezed_where_stdout_is_a_file(capsys):
    summary_table("Held-out text", ["model", "perplexity"], [["x" * 100, 31.2], ["[brackets]", None], ["n", 12345]])
    out = capsys.readouterr().out
    assert "x" * 100 in out and "[brackets]" in out and "31.2 " in out and " – " in out and " 12,345 " in out


def test_printed_columns_are_aligned_as_the_table_says(capsys):
    print_tables([Table(("a", "b", "c"), [("x", 1, "left"), ("long", 12345, "y")], left=(0, 2))])
    assert [line for line in capsys.readouterr().out.splitlines() if "x" in line or "long" in line] == [
        "│ x    │      1 │ left │",
        "│ long │ 12,345 │ y    │",
    ]
