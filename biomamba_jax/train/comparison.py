"""The page of `report`: several runs side by side, their curves overlaid."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from biomamba_jax import files, html
from biomamba_jax.errors import UserError
from biomamba_jax.tables import Table
from biomamba_jax.train.metrics import METRICS, Record, read_metrics, read_timing
from biomamba_jax.train.report import Series, evaluations, key_figures, values_of

_POINTS = 4000
"""Points of a curve on the page."""


class Run(NamedTuple):
    """The files of one run directory."""

    name: str
    """Name on the page."""
    settings: Mapping[str, Any]
    """Its config.yaml, flat: dotted key -> value."""
    metrics: Sequence[Record]
    """Lines of metrics.jsonl."""
    timing: Sequence[Record]
    """Lines of timing.jsonl."""


def write_comparison(run_dirs: Sequence[str], path: Path) -> Path:
    """Write the page.

    Args:
      run_dirs: run directories, at any moment of their lives.
      path: the page, written whole or not at all.

    Returns:
      `path`.

    Raises:
      UserError: a folder is given twice or is not a run directory, or one of its files cannot be read.
    """
    runs = [_read(folder, name) for folder, name in zip(run_dirs, _names(run_dirs), strict=True)]
    return html.write(
        path,
        "comparison",
        title=f"{len(runs)} training runs" if len(runs) > 1 else runs[0].name,
        names=[run.name for run in runs],
        tables=[_results(runs), _settings(runs)],
        charts=[_chart(title, curves) for title, curves in _curves(runs).items()],
    )


def _names(run_dirs: Sequence[str]) -> list[str]:
    """Return the last part of each folder's path, or the path as given where another folder's has the same."""
    folders = [Path(folder).resolve() for folder in run_dirs]
    if again := [given for given, folder in zip(run_dirs, folders, strict=True) if folders.count(folder) > 1]:
        raise UserError(f"{again[0]}: is given twice; name each run once")
    lasts = [folder.name for folder in folders]
    return [last if lasts.count(last) == 1 else given for given, last in zip(run_dirs, lasts, strict=True)]


def _read(run_dir: str, name: str) -> Run:
    folder, config = Path(run_dir), Path(run_dir) / "config.yaml"
    if not (folder / METRICS).exists():
        raise UserError(f"{run_dir}: is not a run directory: it has no {METRICS}")
    settings = files.read_yaml(config) if config.exists() else {}
    return Run(name, flatten_dict(settings, sep=".", keep_empty_nodes=True), read_metrics(folder), read_timing(folder))


def _results(runs: Sequence[Run]) -> Table:
    """Return the figures that a run's own report begins with, a run a row."""
    figures = {run.name: {label: figure for figure, label in key_figures(run.metrics, run.timing)} for run in runs}
    labels = list(dict.fromkeys(label for found in figures.values() for label in found))
    rows = [[name, *(found.get(label) for label in labels)] for name, found in figures.items()]
    return Table(["run", *labels], rows, "Final figures")


def _settings(runs: Sequence[Run]) -> Table:
    """Return the settings in which the runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    values = {key: [run.settings.get(key) for run in runs] for key in keys if key != "run_dir"}
    rows = [[key, *map(str, found)] for key, found in values.items() if any(each != found[0] for each in found)]
    return Table(["setting", *(run.name for run in runs)], rows, "Settings that differ", left=range(len(runs) + 1))


def _curves(runs: Iterable[Run]) -> dict[str, dict[str, Series]]:
    """Return curves by title and name of the run."""
    found: dict[str, dict[str, Series]] = {}
    for run in runs:
        trained = [record for record in run.metrics if record["split"] == "train"]
        own = {
            "Training loss (nats per token)": values_of(trained, "loss"),
            "Learning rate": values_of(trained, "learning_rate"),
            "Gradient norm": values_of(trained, "gradient_norm"),
            "Tokens per second": values_of(run.timing, "tokens_per_second"),
        }
        for split, records in (evaluations(run.metrics) | evaluations(run.metrics, tasks=True)).items():
            for measure in dict.fromkeys(key for record in records for key in record):
                if measure not in ("step", "split", "tokens", "targets"):
                    own[f"{split}: {measure.replace('_', ' ')}"] = values_of(records, measure)
        for title, curve in own.items():
            if len(curve[0]):
                found.setdefault(title, {})[run.name] = curve
    return found


def _chart(title: str, curves: Mapping[str, Series]) -> dict[str, Any]:
    """Return what curves.js draws, as JSON values."""
    series = [{"run": name, "x": xs.tolist(), "y": ys.tolist()} for name, (xs, ys) in _thinned(curves)]
    return {"title": title, "log": title == "Gradient norm", "series": series}


def _thinned(curves: Mapping[str, Series]) -> Iterable[tuple[str, Series]]:
    """Yield curves of at most `_POINTS` points: the extremes of equal parts, so that spikes stay."""
    for name, (xs, ys) in curves.items():
        if len(xs) > _POINTS:
            parts = np.array_split(np.arange(len(xs)), _POINTS // 2)
            kept = np.unique([part[index] for part in parts for index in (ys[part].argmin(), ys[part].argmax())])
            xs, ys = xs[kept], ys[kept]
        yield name, (xs, ys)
