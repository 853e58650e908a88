"""`report.html` of an evaluation: every model a column; domains, tasks, intervals and plots on one page."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from biomamba_jax import html
from biomamba_jax.command_line import to_yaml
from biomamba_jax.tasks.evaluation import Domain, Evaluation, Task
from biomamba_jax.tasks.statistics import Estimate

_WHY_BYTES = (
    "Every token of every document counts once, its end included. Perplexity is per token: it depends on how a "
    "tokenizer cuts the text, so it compares only models with the same number of tokens. Bits per byte divide the same "
    "total by the bytes of the text and compare all of them."
)
_WHY_NOT_MASKED = (
    "Columns marked pseudo are masked language models: each token is predicted from the text on both sides of it, "
    "which is no probability of the text, and lower by its nature. They are not compared with the others."
)
_PAPER = (
    "Computed as the published BioMamba code does (protocol paper): perplexity from the mean of batch means; PubMedQA "
    "on 200 random questions with thresholds chosen on these same questions; BioASQ's yes/no questions in generated "
    "text. These figures are for comparison with published ones only."
)
_TASK_MEASURES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "yesno_accuracy": "yes/no: accuracy",
    "yesno_macro_f1": "yes/no: macro F1",
    "yesno_f1_yes": "yes/no: F1 of yes",
    "yesno_f1_no": "yes/no: F1 of no",
    "factoid_strict_accuracy": "factoid: strict accuracy",
    "factoid_lenient_accuracy": "factoid: lenient accuracy",
    "factoid_mrr": "factoid: mean reciprocal rank",
    "list_precision": "list: mean precision",
    "list_recall": "list: mean recall",
    "list_f1": "list: mean F1",
}

Row = tuple[str, Sequence[str]]


def write(results: Evaluation, output: Path) -> Path:
    """Writes `output`/report.html, whole or not at all, and returns its path."""
    config = results.config
    title = output.resolve().name
    level = f"{100 * config.confidence:g}%"
    interval = f"{level} intervals in brackets; bootstrap over documents or questions, Wilson for accuracy"
    subtitle = f"{len(results.models)} models · {interval}"
    notes = [_PAPER] if config.protocol == "paper" else []
    body = [
        f"<header><h1>{html.text(title)}</h1><p>{html.text(subtitle)}</p></header>",
        *[f"<p>{html.text(note)}</p>" for note in notes],
        html.section("Models", _models(results)),
        html.section("Text domains", _domains(results)),
        *[html.section(task.title, _task(results, task)) for task in results.tasks.values()],
        html.section("Environment", html.environment_table(results.environment)),
        html.section("Configuration", f"<pre>{html.text(to_yaml(config))}</pre>"),
    ]
    path = output / "report.html"
    html.write(path, title, body)
    return path


# --- Tables ---


def _table(head: Sequence[str], rows: Sequence[Row]) -> str:
    """A table whose first column names the rows; an empty row is a heading."""
    top = "".join(f"<th>{html.text(name)}</th>" for name in head)
    lines = []
    for name, cells in rows:
        if cells:
            lines.append(f"<tr><td>{html.text(name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
        else:
            lines.append(f'<tr class="heading"><th colspan="{len(head)}">{html.text(name)}</th></tr>')
    return f'<table class="columns"><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _estimate(estimate: Estimate | None, show: Callable[[float], str]) -> str:
    """A figure and its interval."""
    if estimate is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return show(estimate.value)
    return f"{show(estimate.value)} <small>[{show(estimate.low)}, {show(estimate.high)}]</small>"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "∞" if value > 0 else "–"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.2f}" if abs(value) >= 10 else f"{value:.4f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else "–"


def _columns(results: Evaluation) -> list[str]:
    return [f"{name} (pseudo)" if facts.kind == "masked" else name for name, facts in results.models.items()]


def _models(results: Evaluation) -> str:
    shown = ("path", "run_by", "kind", "parameters", "tokenizer", "context", "dtype")
    rows: list[Row] = []
    for key in shown:
        values = [getattr(facts, key) for facts in results.models.values()]
        cells = [f"{value:,}" if isinstance(value, int) else html.text(value) for value in values]
        rows.append((key.replace("_", " "), cells))
    return _table(["", *_columns(results)], rows)


def _domains(results: Evaluation) -> str:
    if not results.domains:
        return ""
    rows: list[Row] = []
    for name, domain in results.domains.items():
        rows.append((f"{name}: {domain.documents:,} documents, {domain.bytes:,} bytes, {domain.words:,} words", []))
        rows += _published(results, domain) if domain.paper else _measured(results, domain)
    plots = _domain_plots(results)
    notes = [_WHY_BYTES] if any(domain.models for domain in results.domains.values()) else []
    if any(facts.kind == "masked" for facts in results.models.values()):
        notes.append(_WHY_NOT_MASKED)
    text = "".join(f"<p>{html.text(note)}</p>" for note in notes)
    return text + _table(["", *_columns(results)], rows) + html.figures(plots)


def _measured(results: Evaluation, domain: Domain) -> list[Row]:
    found = [domain.models[name] for name in results.models]
    rows: list[Row] = [
        ("bits per byte", [_estimate(each.bits_per_byte, _number) for each in found]),
        ("bits per word", [_estimate(each.bits_per_word, _number) for each in found]),
        ("perplexity per token", [_estimate(each.perplexity, _number) for each in found]),
        ("cross-entropy, nats per token", [_estimate(each.cross_entropy, _number) for each in found]),
        ("tokens", [f"{each.tokens:,}" for each in found]),
        ("tokens per second", [f"{each.tokens_per_second:,.0f}" for each in found]),
    ]
    if domain.comparisons:
        pairs = [domain.comparisons.get(name) for name in results.models]
        reference = html.text(results.reference)
        less = [_estimate(pair.bits_per_byte if pair else None, _number) for pair in pairs]
        ratio = [_estimate(pair.perplexity_ratio if pair else None, _number) for pair in pairs]
        rows.append((f"bits per byte minus {reference}'s, documents paired", less))
        rows.append((f"perplexity of {reference} over this model's, paired, same tokens only", ratio))
    return rows


def _published(results: Evaluation, domain: Domain) -> list[Row]:
    found = [domain.paper[name] for name in results.models]
    return [
        ("perplexity, mean of batch means", [_number(each["perplexity"]) for each in found]),
        ("cross-entropy, mean of batch means", [_number(each["cross_entropy"]) for each in found]),
        ("rows", [f"{each['rows']:,}" for each in found]),
    ]


def _task(results: Evaluation, task: Task) -> str:
    found = [task.models[name] for name in results.models]
    every = [*([task.majority] if task.majority else []), *found]
    head = ["", *(["majority"] if task.majority else []), *_columns(results)]
    rows: list[Row] = []
    for key, name in _TASK_MEASURES.items():
        if any(key in result.measures for result in found):
            rows.append((name, [_estimate(result.measures.get(key), _percent) for result in every]))
    labels = list(dict.fromkeys(label for result in found for label in result.details.get("classes", {})))
    for label in labels:
        classes = [result.details.get("classes", {}).get(label) for result in every]
        rows.append((f"F1 of {label}", [_percent(each["f1"]) if each else "–" for each in classes]))
    missing = [""] if task.majority else []
    if task.comparisons:
        tests = [task.comparisons.get(name) for name in results.models]
        cells = [f"{t.only_this} / {t.only_reference}, p = {t.p_value:.3g}" if t else "–" for t in tests]
        rows.append((f"right alone / {results.reference} alone, McNemar", [*missing, *cells]))
    rows += _thresholds(task, results, missing)
    rows.append(("questions", [f"{result.questions:,}" for result in every]))
    speed = [f"{result.answered / result.seconds:,.1f}" if result.seconds else "–" for result in found]
    rows.append(("questions per second", [*missing, *speed]))
    return _table(head, rows) + _batches(results, task) + html.figures(_task_plots(results, task))


def _thresholds(task: Task, results: Evaluation, missing: Sequence[str]) -> list[Row]:
    found = [task.models[name].details.get("thresholds") for name in results.models]
    if not any(found):
        return []
    chosen = [f"by {each['chosen_by']}" if each else "–" for each in found]
    rows: list[Row] = [("thresholds", [*missing, *map(html.text, chosen)])]
    if any(each and "cross_validated_accuracy" in each for each in found):
        tried = [_percent(each["cross_validated_accuracy"]) if each else "–" for each in found]
        rows.append(("accuracy on development questions, cross-validated", [*missing, *tried]))
    return rows


def _batches(results: Evaluation, task: Task) -> str:
    """The same measures of each file, where there are several."""
    files = next(iter(task.models.values())).details.get("batches", {})
    if len(files) < 2:
        return ""
    rows: list[Row] = []
    for path in files:
        rows.append((Path(path).name, []))
        of_models: list[Mapping[str, Estimate]] = [
            task.models[name].details["batches"].get(path, {}) for name in results.models
        ]
        for key, name in _TASK_MEASURES.items():
            if any(key in measures for measures in of_models):
                rows.append((name, [_estimate(measures.get(key), _percent) for measures in of_models]))
    return f"<h3>Per batch</h3>{_table(['', *_columns(results)], rows)}"


# --- Plots ---


def _domain_plots(results: Evaluation) -> list[str]:
    measured = {name: domain for name, domain in results.domains.items() if domain.models}
    plots = []
    if measured:
        values = {
            model: [domain.models[model].bits_per_byte for domain in measured.values()] for model in results.models
        }
        plots.append(_dots("Bits per byte", list(measured), values))
    for name, domain in measured.items():
        plots.append(_positions(f"Cross-entropy by place in the document: {name}", domain))
    return plots


def _task_plots(results: Evaluation, task: Task) -> list[str]:
    found = dict(task.models)
    if task.majority:
        found = {"majority": task.majority} | found
    keys = [key for key in ("accuracy", "macro_f1", "yesno_accuracy", "yesno_macro_f1", "factoid_mrr", "list_f1")]
    keys = [key for key in keys if any(key in task.models[name].measures for name in results.models)]
    values = {
        name: [result.measures.get(key, Estimate(math.nan)).map(lambda share: 100 * share) for key in keys]
        for name, result in found.items()
    }
    title = "Measures with intervals (%)"
    return [_dots(title, [_TASK_MEASURES[key] for key in keys], values)] if keys else []


def _dots(title: str, groups: Sequence[str], values: Mapping[str, Sequence[Estimate]]) -> str:
    """Figures with their intervals: groups along the axis, models side by side in each."""

    def draw(axes: Any) -> None:
        width = 0.6 / max(1, len(values))
        for index, (name, estimates) in enumerate(values.items()):
            places = np.arange(len(groups)) + (index - (len(values) - 1) / 2) * width
            centers = np.array([each.value for each in estimates])
            lows = np.array([each.value if each.low is None else each.low for each in estimates])
            highs = np.array([each.value if each.high is None else each.high for each in estimates])
            spread = np.maximum(0, np.nan_to_num([centers - lows, highs - centers]))
            colour = html.COLOURS[index % len(html.COLOURS)]
            axes.errorbar(
                places, centers, spread, fmt="o", color=colour, capsize=3, markersize=4, label=html.label(name)
            )
        axes.set_xticks(range(len(groups)), list(map(html.label, groups)))
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.legend(frameon=False)

    return html.svg(title, draw)


def _positions(title: str, domain: Domain) -> str:
    def draw(axes: Any) -> None:
        for index, (name, found) in enumerate(domain.models.items()):
            places = [1 + (each["from"] + each["to"]) / 2 for each in found.positions]
            nats = [each["cross_entropy"] for each in found.positions]
            colour = html.COLOURS[index % len(html.COLOURS)]
            axes.plot(places, nats, color=colour, linewidth=1.6, marker="o", markersize=3, label=html.label(name))
        axes.set_xscale("log", base=2)
        axes.set_xlabel("token of the document")
        axes.set_ylabel("nats per token")
        axes.legend(frameon=False)

    return html.svg(title, draw)
