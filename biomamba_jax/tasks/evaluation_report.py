"""`report.html` of an evaluation: every model a column; domains, tasks, intervals and plots on one page."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from biomamba_jax import html
from biomamba_jax.command_line import to_yaml
from biomamba_jax.tables import Table
from biomamba_jax.tasks.evaluation import Domain, Evaluation, Task, counted, padded_ratios
from biomamba_jax.tasks.statistics import Estimate

_TASK_MEASURES = {
    "accuracy": "accuracy",
    "accuracy_per_byte": "accuracy, likelihood per byte",
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
    "summary_rouge_2_recall": "ideal answer: ROUGE-2 recall",
    "summary_rouge_2_f1": "ideal answer: ROUGE-2 F1",
    "summary_rouge_su4_recall": "ideal answer: ROUGE-SU4 recall",
    "summary_rouge_su4_f1": "ideal answer: ROUGE-SU4 F1",
}
_DRAWN = ("accuracy", "macro_f1", "yesno_accuracy", "yesno_macro_f1", "factoid_mrr", "list_f1", "summary_rouge_2_f1")


def write(results: Evaluation, output: Path) -> Path:
    """Write `output`/report.html, whole or not at all, and return its path."""
    columns = [f"{name} (pseudo)" if facts.kind == "masked" else name for name, facts in results.models.items()]
    return html.write(
        output / "report.html",
        "evaluation",
        title=output.resolve().name,
        confidence=results.config.confidence,
        published=results.config.protocol == "paper",
        masked=any(facts.kind == "masked" for facts in results.models.values()),
        models=_models(results, columns),
        domains=_domains(results, columns),
        domain_plots=_domain_plots(results),
        tasks=[_task(results, task, columns) for task in results.tasks.values()],
        about=results.environment,
        config=to_yaml(results.config),
    )


# --- Figures ---


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "∞" if value > 0 else "–"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.2f}" if abs(value) >= 10 else f"{value:.4f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else "–"


_count = "{:,.0f}".format

_DOMAIN_MEASURES = {
    "bits_per_byte": ("bits per byte", _number),
    "bits_per_word": ("bits per word", _number),
    "perplexity": ("perplexity per token", _number),
    "cross_entropy": ("cross-entropy, nats per token", _number),
    "tokens": ("tokens", _count),
    "tokens_per_second": ("tokens per second", _count),
}
_PUBLISHED_MEASURES = {
    "perplexity": ("perplexity, mean of batch means", _number),
    "cross_entropy": ("cross-entropy, mean of batch means", _number),
    "rows": ("rows", _count),
}
_PADDED_MEASURES = {
    "perplexity": ("perplexity with padding in the loss (protocol paper_v1)", _number),
    "padding": ("share of padding in it", _percent),
    "padding_cross_entropy": ("nats per token of padding", _number),
    "text_cross_entropy": ("nats per token of the same rows' text", _number),
}


# --- Tables ---


def estimates_row(name: str, values: Iterable[Any], show: Callable[[Any], str]) -> list[Any]:
    """Return a row of a `Table`: estimates with their intervals, None where a model has no value."""

    def cell(value: Any) -> Any:
        if not isinstance(value, Estimate):
            return None if value is None else show(value)
        if value.low is None or value.high is None:
            return show(value.value)
        return show(value.value), f"[{show(value.low)}, {show(value.high)}]"

    return [name, *map(cell, values)]


def _models(results: Evaluation, columns: Sequence[str]) -> Table:
    shown = ("path", "run_by", "kind", "parameters", "tokenizer", "context", "dtype")
    rows = [[key.replace("_", " "), *(getattr(facts, key) for facts in results.models.values())] for key in shown]
    return Table(["", *columns], rows)


def _domains(results: Evaluation, columns: Sequence[str]) -> Table:
    rows: list[list[Any]] = []
    for name, domain in results.domains.items():
        left_out = f"; left out: {counted(domain.left_out)}" if domain.left_out else ""
        sizes = f"{domain.documents:,} documents, {domain.bytes:,} bytes, {domain.words:,} words"
        rows.append([f"{name}: {sizes}{left_out}"])
        measures = _PUBLISHED_MEASURES if domain.paper else _DOMAIN_MEASURES
        found = [domain.paper[m] if domain.paper else vars(domain.models[m]) for m in results.models]
        rows += [estimates_row(label, [each[key] for each in found], show) for key, (label, show) in measures.items()]
        padded = [vars(domain.paper_v1[model]) for model in results.models if domain.paper_v1]
        rows += [
            estimates_row(label, [each[key] for each in padded], show)
            for key, (label, show) in _PADDED_MEASURES.items()
            if padded
        ]
        by_word = [getattr(domain.models.get(model), "pll_word_l2r", None) for model in results.models]
        for key in ("bits_per_byte", "perplexity") if any(by_word) else ():
            label = f"{measures[key][0]}, PLL-word-l2r"
            rows.append(estimates_row(label, [each and getattr(each, key) for each in by_word], _number))
        shares = domain.unspelled.items()
        lost = [f"{100 * share:.2f} %" + ", not compared" * (model in domain.not_compared) for model, share in shares]
        rows.append(["bytes that the tokenizer does not spell", *lost])
        if domain.comparisons:
            pairs = [domain.comparisons.get(model) for model in results.models]
            for key, label in (
                ("bits_per_byte", f"bits per byte minus {results.reference}'s, documents paired"),
                ("perplexity_ratio", f"perplexity of {results.reference} over this model's, paired, same tokens only"),
            ):
                rows.append(estimates_row(label, [getattr(pair, key, None) for pair in pairs], _number))
        ratios = padded_ratios(domain, results.reference)
        if ratios:
            label = f"perplexity of {results.reference} over this model's by protocol paper_v1"
            rows.append(estimates_row(label, [ratios.get(model) for model in results.models], _number))
    return Table(["", *columns], rows)


def _task(results: Evaluation, task: Task, columns: Sequence[str]) -> tuple[str, Table, list[html.Plot]]:
    models = [*([("majority", task.majority)] if task.majority else []), *task.models.items()]
    every = [result for _, result in models]
    rows = _measure_rows([result.measures for result in every])
    classes = [result.details.get("classes", {}) for result in every]
    for label in dict.fromkeys(label for found in classes[-len(task.models) :] for label in found):
        rows.append(estimates_row(f"F1 of {label}", [found.get(label, {}).get("f1") for found in classes], _percent))
    if task.comparisons:
        tests = [None if result is task.majority else task.comparisons.get(name) for name, result in models]
        label = f"only this model right / only {results.reference} right, McNemar"
        rows.append(estimates_row(label, tests, lambda t: f"{t.only_this} / {t.only_reference}, p = {t.p_value:.3g}"))
    thresholds = [result.details.get("thresholds") or {} for result in every]
    if any(thresholds):
        rows.append(estimates_row("thresholds", [each.get("chosen_by") for each in thresholds], "by {}".format))
    if any("cross_validated_accuracy" in each for each in thresholds):
        tried = [each.get("cross_validated_accuracy") for each in thresholds]
        rows.append(estimates_row("accuracy on development questions, cross-validated", tried, _percent))
    rows.append(["questions", *(result.questions for result in every)])
    rows += [[f"left out: {reason}", *(count for _ in every)] for reason, count in task.left_out.items()]
    speeds = [result.answered / result.seconds if result.seconds else None for result in every]
    rows.append(estimates_row("questions per second", speeds, "{:,.1f}".format))
    rows += _batch_rows([result.details.get("batches", {}) for result in every])
    head = ["", *(["majority"] if task.majority else []), *columns]
    return task.title, Table(head, rows), _task_plots([(name, result.measures) for name, result in models])


def _measure_rows(of_models: Sequence[Mapping[str, Estimate]]) -> list[list[Any]]:
    return [
        estimates_row(label, [measures.get(key) for measures in of_models], _percent)
        for key, label in _TASK_MEASURES.items()
        if any(key in measures for measures in of_models)
    ]


def _batch_rows(batches: Sequence[Mapping[str, Mapping[str, Estimate]]]) -> list[list[Any]]:
    """Return the same measures of each file, where there are several."""
    rows: list[list[Any]] = []
    paths = batches[-1] if len(batches[-1]) > 1 else ()
    for path in paths:
        rows += [[Path(path).name], *_measure_rows([of_model.get(path, {}) for of_model in batches])]
    return rows


# --- Plots ---


def _domain_plots(results: Evaluation) -> list[html.Plot]:
    measured = {name: domain for name, domain in results.domains.items() if domain.models}
    if not measured:
        return []

    def bits(domain: Domain, model: str) -> Estimate:
        return Estimate(math.nan) if model in domain.not_compared else domain.models[model].bits_per_byte

    values = [(model, [bits(domain, model) for domain in measured.values()]) for model in results.models]
    positions = [
        _positions_plot(f"Cross-entropy by position in the document: {name}", d) for name, d in measured.items()
    ]
    padded = [_padding_plot(name, domain, results.reference) for name, domain in measured.items() if domain.paper_v1]
    return [_intervals_plot("Bits per byte", list(measured), values), *positions, *padded]


def _task_plots(found: Sequence[tuple[str, Mapping[str, Estimate]]]) -> list[html.Plot]:
    keys = [key for key in _DRAWN if any(key in measures for _, measures in found)]
    values = [
        (name, [measures.get(key, Estimate(math.nan)).map(lambda share: 100 * share) for key in keys])
        for name, measures in found
    ]
    groups = [_TASK_MEASURES[key] for key in keys]
    return [_intervals_plot("Measures with intervals (%)", groups, values)] if keys else []


def _intervals_plot(title: str, groups: Sequence[str], values: Sequence[tuple[str, Sequence[Estimate]]]) -> html.Plot:
    """Draw figures with their intervals: groups along the axis, models side by side in each."""

    def draw(axes: Any) -> None:
        width = 0.6 / max(1, len(values))
        for index, (name, estimates) in enumerate(values):
            places = np.arange(len(groups)) + (index - (len(values) - 1) / 2) * width
            lows, centers, highs = np.array([(each.low, each.value, each.high) for each in estimates], float).T
            lengths = np.maximum(0, np.nan_to_num([centers - lows, highs - centers]))
            axes.errorbar(places, centers, lengths, fmt="o", capsize=3, markersize=4, label=html.legend_label(name))
        axes.set_xticks(range(len(groups)), list(groups))
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.legend()

    return html.plot(title, draw)


def _padding_plot(key: str, domain: Domain, reference: str) -> html.Plot:
    """Draw how many times lower protocol paper_v1 finds each model's perplexity, by the share of padding."""

    def draw(axes: Any) -> None:
        shares, base = np.linspace(0, 0.95, 96), domain.paper_v1[reference]
        for name, found in domain.paper_v1.items():
            if name != reference:
                ratios = [math.exp(base.loss_at(share) - found.loss_at(share)) for share in shares]
                (line,) = axes.plot(100 * shares, ratios, label=html.legend_label(name))
                axes.plot([100 * found.padding], [base.perplexity / found.perplexity], "o", color=line.get_color())
        axes.set_yscale("log")
        axes.set_xlabel("padding, % of the tokens (dot: these texts; 0 %: the text itself)")
        axes.set_ylabel(f"perplexity of {reference} over the model's")
        if domain.paper_v1.keys() - {reference}:
            axes.legend()

    return html.plot(f"Perplexity ratio with padding in the loss: {key}", draw)


def _positions_plot(title: str, domain: Domain) -> html.Plot:
    def draw(axes: Any) -> None:
        for name, found in domain.models.items():
            places = [1 + (each["from"] + each["to"]) / 2 for each in found.positions]
            nats = [each["cross_entropy"] for each in found.positions]
            axes.plot(places, nats, marker="o", label=html.legend_label(name))
        axes.set_xscale("log", base=2)
        axes.set_xlabel("position in the document, tokens")
        axes.set_ylabel("nats per token")
        axes.legend()

    return html.plot(title, draw)
