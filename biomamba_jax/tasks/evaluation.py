"""Evaluates every model of a config on its text domains and tasks, one model in memory at a time, and compares them."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from biomamba_jax import files
from biomamba_jax.config import EvaluateConfig, MultipleChoiceConfig
from biomamba_jax.environment import environment
from biomamba_jax.errors import UserError
from biomamba_jax.tasks import multiple_choice, paper, paper_v1, pubmedqa
from biomamba_jax.tasks import question_answering as qa
from biomamba_jax.tasks.documents import Document, read_domain
from biomamba_jax.tasks.load_scorer import check_model, load_scorer
from biomamba_jax.tasks.paper_v1 import PaddedFigures
from biomamba_jax.tasks.perplexity import Comparison, DomainMeasures, DomainScores, compare, measure, score_domain
from biomamba_jax.tasks.scoring import ModelFacts, Scorer
from biomamba_jax.tasks.spelling import unspelled_share
from biomamba_jax.tasks.statistics import Resampling, mcnemar

Answer = Callable[[Scorer], qa.TaskResult]
"""Lets a model answer the questions of a task."""


@dataclass
class Domain:
    """A text domain and the figures of each model."""

    sources: list[str]
    """Paths of its text."""
    documents: int
    """Number of documents."""
    bytes: int
    """Their length in UTF-8."""
    words: int
    """Their number of words."""
    models: dict[str, DomainMeasures] = field(default_factory=dict)
    """Figures of each model."""
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    """Comparison of each model with the reference."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Number of documents that are not measured, by reason; unspelled: their stored ids do not spell their text."""
    unspelled: dict[str, float] = field(default_factory=dict)
    """Share of the bytes that each model's tokenizer does not spell."""
    not_compared: list[str] = field(default_factory=list)
    """Models for which that share is above `max_unspelled`."""
    paper: dict[str, dict[str, float]] = field(default_factory=dict)
    """protocol paper: the published figures, instead of `models`."""
    paper_v1: dict[str, PaddedFigures] = field(default_factory=dict)
    """protocol paper_v1: figures with padding in the loss, next to `models`."""


@dataclass(frozen=True)
class McNemar:
    """McNemar's test of a model against the reference on the same questions."""

    reference: str
    """Name of the reference model."""
    only_this: int
    """Questions that only this model answers correctly."""
    only_reference: int
    """Questions that only the reference answers correctly."""
    p_value: float
    """Two-sided p-value."""


@dataclass
class Task:
    """A task and the result of each model."""

    title: str
    """Heading in the report."""
    questions: int
    """Number of questions."""
    majority: qa.TaskResult | None
    """Result of always giving the most frequent answer."""
    models: dict[str, qa.TaskResult] = field(default_factory=dict)
    """Result of each model."""
    comparisons: dict[str, McNemar] = field(default_factory=dict)
    """Test of each model against the reference."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Number of questions that are not asked, by reason."""


@dataclass
class Evaluation:
    """All results of an evaluation."""

    config: EvaluateConfig
    """The evaluation's settings."""
    reference: str
    """Name of the model that the others are compared with."""
    models: dict[str, ModelFacts] = field(default_factory=dict)
    """Facts about each model."""
    domains: dict[str, Domain] = field(default_factory=dict)
    """Results on each text domain."""
    tasks: dict[str, Task] = field(default_factory=dict)
    """Results of each task: pubmedqa, bioasq, and each set of multiple choice by its name."""
    environment: dict[str, Any] = field(default_factory=environment)
    """Versions, devices and command line."""


@dataclass(frozen=True)
class Inputs:
    """Texts and questions, read once and before the first model is loaded."""

    domains: dict[str, tuple[list[Document], dict[str, int]]]
    """Documents of each text domain, and the number of those left out, by reason."""
    tasks: dict[str, Task]
    """Each task, without results."""
    answer: dict[str, Answer]
    """For each task, the function that lets a model answer it."""


