"""PubMedQA and BioASQ answered by one model, and what the official measures make of the answers."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from biomamba_jax.config import BioASQConfig, PubMedQAConfig
from biomamba_jax.errors import UserError
from biomamba_jax.tasks import bioasq, measures, pubmedqa
from biomamba_jax.tasks.answers import (
    Prediction,
    choose,
    cross_validated,
    fit_offsets,
    likelihood_scores,
    read_label,
    read_names,
)
from biomamba_jax.tasks.scoring import Scorer
from biomamba_jax.tasks.statistics import Estimate, Resampling, bootstrap, mean, wilson

Measures = dict[str, Estimate]


@dataclass(frozen=True)
class TaskResult:
    """A model's answers to the questions of a task."""

    measures: Measures
    predictions: list[Prediction]
    questions: int
    seconds: float
    """What answering took, thresholds' development questions included; 0 for a baseline."""
    answered: int
    """Questions answered in that time."""
    details: dict[str, Any] = field(default_factory=dict)
    """Confusion, thresholds, batches: whatever else there is to say, as JSON has it."""


def classification_measures(truth: Sequence[str], predicted: Sequence[str], resampling: Resampling) -> Measures:
    """Accuracy with Wilson's interval, macro F1 with that of the bootstrap."""
    right = sum(t == p for t, p in zip(truth, predicted, strict=True))
    labels = list(dict.fromkeys([*truth, *predicted]))
    columns = measures.encode(labels, truth, predicted)

    def macro_f1(truth: np.ndarray, predicted: np.ndarray, axis: int = -1) -> np.ndarray:
        return measures.macro_f1(truth, predicted, len(labels))

    return {
        "accuracy": wilson(right, len(truth), resampling.confidence),
        "macro_f1": bootstrap(macro_f1, *columns, resampling=resampling),
    }


# --- PubMedQA ---


def read_pubmedqa(config: PubMedQAConfig) -> pubmedqa.Split:
    """The test set, shortened if the config says so, and the development folds."""
    assert config.path is not None
    split = pubmedqa.official_split(pubmedqa.read_questions(config.path), config.test_ids)
    return split._replace(test=split.test[: config.max_questions])


def pubmedqa_majority(split: pubmedqa.Split, resampling: Resampling) -> TaskResult:
    """Always the answer that most development questions have."""
    ((label, _),) = Counter(question.answer for question in split.development).most_common(1)
    return _pubmedqa_result(split.test, [label] * len(split.test), resampling, 0.0, 0, {"answer": label})


def answer_pubmedqa(
    scorer: Scorer, config: PubMedQAConfig, split: pubmedqa.Split, resampling: Resampling
) -> TaskResult:
    """Answers the test questions as `config` says."""
    labels, start = list(config.answers), time.perf_counter()

    def prompts(questions: Sequence[pubmedqa.Question]) -> list[str]:
        return [config.prompt.format(question=q.question, context=q.context) for q in questions]

    if config.method == "generation":
        texts = scorer.generate(prompts(split.test), config.max_new_tokens, ["\n"])
        predicted = [read_label(text, labels) for text in texts]
        seconds = time.perf_counter() - start
        return _pubmedqa_result(split.test, predicted, resampling, seconds, len(texts), texts=texts)

    def score(questions: Sequence[pubmedqa.Question]) -> np.ndarray:
        return likelihood_scores(scorer, prompts(questions), list(config.answers.values()), config.normalize)

    scores, offsets, details, answered = score(split.test), None, {}, len(split.test)
    if config.thresholds != "none":
        development = split.development
        on_development = score(development)
        truth = measures.encode(labels, [question.answer for question in development])[0]
        ends = np.cumsum([len(fold) for fold in split.folds])
        folds = [range(end - len(fold), end) for fold, end in zip(split.folds, ends.tolist(), strict=True)]
        offsets = fit_offsets(on_development, truth, config.thresholds)
        held_out = cross_validated(on_development, truth, folds, config.thresholds)
        tried = measures.classification([labels[i] for i in truth], [labels[i] for i in held_out])
        answered += len(development)
        details["thresholds"] = {
            "offsets": dict(zip(labels, offsets.tolist(), strict=True)),
            "chosen_by": config.thresholds,
            "development_questions": len(development),
            "cross_validated_accuracy": tried.accuracy,
            "cross_validated_macro_f1": tried.macro_f1,
        }
    predicted = [labels[place] for place in choose(scores, offsets)]
    seconds = time.perf_counter() - start
    return _pubmedqa_result(split.test, predicted, resampling, seconds, answered, details, labels=labels, scores=scores)


