"""The work of `finetune`: training on examples, then predicting with the best weights."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from statistics import mode
from typing import Any

import jax

from biomamba_jax import encoder_training, files, folders
from biomamba_jax.config import FinetuneConfig, RowsConfig
from biomamba_jax.config.finetune import FOLDS
from biomamba_jax.data.examples import EncodedExamples, encode_examples, encode_texts
from biomamba_jax.errors import UserError
from biomamba_jax.interop import Weights, read_model
from biomamba_jax.interop import run_dir as run_files
from biomamba_jax.tasks import mining_measures
from biomamba_jax.tasks.annotate import HeadModel
from biomamba_jax.tasks.answers import Prediction, label_predictions
from biomamba_jax.tasks.architectures import TRANSFORMERS_PREFIX
from biomamba_jax.tasks.model import Model, load, load_head
from biomamba_jax.tasks.relations import predicted_relations
from biomamba_jax.tasks.statistics import Resampling
from biomamba_jax.tasks.supervision import SupervisedTask, head_labels, measure, predict, read_tasks
from biomamba_jax.train.setup import with_execution_settings
from biomamba_jax.train.supervised import finetune

RESULTS, PREDICTIONS = "results.json", "predictions"
_LOG = logging.getLogger(__name__)


def read_weights(config: FinetuneConfig) -> Weights | None:
    """Return the weights of `config.init_from`; None for a third-party encoder, which transformers loads."""
    name = config.init_from or ""
    return None if name.startswith(TRANSFORMERS_PREFIX) else read_model(name)


def train_and_answer(config: FinetuneConfig, weights: Weights | None) -> dict[str, Any] | None:
    """Fine-tune, then answer the development and test splits with the best weights.

    Args:
      config: the run.
      weights: what to start from, or None for the encoder that `config.init_from` names.

    Returns:
      Measures by "task split", as in results.json; empty if the run has several hosts, None if it was stopped.
    """
    tasks, length = read_tasks(config), config.data.sequence_length
    config = dataclasses.replace(config, labels=head_labels(config, tasks))
    tokenizer: Any
    if weights is None:
        encoder = encoder_training.start(config)
        tokenizer, length = encoder.tokenizer, min(length, encoder.limit) - 1  # [SEP] ends a text
    else:
        tokenizer = weights.tokenizer(config.init_from)
        config = dataclasses.replace(config, model=with_execution_settings(weights.config, config.model))
    for message in (message for task in tasks for message in task.messages):
        _LOG.info(message)
    if config.data.negative not in ("", *config.labels):
        _LOG.info(f"data.negative = {config.data.negative!r} is the class of no text: F1 counts all of them")

    def encoded(split: str) -> EncodedExamples:
        examples = [example for task in tasks for example in getattr(task, split)]
        source = f"{' and '.join(task.name for task in tasks)}, {'training' if split == 'train' else split} split"
        if (head := config.head_config) is None:
            return encode_examples(examples, tokenizer, length, source=source)
        return encode_texts(examples, tokenizer, length, head, source=source)

    if weights is None:
        encoder_training.train(config, encoder, encoded("train"), encoded("development"))
    elif not finetune(config, weights, encoded("train"), encoded("development")):
        return None
    # A finished run trains nothing and keeps its config.yaml: figures of other data would not be what that says.
    run_dir = Path(config.run_dir)
    asked = run_files.changed(run_files.read_settings(run_dir), dataclasses.asdict(config))
    shape = tuple(f"data.{field.name}" for field in dataclasses.fields(RowsConfig))
    if others := [key for key in asked if key.startswith(("data.", "pubmedqa.", "bioasq.")) and key not in shape]:
        raise UserError(f"{run_dir}: is finished, and was trained with another {others[0]}; give another run_dir")
    return answer(config, tasks) if jax.process_count() == 1 else {}


def answer(config: FinetuneConfig, tasks: Sequence[SupervisedTask]) -> dict[str, Any]:
    """Predict with the run's best weights, write predictions/ and results.json, and return the measures."""
    run_dir = Path(config.run_dir)
    model = load(run_dir) if config.head_config is None else load_head(run_dir)
    results = {}
    for task in tasks:
        for split, examples in (("development", task.development), ("test", task.test)):
            if examples:
                lines, results[f"{task.name} {split}"] = _answer(config, model, task, examples)
                files.write_json_lines(run_dir / PREDICTIONS / f"{task.name}-{split}.jsonl", lines)
    files.write_json(run_dir / RESULTS, results)
    return results


def _answer(
    config: FinetuneConfig, model: Model | HeadModel, task: SupervisedTask, examples: Sequence[Any]
) -> tuple[list[Any], Any]:
    """Return predictions as JSON values, and their measures."""
    if isinstance(model, Model):
        majority = mode(example.label for example in task.train) if task.answers else None
        predictions = predict(model, task, examples, config.data)
        return [dataclasses.asdict(each) for each in predictions], measure(predictions, majority)
    found, resampling = model.annotate(examples), Resampling()
    measures = mining_measures.measure(model.head, examples, found, resampling, negative=config.data.negative)
    if config.data.relation:
        pairs, keys = predicted_relations(found), list(dict.fromkeys(text.key for text in examples))
        gold, named = [task.relations[key] for key in keys], [pairs.get(key, set()) for key in keys]
        measures |= {"texts": len(keys)} | mining_measures.micro(gold, named, resampling)
    if config.head != "classifier":
        both = zip(found, examples, strict=True)
        return [dataclasses.asdict(each) | {"gold": dataclasses.asdict(text)} for each, text in both], measures
    truth, labels = ([text.labels[0] for text in texts] for texts in (examples, found))
    scores = [text.scores for text in found]
    predictions = label_predictions([text.key for text in examples], truth, labels, scores=scores)
    majority = mode(text.labels[0] for text in task.train)
    return [dataclasses.asdict(each) for each in predictions], measures | measure(predictions, majority)


def cross_validate(config: FinetuneConfig, weights: Weights | None) -> dict[str, Any] | None:
    """Train on nine of the ten folds of PubMedQA's authors, ten times; the tenth fold selects the best weights.

    Returns:
      Metrics of each fold, of all folds' pooled predictions, and of the official test set with each fold's weights;
      None if a run was stopped. The pooled metrics are of questions that selected the weights, those of the test set
      are not.
    """
    if (hosts := jax.process_count()) > 1:
        raise UserError(f"cross_validate: runs on one host, not on {hosts}; train each fold in a run of its own")
    results: dict[str, Any] = {}
    tests, pooled = [], []
    for fold in range(FOLDS):
        run_dir = f"{config.run_dir}/fold-{fold}"
        settings = dataclasses.replace(config, run_dir=run_dir, fold=fold, cross_validate=False)
        with folders.locked(run_dir):
            of_fold = train_and_answer(settings, weights)
        if of_fold is None:
            return None
        results[f"fold {fold}"] = of_fold["pubmedqa development"]
        tests.append(of_fold["pubmedqa test"])
        lines = files.read_json_lines(Path(run_dir) / PREDICTIONS / "pubmedqa-development.jsonl")
        pooled += [Prediction(**values) for _, values in lines]
    results["all folds"] = measure(pooled, results["fold 0"]["majority"])
    means = {key: sum(test[key] for test in tests) / FOLDS for key in ("accuracy", "macro_f1")}
    results["test, mean of folds"] = tests[0] | means
    files.write_json(Path(config.run_dir) / RESULTS, results)
    return results
