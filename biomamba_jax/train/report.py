"""`report.html`: one run on one page that can be sent to a colleague; no scripts, nothing fetched from elsewhere.

Made from the files of the run directory alone, so it can be made again at any time, also of a run on another machine:

    config.yaml       the configuration as resolved
    environment.json  versions, devices and host, and every start of the run (`record_start`)
    metrics.jsonl     losses and evaluations; `skipped_updates` counts updates left out for a non-finite gradient
    timing.jsonl      speed
    baselines.json    optional: [{"name": "unigram (add-k)", "split": "validation", "domain": "pubmed",
                      "perplexity": 812.0, "bits_per_byte": 2.4}, ...]
"""

import html
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import biomamba_jax
from biomamba_jax.errors import UserError
from biomamba_jax.train.metrics import Record, read_metrics, read_timing
from biomamba_jax.train.progress import duration

MAX_POINTS = 2000
"""Points of one curve at most: more than a screen has columns, few enough for a page of some 100 kB."""

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece", "tokenizers")

Series = tuple[list[float], list[float]]


def environment() -> dict[str, Any]:
    """Where and how this process runs: versions, devices, host and command line; no environment variables."""
    devices = jax.devices()
    versions = {"biomamba-jax": biomamba_jax.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(sys.orig_argv),
        "host": platform.node(),
        "system": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
        "versions": versions,
    }


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
    _replace(path, json.dumps(now | {"headline": list(headline), "starts": [*earlier, start]}, indent=2) + "\n")


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
        f"<header><h1>{_text(title)}</h1>{_subtitle(about)}</header>",
        _key_figures(metrics, timing),
        _section("Held-out text", _results(metrics, _read_json(folder / "baselines.json", []))),
        _section("Curves", _curves(metrics, timing)),
        _section("Events", _events(metrics, about)),
        _section("Environment", _environment_table(about)),
        _section("Configuration", f"<pre>{_text(config.read_text())}</pre>" if config.exists() else ""),
        f"<footer>Written {time.strftime('%Y-%m-%d %H:%M:%S %z')} by biomamba-jax {biomamba_jax.__version__}.</footer>",
    ]
    path = folder / "report.html"
    _replace(path, _PAGE.format(title=_text(title), style=_STYLE, body="\n".join(body)))
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
    return f"<p>{_text(' · '.join(facts))}</p>" if facts else ""


def _key_figures(metrics: Sequence[Record], timing: Sequence[Record]) -> str:
    train = [record for record in metrics if record["split"] == "train"]
    figures: list[tuple[str, str]] = []
    if metrics:
        figures.append(("steps", f"{metrics[-1]['step']:,}"))
    if train and "tokens" in train[-1]:
        figures.append(("tokens", _count(train[-1]["tokens"])))
    for evaluated in _evaluations(metrics)[:1]:
        last = evaluated[-1]
        figures += [(label, _figure(last[key])) for key, label in _MEASURES.items() if key in last]
    speed = _values(timing, "tokens_per_second")[1]
    if speed:
        figures.append(("tokens/s (median)", f"{statistics.median(speed):,.0f}"))
    share = _values(timing, "share_of_peak")[1]
    if share:
        figures.append(("of peak (median)", f"{100 * statistics.median(share):.1f} %"))
    if len(timing) > 1:
        figures.append(("wall clock", duration(timing[-1]["time"] - timing[0]["time"])))
    cards = "".join(f"<div><strong>{value}</strong><span>{_text(label)}</span></div>" for label, value in figures)
    return f'<div class="figures">{cards}</div>' if cards else ""


_MEASURES = {"perplexity": "perplexity", "bits_per_byte": "bits per byte"}