def evaluate(
    config: EvaluateConfig,
    output: Path,
    say: Callable[[str], None] = lambda line: None,
    *,
    scorers: Mapping[str, Scorer] | None = None,
    inputs: Inputs | None = None,
) -> Evaluation:
    """Run an evaluation; results of documents and questions are written as soon as a model has them.

    Args:
      config: models, domains, tasks and protocol.
      output: folder of documents/ and predictions/.
      say: called with a line about each figure as it is computed.
      scorers: models that are in memory, by name; the others are loaded.
      inputs: what `read_inputs` returned for these settings; None to read them.

    Raises:
      UserError: a model, text or question file cannot be read; all texts are read before anything is measured.
    """
    inputs, scorers = inputs or read_inputs(config), scorers or {}
    evaluator = _Evaluator(config, inputs, output, say)
    for name, path in config.models.items():
        if name not in scorers:
            check_model(name, path, config)
    for name, path in config.models.items():
        scorer = scorers.get(name) or load_scorer(name, path, config)
        evaluator.measure(name, scorer)
        del scorer  # before the next one is loaded
    return evaluator.compared()


class _Evaluator:
    """Measures one model after the other on the same texts and questions, and then compares them."""

    def __init__(self, config: EvaluateConfig, inputs: Inputs, output: Path, say: Callable[[str], None]):
        self._config, self._inputs, self._output, self._say = config, inputs, output, say
        self._resampling = _resampling(config)
        self._scores: dict[str, dict[str, DomainScores]] = {key: {} for key in inputs.domains}
        self._results = Evaluation(config, config.reference or next(iter(config.models)))
        for key, (documents, left_out) in inputs.domains.items():
            sizes = sum(d.bytes for d in documents), sum(d.words for d in documents)
            self._results.domains[key] = Domain(config.domains[key].paths, len(documents), *sizes, left_out=left_out)
            if left_out:
                say(f"{key}: documents left out: {counted(left_out)}")
        for key, task in inputs.tasks.items():
            self._results.tasks[key] = dataclasses.replace(task, models={}, comparisons={})
            if task.left_out:
                say(f"{key}: questions left out: {counted(task.left_out)}")

    def measure(self, name: str, scorer: Scorer) -> None:
        """Measure a model on every domain and task."""
        self._results.models[name] = scorer.facts
        self._say(f"{name}: {scorer.facts.parameters:,} parameters, run by {scorer.facts.run_by}")
        for key, (documents, _) in self._inputs.domains.items():
            spelling = self._check_spelling(name, key, scorer, documents)
            if self._config.protocol == "paper":
                self._measure_as_published(name, key, scorer, documents, spelling)
            else:
                self._measure_domain(name, key, scorer, documents, spelling)
        for key, answer in self._inputs.answer.items():
            self._results.tasks[key].models[name] = result = answer(scorer)
            path = self._output / "predictions" / key / f"{name}.jsonl"
            _write_lines(path, map(dataclasses.asdict, result.predictions))
            shown = ", ".join(f"{m} {e.value:.4f}" for m, e in result.measures.items())
            self._say(f"{name} on {key}: {shown} ({result.answered / max(result.seconds, 1e-9):.1f} questions/s)")

    def _check_spelling(self, name: str, key: str, scorer: Scorer, documents: Sequence[Document]) -> str:
        """Record the share of a domain that a model's tokenizer does not spell, and return it in words."""
        domain = self._results.domains[key]
        domain.unspelled[name] = lost = unspelled_share(scorer, [document.text for document in documents])
        if lost == 1:
            path = self._config.models[name]
            raise UserError(f"models.{name}: the tokenizer of {path} spells nothing of domains.{key}; leave one out")
        if lost <= self._config.max_unspelled:
            return f"{100 * lost:.2f} % of bytes not spelled"
        domain.not_compared.append(name)
        return f"{100 * lost:.2f} % of bytes not spelled: not compared"

    def _measure_as_published(
        self, name: str, key: str, scorer: Scorer, documents: Sequence[Document], spelling: str
    ) -> None:
        found = paper.domain_perplexity(scorer, documents, self._config.domains[key].paper_rows)
        self._results.domains[key].paper[name] = found
        figure = f"perplexity {found['perplexity']:.4f}, mean of batch means (protocol paper)"
        self._say(f"{name} on {key}: {figure}; {spelling}")

    def _measure_domain(
        self, name: str, key: str, scorer: Scorer, documents: Sequence[Document], spelling: str
    ) -> None:
        domain = self._results.domains[key]
        if self._config.protocol == "paper_v1":
            domain.paper_v1[name] = found = paper_v1.domain_figures(scorer, documents)
            self._say(
                f"{name} on {key}: perplexity {found.perplexity:.4f} with padding in the loss (protocol paper_v1), "
                f"{100 * found.padding:.1f} % of the tokens; nats per token: {found.padding_cross_entropy:.3f} of "
                f"padding, {found.text_cross_entropy:.3f} of text"
            )
        self._scores[key][name] = scores = score_domain(scorer, documents)
        measures = measure(scores, self._resampling)
        if scorer.documents_by_word:
            by_word = score_domain(scorer, documents, scorer.documents_by_word)
            measures = dataclasses.replace(measures, pll_word_l2r=measure(by_word, self._resampling))
        domain.models[name] = measures
        _write_lines(self._output / "documents" / key / f"{name}.jsonl", _document_records(documents, scores))
        self._say(f"{name} on {key}: {_domain_line(measures)}; {spelling}")

    def compared(self) -> Evaluation:
        """Return the results of all models, compared with the reference."""
        results, reference = self._results, self._results.reference
        _compare(results, self._scores, self._resampling)
        for key, domain in results.domains.items():
            for name, ratio in padded_ratios(domain, reference).items():
                pair = domain.comparisons.get(name)
                honest = pair.perplexity_ratio if pair else None
                of_text = f"{honest.value:.3f} on the text itself" if honest else "not comparable on the text itself"
                self._say(f"{name} on {key}: {reference}'s perplexity over its own: {ratio:.1f} by paper_v1, {of_text}")
        return results


