"""The paper's claim at laptop scale, with controls: trains the models of configs/reproduce, measures and compares them.

A general model is pretrained further on PubMed for a tenth of its steps; the paper's proportion is smaller still.
Controls: the general model trained further for as long on general text; a model of PubMed alone, trained for as long as
both together; the adaptation without decontamination. Each is trained from several seeds, which decide initial weights
and the order of the text. Every figure has two uncertainties: an interval over documents, by the bootstrap, and the
range over seeds.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.seeds import OfSeeds, Shown, difference, markdown, run, run_on_cores, verdict, with_interval
from biomamba_jax import files
from biomamba_jax.config.checks import InnerFraction, PositiveFloat, PositiveInt, Settings
from biomamba_jax.tasks.statistics import Resampling

CONFIGS = Path("configs/reproduce")
PARTS = {
    "general": "general model",
    "continued": "+ general text (control)",
    "adapted": "+ PubMed and general text",
    "not_decontaminated": "the same, not decontaminated",
    "scratch": "PubMed alone, from scratch",
}
"""Each part of the reproduction: the name of its config, and its name in the table."""
_EVALUATED = 0.01
"""Share of the PubMed records that are measured."""


@dataclass(frozen=True)
class ReproductionBenchmark(Settings):
    """Settings of the reproduction."""

    seeds: PositiveInt = 3
    """Number of seeds."""
    pubmedqa: str | None = None
    """The authors' ori_pqal.json, to leave its articles out of the training text and ask its questions."""
    steps: PositiveFloat = 1.0
    """Factor of the steps of every training run; a small one tries the program."""
    confidence: InnerFraction = 0.95
    """Confidence level of the intervals over documents."""


Values = Mapping[tuple[str, int], np.ndarray]
"""By (part, seed): negative log-likelihoods in nats, or 1 for a correct answer, float64 [documents or questions]."""


def reproduce_claim(config: ReproductionBenchmark) -> str:
    """Run whatever of the reproduction is not done yet, print its tables and return them as Markdown."""
    write_evaluation_text(Path("data/reproduce/evaluation.jsonl"))
    *training, evaluate = commands(config)
    of_seed = [training[first : first + len(PARTS)] for first in range(0, len(training), len(PARTS))]
    for command in of_seed[0]:  # also prepares the text of all seeds
        run(command)
    run_on_cores(of_seed[1:])
    run(evaluate)
    table = results(Path("runs/reproduce/evaluation"), config)
    files.write_text(Path("runs/reproduce/table.md"), table)
    print(table)
    return table


