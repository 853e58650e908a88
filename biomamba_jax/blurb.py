"""`evaluate --suite blurb`: models fine-tuned and measured on BLURB's sets (Gu et al. 2021, arXiv 2007.15779).

Each set is trained on its training split, the development split chooses the weights, and every run predicts the test
split once. A figure is the mean over seeds; BLURB's score is the mean over six types of tasks of the mean over their
sets. It is given if all thirteen sets are there with test splits of the published sizes; else what is missing or of
another size is named, and the mean is that of what is there.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from biomamba_jax import files, folders, html
from biomamba_jax.command_line import parse, to_yaml
from biomamba_jax.config import EvaluateConfig, FinetuneConfig
from biomamba_jax.environment import environment
from biomamba_jax.errors import UserError
from biomamba_jax.finetuning import PREDICTIONS, RESULTS, read_weights, train_and_answer
from biomamba_jax.interop.run_dir import changed, read_settings
from biomamba_jax.tables import Table, print_tables
from biomamba_jax.tasks.architectures import TRANSFORMERS_PREFIX
from biomamba_jax.tasks.mining_measures import by_group

_SPLITS = {"files": "train", "development": "dev", "test": "test"}
"""Part of the names of each split's files, in any case."""
_RECIPE = "--optimizer.weight_decay=0.01 --schedule.kind=linear --schedule.final_fraction=0 --train.eval_every=40"


class Set(NamedTuple):
    """A set of BLURB: its files, and how it is trained and measured."""

    type: str
    """Type of task."""
    folder: str
    """Folder of its files."""
    head: str
    """Head of `finetune`."""
    format: str
    """data.format of its files, or pubmedqa for the authors' ori_pqal.json."""
    measure: str
    """Measure of BLURB, by its name in results.json."""
    size: int
    """Published size of the test split: mentions of entities, of anything else texts."""
    seeds: int = 5
    """Published number of runs."""
    setting: str = ""
    """Further options of `finetune`."""


SETS = {
    "BC5-chem": Set("entities", "bc5cdr", "token_classifier", "pubtator", "f1", 5385, 5, "--data.types=Chemical"),
    "BC5-disease": Set("entities", "bc5cdr", "token_classifier", "pubtator", "f1", 4424, 5, "--data.types=Disease"),
    "NCBI-disease": Set("entities", "ncbi_disease", "token_classifier", "conll", "f1", 960),
    "BC2GM": Set("entities", "bc2gm", "token_classifier", "conll", "f1", 6325),
    "JNLPBA": Set("entities", "jnlpba", "token_classifier", "conll", "f1", 8662),
    "EBM PICO": Set("PICO", "ebm_pico", "token_classifier", "conll", "macro_word_f1", 16364),
    "ChemProt": Set("relations", "chemprot", "classifier", "marked", "f1", 15745, 5, "--data.negative=false"),
    "DDI": Set("relations", "ddi", "classifier", "marked", "f1", 5716, 5, "--data.negative=false"),
    "GAD": Set("relations", "gad", "classifier", "tsv", "f1", 534, 5, "--data.negative=0"),
    "BIOSSES": Set("similarity", "biosses", "regression", "spans", "pearson", 20, 10),
    "HoC": Set("documents", "hoc", "multi_label", "tsv", "f1", 371),
    "PubMedQA": Set("questions", "pubmedqa", "classifier", "pubmedqa", "accuracy", 500, 10),
    "BioASQ": Set("questions", "bioasq", "classifier", "spans", "accuracy", 140, 10),
}
RunMeasures = Mapping[str, Any]


def evaluate_blurb(config: EvaluateConfig) -> Path:
    """Fine-tune and measure what has not been yet, write report.html and report.json, and return the page's path.

    Raises:
      UserError: no set is there, a file of one cannot be read, or a run has other settings.
    """
    output, here = Path(config.output), {name: data for name, each in SETS.items() if (data := _data(config, each))}
    if not here:
        names = ", ".join({each.folder: each for each in SETS.values()})
        raise UserError(f"blurb.data = {config.blurb.data!r}: has none of {names}")
    given = config.blurb
    recipe = f"--data.batch_size={given.batch_size} --optimizer.learning_rate={given.learning_rate} {_RECIPE}".split()
    recipe += [f"--train.epochs={given.epochs}", f"--train.steps={'null' if given.steps is None else given.steps}"]

    def measures(name: str, model: str, seed: int) -> RunMeasures:
        path, run_dir = config.models[model], output / "runs" / model / f"{name.replace(' ', '_')}-{seed}"
        words = [f"--init_from={path}", f"--run_dir={run_dir}", f"--train.seed={seed}", *here[name], *recipe]
        reading = "once" if path.startswith(TRANSFORMERS_PREFIX) else given.reading
        return _measures(SETS[name], [*words, f"--reading={reading}"])

    seeds = {name: range(given.seeds or SETS[name].seeds) for name in here}
    results = {name: {m: [measures(name, m, seed) for seed in seeds[name]] for m in config.models} for name in here}
    report = report_of(results, [name for name in SETS if name not in here])
    files.write_text(output / "config.yaml", to_yaml(config))
    files.write_json(output / "report.json", report)
    return _page(report, output)


