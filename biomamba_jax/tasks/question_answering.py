"""PubMedQA and BioASQ answered by one model, scored with the official measures."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from biomamba_jax.config import BioASQConfig, PubMedQAConfig
from biomamba_jax.errors import UserError
from biomamba_jax.tasks import answers, bioasq, measures, pubmedqa
from biomamba_jax.tasks.answers import Prediction, label_predictions, likelihood_scores, score_table
from biomamba_jax.tasks.prompts import bioasq_prompt, pubmedqa_prompt
from biomamba_jax.tasks.scoring import Scorer
from biomamba_jax.tasks.statistics import Estimate, Resampling, bootstrap, wilson

Measures = dict[str, Estimate]


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


def classification_measures(truth: Sequence[str], predicted: Sequence[str], resampling: Resampling) -> Measures:
    """Return accuracy with its Wilson interval and macro-F1 with its bootstrap interval."""
    correct = sum(t == p for t, p in zip(truth, predicted, strict=True))
    labels = list(dict.fromkeys([*truth, *predicted]))
    columns = measures.encode(labels, truth, predicted)
    return {
        "accuracy": wilson(correct, len(truth), resampling.confidence),
        "macro_f1": bootstrap(partial(measures.macro_f1, classes=len(labels)), *columns, resampling=resampling),
    }


def _fit_thresholds(
    labels: Sequence[str],
    scores: np.ndarray,
    truth: Sequence[str],
    objective: answers.Objective,
    folds: Sequence[Sequence[int]] = (),
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return offsets fitted on development questions, and what a report says of them."""
    (indices,) = measures.encode(labels, truth)
    offsets = answers.fit_offsets(scores, indices, objective)
    details: dict[str, Any] = {
        "offsets": dict(zip(labels, offsets.tolist(), strict=True)),
        "chosen_by": objective,
        "development_questions": len(truth),
    }
    if folds:
        held_out = [labels[index] for index in answers.cross_validated(scores, indices, folds, objective)]
        found = measures.classification(truth, held_out)
        details |= {"cross_validated_accuracy": found.accuracy, "cross_validated_macro_f1": found.macro_f1}
    return offsets, details


# --- PubMedQA ---


def read_pubmedqa(config: PubMedQAConfig) -> pubmedqa.Split:
    """Read the official split; its test set is shortened if the config says so.

    Raises:
      UserError: a file that cannot be read, is damaged or is of another release.
    """
    assert config.path is not None
    split = pubmedqa.official_split(pubmedqa.read_questions(config.path), config.test_ids)
    return split._replace(test=split.test[: config.max_questions])


def pubmedqa_majority(split: pubmedqa.Split, resampling: Resampling) -> TaskResult:
    """Return the result of always giving the most frequent answer of the development questions."""
    ((label, _),) = Counter(question.answer for question in split.development).most_common(1)
    return _pubmedqa_result(split.test, [label] * len(split.test), resampling, 0.0, 0, {"answer": label})


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
    labels, start = list(config.answers), time.perf_counter()
    if config.method == "generation":
        prompts = [pubmedqa_prompt(config, question) for question in split.test]
        texts = scorer.generate(prompts, config.max_new_tokens, ["\n"])
        predicted = [answers.read_label(text, labels) for text in texts]
        seconds = time.perf_counter() - start
        return _pubmedqa_result(split.test, predicted, resampling, seconds, len(texts), text=texts)

    def score(questions: Sequence[pubmedqa.Question]) -> np.ndarray:
        prompts = [pubmedqa_prompt(config, question) for question in questions]
        return likelihood_scores(scorer, prompts, list(config.answers.values()), config.normalize)

    scores, offsets, details, answered = score(split.test), None, {}, len(split.test)
    if config.thresholds != "none":
        ends = np.cumsum([len(fold) for fold in split.folds]).tolist()
        folds = [range(end - len(fold), end) for fold, end in zip(split.folds, ends, strict=True)]
        truth = [question.answer for question in split.development]
        offsets, fitted = _fit_thresholds(labels, score(split.development), truth, config.thresholds, folds)
        details["thresholds"] = fitted
        answered += len(truth)
    predicted = [labels[index] for index in answers.choose(scores, offsets)]
    seconds, table = time.perf_counter() - start, score_table(labels, scores)
    return _pubmedqa_result(split.test, predicted, resampling, seconds, answered, details, scores=table)