def _pubmedqa_result(
    questions: Sequence[pubmedqa.Question],
    predicted: Sequence[str],
    resampling: Resampling,
    seconds: float,
    answered: int,
    details: dict[str, Any] | None = None,
    texts: Sequence[str] | None = None,
    labels: Sequence[str] = (),
    scores: np.ndarray | None = None,
) -> TaskResult:
    truth = [question.answer for question in questions]
    found = measures.classification(truth, predicted)
    predictions = [
        Prediction(
            question.key,
            question.answer,
            answer,
            question.answer == answer,
            scores=None if scores is None else dict(zip(labels, scores[index].tolist(), strict=True)),
            text=None if texts is None else texts[index],
        )
        for index, (question, answer) in enumerate(zip(questions, predicted, strict=True))
    ]
    classes = {label: values._asdict() for label, values in found.classes.items()}
    return TaskResult(
        classification_measures(truth, predicted, resampling),
        predictions,
        len(truth),
        seconds,
        answered,
        {"classes": classes, "confusion": found.confusion} | (details or {}),
    )


# --- BioASQ ---

Batches = dict[str, list[bioasq.Question]]


def read_bioasq(config: BioASQConfig, paths: Sequence[str]) -> Batches:
    """The questions of each file that have a golden answer and are of a kind that is asked for.

    Raises:
      UserError: a broken file, or files without such a question.
    """
    batches = {path: [q for q in bioasq.read_questions(path) if q.kind in config.types and q.golden] for path in paths}
    if not any(batches.values()):
        kinds = ", ".join(config.types)
        raise UserError(f"{', '.join(paths)}: no question of bioasq.types ({kinds}) with a golden answer; give others")
    return batches


def bioasq_majority(batches: Batches, resampling: Resampling) -> TaskResult:
    """Always yes, which most questions of BioASQ have as their answer, and no names."""
    answers = {path: [["yes"] if q.kind == "yesno" else [] for q in questions] for path, questions in batches.items()}
    return _bioasq_result(batches, answers, {}, resampling, 0.0, {"answer": "yes"})


def answer_bioasq(
    scorer: Scorer, config: BioASQConfig, batches: Batches, development: Batches, resampling: Resampling
) -> TaskResult:
    """Answers the questions as `config` says: yes/no by likelihood or in text, names in text."""
    start, labels = time.perf_counter(), list(config.answers)
    extras: dict[bioasq.Question, dict[str, Any]] = {}
    details: dict[str, Any] = {}
    answers: dict[bioasq.Question, list[str]] = {}
    every = [question for questions in batches.values() for question in questions]
    yesno = [question for question in every if question.kind == "yesno"]
    names = [question for question in every if question.kind != "yesno"]
    if yesno and config.method == "likelihood":
        scores = _yesno_scores(scorer, config, yesno)
        offsets = None
        if config.thresholds != "none":
            known = [q for questions in development.values() for q in questions if q.kind == "yesno"]
            if not known:
                raise UserError("bioasq.development: holds no yes/no question to fit thresholds on")
            (truth,) = measures.encode(labels, [question.golden[0][0] for question in known])
            offsets = fit_offsets(_yesno_scores(scorer, config, known), truth, config.thresholds)
            fitted = {"offsets": dict(zip(labels, offsets.tolist(), strict=True)), "chosen_by": config.thresholds}
            details["thresholds"] = fitted | {"development_questions": len(known)}
        for question, place, row in zip(yesno, choose(scores, offsets), scores.tolist(), strict=True):
            answers[question] = [labels[place]]
            extras[question] = {"scores": dict(zip(labels, row, strict=True))}
        asked = names
    else:
        asked = every
    if asked:
        texts = scorer.generate([_prompt(config, q) for q in asked], config.max_new_tokens, ["\n"])
        for question, text in zip(asked, texts, strict=True):
            answers[question] = [text] if question.kind == "yesno" else read_names(text)
            extras[question] = {"text": text}
    given = {path: [answers[question] for question in questions] for path, questions in batches.items()}
    seconds = time.perf_counter() - start
    return _bioasq_result(batches, given, extras, resampling, seconds, details)


def _prompt(config: BioASQConfig, question: bioasq.Question) -> str:
    templates = {"yesno": config.yesno_prompt, "factoid": config.factoid_prompt, "list": config.list_prompt}
    return templates[question.kind].format(question=question.question, context=question.context(config.max_snippets))