def _results(metrics: Sequence[Record], baselines: Iterable[Mapping[str, Any]]) -> str:
    """Perplexity and bits per byte of every held-out text: before, after, and the baselines of the same text."""
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
    head = "".join(f"<th>{_text(name)}</th>" for name in ("text", "model", *_MEASURES.values()))
    lines = "".join(
        f'<tr class="{css}"><td>{_text(text)}</td><td>{_text(name)}</td>'
        + "".join(f"<td>{_figure(values.get(key))}</td>" for key in _MEASURES)
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
        lines.append(f"started on {_text(starts[0]['host'])}, {_text(starts[0]['time'])}")
    for start in starts[1:]:
        where = _text(f"{start['host']} ({start['devices']}), {start['time']}")
        lines.append(f"resumed at step {start['step']:,} on {where}")
    return f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>" if lines else ""


def _environment_table(about: Mapping[str, Any]) -> str:
    rows = {name: value for name, value in about.items() if name not in ("versions", "starts", "headline")}
    if "versions" in about:
        rows["versions"] = " · ".join(f"{package} {version}" for package, version in about["versions"].items())
    lines = "".join(f"<tr><th>{_text(name.replace('_', ' '))}</th><td>{_text(v)}</td></tr>" for name, v in rows.items())
    return f'<table class="environment"><tbody>{lines}</tbody></table>' if lines else ""


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
    figures = "".join(f"<figure>{_svg(*plot)}</figure>" for plot in shown)
    return f'<div class="curves">{figures}</div>' if figures else ""


# --- Curves ---

# Seen on white and on near-black alike.
_COLOURS = ("#2f7ed8", "#e0702d", "#2a9d6f", "#b05cc8", "#c9a227", "#d1495b")
_INK = "#123456"  # stands for the page's own text colour until the SVG is written


def _svg(title: str, curves: Mapping[str, Series], scale: str) -> str:
    """One plot as SVG whose text and axes take the colour of the page around it."""
    noisy = ("training", "gradient norm", "tokens/s")  # drawn pale, with their running mean on top
    import matplotlib
    from matplotlib.figure import Figure

    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    style: Any = dict.fromkeys(ink, _INK) | {
        "svg.fonttype": "none",
        "svg.hashsalt": title,  # the ids of two plots on one page must differ, and those of two writings agree
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.alpha": 0.15,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6, 3.4), layout="constrained")
        axes = figure.add_subplot(yscale=scale)
        axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
        axes.set_xlabel("step")
        axes.grid(True)
        for index, (name, (xs, ys)) in enumerate(curves.items()):
            colour = _COLOURS[index % len(_COLOURS)]
            if name in noisy and len(xs) > 50:
                axes.plot(*thin(xs, ys), color=colour, alpha=0.3, linewidth=0.8)
                axes.plot(*thin(xs, _smooth(ys)), color=colour, linewidth=1.6, label=f"{name}, smoothed")
            else:
                marker = "o" if len(xs) <= 50 else None
                axes.plot(*thin(xs, ys), color=colour, linewidth=1.6, marker=marker, markersize=3, label=name)
        if len(curves) > 1:
            axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    opening, rest = svg.split(">", 1)
    # Without a size of its own the picture fills the width of its column.
    kept = " ".join(part for part in opening.split() if not part.startswith(('width="', 'height="')))
    return f'{kept} role="img" aria-label="{_text(title)}">{rest}'


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


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _count(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>" if content else ""


def _text(value: object) -> str:
    return html.escape(str(value))


# --- Files ---


def _read_json(path: Path, default: Any) -> Any:
    if not path.exists():
        return default
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); delete the file or write it again") from None


def _replace(path: Path, content: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5d6878; --line: #dfe3ea; --page: #ffffff; --card: #f5f7fa;
  --accent: #2f7ed8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #98a3b3; --line: #2d3542; --page: #12161d;
  --card: #1b212b; --accent: #6cabf5; } }
body { margin: 0 auto; padding: 2rem 1.25rem 3rem; max-width: 68rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.75rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
header p, footer { color: var(--soft); margin: .25rem 0 0; }
footer { margin-top: 3rem; font-size: .85rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem;
  margin-top: 1.5rem; }
.figures div { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; }
.figures strong { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
.figures span { color: var(--soft); font-size: .85rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .5rem; border: 1px solid var(--line); border-radius: .5rem; }
figure svg { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .4rem .75rem; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th, .environment th { color: var(--soft); font-weight: 500; }
.results th:nth-child(n+3), .results td:nth-child(n+3) { text-align: right; font-variant-numeric: tabular-nums; }
.results .final td { font-weight: 600; } .results .final td:nth-child(n+3) { color: var(--accent); }
.environment { font-size: .9rem; } .environment td { overflow-wrap: anywhere; } .environment th { white-space: nowrap; }
ul { padding-left: 1.25rem; margin: 0; }
pre { background: var(--card); border-radius: .5rem; padding: 1rem; overflow-x: auto; font-size: .85rem; margin: 0; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