def _pubmedqa_result(
    questions: Sequence[pubmedqa.Question],
    predicted: Sequence[str],
    resampling: Resampling,
    seconds: float,
    answered: int,
    details: dict[str, Any] | None = None,
    **columns: Any,
) -> TaskResult:
    truth = [question.answer for question in questions]
    found = measures.classification(truth, predicted)
    classes = {label: values._asdict() for label, values in found.classes.items()}
    return TaskResult(
        classification_measures(truth, predicted, resampling),
        label_predictions([question.key for question in questions], truth, predicted, **columns),
        len(truth),
        seconds,
        answered,
        {"classes": classes, "confusion": found.confusion} | (details or {}),
    )


# --- BioASQ ---

Questions = Sequence[bioasq.Question]


def read_bioasq(config: BioASQConfig, paths: Sequence[str]) -> list[bioasq.Question]:
    """Read the questions of golden files that have a golden answer and are of one of `config.types`.

    Raises:
      UserError: a damaged file, or files without such a question.
    """
    questions = [q for path in paths for q in bioasq.read_questions(path) if q.kind in config.types and q.golden]
    if not questions:
        kinds = ", ".join(config.types)
        raise UserError(f"{', '.join(paths)}: no question of bioasq.types ({kinds}) with a golden answer; give others")
    return questions


def bioasq_majority(questions: Questions, resampling: Resampling) -> TaskResult:
    """Return the result of always answering yes, the most frequent answer in BioASQ, and naming nothing."""
    given = {question: ["yes"] if question.kind == "yesno" else [] for question in questions}
    return _bioasq_result(questions, given, {}, resampling, 0.0, {"answer": "yes"})


def answer_bioasq(
    scorer: Scorer, config: BioASQConfig, questions: Questions, development: Questions, resampling: Resampling
) -> TaskResult:
    """Answer the questions: yes/no by likelihood or in generated text, names in generated text.

    Args:
      scorer: the model.
      config: prompts, answers, method and thresholds.
      questions: questions of all files.
      development: questions that thresholds are fitted on.
      resampling: of the intervals.

    Raises:
      UserError: log-likelihoods are NaN, the model cannot generate, or thresholds lack a yes/no question to fit on.
    """
    start, labels = time.perf_counter(), list(config.answers)
    extras: dict[bioasq.Question, dict[str, Any]] = {}
    details: dict[str, Any] = {}
    given: dict[bioasq.Question, list[str]] = {}

    def score(questions: Questions) -> np.ndarray:
        prompts = [bioasq_prompt(config, question) for question in questions]
        return likelihood_scores(scorer, prompts, list(config.answers.values()))

    yesno = [question for question in questions if question.kind == "yesno" and config.method == "likelihood"]
    if yesno:
        scores, offsets = score(yesno), None
        if config.thresholds != "none":
            known = [question for question in development if question.kind == "yesno"]
            if not known:
                raise UserError("bioasq.development: has no yes/no question to fit thresholds on; give other files")
            truth = [question.golden[0][0] for question in known]
            offsets, details["thresholds"] = _fit_thresholds(labels, score(known), truth, config.thresholds)
        chosen, table = answers.choose(scores, offsets), score_table(labels, scores)
        for question, index, row in zip(yesno, chosen, table, strict=True):
            given[question], extras[question] = [labels[index]], {"scores": row}
    if generated := [question for question in questions if question not in given]:
        prompts = [bioasq_prompt(config, question) for question in generated]
        texts = scorer.generate(prompts, config.max_new_tokens, ["\n"])
        for question, text in zip(generated, texts, strict=True):
            given[question] = [text] if question.kind == "yesno" else answers.read_names(text)
            extras[question] = {"text": text}
    return _bioasq_result(questions, given, extras, resampling, time.perf_counter() - start, details)


def bioasq_measures(pairs: Sequence[tuple[bioasq.Question, list[str]]], resampling: Resampling) -> Measures:
    """Return the official measures of (question, answer) pairs, for each kind of question that occurs."""
    found: Measures = {}
    if yesno := [(q.golden[0][0], "".join(answer)) for q, answer in pairs if q.kind == "yesno"]:
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
        truth, read = question.golden[0][0], measures.read_yesno("".join(answer))
        return Prediction(question.key, truth, read, truth == read, batch=question.batch, **extra)
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
