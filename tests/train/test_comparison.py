"""`report`: runs side by side, on a page whose curves are drawn and zoomed by its own script."""

import json
import shutil
import subprocess
from pathlib import Path

import lxml.html
import pytest

from biomamba_jax.errors import UserError
from biomamba_jax.report import main
from biomamba_jax.train.comparison import write_comparison

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs node, to run the page's script")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs of 100 steps, the second with another learning rate, a lower loss and a task."""
    monkeypatch.chdir(tmp_path)
    for name, loss, rate in (("one <1>", 3.0, 1e-3), ("two", 2.0, 2e-3)):
        folder = tmp_path / name
        folder.mkdir()
        trained = [
            {"step": step, "split": "train", "loss": loss + 100 / step, "gradient_norm": 10.0**-step, "tokens": step}
            for step in range(1, 101)
        ]
        evaluated = [
            {"step": 0, "split": "validation", "loss": 5.0},
            {"step": 100, "split": "validation", "loss": loss},
        ]
        if name == "two":
            evaluated.append({"step": 100, "split": "evaluate/pubmedqa", "accuracy": 0.75})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in trained + evaluated))
        (folder / "config.yaml").write_text(f"run_dir: {name[:3]}\noptimizer: {{learning_rate: {rate}, beta1: 0.9}}\n")
    return ["one <1>", "two"]


def page(runs, **settings):
    return lxml.html.parse(str(write_comparison(runs, Path("page.html"), **settings))).getroot()


def test_the_page_has_a_row_a_run_and_the_settings_that_differ(runs, capsys):
    main([*runs, "--output", "page.html"])
    assert capsys.readouterr().out == "report: page.html\n"
    root = lxml.html.parse("page.html").getroot()
    tables = [
        [[cell.text_content() for cell in row] for row in table.xpath(".//tr")] for table in root.xpath("//table")
    ]
    assert tables == [
        [["run", "steps", "tokens"], ["one <1>", "100", "100"], ["two", "100", "100"]],
        [["setting", "one <1>", "two"], ["optimizer.learning_rate", "0.001", "0.002"]],
    ]


def test_nothing_is_fetched_and_a_name_cannot_end_the_script(runs):
    Path("</script><b>").parent.mkdir()
    Path("two").rename("</script><b>")
    root = page([runs[0], "</script><b>"])
    assert not root.xpath("//@src | //link | //b")
    assert json.loads(root.get_element_by_id("curves").text)["names"] == ["one <1>", "script><b>"]


def test_long_curves_keep_their_spikes(runs):
    lines = [{"step": step, "split": "train", "loss": 9.0 if step == 15_555 else 1.0} for step in range(20_000)]
    Path("two/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (chart,) = json.loads(page(["two"]).get_element_by_id("curves").text)["charts"]
    (curve,) = chart["series"]
    assert len(curve["x"]) <= 4000
    assert curve["x"][curve["y"].index(9.0)] == 15_555


def test_a_folder_that_is_no_run_or_given_twice_is_refused(runs):
    Path("empty").mkdir()
    with pytest.raises(UserError, match=r"empty: is not a run directory: it has no metrics\.jsonl"):
        main([*runs, "empty"])
    with pytest.raises(UserError, match=r"two: is given twice"):
        main(["two", "./two"])
    with pytest.raises(UserError, match=r"runs = \[\]: must be one run directory or several"):
        main([])


def test_runs_of_one_name_are_named_by_their_paths(runs):
    shutil.copytree("two", "more/two")
    assert page(["two", "more/two"]).findtext(".//header/p") == "two · more/two"


def in_a_browser(root, after: str):
    """What `after`, a program that may call charts() and fire(), prints as JSON once the page's script has run."""
    data, script = (node.text for node in root.xpath("//script"))
    stub = (Path(__file__).parent / "page_stub.js").read_text().replace("CURVES", json.dumps(data))
    program = f"{stub}\n{script}\n{after}"
    done = subprocess.run(["node", "-"], input=program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_node
def test_every_curve_is_drawn_from_its_first_to_its_last_step_and_from_its_least_to_its_largest_value(runs):
    drawn = {c["title"]: c for c in in_a_browser(page(runs), "console.log(JSON.stringify(charts()))")}
    assert list(drawn) == [
        "Training loss (nats per token)",
        "Gradient norm",
        "validation: loss",
        "pubmedqa: accuracy",
    ]
    first, second = drawn["Training loss (nats per token)"]["lines"]
    for line in (first, second):
        assert [line[0][0], line[-1][0]] == [64.0, 576.0]  # of 600, without the margins
    assert first[0][1] == 8.0 and second[-1][1] == 280.0  # the largest and the least of both, within the margins
    assert drawn["Training loss (nats per token)"]["texts"][-1] == "step"
    (norm, _) = drawn["Gradient norm"]["lines"]
    assert norm[50][1] == pytest.approx((norm[0][1] + norm[-1][1]) / 2, rel=0.02)  # logarithmic


@needs_node
def test_a_drag_zooms_all_charts_over_the_same_steps_a_double_click_undoes_it_and_a_click_hides_a_run(runs):
    after = """
    const svg = byId.charts.all("svg")[0], found = [];
    const steps = chart => chart.lines.map(line => line.map(point => point[0]));
    const show = () => found.push(charts().slice(0, 2).map(steps));
    for (const [name, at] of [["pointerdown", 320], ["pointermove", 400], ["pointerup", 576]]) fire(svg, name, at);
    show();
    fire(svg, "dblclick", 0);
    fire(byId.runs.all("button")[0], "click", 0);
    show();
    console.log(JSON.stringify(found));
    """
    zoomed, hidden = in_a_browser(page(runs), after)
    for chart in zoomed:
        for line in chart:
            assert line[-1] == 576.0 and line[50] == pytest.approx(64, abs=6)  # from step 50.5 or so on
    assert [len(chart) for chart in hidden] == [1, 1]
    assert hidden[0][0][0] == 64.0
