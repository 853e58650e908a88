"""PubMedQA and BioASQ answered by one model, scored with the official measures."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import mode
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from biomamba_jax.config import BioASQConfig, PubMedQAConfig
from biomamba_jax.errors import UserError
from biomamba_jax.tasks import answers, bioasq, measures, pubmedqa
from biomamba_jax.tasks.answers import Prediction, label_predictions, likelihood_scores, score_table
from biomamba_jax.tasks.scoring import Scorer, SpanScorer
from biomamba_jax.tasks.statistics import Estimate, Resampling, bootstrap, wilson

Measures = dict[str, Estimate]

_MAX_WORDS = 200
"""Words of an ideal answer that count in BioASQ."""


@dataclass(frozen=True)
class TaskResult:
    """A model's answers to the questions of a task, and their measures."""

    measures: Measures
    """Value and interval of each measure."""
    predictions: list[Prediction]
    """The answer to each question."""
    questions: int
    """Number of questions that the measures are of."""
    seconds: float
    """Time to answer, including the development questions of thresholds; 0 for a baseline."""
    answered: int
    """Number of questions answered in that time."""
    details: dict[str, Any] = field(default_factory=dict)
    """Confusion matrix, thresholds, batches and the like, as JSON values."""


def labelled_result(
    questions: Sequence[pubmedqa.Question] | Sequence[bioasq.Question],
    predicted: Sequence[str],
    resampling: Resampling,
    seconds: float = 0.0,
    answered: int = 0,
    details: Mapping[str, Any] = MappingProxyType({}),
    **columns: Any,
) -> TaskResult:
    """Return the result of questions that have one correct label.

    Accuracy has its Wilson interval and macro-F1 its bootstrap interval.

    Args:
      questions: questions with an `answer`.
      predicted: their predicted labels.
      resampling: of the intervals.
      seconds: time to answer; 0 for a baseline.
      answered: number of questions answered in that time.
      details: further details of the result.
      **columns: further fields of `Prediction`, one value a question.
    """
    if not questions:
        return TaskResult({}, [], 0, seconds, answered, dict(details))
    truth = [question.answer for question in questions]
    found = measures.classification(truth, predicted)
    classes = {label: values._asdict() for label, values in found.classes.items()}
    encoded = measures.encode(list(classes), truth, predicted)
    macro_f1 = partial(measures.macro_f1, classes=len(classes))
    return TaskResult(
        {
            "accuracy": wilson(round(found.accuracy * len(truth)), len(truth), resampling.confidence),
            "macro_f1": bootstrap(macro_f1, *encoded, resampling=resampling),
        },
        label_predictions([question.key for question in questions], truth, predicted, **columns),
        len(truth),
        seconds,
        answered,
        {"classes": classes, "confusion": found.confusion, **details},
    )


def _likeliest(
    scorer: Scorer,
    config: Any,
    questions: Sequence[Any],
    development: Sequence[Any],
    folds: Sequence[int] = (),
    normalize: Literal["none", "bytes"] = "none",
) -> tuple[list[str], list[dict[str, float]], dict[str, Any]]:
    """Return the likeliest answer to each question, every answer's score, and what a report says of thresholds.

    Args:
      scorer: the model.
      config: prompts, answers and thresholds of the task.
      questions: what to answer.
      development: the questions that thresholds are fitted on.
      folds: each development question's fold, to cross-validate thresholds.
      normalize: what scores are divided by.
    """
    labels, texts = list(config.answers), list(config.answers.values())

    def score(questions: Sequence[Any]) -> np.ndarray:
        return likelihood_scores(scorer, [question.prompt(config) for question in questions], texts, normalize)

    scores, offsets, details = score(questions), None, {}
    if config.thresholds != "none":
        tried, truth = score(development), [question.answer for question in development]
        (indices,) = measures.encode(labels, truth)
        offsets = answers.fit_offsets(tried, indices, config.thresholds)
        details["thresholds"] = {
            "offsets": dict(zip(labels, offsets.tolist(), strict=True)),
            "chosen_by": config.thresholds,
            "development_questions": len(truth),
        }
        if folds:
            held_out = [labels[i] for i in answers.cross_validated(tried, indices, folds, config.thresholds)]
            measured = measures.classification(truth, held_out)
            found = {"cross_validated_accuracy": measured.accuracy, "cross_validated_macro_f1": measured.macro_f1}
            details["thresholds"] |= found
    return [labels[index] for index in answers.choose(scores, offsets)], score_table(labels, scores), details


# --- PubMedQA ---