def _yesno_scores(scorer: Scorer, config: BioASQConfig, questions: Sequence[bioasq.Question]) -> np.ndarray:
    prompts = [_prompt(config, question) for question in questions]
    return likelihood_scores(scorer, prompts, list(config.answers.values()), "none")


def bioasq_measures(pairs: Sequence[tuple[bioasq.Question, list[str]]], resampling: Resampling) -> Measures:
    """The official measures of questions and answers, those of each kind that occurs."""
    found: Measures = {}
    if yesno := [(q.golden[0][0], "".join(answer)) for q, answer in pairs if q.kind == "yesno"]:
        truth, given = zip(*yesno, strict=True)
        official = measures.yesno(truth, given)
        # As the official program counts: what is neither yes nor no is the wrong one of the two.
        wrong = {"yes": "no", "no": "yes"}
        read = [t if measures.read_yesno(g) == t else wrong[t] for t, g in yesno]
        columns = measures.encode(("yes", "no"), truth, read)

        def macro_f1(truth: np.ndarray, read: np.ndarray, axis: int = -1) -> np.ndarray:
            return measures.macro_f1(truth, read, 2)

        found["yesno_accuracy"] = wilson(round(official["accuracy"] * len(truth)), len(truth), resampling.confidence)
        found["yesno_macro_f1"] = bootstrap(macro_f1, *columns, resampling=resampling)
        found["yesno_f1_yes"], found["yesno_f1_no"] = Estimate(official["f1_yes"]), Estimate(official["f1_no"])
    if factoids := [measures.factoid(q.golden, answer) for q, answer in pairs if q.kind == "factoid"]:
        for name in ("strict", "lenient"):
            right = int(sum(getattr(each, name) for each in factoids))
            found[f"factoid_{name}_accuracy"] = wilson(right, len(factoids), resampling.confidence)
        ranks = np.array([each.reciprocal_rank for each in factoids])
        found["factoid_mrr"] = bootstrap(mean, ranks, resampling=resampling)
    if lists := [measures.list_measures(q.golden, answer) for q, answer in pairs if q.kind == "list"]:
        for name in ("precision", "recall", "f1"):
            values = np.array([getattr(each, name) for each in lists])
            found[f"list_{name}"] = bootstrap(mean, values, resampling=resampling)
    return found


def _bioasq_result(
    batches: Batches,
    answers: dict[str, list[list[str]]],
    extras: dict[bioasq.Question, dict[str, Any]],
    resampling: Resampling,
    seconds: float,
    details: dict[str, Any],
) -> TaskResult:
    pairs = {path: list(zip(questions, answers[path], strict=True)) for path, questions in batches.items()}
    pooled = [pair for of_batch in pairs.values() for pair in of_batch]
    predictions = [
        _bioasq_prediction(path, question, answer, extras.get(question, {}))
        for path, of_batch in pairs.items()
        for question, answer in of_batch
    ]
    of_batches = {path: bioasq_measures(of_batch, resampling) for path, of_batch in pairs.items() if of_batch}
    counts = Counter(question.kind for question, _ in pooled)
    return TaskResult(
        bioasq_measures(pooled, resampling),
        predictions,
        len(pooled),
        seconds,
        len(pooled) if seconds else 0,
        {"questions_by_kind": dict(counts), "batches": of_batches} | details,
    )


def _bioasq_prediction(path: str, question: bioasq.Question, answer: list[str], extra: dict[str, Any]) -> Prediction:
    if question.kind == "yesno":
        truth, read = question.golden[0][0], measures.read_yesno("".join(answer))
        return Prediction(question.key, truth, read, truth == read, batch=path, **extra)
    golden = [list(synonyms) for synonyms in question.golden]
    correct = bool(measures.factoid(question.golden, answer).strict) if question.kind == "factoid" else None
    return Prediction(question.key, golden, answer, correct, batch=path, **extra)


def shared_correctness(first: TaskResult, second: TaskResult) -> tuple[list[bool], list[bool]]:
    """Whether each of two models is right, on the questions whose answers are simply right or wrong."""
    pairs = [
        (a.correct, b.correct)
        for a, b in zip(first.predictions, second.predictions, strict=True)
        if a.correct is not None and b.correct is not None
    ]
    return [a for a, _ in pairs], [b for _, b in pairs]
