"""The report and the progress line: what a person sees of a run."""

import io
import json
import math
import time

import lxml.html
import numpy as np
import pytest
from rich.console import Console

from biomamba_jax.config import RunConfig
from biomamba_jax.environment import environment
from biomamba_jax.errors import UserError
from biomamba_jax.train.meters import Speed
from biomamba_jax.train.metrics import MetricsWriter
from biomamba_jax.train.progress import Progress
from biomamba_jax.train.report import RunReport, _smooth, record_start, write_report


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run <1>"
    with MetricsWriter(RunConfig(run_dir=str(folder), tensorboard=False), None) as writer:
        for step in range(0, 100, 10):
            loss = 2 + 7 * math.exp(-step / 30)
            values = {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / 3}
            writer.write(step, "validation", values)
            values = {"loss": loss, "learning_rate": 1e-3, "gradient_norm": 1.0, "tokens": 1000 * step}
            writer.write(step + 10, "train", values | {"skipped_updates": 3})
            writer.write_timing(step + 10, {"tokens_per_second": 4321.0, "share_of_peak": 0.25})
    (folder / "config.yaml").write_text("data:\n  path: <script>alert(1)</script> & co\n")
    return folder


def page(run_dir):
    return lxml.html.parse(str(write_report(run_dir))).getroot()


def cells(root):
    return [[cell.text_content() for cell in row] for row in root.xpath("//section[1]//tbody/tr")]


def test_the_table_compares_before_and_after_with_baselines_of_the_same_text(run_dir):
    baselines = [
        {"name": "unigram", "split": "validation", "perplexity": 800.0, "bits_per_byte": 2.5},
        {"name": "elsewhere", "split": "test", "perplexity": 1.0, "bits_per_byte": 1.0},
    ]
    (run_dir / "baselines.json").write_text(json.dumps(baselines))
    assert cells(page(run_dir)) == [
        ["validation", "this model, step 0", "8,103.08", "3.0000"],
        ["validation", "unigram", "800.00", "2.5000"],
        ["validation", "this model, step 90", "10.47", "0.7828"],
    ]


def test_the_first_figures_are_steps_tokens_the_last_evaluation_and_the_medians_of_speed(run_dir):
    lines = [
        {"step": step, "time": 1e9 + 60 * step, "tokens_per_second": speed, "share_of_peak": share}
        for step, speed, share in ((1, 1000.0, 0.1), (2, 1234.4, 0.4125), (62, 9000.0, 0.9))
    ]
    (run_dir / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = page(run_dir).xpath("//div[@class='cards']/div")
    assert [tuple(part.text for part in figure) for figure in figures] == [
        ("100", "steps"),
        ("90 k", "tokens"),
        ("10.47", "perplexity"),
        ("0.7828", "bits per byte"),
        ("1,234", "tokens/s (median)"),
        ("41.2 %", "of peak (median)"),
        ("1:01:00", "wall clock"),
    ]


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [(999, "999"), (123_456, "123 k"), (1_500_000, "1.5 M"), (2_340_000_000, "2.34 B"), (3 * 10**12, "3 T")],
)
def test_tokens_are_counted_in_thousands_millions_billions_and_trillions(tmp_path, tokens, shown):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "split": "train", "tokens": tokens}) + "\n")
    assert page(tmp_path).xpath("//div[@class='cards']/div/strong/text()") == ["1", shown]


def test_a_smoothed_straight_line_is_that_line():
    xs = np.arange(0.0, 3000.0, 3)
    smooth_xs, smooth_ys = _smooth(xs, 5 - xs)
    assert len(smooth_xs) == 980
    np.testing.assert_allclose(smooth_ys, 5 - smooth_xs)


def test_it_is_one_file_that_runs_nothing_and_fetches_nothing(run_dir):
    root = page(run_dir)
    assert not root.xpath("//script | //link | //img | //iframe | //object | //use[not(starts-with(@*, '#'))]")
    assert not [value for value in root.xpath("//@src | //@href") if not value.startswith("#")]
    assert "@import" not in (run_dir / "report.html").read_text()


def test_names_and_configuration_are_shown_as_they_are(run_dir):
    root = page(run_dir)
    assert root.findtext(".//h1") == "run <1>"
    assert root.findtext(".//pre") == "data:\n  path: <script>alert(1)</script> & co\n"


def test_there_is_a_curve_for_loss_rate_gradient_and_speed_in_the_colour_of_the_page(run_dir):
    figures = page(run_dir).xpath("//figure")
    assert [figure.findtext("figcaption") for figure in figures] == [
        "Loss (nats per token)",
        "Learning rate",
        "Gradient norm",
        "Tokens per second",
    ]
    assert all("currentColor" in lxml.html.tostring(figure).decode() for figure in figures)


def test_it_tells_of_resumes_and_skipped_updates(run_dir):
    for step in (0, 40, 70):
        record_start(run_dir, step)
    root = page(run_dir)
    events = [item.text_content() for item in root.xpath("//li")]
    assert events[0] == "updates skipped for a non-finite gradient: 3"
    assert [event.split(" on ")[0] for event in events[1:]] == ["started", "resumed at step 40", "resumed at step 70"]
    assert "1 x cpu" in root.findtext(".//header/p")