def read_pubmedqa(config: PubMedQAConfig, seed: int) -> tuple[pubmedqa.Split, dict[str, int]]:
    """Read the official split; if the config limits the questions, the test set is a sample that depends on the seed.

    Returns:
      The split, and the number of test questions that are left out, by reason.

    Raises:
      UserError: a file that cannot be read, is damaged or is of another release.
    """
    assert config.path is not None
    split = pubmedqa.official_split(pubmedqa.read_questions(config.path), config.test_ids, config.path)
    chosen = pubmedqa.stratified_sample(split.test, config.max_questions or len(split.test), seed)
    left_out = len(split.test) - len(chosen)
    return split._replace(test=chosen), {"not in the sample": left_out} if left_out else {}


def pubmedqa_majority(split: pubmedqa.Split, resampling: Resampling) -> TaskResult:
    """Return the result of always giving the most frequent answer of the development questions."""
    label = mode(question.answer for question in split.development)
    return labelled_result(split.test, [label] * len(split.test), resampling, details={"answer": label})


def answer_pubmedqa(
    scorer: Scorer, config: PubMedQAConfig, split: pubmedqa.Split, resampling: Resampling
) -> TaskResult:
    """Answer the test questions.

    Args:
      scorer: the model.
      config: prompt, answers, method and thresholds.
      split: test questions, and the development folds that thresholds are fitted on.
      resampling: of the intervals.

    Raises:
      UserError: log-likelihoods are NaN, or the model cannot generate.
    """
    start, questions = time.perf_counter(), split.test
    columns: dict[str, Any] = {}
    details: dict[str, Any] = {}
    development = split.development if config.thresholds != "none" else []
    if config.method == "generation":
        prompts = [question.prompt(config) for question in questions]
        columns["text"] = scorer.generate(prompts, config.max_new_tokens, ["\n"])
        predicted = [answers.read_label(text, list(config.answers)) for text in columns["text"]]
    else:
        folds = [number for number, fold in enumerate(split.folds) for _ in fold]
        predicted, columns["scores"], details = _likeliest(
            scorer, config, questions, development, folds, config.normalize
        )
    seconds, answered = time.perf_counter() - start, len(questions) + len(development)
    return labelled_result(questions, predicted, resampling, seconds, answered, details, **columns)


# --- BioASQ ---

Questions = Sequence[bioasq.Question]


def read_bioasq(config: BioASQConfig, paths: Sequence[str]) -> tuple[list[bioasq.Question], dict[str, int]]:
    """Read the questions of golden files that have a golden answer and are of one of `config.types`.

    Returns:
      These questions, and the number of those that are left out, by reason.

    Raises:
      UserError: a damaged file, or files without such a question.
    """
    kept, left_out = [], Counter[str]()
    for question in (question for path in paths for question in bioasq.read_questions(path)):
        if question.kind not in config.types:
            left_out[question.kind] += 1
        elif not (question.ideal_answers if question.kind == "summary" else question.golden):
            left_out["without a golden answer"] += 1
        else:
            kept.append(question)
    if not kept:
        kinds = ", ".join(config.types)
        raise UserError(f"{', '.join(paths)}: no question of bioasq.types ({kinds}) with a golden answer; give others")
    return kept, dict(left_out)


def bioasq_majority(questions: Questions, resampling: Resampling) -> TaskResult:
    """Return the result of always answering yes, the most frequent answer in BioASQ, and naming nothing."""
    given = {question: ["yes"] if question.kind == "yesno" else [] for question in questions}
    return _bioasq_result(questions, given, {}, resampling, 0.0, {"answer": "yes"})


def answer_bioasq(
    scorer: Scorer, config: BioASQConfig, questions: Questions, development: Questions, resampling: Resampling
) -> TaskResult:
    """Answer the questions: yes/no by likelihood or in generated text, names in generated text or by spans.

    Args:
      scorer: the model.
      config: prompts, answers, method and thresholds.
      questions: questions of all files.
      development: questions that thresholds are fitted on.
      resampling: of the intervals.

    Raises:
      UserError: log-likelihoods are NaN, the model cannot generate, or thresholds lack a yes/no question to fit on.
    """
    start = time.perf_counter()
    details: dict[str, Any] = {}
    extras: dict[bioasq.Question, dict[str, Any]] = {}
    given: dict[bioasq.Question, list[str]] = {}

    yesno = [question for question in questions if question.kind == "yesno" and config.method == "likelihood"]
    if yesno:
        known = [question for question in development if question.kind == "yesno"]
        if config.thresholds != "none" and not known:
            raise UserError("bioasq.development: has no yes/no question to fit thresholds on; give other files")
        chosen, table, details = _likeliest(scorer, config, yesno, known)
        for question, label, row in zip(yesno, chosen, table, strict=True):
            given[question], extras[question] = [label], {"scores": row}
    if isinstance(scorer, SpanScorer):
        for question in (question for question in questions if question.kind == "factoid"):
            given[question] = scorer.spans(question.question, question.snippets[: config.max_snippets])
    rest = [question for question in questions if question not in given]
    for longest, kinds in (
        (config.max_new_tokens, ("yesno", "factoid", "list")),
        (config.max_summary_tokens, ("summary",)),
    ):
        generated = [question for question in rest if question.kind in kinds]
        texts = scorer.generate([q.prompt(config) for q in generated], longest, ["\n"]) if generated else []
        for question, text in zip(generated, texts, strict=True):
            given[question] = answers.read_names(text) if question.kind in ("factoid", "list") else [text]
            extras[question] = {"text": text}
    return _bioasq_result(questions, given, extras, resampling, time.perf_counter() - start, details)


