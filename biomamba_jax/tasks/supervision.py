"""Question answering and text mining as supervised examples, with the prompts that `evaluate` uses; predictions.

Each task is split into examples to train on, to stop early by (development) and, where there are any, to test on.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from biomamba_jax.config import BioASQConfig, ExamplesConfig, FinetuneConfig, PubMedQAConfig, RowsConfig
from biomamba_jax.config.checks import check
from biomamba_jax.config.evaluate import QuestionKind
from biomamba_jax.data.annotation_files import read_annotated
from biomamba_jax.data.annotations import AnnotatedText, Relation, check_splits, describe, tag_names
from biomamba_jax.data.examples import Example, held_out_share, read_examples
from biomamba_jax.errors import UserError
from biomamba_jax.tasks import bioasq, pubmedqa
from biomamba_jax.tasks.answers import Prediction, label_predictions, likelihood_scores, score_table
from biomamba_jax.tasks.measures import classification
from biomamba_jax.tasks.model import Model
from biomamba_jax.tasks.native_scorer import NativeScorer
from biomamba_jax.tasks.question_answering import read_bioasq
from biomamba_jax.tasks.relations import NO_RELATION, candidates

_MAX_NEW_TOKENS = 64
_PROMPT = attrgetter("prompt")


@dataclass(frozen=True)
class SupervisedTask:
    """Examples of one source."""

    name: str
    """The task's name in results and file names."""
    train: list[Any]
    """Examples to train on: `Example` for the language model's head, `AnnotatedText` for another one."""
    development: list[Any]
    """Examples to stop early by."""
    test: list[Any] = field(default_factory=list)
    """Examples to predict with the final weights."""
    answers: Mapping[str, str] = field(default_factory=dict)
    """Text of each class after a prompt; {} if answers are free text."""
    relations: Mapping[str, set[Relation]] = field(default_factory=dict)
    """Relations of each document of development and test split, by its key, if the examples are candidates."""
    messages: Sequence[str] = ()
    """Lines about the data for the log."""


def read_tasks(config: FinetuneConfig) -> list[SupervisedTask]:
    """Read the tasks that `config` names.

    Raises:
      UserError: a file that cannot be read or is of another kind.
    """
    fraction, annotated = config.data.development_fraction, config.data.format != "examples"
    tasks = [(_annotated if annotated else _json_lines)(config.data)] if config.data.files else []
    of_questions = [_pubmedqa(config.pubmedqa, config.fold, fraction)] if config.pubmedqa.path else []
    of_questions += _bioasq(config.bioasq, fraction) if config.bioasq.path else []
    if config.head == "language_model":
        return tasks + of_questions
    return [task if annotated else _for_head(task) for task in tasks] + [_for_head(task) for task in of_questions]


def _for_head(task: SupervisedTask) -> SupervisedTask:
    """Return the task with its prompts as texts, whose class is the label."""

    def texts(examples: Sequence[Example]) -> list[AnnotatedText]:
        return [AnnotatedText(each.key, each.prompt, labels=(each.label,)) for each in examples]

    return dataclasses.replace(
        task, train=texts(task.train), development=texts(task.development), test=texts(task.test)
    )


def _annotated(config: ExamplesConfig) -> SupervisedTask:
    """Read annotated texts, say what cannot be learnt of them, and make candidates of documents with relations."""
    files = {"train": config.files, "development": config.development, "test": config.test}
    texts = {split: [text for path in paths for text in read_annotated(path, config)] for split, paths in files.items()}
    if unknown := set(config.types) - {span.type for text in texts["train"] for span in text.spans}:
        raise UserError(
            f"data.types: no span of the training split is of type {', '.join(sorted(unknown))}; correct it"
        )
    messages = [line for split in texts for line in describe(texts[split], f"{split} split")]
    if not config.development:
        fraction = config.development_fraction
        texts["train"], texts["development"] = held_out_share(texts["train"], fraction, lambda text: text.text)
    messages += check_splits(files, texts)
    relations: dict[str, set[Relation]] = {}
    if config.relation:
        held_out = [*texts["development"], *texts["test"]]
        relations = {text.key: {r for r in text.relations if r.type == config.relation} for text in held_out}
        pairs = {
            split: [pair for text in own for pair in candidates(text, config.relation, config.pair)]
            for split, own in texts.items()
        }
        messages += [
            f"{split} split: {len(own):,} pairs in {len(texts[split]):,} texts" for split, own in pairs.items()
        ]
        texts = pairs
    train, development, test = texts.values()
    return SupervisedTask(config.format, train, development, test, relations=relations, messages=messages)


def _json_lines(config: ExamplesConfig) -> SupervisedTask:
    def read(files: Sequence[str]) -> list[Example]:
        return [example for path in files for example in read_examples(path, config.prompt, config.answer)]

    train, development = read(config.files), read(config.development)
    if not config.development:
        train, development = held_out_share(train, config.development_fraction, _PROMPT)
    test = read(config.test)
    return SupervisedTask("examples", train, development, test, messages=_shared(train, development, test))


def _shared(train: Sequence[Example], development: Sequence[Example], test: Sequence[Example] = ()) -> list[str]:
    """Return a line for each two splits that share prompts."""
    splits = {"training": train, "development": development, "test": test}
    prompts = {name: {example.prompt for example in examples} for name, examples in splits.items()}
    pairs = itertools.combinations(prompts, 2)
    counts = {(one, other): len(prompts[one] & prompts[other]) for one, other in pairs}
    return [
        f"{count:,} prompts of the {other} split are also in the {one} split"
        for (one, other), count in counts.items()
        if count
    ]