def _data(config: EvaluateConfig, each: Set) -> list[str]:
    """Return the options that name the files of a set; [] if its training or test split is not there."""
    folder = Path(config.blurb.data, each.folder)
    if each.format == "pubmedqa":
        path = folder / "ori_pqal.json"
        return [f"--pubmedqa.path={path}"] if path.exists() else []
    found = {key: [str(p) for p in sorted(folder.glob("*")) if word in p.name.lower()] for key, word in _SPLITS.items()}
    options = [f"--data.format={each.format}", *(f"--data.{key}={json.dumps(paths)}" for key, paths in found.items())]
    return options if found["files"] and found["test"] else []


def _measures(each: Set, words: Sequence[str]) -> RunMeasures:
    """Return the measures of a run on the test split; one that has results is not trained again."""
    settings = parse(FinetuneConfig, [*words, f"--head={each.head}", *each.setting.split()])
    run_dir = Path(settings.run_dir)
    if not (run_dir / RESULTS).exists():
        with folders.locked(run_dir):
            results = train_and_answer(settings, read_weights(settings))
    else:
        results = files.read_json(run_dir / RESULTS)
        for key in changed(read_settings(run_dir), dataclasses.asdict(settings)):
            if key.split(".")[0] in ("init_from", "reading", "data", "optimizer", "train"):
                raise UserError(f"{run_dir}: was trained with another {key}; give another --output")
    if results is None:
        raise UserError(f"{run_dir}: was stopped; run the same command to go on")
    measures = next((values for split, values in results.items() if split.endswith(" test")), None)
    if not isinstance(measures, dict) or each.measure not in {*measures, "macro_word_f1"}:
        raise UserError(f"{run_dir / RESULTS}: holds no {each.measure} of a test split; remove the folder")
    if each.measure == "macro_word_f1":
        [lines] = (run_dir / PREDICTIONS).glob("*-test.jsonl")
        measures |= {each.measure: macro_word_f1([line for _, line in files.read_json_lines(lines)])}
    print(f"{run_dir}: {each.measure} {measures[each.measure]}", flush=True)
    return measures


def macro_word_f1(lines: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean over types of the F1 of the words in their spans, by which PICO is measured.

    Args:
      lines: predictions with "text", "spans" and "gold", as `finetune` writes them.
    """

    def words(of: Mapping[str, Any], text: str) -> set[tuple[int, str]]:
        starts = [match.start() for match in re.finditer(r"\S+", text)]
        return {(place, kind) for first, end, kind, *_ in of["spans"] for place in starts if first <= place < end}

    gold = [words(line["gold"], line["text"]) for line in lines]
    types = sorted({span[2] for line in lines for span in line["gold"]["spans"]})
    of_types = by_group(types, gold, [words(line, line["text"]) for line in lines], itemgetter(1))
    return float(np.mean([measures["f1"] for measures in of_types.values()]))


def report_of(results: Mapping[str, Mapping[str, Sequence[RunMeasures]]], missing: Sequence[str]) -> dict[str, Any]:
    """Return what report.json holds: each set's figures, what is missing or of another size, and averages.

    Args:
      results: measures of each run on the test split, by set and model.
      missing: names of the sets that are not there.
    """
    sets, averages = dict[str, Any](), dict[str, dict[str, list[float]]]()
    for name, models in results.items():
        each, first = SETS[name], next(iter(models.values()))[0]
        size = first["gold" if each.head == "token_classifier" else "texts"]
        figures = {}
        for model, runs in models.items():
            values = [run[each.measure] or 0.0 for run in runs]  # the correlation of a constant is None
            mean = float(np.mean(values))
            figures[model] = {"mean": mean, "low": min(values), "high": max(values), "runs": runs}
            averages.setdefault(model, {}).setdefault(each.type, []).append(mean)
        sets[name] = {"measure": each.measure, "size": size, "published_size": each.size, "models": figures}
    differ = {name: "not there" for name in missing} | {
        name: f"its test split has {found['size']:,} items, the published one {found['published_size']:,}"
        for name, found in sets.items()
        if found["size"] != found["published_size"]
    }
    return {
        "average": f"mean by type over these {len(sets)} sets: not the BLURB score" if differ else "BLURB score",
        "averages": {m: float(np.mean([np.mean(x) for x in of_type.values()])) for m, of_type in averages.items()},
        "not_as_published": differ,
        "sets": sets,
        "environment": environment(),
    }


def _page(report: Mapping[str, Any], output: Path) -> Path:
    rows = []
    for name, each in report["sets"].items():
        of_models = ([100 * x[key] for key in ("mean", "low", "high")] for x in each["models"].values())
        cells = [(f"{mean:.1f}", f"[{low:.1f}, {high:.1f}]") for mean, low, high in of_models]
        rows.append([f"{name}: {each['measure'].replace('_', ' ')}", each["size"], *cells])
    rows.append([report["average"], None, *(f"{100 * mean:.1f}" for mean in report["averages"].values())])
    columns, title = ["task", "items", *report["averages"]], "Test splits, %: mean over seeds, and their range"
    results = Table(columns, rows, title, emphasized=[len(rows) - 1])
    print_tables([results])
    differ = Table(["set", ""], list(report["not_as_published"].items()), "Not as published", left=(0, 1))
    names, tables = list(report["averages"]), [results, differ]
    return html.write(output / "report.html", "comparison", title="BLURB", names=names, tables=tables, charts=[])