def bioasq_measures(pairs: Sequence[tuple[bioasq.Question, list[str]]], resampling: Resampling) -> Measures:
    """Return the official measures of (question, answer) pairs, for each kind of question that occurs."""
    found: Measures = {}
    if yesno := [(q.answer, "".join(answer)) for q, answer in pairs if q.kind == "yesno"]:
        truth, given = zip(*yesno, strict=True)
        official = measures.yesno(truth, given)
        columns = measures.encode(("yes", "no"), truth, measures.yesno_predictions(truth, given))
        found["yesno_accuracy"] = wilson(round(official["accuracy"] * len(truth)), len(truth), resampling.confidence)
        found["yesno_macro_f1"] = bootstrap(partial(measures.macro_f1, classes=2), *columns, resampling=resampling)
        found["yesno_f1_yes"], found["yesno_f1_no"] = Estimate(official["f1_yes"]), Estimate(official["f1_no"])
    if factoids := [measures.factoid(q.golden, answer) for q, answer in pairs if q.kind == "factoid"]:
        for name in ("strict", "lenient"):
            correct = int(sum(getattr(each, name) for each in factoids))
            found[f"factoid_{name}_accuracy"] = wilson(correct, len(factoids), resampling.confidence)
        ranks = np.array([each.reciprocal_rank for each in factoids])
        found["factoid_mrr"] = bootstrap(np.mean, ranks, resampling=resampling)
    if lists := [measures.list_measures(q.golden, answer) for q, answer in pairs if q.kind == "list"]:
        for name, values in zip(measures.ListMeasures._fields, np.array(lists).T, strict=True):
            found[f"list_{name}"] = bootstrap(np.mean, values, resampling=resampling)
    summaries = [
        (q.ideal_answers, " ".join("".join(answer).split()[:_MAX_WORDS])) for q, answer in pairs if q.kind == "summary"
    ]
    for name, rouge in (("rouge_2", measures.rouge_2), ("rouge_su4", measures.rouge_su4)) if summaries else ():
        for part, values in zip(measures.Rouge._fields, np.array([rouge(*each) for each in summaries]).T, strict=True):
            found[f"summary_{name}_{part}"] = bootstrap(np.mean, values, resampling=resampling)
    return found


def _bioasq_result(
    questions: Questions,
    given: dict[bioasq.Question, list[str]],
    extras: dict[bioasq.Question, dict[str, Any]],
    resampling: Resampling,
    seconds: float,
    details: dict[str, Any],
) -> TaskResult:
    pairs = [(question, given[question]) for question in questions]
    batches: dict[str, list[tuple[bioasq.Question, list[str]]]] = {}
    for question, answer in pairs:
        batches.setdefault(question.batch, []).append((question, answer))
    counts = Counter(question.kind for question in questions)
    by_batch = {batch: bioasq_measures(of_batch, resampling) for batch, of_batch in batches.items()}
    return TaskResult(
        bioasq_measures(pairs, resampling),
        [_bioasq_prediction(question, answer, extras.get(question, {})) for question, answer in pairs],
        len(pairs),
        seconds,
        len(pairs) if seconds else 0,
        {"questions_by_kind": dict(counts), "batches": by_batch} | details,
    )


def _bioasq_prediction(question: bioasq.Question, answer: list[str], extra: dict[str, Any]) -> Prediction:
    if question.kind == "yesno":
        read = measures.read_yesno("".join(answer))
        return Prediction(question.key, question.answer, read, question.answer == read, batch=question.batch, **extra)
    if question.kind == "summary":
        return Prediction(question.key, [[*question.ideal_answers]], answer, None, batch=question.batch, **extra)
    golden = [list(synonyms) for synonyms in question.golden]
    correct = bool(measures.factoid(question.golden, answer).strict) if question.kind == "factoid" else None
    return Prediction(question.key, golden, answer, correct, batch=question.batch, **extra)


def shared_correctness(first: TaskResult, second: TaskResult) -> tuple[list[bool], list[bool]]:
    """Return the correctness of two models' answers to the questions that have a correct or incorrect answer."""
    pairs = [
        (a.correct, b.correct)
        for a, b in zip(first.predictions, second.predictions, strict=True)
        if a.correct is not None and b.correct is not None
    ]
    return [a for a, _ in pairs], [b for _, b in pairs]
