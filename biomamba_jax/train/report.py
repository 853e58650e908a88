"""`report.html`: one run on one page that can be sent to a colleague; no scripts, nothing fetched from elsewhere.

Made from the files of the run directory alone, so it can be made again at any time, also of a run on another machine:

    config.yaml       the configuration as resolved
    environment.json  versions, devices and host, and every start of the run (`record_start`)
    metrics.jsonl     losses and evaluations; `skipped_updates` counts updates left out for a non-finite gradient
    timing.jsonl      speed
    baselines.json    optional: [{"name": "unigram (add-k)", "split": "validation", "domain": "pubmed",
                      "perplexity": 812.0, "bits_per_byte": 2.4}, ...]
"""

import itertools
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from biomamba_jax import files, html
from biomamba_jax.environment import environment
from biomamba_jax.errors import UserError
from biomamba_jax.train.metrics import Record, read_metrics, read_timing
from biomamba_jax.train.progress import duration

MAX_POINTS = 2000
"""Points of one curve at most: more than a screen has columns, few enough for a page of some 100 kB."""

Series = tuple[list[float], list[float]]


def record_start(run_dir: str | os.PathLike[str], step: int, headline: Sequence[str] = ()) -> None:
    """Writes `environment.json` of this process, and adds this start to the run's earlier ones.

    Call it on the first process only.

    Args:
      run_dir: the run's directory, which exists.
      step: steps done before this start; 0 opens a new history.
      headline: facts for the top of the report, for instance "12.3 M parameters", "16,384 tokens a step".
    """
    path = Path(run_dir) / "environment.json"
    now = environment()
    earlier = _read_json(path, {}).get("starts", []) if step else []
    start = {"step": step} | {key: now[key] for key in ("time", "host", "devices", "command")}
    files.write_text(path, json.dumps(now | {"headline": list(headline), "starts": [*earlier, start]}, indent=2) + "\n")


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Writes `report.html` of a run directory, whole or not at all. Call it on the first process only.

    Args:
      run_dir: the run's directory, at any moment of its life; what is missing is left out.

    Returns:
      The path of the report.

    Raises:
      UserError: one of the files can't be read; names it.
    """
    folder = Path(run_dir)
    metrics, timing = read_metrics(folder), read_timing(folder)
    about = _read_json(folder / "environment.json", {})
    config = folder / "config.yaml"
    title = folder.resolve().name
    body = [
        f"<header><h1>{html.text(title)}</h1>{_subtitle(about)}</header>",
        _key_figures(metrics, timing),
        html.section("Held-out text", _results(metrics, _read_json(folder / "baselines.json", []))),
        html.section("Curves", _curves(metrics, timing)),
        html.section("Events", _events(metrics, about)),
        html.section("Environment", html.environment_table(about)),
        html.section("Configuration", f"<pre>{html.text(config.read_text())}</pre>" if config.exists() else ""),
    ]
    path = folder / "report.html"
    html.write(path, title, body)
    return path


def thin(xs: Sequence[float], ys: Sequence[float], limit: int = MAX_POINTS) -> Series:
    """At most `limit` points of a curve: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(xs) <= limit:
        return list(xs), list(ys)
    stretches = limit // 2
    edges = [round(i * len(xs) / stretches) for i in range(stretches + 1)]
    kept: list[int] = []
    for start, end in itertools.pairwise(edges):
        stretch = range(start, end)
        kept += sorted({min(stretch, key=ys.__getitem__), max(stretch, key=ys.__getitem__)})
    return [xs[i] for i in kept], [ys[i] for i in kept]


# --- The parts of the page ---


def _subtitle(about: Mapping[str, Any]) -> str:
    facts = [*about.get("headline", []), *(about[key] for key in ("devices", "time") if key in about)]
    return f"<p>{html.text(' · '.join(facts))}</p>" if facts else ""


def _key_figures(metrics: Sequence[Record], timing: Sequence[Record]) -> str:
    train = [record for record in metrics if record["split"] == "train"]
    figures: list[tuple[str, str]] = []
    if metrics:
        figures.append(("steps", f"{metrics[-1]['step']:,}"))
    if train and "tokens" in train[-1]:
        figures.append(("tokens", _count(train[-1]["tokens"])))
    for evaluated in _evaluations(metrics)[:1]:
        last = evaluated[-1]
        figures += [(label, html.figure(last[key])) for key, label in _MEASURES.items() if key in last]
    speed = _values(timing, "tokens_per_second")[1]
    if speed:
        figures.append(("tokens/s (median)", f"{statistics.median(speed):,.0f}"))
    share = _values(timing, "share_of_peak")[1]
    if share:
        figures.append(("of peak (median)", f"{100 * statistics.median(share):.1f} %"))
    if len(timing) > 1:
        figures.append(("wall clock", duration(timing[-1]["time"] - timing[0]["time"])))
    cards = "".join(f"<div><strong>{value}</strong><span>{html.text(label)}</span></div>" for label, value in figures)
    return f'<div class="figures">{cards}</div>' if cards else ""


_MEASURES = {"perplexity": "perplexity", "bits_per_byte": "bits per byte", "accuracy": "accuracy"}