def read_inputs(config: EvaluateConfig) -> Inputs:
    """Read all texts and questions.

    Raises:
      UserError: a file cannot be read.
    """
    domains = {name: read_domain(name, domain, config.seed) for name, domain in config.domains.items()}
    asked: dict[str, tuple[Task, Answer]] = {}
    if config.pubmedqa.path:
        asked["pubmedqa"] = _pubmedqa(config)
    if config.bioasq.path:
        asked["bioasq"] = _bioasq(config)
    for name, choice in config.multiple_choice.items():
        asked[name] = _multiple_choice(name, choice, config)
    tasks = {name: task for name, (task, _) in asked.items()}
    return Inputs(domains, tasks, {name: answer for name, (_, answer) in asked.items()})


def _protocol(config: EvaluateConfig) -> ModuleType:
    """Return the module that asks PubMedQA and BioASQ; both have the same functions."""
    return paper if config.protocol == "paper" else qa


def _resampling(config: EvaluateConfig) -> Resampling:
    return Resampling(config.resamples, config.confidence, config.seed)


def _pubmedqa(config: EvaluateConfig) -> tuple[Task, Answer]:
    protocol, resampling = _protocol(config), _resampling(config)
    split, left_out = protocol.read_pubmedqa(config.pubmedqa, config.seed)
    title, size = "PubMedQA, official test set", len(split.test) + sum(left_out.values())
    if size != pubmedqa.OFFICIAL_SIZE:
        title = f"PubMedQA's split of another file, {size:,} test questions and not {pubmedqa.OFFICIAL_SIZE}"
    if config.protocol == "paper":
        title = f"PubMedQA, {len(split.test)} random questions, thresholds chosen on them (protocol paper)"
    elif left_out:
        title += f", a sample of {len(split.test)} questions stratified by answer (seed {config.seed})"
    majority = qa.pubmedqa_majority(split, resampling)
    answer = partial(protocol.answer_pubmedqa, config=config.pubmedqa, split=split, resampling=resampling)
    return Task(title, majority.questions, majority, left_out=left_out), answer


