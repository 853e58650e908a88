"""Question answering as supervised examples, asked with the prompts that `evaluate` asks with, and answered again.

Each task is divided into examples to train on, to stop early by and, where there are any, to predict at the end.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from biomamba_jax.config import BioASQConfig, ExamplesConfig, FinetuneConfig, PubMedQAConfig
from biomamba_jax.data.examples import Example, held_out_share, read_examples
from biomamba_jax.tasks import bioasq, pubmedqa
from biomamba_jax.tasks.answers import Prediction, likelihood_scores
from biomamba_jax.tasks.measures import classification
from biomamba_jax.tasks.model import Model
from biomamba_jax.tasks.native_scorer import NativeScorer

_MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Task:
    """Examples of one source."""

    name: str
    train: list[Example]
    development: list[Example]
    test: list[Example] = field(default_factory=list)
    answers: Mapping[str, str] = field(default_factory=dict)
    """The text of each class behind a prompt; {} where answers are free text."""


def read_tasks(config: FinetuneConfig) -> list[Task]:
    """The tasks that `config` names.

    Raises:
      UserError: a file that cannot be read or is of another kind.
    """
    tasks = []
    if config.data.files:
        tasks.append(_json_lines(config.data))
    if config.pubmedqa.path:
        tasks.append(_pubmedqa(config.pubmedqa, config.fold, config.data.development_fraction))
    if config.bioasq.path:
        tasks += _bioasq(config.bioasq, config.data.development_fraction)
    return tasks


def _json_lines(config: ExamplesConfig) -> Task:
    def read(files: Sequence[str]) -> list[Example]:
        return [example for path in files for example in read_examples(path, config.prompt, config.answer)]

    train, development = read(config.files), read(config.development)
    if not config.development:
        train, development = held_out_share(train, config.development_fraction)
    return Task("examples", train, development, read(config.test))


def _pubmedqa(config: PubMedQAConfig, fold: int, development_fraction: float) -> Task:
    """The authors' folds and test set of the labelled questions (PQA-L). The artificial ones (PQA-A: ori_pqaa.json),
    which are never answered with maybe, are all for training, but for a share to stop by."""
    assert config.path is not None

    def examples(questions: Sequence[pubmedqa.Question]) -> list[Example]:
        texts = [config.prompt.format(question=each.question, context=each.context) for each in questions]
        return [
            Example(text, config.answers[each.answer], each.answer, each.key)
            for text, each in zip(texts, questions, strict=True)
        ]

    questions = pubmedqa.read_questions(config.path)
    if not any(question.answer == "maybe" for question in questions):
        train, development = held_out_share(examples(questions), development_fraction)
        return Task("pubmedqa", train, development, answers=config.answers)
    split = pubmedqa.official_split(questions, config.test_ids)
    rest = [question for index, part in enumerate(split.folds) if index != fold for question in part]
    return Task("pubmedqa", examples(rest), examples(split.folds[fold]), examples(split.test), config.answers)


def _bioasq(config: BioASQConfig, development_fraction: float) -> list[Task]:
    """A task of yes/no questions and one of all others: a name is the first of its synonyms, lists as prompts ask."""

    def example(question: bioasq.Question) -> Example:
        prompts = {"yesno": config.yesno_prompt, "factoid": config.factoid_prompt, "list": config.list_prompt}
        prompt = prompts[question.kind].format(
            question=question.question, context=question.context(config.max_snippets)
        )
        if question.kind == "yesno":
            label = question.golden[0][0]
            return Example(prompt, config.answers[label], label, question.key)
        names = "; ".join(synonyms[0] for synonyms in question.golden)
        return Example(prompt, f" {names}", names, question.key)

    def read(files: Sequence[str], kinds: Sequence[str]) -> list[Example]:
        questions = [question for path in files for question in bioasq.read_questions(path)]
        return [example(question) for question in questions if question.kind in kinds and question.golden]

    tasks = []
    for name, kinds, answers in (
        ("bioasq-yesno", ("yesno",), config.answers),
        ("bioasq-names", ("factoid", "list"), {}),
    ):
        chosen = [kind for kind in kinds if kind in config.types]
        train, development = read(config.path, chosen), read(config.development, chosen)
        if not config.development:
            train, development = held_out_share(train, development_fraction)
        if train or development:
            tasks.append(Task(name, train, development, answers=answers))
    return tasks


def predict(
    model: Model, task: Task, examples: Sequence[Example], *, classifier: bool, window: int, batch_size: int
) -> list[Prediction]:
    """What `model` answers to each example.

    Args:
      classifier: take the model's classifier; otherwise the likeliest text of a class, or greedy text up to a line end.
    """
    prompts, labels = [example.prompt for example in examples], list(task.answers)
    texts: list[str] | None = None
    scores: list[dict[str, float]] | None = None
    if classifier:
        scores = [found.probabilities for found in model.classify(prompts)]
    else:
        scorer = NativeScorer(task.name, model, task.name, window, batch_size)
        if labels:
            rows = likelihood_scores(scorer, prompts, list(task.answers.values()), "none").tolist()
            scores = [dict(zip(labels, row, strict=True)) for row in rows]
        else:
            texts = scorer.generate(prompts, _MAX_NEW_TOKENS, ["\n"])
    if scores is not None:
        predicted = [max(row, key=row.__getitem__) for row in scores]
    else:
        predicted = [text.strip() for text in texts or []]
    return [
        Prediction(
            example.key,
            example.label,
            answer,
            example.label == answer,
            scores=None if scores is None else scores[index],
            text=None if texts is None else texts[index],
        )
        for index, (example, answer) in enumerate(zip(examples, predicted, strict=True))
    ]


def measure(predictions: Sequence[Prediction], majority: str | None) -> dict[str, Any]:
    """Measures of predictions beside those of always giving the answer `majority`; of free text (None) accuracy alone,
    which counts what is the same letter by letter."""
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


def most_frequent(examples: Sequence[Example]) -> str:
    """The label that most examples have; of several, the first."""
    return Counter(example.label for example in examples).most_common(1)[0][0]