def test_a_start_at_step_0_opens_a_new_history(tmp_path):
    for step in (0, 40, 0):
        record_start(tmp_path, step)
    assert [start["step"] for start in json.loads((tmp_path / "environment.json").read_text())["starts"]] == [0]


def test_a_run_that_has_only_begun_has_a_report(tmp_path):
    assert page(tmp_path).findtext(".//h1") == tmp_path.name


def test_values_that_are_not_finite_are_left_out_of_the_curves(run_dir):
    with MetricsWriter(RunConfig(run_dir=str(run_dir), tensorboard=False), 100) as writer:
        writer.write(101, "train", {"loss": math.nan, "gradient_norm": math.inf})
    assert len(page(run_dir).xpath("//figure")) == 4


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("baselines.json", b"{", "cannot be read as JSON"),
        ("environment.json", b'{"versions": 5, "devices": "x", "time": "y"}', "is not a record of starts"),
        ("timing.jsonl", b'{"step": 1}\n', "line 1: lacks a value"),
        ("config.yaml", b"a: \xff", "not UTF-8"),
    ],
)
def test_a_broken_file_is_named_and_the_old_report_stays(run_dir, file, content, message):
    before = write_report(run_dir).read_bytes()
    (run_dir / file).write_bytes(content)
    with pytest.raises(UserError, match=rf"{file}.*{message}"):
        write_report(run_dir)
    assert (run_dir / "report.html").read_bytes() == before


def test_the_environment_names_versions_devices_and_the_command_but_no_secrets(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hush-hush")
    about = environment()
    assert {"jax", "flax", "python", "biomamba-jax"} <= about["versions"].keys()
    assert "cpu" in about["devices"] and "python" in about["command"]
    assert "hush-hush" not in json.dumps(about)


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock, as a list of one number to advance."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_run_in_training_draws_its_report_every_minute_and_when_it_ends(tmp_path, clock):
    file, written = tmp_path / "report.html", []
    with pytest.raises(KeyboardInterrupt), RunReport(tmp_path, lambda line: None) as page:
        for _ in range(4):
            clock[0] += 25
            page.update()
            written.append(file.exists())
            file.unlink(missing_ok=True)
        raise KeyboardInterrupt
    assert written == [False, False, True, False] and file.exists()


def test_a_report_that_cannot_be_written_is_logged_and_not_tried_again_at_once(tmp_path, clock):
    (tmp_path / "baselines.json").write_text("{")
    lines = []
    with RunReport(tmp_path, lines.append) as page:
        for _ in range(2):
            clock[0] += 50
            page.update()
    assert len(lines) == 1 and lines[0].startswith("report.html is not written: ")


def steps(progress, clock, count):
    for step in range(1, count + 1):
        clock[0] += 1.0
        progress.update(step, 5.0, Speed(1234.5, 0.5, 0.0325))


def test_without_a_terminal_there_is_a_plain_line_every_ten_seconds_and_one_at_the_end(clock):
    out = io.StringIO()
    with Progress(100, Console(file=out, width=80)) as progress:
        steps(progress, clock, 25)
        progress.log("saved [step 25]")
    assert out.getvalue().splitlines() == [
        "step 1/100 (1 %)  loss 5.0000  1,234 tokens/s  50.0 % of peak  data wait 3.2 %",
        "step 11/100 (11 %)  loss 5.0000  0:01:29 left  1,234 tokens/s  50.0 % of peak  data wait 3.2 %",
        "step 21/100 (21 %)  loss 5.0000  0:01:19 left  1,234 tokens/s  50.0 % of peak  data wait 3.2 %",
        "saved [step 25]",
        "step 25/100 (25 %)  loss 5.0000  0:01:15 left  1,234 tokens/s  50.0 % of peak  data wait 3.2 %",
    ]


def test_ctrl_c_gives_the_terminal_back_with_its_cursor(clock):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    with pytest.raises(KeyboardInterrupt), Progress(100, console) as progress:
        steps(progress, clock, 3)
        raise KeyboardInterrupt
    assert "\x1b[?25l" in out.getvalue() and out.getvalue().rstrip().endswith("\x1b[?25h")


def test_an_unknown_peak_is_not_shown():
    out = io.StringIO()
    with Progress(10, Console(file=out)) as progress:
        progress.update(1, 5.0, Speed(10.0, None, 0.0))
    assert "peak" not in out.getvalue()


def test_a_speed_that_is_not_measured_yet_is_not_shown():
    out = io.StringIO()
    with Progress(10, Console(file=out)) as progress:
        progress.update(1, 5.0, Speed(None, None, None))
    assert out.getvalue().splitlines() == ["step 1/10 (10 %)  loss 5.0000"]


def test_only_the_first_process_shows_progress(monkeypatch, capfd):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with Progress(10) as progress:
        progress.update(1, 5.0, Speed(10.0, None, 0.0))
        progress.log("hello")
    assert capfd.readouterr() == ("", "")