def write_evaluation_text(path: Path) -> None:
    """Write the records of the NLM sample that are measured, chosen by a hash of their PMIDs, as JSON lines."""
    from biomamba_jax.config.prepare import FilterConfig
    from biomamba_jax.data.filters import judge
    from biomamba_jax.data.readers import read_records
    from biomamba_jax.data.records import KEPT
    from biomamba_jax.data.sample import nlm_sample
    from biomamba_jax.data.text import split_position

    if path.exists():
        return
    kept = {
        record.pmid: record.text
        for source in nlm_sample()
        for record in judge(read_records(source), FilterConfig())
        if record.status == KEPT and split_position(f"measured {record.pmid}".encode()) < _EVALUATED * 2**32
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json_lines(path, [{"pmid": pmid, "text": text} for pmid, text in kept.items()])


def commands(config: ReproductionBenchmark) -> Iterator[list[str]]:
    """Yield the arguments of every command of the package, in order; one that was run is over in seconds."""
    models = []
    for seed in range(config.seeds):
        for part in PARTS:
            raw = yaml.safe_load((CONFIGS / f"{part}.yaml").read_text())
            steps = max(2, round(raw["train"]["steps"] * config.steps))
            run_dir = f"{raw['run_dir']}-{seed}"
            command = ["biomamba_jax.pretrain", "--config", str(CONFIGS / f"{part}.yaml"), "--run_dir", run_dir]
            command += ["--train.seed", str(seed), "--train.steps", str(steps)]
            command += ["--init_from", f"{raw['init_from']}-{seed}"] if "init_from" in raw else []
            if config.pubmedqa and "decontaminate" in raw["prepare"]:
                command += ["--prepare.decontaminate", *raw["prepare"]["decontaminate"], config.pubmedqa]
            models += [f"--models.{part}-{seed}", run_dir]
            yield command
    questions = ["--pubmedqa.path", config.pubmedqa] if config.pubmedqa else []
    yield ["biomamba_jax.evaluate", "--config", str(CONFIGS / "evaluate.yaml"), *models, *questions]


def results(evaluation: Path, config: ReproductionBenchmark) -> str:
    """Return the tables of an evaluation as Markdown.

    Args:
      evaluation: folder that `evaluate` wrote for the models PART-SEED.
      config: seeds and confidence.
    """
    models = [(part, seed) for part in PARTS for seed in range(config.seeds)]
    resampling, verdicts = Resampling(confidence=config.confidence), list[str]()
    lines: list[list[str]] = []
    domains = json.loads((evaluation / "report.json").read_text())["domains"]
    for domain in domains:
        read = {key: _lines(evaluation / "documents" / domain, key) for key in models}
        nats = {key: np.array([line["nats"] for line in read[key]]) for key in models}
        tokens = np.array([line["tokens"] for line in read[models[0]]])
        title = f"perplexity, {domain}, {len(tokens):,} documents"
        lines.append([title, *cells(nats, tokens, resampling, math.exp)])
        verdicts += list(verdicts_of(domain, nats, tokens, resampling))
    if config.pubmedqa:
        read = {key: _lines(evaluation / "predictions" / "pubmedqa", key) for key in models}
        right = {key: np.array([100.0 * line["correct"] for line in read[key]]) for key in models}
        count = len(right[models[0]])
        lines.append([f"% correct, PubMedQA, {count:,} questions", *cells(right, np.ones(count), resampling)])
    head = f"mean of {config.seeds} seeds ({100 * config.confidence:g} % interval over documents) [range over seeds]"
    return markdown([[head, *PARTS.values()], *lines]) + "".join(f"\n{each}\n" for each in verdicts)


def _lines(folder: Path, model: tuple[str, int]) -> list[dict[str, Any]]:
    return [line for _, line in files.read_json_lines(folder / f"{model[0]}-{model[1]}.jsonl")]


def of_part(values: Values, counts: np.ndarray, part: str) -> OfSeeds:
    """Return the values of a part over `counts`, for each seed."""
    over = np.stack([each for (other, _), each in values.items() if other == part])
    return OfSeeds(over, np.broadcast_to(counts, over.shape))


def cells(values: Values, counts: np.ndarray, resampling: Resampling, shown: Shown = float) -> Iterator[str]:
    """Yield "mean (interval over documents) [range over seeds]" of each part's sum over the sum of `counts`."""
    for part in PARTS:
        yield of_part(values, counts, part).cell(resampling, shown)


def verdicts_of(domain: str, nats: Values, tokens: np.ndarray, resampling: Resampling) -> Iterator[str]:
    """Yield a sentence on each effect: its size, and whether it is larger than the spread over seeds."""
    for text, before, after in (
        ("Adaptation", "general", "adapted"),
        ("PubMed instead of as much general text", "continued", "adapted"),
        ("PubMed alone instead of general text first", "adapted", "scratch"),
        ("Keeping the measured articles in the training text", "adapted", "not_decontaminated"),
    ):
        first, second = (of_part(nats, tokens, part) for part in (before, after))
        found, by_seed = difference(first, second, resampling)
        yield (
            f"{text}, {domain}: perplexity divided by {with_interval(found.map(math.exp), 2)} "
            f"[{math.exp(by_seed.min()):.2f}-{math.exp(by_seed.max()):.2f}]; {verdict(found, by_seed)}"
        )
