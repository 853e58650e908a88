"""`report.html`: one run on one page.

Made from the files of the run directory alone, so it can be made again at any time, also of a run on another machine:

    config.yaml       the configuration as resolved
    environment.json  versions, devices and host, and every start of the run (`record_start`)
    metrics.jsonl     losses and evaluations; `skipped_updates` counts updates skipped for a non-finite gradient
    timing.jsonl      speed
    baselines.json    optional: [{"name": "unigram (add-k)", "split": "validation", "perplexity": 812.0,
                      "bits_per_byte": 2.4}, ...]
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import numpy as np

from biomamba_jax import files, html
from biomamba_jax.environment import environment
from biomamba_jax.errors import UserError
from biomamba_jax.tables import Table
from biomamba_jax.train.metrics import Record, read_metrics, read_timing

ENVIRONMENT, BASELINES = "environment.json", "baselines.json"
_LOG = logging.getLogger(__name__)

Series = tuple[np.ndarray, np.ndarray]

_MEASURES = {
    "perplexity": ("perplexity", "{:,.2f}"),
    "bits_per_byte": ("bits per byte", "{:.4f}"),
    "accuracy": ("accuracy", "{:.4f}"),
}
TASKS = "evaluate/"
"""Prefix of the split in lines with figures of a task."""
_EVERY = 60.0
"""Seconds between two reports of a run in training: drawing one takes about a second of a CPU."""
_MARKED = 50
"""Points up to which a curve is drawn with markers, and from which a noisy one is smoothed."""


def record_start(run_dir: str | os.PathLike[str], step: int) -> None:
    """Write `environment.json` of this process and add this start to the run's earlier ones.

    Call it on the first process only.

    Args:
      run_dir: the run's directory, which exists.
      step: steps done before this start; 0 opens a new history.
    """
    path = Path(run_dir) / ENVIRONMENT
    now = environment()
    try:
        earlier = _environment(run_dir).get("starts", []) if step else []
    except UserError as error:
        _LOG.warning(f"{error}; the starts before this one are forgotten")
        earlier = []
    start = {"step": step} | {key: now[key] for key in ("time", "host", "devices", "command")}
    files.write_json(path, now | {"starts": [*earlier, start]})


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write `report.html` of a run directory, whole or not at all. Call it on the first process only.

    Args:
      run_dir: the run's directory, at any moment of its life; what is missing is left out.

    Returns:
      The path of the report.

    Raises:
      UserError: one of the files cannot be read; names it.
    """
    folder = Path(run_dir)
    metrics, timing = read_metrics(folder), read_timing(folder)
    config = folder / "config.yaml"
    return html.write(
        folder / "report.html",
        "training",
        title=folder.resolve().name,
        about=_environment(folder),
        key_figures=key_figures(metrics, timing),
        results=held_out_table(folder, metrics),
        tasks=task_table(metrics),
        curves=_curves(metrics, timing),
        skipped=max((record["skipped_updates"] for record in metrics if "skipped_updates" in record), default=None),
        config="".join(f"{line}\n" for line in files.read_lines(config)) if config.exists() else "",
    )


class RunReport:
    """The report of a run in training, written again when a minute has passed since, and when the run ends.

    One that cannot be written must not cost the run its checkpoint: that is logged.

    Args:
      run_dir: the run's directory; None: another process writes the report.
      log: called with a line of text.
    """

    def __init__(self, run_dir: Path | None, log: Callable[[str], None]):
        self._run_dir, self._log, self._due, self._stale = run_dir, log, time.monotonic() + _EVERY, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._stale:
            self._write()

    def update(self) -> None:
        """Take note of new metrics."""
        self._stale = self._run_dir is not None
        if self._stale and time.monotonic() >= self._due:
            self._write()

    def _write(self) -> None:
        try:
            write_report(self._run_dir or "")
        except (UserError, OSError) as error:
            self._log(f"report.html is not written: {error}")
        self._due, self._stale = time.monotonic() + _EVERY, False


def held_out_table(run_dir: str | os.PathLike[str], metrics: Sequence[Record]) -> Table:
    """Return the measures of held-out text: of the run's first and last evaluation, and of the baselines.

    Args:
      run_dir: the run's directory, which may have a baselines.json.
      metrics: the lines of its metrics.jsonl.

    Raises:
      UserError: baselines.json cannot be read.
    """
    baselines = read_baselines(run_dir)
    rows: list[tuple[str, str, Record]] = []
    final = []
    for split, records in evaluations(metrics).items():
        named = [(split, f"this model, step {values['step']:,}", values) for values in records]
        same = [(split, values["name"], values) for values in baselines if values["split"] == split]
        rows += [*named[:-1][:1], *same, named[-1]]
        final.append(len(rows) - 1)
    measures = {key: found for key, found in _MEASURES.items() if any(key in values for _, _, values in rows)}
    cells = [
        [split, name, *(show.format(values[key]) if key in values else None for key, (_, show) in measures.items())]
        for split, name, values in rows
    ]
    columns = ["text", "model", *(label for label, _ in measures.values())]
    tokens = [f" ({record['tokens']:,} tokens)" for _, _, record in rows[-1:] if "tokens" in record]
    return Table(columns, cells, "".join(["Held-out text", *tokens]), left=(0, 1), emphasized=final)


def task_table(metrics: Sequence[Record]) -> Table:
    """Return the measures of the first and the last evaluation on each task, a measure a row."""
    rows: list[list[str | None]] = []
    for name, records in evaluations(metrics, tasks=True).items():
        keys = [key for key in records[-1] if key not in ("step", "split", "tokens")]
        rows += [[name, key.replace("_", " "), *(_step_value(records[i], key) for i in (0, -1))] for key in keys]
    return Table(["task", "measure", "first", "last"], rows, left=(0, 1))


