"""All models on all domains and tasks of a config, one model in memory at a time, and what they differ in."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from biomamba_jax import files
from biomamba_jax.config import EvaluateConfig
from biomamba_jax.environment import environment
from biomamba_jax.errors import UserError
from biomamba_jax.tasks import paper, pubmedqa
from biomamba_jax.tasks import question_answering as qa
from biomamba_jax.tasks.documents import Document, read_domain
from biomamba_jax.tasks.load_scorer import load_scorer
from biomamba_jax.tasks.perplexity import Comparison, DomainMeasures, DomainScores, compare, measure, score_domain
from biomamba_jax.tasks.scoring import ModelFacts, Scorer
from biomamba_jax.tasks.statistics import Resampling, mcnemar

Say = Callable[[str], None]


@dataclass
class Domain:
    """A text domain and what each model makes of it."""

    sources: list[str]
    documents: int
    bytes: int
    words: int
    models: dict[str, DomainMeasures] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    """Of each model with the reference."""
    paper: dict[str, dict[str, float]] = field(default_factory=dict)
    """protocol paper: the published figures instead of `models`."""


@dataclass(frozen=True)
class McNemar:
    """A model against the reference on the same questions."""

    reference: str
    only_this: int
    """Questions that this model alone gets right."""
    only_reference: int
    p_value: float


@dataclass
class Task:
    """A task and each model's result."""

    title: str
    questions: int
    majority: qa.TaskResult | None
    """What always giving the commonest answer scores."""
    models: dict[str, qa.TaskResult] = field(default_factory=dict)
    comparisons: dict[str, McNemar] = field(default_factory=dict)


@dataclass
class Evaluation:
    """All results of a run."""

    config: EvaluateConfig
    reference: str
    models: dict[str, ModelFacts] = field(default_factory=dict)
    domains: dict[str, Domain] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=environment)


@dataclass(frozen=True)
class _Inputs:
    """What all models are given, read once and before the first model is loaded."""

    domains: dict[str, list[Document]]
    questions: list[pubmedqa.Question]
    pubmedqa: pubmedqa.Split | None
    bioasq: qa.Batches
    bioasq_development: qa.Batches


def evaluate(config: EvaluateConfig, output: Path, say: Say = lambda line: None) -> Evaluation:
    """Does what `config` says. Documents' and questions' results are in `output` as soon as a model has them.

    Args:
      say: told of each figure as it comes.

    Raises:
      UserError: a model, a text or questions that cannot be read; nothing is measured before all texts are.
    """
    inputs = _read(config)
    resampling = Resampling(config.resamples, config.confidence, config.seed)
    results = Evaluation(config, config.reference or next(iter(config.models)))
    for name, documents in inputs.domains.items():
        sizes = sum(d.bytes for d in documents), sum(d.words for d in documents)
        results.domains[name] = Domain(config.domains[name].paths, len(documents), *sizes)
    results.tasks = _tasks(config, inputs, resampling)
    scores: dict[str, dict[str, DomainScores]] = {name: {} for name in inputs.domains}
    for name, path in config.models.items():
        scorer = load_scorer(name, path, config)
        results.models[name] = scorer.facts
        say(f"{name}: {scorer.facts.parameters:,} parameters, run by {scorer.facts.run_by}")
        for domain, documents in inputs.domains.items():
            if config.protocol == "paper":
                figures = paper.domain_perplexity(scorer, documents, config.domains[domain].paper_rows)
                results.domains[domain].paper[name] = figures
                say(f"{name} on {domain}: perplexity {figures['perplexity']:.4f}, mean of batch means (protocol paper)")
                continue
            scores[domain][name] = of_domain = score_domain(scorer, documents)
            results.domains[domain].models[name] = found = measure(of_domain, resampling)
            _write_lines(output / "documents" / domain / f"{name}.jsonl", _document_lines(documents, of_domain))
            say(f"{name} on {domain}: {_domain_line(scorer.facts, found)}")
        for key, task in results.tasks.items():
            task.models[name] = result = _answer(scorer, key, config, inputs, resampling)
            lines = (dataclasses.asdict(prediction) for prediction in result.predictions)
            _write_lines(output / "predictions" / key / f"{name}.jsonl", lines)
            shown = ", ".join(f"{m} {e.value:.4f}" for m, e in result.measures.items())
            say(f"{name} on {key}: {shown} ({result.answered / max(result.seconds, 1e-9):.1f} questions/s)")
        del scorer
    for domain, of_models in scores.items():
        _compare_domain(results, results.domains[domain], of_models, resampling)
    for task in results.tasks.values():
        _compare_task(results.reference, task)
    return results