def _pubmedqa(config: PubMedQAConfig, fold: int, development_fraction: float) -> SupervisedTask:
    """Split PubMedQA.

    The labelled questions (PQA-L) have the authors' folds and test set. The artificial ones (PQA-A: ori_pqaa.json),
    whose answer is never maybe, are all training examples except for a development share.
    """
    assert config.path is not None

    def examples(questions: Sequence[pubmedqa.Question]) -> list[Example]:
        return [Example(q.prompt(config), config.answers[q.answer], q.answer, q.key) for q in questions]

    questions = pubmedqa.read_questions(config.path)
    if not any(question.answer == "maybe" for question in questions):
        train, development = held_out_share(examples(questions), development_fraction, _PROMPT)
        return SupervisedTask("pubmedqa", train, development, answers=config.answers)
    split = pubmedqa.official_split(questions, config.test_ids, config.path)
    rest = [question for index, part in enumerate(split.folds) if index != fold for question in part]
    return SupervisedTask("pubmedqa", examples(rest), examples(split.folds[fold]), examples(split.test), config.answers)


def _bioasq(config: BioASQConfig, development_fraction: float) -> list[SupervisedTask]:
    """Return a task of yes/no questions and one of all others, whose answers are the first synonym of each name."""

    def example(question: bioasq.Question) -> Example:
        label = "; ".join(synonyms[0] for synonyms in question.golden)
        text = config.answers[label] if question.kind == "yesno" else f" {label}"
        return Example(question.prompt(config), text, label, question.key)

    types: list[QuestionKind] = [kind for kind in config.types if kind != "summary"]
    check(types, "bioasq.types", config.types, "give yesno, factoid or list; summaries are not trained on")
    config = dataclasses.replace(config, types=types)
    asked, left_out = read_bioasq(config, config.path)
    held_out, others = read_bioasq(config, config.development) if config.development else ([], {})
    tasks = []
    for name, kinds, answers in (
        ("bioasq-yesno", ("yesno",), config.answers),
        ("bioasq-names", ("factoid", "list"), {}),
    ):
        train, development = (
            [example(each) for each in questions if each.kind in kinds] for questions in (asked, held_out)
        )
        if not config.development:
            train, development = held_out_share(train, development_fraction, _PROMPT)
        if train or development:
            messages = _shared(train, development)
            tasks.append(SupervisedTask(name, train, development, answers=answers, messages=messages))
    if counts := Counter(left_out) + Counter(others):
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in counts.items())
        messages = [*tasks[0].messages, f"bioasq: questions left out: {reasons}"]
        tasks[0] = dataclasses.replace(tasks[0], messages=messages)
    return tasks


def predict(model: Model, task: SupervisedTask, examples: Sequence[Example], rows: RowsConfig) -> list[Prediction]:
    """Predict the answer of each example: the most likely one of the task, or text up to a line end if it is free.

    Args:
      model: the fine-tuned model.
      task: the examples' task.
      examples: what to predict.
      rows: shape of the batches.
    """
    prompts = [example.prompt for example in examples]
    keys, truth = [example.key for example in examples], [example.label for example in examples]
    scorer = NativeScorer(task.name, model.generator, task.name, rows.sequence_length, rows.batch_size)
    if not task.answers:
        texts = scorer.generate(prompts, _MAX_NEW_TOKENS, ["\n"])
        return label_predictions(keys, truth, [text.strip() for text in texts], text=texts)
    scores = score_table(list(task.answers), likelihood_scores(scorer, prompts, list(task.answers.values())))
    return label_predictions(keys, truth, [max(row, key=row.__getitem__) for row in scores], scores=scores)


def measure(predictions: Sequence[Prediction], majority: str | None) -> dict[str, Any]:
    """Return the measures of predictions next to those of always predicting `majority`.

    Args:
      predictions: at least one.
      majority: the most frequent label; None for free text, of which only the accuracy (exact match) is measured.
    """
    truth = [str(prediction.truth) for prediction in predictions]
    found = classification(truth, [str(prediction.prediction) for prediction in predictions])
    values: dict[str, Any] = {"questions": len(truth), "accuracy": found.accuracy}
    if majority is not None:
        always = classification(truth, [majority] * len(truth))
        values |= {
            "macro_f1": found.macro_f1,
            "majority": majority,
            "majority_accuracy": always.accuracy,
            "majority_macro_f1": always.macro_f1,
        }
    return values


def head_labels(config: FinetuneConfig, tasks: Sequence[SupervisedTask]) -> list[str]:
    """Return the names of the rows of the head that `config` names: its labels, or those that occur in the tasks.

    Raises:
      UserError: they leave nothing to choose from.
    """
    if config.head == "language_model":
        return config.labels
    if config.head in ("span", "regression"):
        return config.labels or {"span": ["start", "end"], "regression": ["score"]}[config.head]
    texts = [text for task in tasks for text in [*task.train, *task.development]]
    if config.head == "token_classifier":
        found = config.labels or tag_names(sorted({span.type for text in texts for span in text.spans}))
    else:
        unrelated = {NO_RELATION} if config.data.relation else set[str]()
        found = config.labels or sorted(unrelated.union(*(text.labels for text in texts)))
    if len(found) < (1 if config.head == "multi_label" else 2):
        raise UserError(
            f"head {config.head}: nothing to learn, the labels of the texts are {', '.join(found) or 'missing'}; check "
            "data.format and the keys of its files, data.types, data.relation, data.answer and labels"
        )
    return found