def _results(metrics: Sequence[Record], baselines: Iterable[Mapping[str, Any]]) -> str:
    """Measures of every held-out text: before, after, and the baselines of the same text."""
    baselines = list(baselines)
    rows: list[tuple[str, str, Mapping[str, Any], str]] = []
    for evaluated in _evaluations(metrics):
        first, last = evaluated[0], evaluated[-1]
        text = _label(last)
        same = [b for b in baselines if b["split"] == last["split"] and b.get("domain") == last.get("domain")]
        if last["step"] != first["step"]:
            rows.append((text, f"this run at step {first['step']:,}", first, ""))
        rows += [(text, baseline["name"], baseline, "") for baseline in same]
        rows.append((text, f"this run at step {last['step']:,}", last, "final"))
    if not rows:
        return ""
    shown = {key: name for key, name in _MEASURES.items() if any(key in values for _, _, values, _ in rows)}
    head = "".join(f"<th>{html.text(name)}</th>" for name in ("text", "model", *shown.values()))
    lines = "".join(
        f'<tr class="{css}"><td>{html.text(text)}</td><td>{html.text(name)}</td>'
        + "".join(f"<td>{html.figure(values.get(key))}</td>" for key in shown)
        + "</tr>"
        for text, name, values, css in rows
    )
    return f'<table class="results"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>'


def _events(metrics: Sequence[Record], about: Mapping[str, Any]) -> str:
    starts = about.get("starts", [])
    train = [record for record in metrics if record["split"] == "train"]
    lines = []
    if train and "skipped_updates" in train[-1]:
        lines.append(f"updates skipped for a non-finite gradient: {train[-1]['skipped_updates']:,}")
    if starts:
        lines.append(f"started on {html.text(starts[0]['host'])}, {html.text(starts[0]['time'])}")
    for start in starts[1:]:
        where = html.text(f"{start['host']} ({start['devices']}), {start['time']}")
        lines.append(f"resumed at step {start['step']:,} on {where}")
    return f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>" if lines else ""


def _curves(metrics: Sequence[Record], timing: Sequence[Record]) -> str:
    train = [record for record in metrics if record["split"] == "train"]
    evaluations = {_label(group[-1]): _values(group, "loss") for group in _evaluations(metrics)}
    plots: list[tuple[str, dict[str, Series], str]] = [
        ("Loss (nats per token)", {"training": _values(train, "loss")} | evaluations, "linear"),
        ("Learning rate", {"learning rate": _values(train, "learning_rate")}, "linear"),
        ("Gradient norm", {"gradient norm": _values(train, "gradient_norm")}, "log"),
        ("Tokens per second", {"tokens/s": _values(timing, "tokens_per_second")}, "linear"),
    ]
    shown = [plot for plot in plots if any(len(xs) > 1 for xs, _ in plot[1].values())]
    return html.figures([_svg(*plot) for plot in shown])


# --- Curves ---


def _svg(title: str, curves: Mapping[str, Series], scale: str) -> str:
    """One plot of a run, see `html.svg`."""
    noisy = ("training", "gradient norm", "tokens/s")  # drawn pale, with their running mean on top

    def draw(axes: Any) -> None:
        axes.set_yscale(scale)
        axes.set_xlabel("step")
        for index, (name, (xs, ys)) in enumerate(curves.items()):
            colour = html.COLOURS[index % len(html.COLOURS)]
            if name in noisy and len(xs) > 50:
                axes.plot(*thin(xs, ys), color=colour, alpha=0.3, linewidth=0.8)
                axes.plot(*thin(xs, _smooth(ys)), color=colour, linewidth=1.6, label=f"{html.label(name)}, smoothed")
            else:
                marker = "o" if len(xs) <= 50 else None
                axes.plot(
                    *thin(xs, ys), color=colour, linewidth=1.6, marker=marker, markersize=3, label=html.label(name)
                )
        if len(curves) > 1:
            axes.legend(frameon=False)

    return html.svg(title, draw)


def _smooth(ys: Sequence[float]) -> list[float]:
    """Mean of the 2 % of the curve around each point, of fewer points towards the ends."""
    half = len(ys) // 100
    total = np.concatenate([[0.0], np.cumsum(ys)])
    middle = np.arange(len(ys))
    reach = np.minimum(half, np.minimum(middle, middle[::-1]))  # the same on both sides, or the ends would be bent
    return list((total[middle + reach + 1] - total[middle - reach]) / (2 * reach + 1))


# --- Values of records ---


def _evaluations(metrics: Iterable[Record]) -> list[list[Record]]:
    """The evaluation lines, grouped by the text that was evaluated."""
    groups: dict[str, list[Record]] = {}
    for record in metrics:
        if record["split"] != "train":
            groups.setdefault(_label(record), []).append(record)
    return list(groups.values())


def _label(record: Record) -> str:
    return " ".join(str(record[key]) for key in ("domain", "split") if key in record)


def _values(records: Iterable[Record], name: str) -> Series:
    """Steps and finite values of one name."""
    points = [(r["step"], r[name]) for r in records if name in r and math.isfinite(r[name])]
    return [float(step) for step, _ in points], [float(value) for _, value in points]


def _count(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


# --- Files ---


def _read_json(path: Path, default: Any) -> Any:
    if not path.exists():
        return default
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); delete the file or write it again") from None