def _read(config: EvaluateConfig) -> _Inputs:
    domains = {name: read_domain(name, domain, config.seed) for name, domain in config.domains.items()}
    questions = pubmedqa.read_questions(config.pubmedqa.path) if config.pubmedqa.path else []
    return _Inputs(
        domains=domains,
        questions=questions,
        pubmedqa=qa.read_pubmedqa(config.pubmedqa) if config.pubmedqa.path else None,
        bioasq=qa.read_bioasq(config.bioasq, config.bioasq.path) if config.bioasq.path else {},
        bioasq_development=qa.read_bioasq(config.bioasq, config.bioasq.development)
        if config.bioasq.thresholds != "none"
        else {},
    )


def _tasks(config: EvaluateConfig, inputs: _Inputs, resampling: Resampling) -> dict[str, Task]:
    tasks = {}
    published = config.protocol == "paper"
    if inputs.pubmedqa is not None:
        if published:
            subset = pubmedqa.random_test(inputs.questions)
            majority = qa.pubmedqa_majority(inputs.pubmedqa._replace(test=subset), resampling)
            title = f"PubMedQA, {len(subset)} random questions, thresholds chosen on them (protocol paper)"
        else:
            majority = qa.pubmedqa_majority(inputs.pubmedqa, resampling)
            whole = config.pubmedqa.max_questions is None
            title = "PubMedQA, official test set" if whole else "PubMedQA, part of the official test set"
        tasks["pubmedqa"] = Task(title, majority.questions, majority)
    if inputs.bioasq:
        majority = (paper if published else qa).bioasq_majority(inputs.bioasq, resampling)
        title = "BioASQ task B, all files pooled" + (", yes/no only (protocol paper)" if published else "")
        tasks["bioasq"] = Task(title, majority.questions, majority)
    return tasks


def _domain_line(facts: ModelFacts, found: DomainMeasures) -> str:
    pseudo = "pseudo-" if facts.kind == "masked" else ""
    figures = f"{pseudo}perplexity {found.perplexity.value:.4f}, {found.bits_per_byte.value:.4f} bits per byte"
    return f"{figures} ({found.tokens:,} tokens, {found.tokens_per_second:,.0f} tokens/s)"


def _answer(scorer: Scorer, key: str, config: EvaluateConfig, inputs: _Inputs, resampling: Resampling) -> qa.TaskResult:
    published = config.protocol == "paper"
    if key == "pubmedqa":
        if published:
            return paper.answer_pubmedqa(scorer, config.pubmedqa, inputs.questions, resampling)
        assert inputs.pubmedqa is not None
        return qa.answer_pubmedqa(scorer, config.pubmedqa, inputs.pubmedqa, resampling)
    if published:
        return paper.answer_bioasq(scorer, config.bioasq, inputs.bioasq, resampling)
    return qa.answer_bioasq(scorer, config.bioasq, inputs.bioasq, inputs.bioasq_development, resampling)


def _compare_domain(
    results: Evaluation, domain: Domain, scores: Mapping[str, DomainScores], resampling: Resampling
) -> None:
    """Probabilities with probabilities only: a masked model's figures are none."""
    reference = results.reference
    if reference not in scores or results.models[reference].kind == "masked":
        return
    for name, of_model in scores.items():
        if name != reference and results.models[name].kind == "causal":
            domain.comparisons[name] = compare(reference, scores[reference], of_model, resampling)


def _compare_task(reference: str, task: Task) -> None:
    for name, result in task.models.items():
        if name != reference and reference in task.models:
            this, other = qa.shared_correctness(result, task.models[reference])
            task.comparisons[name] = McNemar(reference, *mcnemar(this, other))


# --- Files ---


def _document_lines(documents: Sequence[Document], scores: DomainScores) -> Iterator[dict[str, Any]]:
    for document, nats, tokens in zip(documents, scores.nats.tolist(), scores.tokens.tolist(), strict=True):
        yield {"key": document.key, "nats": nats, "tokens": tokens, "bytes": document.bytes, "words": document.words}


def _write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines, written whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        files.write_text(path, "".join(lines))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another output") from None


def to_json(results: Evaluation) -> str:
    """`report.json`: every figure, without the predictions, which have files of their own. Not finite: null."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [f.name for f in dataclasses.fields(value) if f.name != "predictions"]
            return {name: plain(getattr(value, name)) for name in fields}
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(results), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