def _step_value(record: Record, key: str) -> str | None:
    return f"{record[key]:.4f} (step {record['step']:,})" if key in record else None


def key_figures(metrics: Sequence[Record], timing: Sequence[Record]) -> list[tuple[str, str]]:
    """Return (figure, label) of what a reader looks for first."""
    trained = [record for record in metrics if record["split"] == "train"]
    evaluated = next(iter(evaluations(metrics).values()), [{}])[-1]
    speeds, shares = (values_of(timing, key)[1] for key in ("tokens_per_second", "share_of_peak"))
    figures = [(f"{record['step']:,}", "steps") for record in metrics[-1:]]
    figures += [(_count(record["tokens"]), "tokens") for record in trained[-1:] if "tokens" in record]
    figures += [(show.format(evaluated[key]), label) for key, (label, show) in _MEASURES.items() if key in evaluated]
    if len(speeds):
        figures.append((f"{np.median(speeds):,.0f}", "tokens/s (median)"))
    if len(shares):
        figures.append((f"{100 * np.median(shares):.1f} %", "of peak (median)"))
    if len(timing) > 1:
        figures.append((str(timedelta(seconds=round(timing[-1]["time"] - timing[0]["time"]))), "wall clock"))
    return figures


# --- Curves ---


def _curves(metrics: Sequence[Record], timing: Sequence[Record]) -> list[html.Plot]:
    trained = [record for record in metrics if record["split"] == "train"]
    losses, tasks = {"training": trained} | evaluations(metrics), evaluations(metrics, tasks=True)
    curves = {
        "Loss (nats per token)": {name: values_of(records, "loss") for name, records in losses.items()},
        "Learning rate": {"learning rate": values_of(trained, "learning_rate")},
        "Gradient norm": {"gradient norm": values_of(trained, "gradient_norm")},
        "Tokens per second": {"tokens/s": values_of(timing, "tokens_per_second")},
        "Accuracy on tasks": {name: values_of(r, "accuracy") for name, r in tasks.items() if "accuracy" in r[0]},
    }
    return [_plot(title, found) for title, found in curves.items() if any(len(xs) > 1 for xs, _ in found.values())]


def _plot(title: str, curves: Mapping[str, Series]) -> html.Plot:
    noisy = ("training", "gradient norm", "tokens/s")  # drawn pale, with their running mean on top

    def draw(axes: Any) -> None:
        axes.set_yscale("log" if "gradient norm" in curves else "linear")
        axes.set_xlabel("step")
        for name, (xs, ys) in curves.items():
            if name in noisy and len(xs) > _MARKED:
                (line,) = axes.plot(xs, ys, alpha=0.3, linewidth=0.8)
                axes.plot(*_smooth(xs, ys), color=line.get_color(), label=f"{name}, smoothed")
            else:
                axes.plot(xs, ys, marker="o" if len(xs) <= _MARKED else None, label=name)
        if len(curves) > 1:
            axes.legend()

    return html.plot(title, draw)


def _smooth(xs: np.ndarray, ys: np.ndarray) -> Series:
    """Return the mean of the 2 % of the curve around each point that has as many on both sides."""
    half = len(ys) // 100
    window = 2 * half + 1
    total = np.concatenate([[0.0], np.cumsum(ys)])
    return xs[half : len(xs) - half], (total[window:] - total[:-window]) / window


# --- Values ---


def evaluations(metrics: Iterable[Record], tasks: bool = False) -> dict[str, list[Record]]:
    """Return the evaluations of each held-out split, or of each task of the run's evaluate section, by its name."""
    found: dict[str, list[Record]] = {}
    for record in metrics:
        if record["split"] != "train" and record["split"].startswith(TASKS) == tasks:
            found.setdefault(record["split"].removeprefix(TASKS), []).append(record)
    return found


def values_of(records: Iterable[Record], name: str) -> Series:
    """Return steps and finite values of one name."""
    points = [(r["step"], r[name]) for r in records if name in r and math.isfinite(r[name])]
    steps, values = np.array(points, float).reshape(-1, 2).T
    return steps, values


def _count(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


# --- Files ---


def read_baselines(run_dir: str | os.PathLike[str]) -> list[Record]:
    """Return the records of baselines.json, [] without the file.

    Raises:
      UserError: the file is damaged.
    """
    path = Path(run_dir) / BASELINES
    records = files.read_any_json(path) if path.exists() else []

    def is_valid(record: Any) -> bool:
        texts, numbers = (("name", "split"), str), (_MEASURES.keys() & record, int | float)
        return all(isinstance(record.get(key), kind) for keys, kind in (texts, numbers) for key in keys)

    if not (isinstance(records, list) and all(isinstance(each, dict) and is_valid(each) for each in records)):
        raise UserError(f"{path}: is not a list of baselines; delete it")
    return records


def _environment(run_dir: str | os.PathLike[str]) -> Record:
    """Return the content of environment.json, {} without the file."""
    path = Path(run_dir) / ENVIRONMENT
    about = files.read_json(path) if path.exists() else {}
    starts, keys = about.get("starts", []), {"step", "host", "devices", "time"}
    valid = isinstance(starts, list) and all(isinstance(each, dict) and keys <= each.keys() for each in starts)
    known = not about or (isinstance(about.get("versions"), dict) and {"devices", "time"} <= about.keys())
    if not (valid and all(type(each["step"]) is int for each in starts) and known):
        raise UserError(f"{path}: is not a record of starts; delete it")
    return about