def _bioasq(config: EvaluateConfig) -> tuple[Task, Answer]:
    protocol, resampling, bioasq = _protocol(config), _resampling(config), config.bioasq
    title = "BioASQ task B, all files pooled"
    if config.protocol == "paper":
        bioasq, title = dataclasses.replace(bioasq, types=["yesno"]), f"{title}, yes/no only (protocol paper)"
    questions, left_out = qa.read_bioasq(bioasq, bioasq.path)
    known = qa.read_bioasq(bioasq, bioasq.development)[0] if bioasq.thresholds != "none" else []
    asked = {question.question for question in questions}
    development = [question for question in known if question.question not in asked]  # later files repeat earlier ones
    if leaked := len(known) - len(development):
        title += f"; {leaked:,} development questions, which are asked too, are left out of the thresholds"
    majority = protocol.bioasq_majority(questions, resampling)
    answer = partial(
        protocol.answer_bioasq, config=bioasq, questions=questions, development=development, resampling=resampling
    )
    return Task(title, majority.questions, majority, left_out=left_out), answer


def _multiple_choice(name: str, choice: MultipleChoiceConfig, config: EvaluateConfig) -> tuple[Task, Answer]:
    task, resampling = multiple_choice.read_task(name, choice, config.seed), _resampling(config)
    title = f"{name}: multiple choice by {choice.answer}, {choice.shots} shots, chance {100 * task.chance:.1f} %"
    majority = multiple_choice.majority(task, resampling)
    answer = partial(multiple_choice.answer, config=choice, task=task, resampling=resampling)
    return Task(title, len(task.asked), majority, left_out=task.left_out), answer


def counted(left_out: Mapping[str, int]) -> str:
    """Return numbers by reason as words."""
    return ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())


def padded_ratios(domain: Domain, reference: str) -> dict[str, float]:
    """Return the reference's perplexity over each other model's by protocol paper_v1."""
    figures = domain.paper_v1
    return {name: figures[reference].perplexity / figures[name].perplexity for name in figures if name != reference}


def _domain_line(found: DomainMeasures) -> str:
    figures = f"perplexity {found.perplexity.value:.4f}, {found.bits_per_byte.value:.4f} bits per byte"
    if other := found.pll_word_l2r:
        figures = (
            f"pseudo-{figures} (PLL, each token masked); pseudo-perplexity {other.perplexity.value:.4f}, "
            f"{other.bits_per_byte.value:.4f} bits per byte (PLL-word-l2r)"
        )
    return f"{figures} ({found.tokens:,} tokens, {found.tokens_per_second:,.0f} tokens/s)"


def _compare(results: Evaluation, scores: Mapping[str, Mapping[str, DomainScores]], resampling: Resampling) -> None:
    """Compare each model with the reference.

    On domains causal models only, since a masked one has no probabilities, and only those that spell the text.
    """
    reference = results.reference
    causal = {name for name, facts in results.models.items() if facts.kind == "causal"}
    for key, by_model in scores.items():
        domain = results.domains[key]
        for name in by_model:
            if name != reference and {name, reference} <= causal.difference(domain.not_compared):
                domain.comparisons[name] = compare(reference, by_model[reference], by_model[name], resampling)
    for task in results.tasks.values():
        for name, result in task.models.items():
            if name != reference:
                correct = qa.shared_correctness(result, task.models[reference])
                task.comparisons[name] = McNemar(reference, *mcnemar(*correct))


# --- Files ---


def _document_records(documents: Sequence[Document], scores: DomainScores) -> Iterable[dict[str, Any]]:
    for document, nats, tokens in zip(documents, scores.nats.tolist(), scores.tokens.tolist(), strict=True):
        yield {"key": document.key, "nats": nats, "tokens": tokens, "bytes": document.bytes, "words": document.words}


def _write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with files.naming_write_errors(path, "give another output"):
        files.write_json_lines(path, records)


def to_json(results: Evaluation) -> str:
    """Return `report.json`: every figure, with null for non-finite ones; predictions have their own files."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            value = {name: each for name, each in vars(value).items() if name != "predictions"}
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(results), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
