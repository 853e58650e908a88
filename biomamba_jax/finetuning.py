"""The work of `finetune`: training on questions, then answering them with the best weights."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from biomamba_jax import files, folders
from biomamba_jax.config import FinetuneConfig
from biomamba_jax.data.examples import Example, encode_examples
from biomamba_jax.data.tokenizer import load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.interop import Weights
from biomamba_jax.tasks.answers import Prediction
from biomamba_jax.tasks.model import load
from biomamba_jax.tasks.pubmedqa import FOLDS
from biomamba_jax.tasks.supervision import Task, measure, most_frequent, predict, read_tasks
from biomamba_jax.train.setup import with_execution_settings
from biomamba_jax.train.supervised import finetune

RESULTS, PREDICTIONS = "results.json", "predictions"


def train_and_answer(config: FinetuneConfig, weights: Weights) -> dict[str, Any] | None:
    """Fine-tune, then answer the development and test splits with the best weights.

    Returns:
      Measures by "task split", as in results.json; empty if the run has several hosts, None if it was stopped.
    """
    if weights.tokenizer_file is None:
        raise UserError(f"{config.init_from}: has no tokenizer; `convert --tokenizer FILE` adds one to the weights")
    tokenizer = load_tokenizer(weights.tokenizer_file)
    tasks = read_tasks(config)
    train = [example for task in tasks for example in task.train]
    development = [example for task in tasks for example in task.development]
    labels = config.labels or sorted({example.label for example in [*train, *development]})
    model = with_execution_settings(weights.config, config.model)
    config = dataclasses.replace(config, model=model, labels=labels if config.head == "classifier" else [])

    def encoded(examples: list[Example], split: str):
        source = f"{' and '.join(task.name for task in tasks)}, {split} split"
        length = config.data.sequence_length
        return encode_examples(examples, tokenizer, length, source=source, labels=config.labels)

    if not finetune(config, weights, encoded(train, "training"), encoded(development, "development")):
        return None
    return answer(config, tasks) if jax.process_count() == 1 else {}


def answer(config: FinetuneConfig, tasks: Sequence[Task]) -> dict[str, Any]:
    """Predict with the run's best weights, write predictions/ and results.json, and return the measures."""
    run_dir, classifier = Path(config.run_dir), config.head == "classifier"
    model, results = load(run_dir), {}
    for task in tasks:
        majority = most_frequent(task.train) if classifier or task.answers else None
        for split, examples in (("development", task.development), ("test", task.test)):
            if examples:
                predictions = predict(model, task, examples, config.data, classifier=classifier)
                path = run_dir / PREDICTIONS / f"{task.name}-{split}.jsonl"
                files.write_json_lines(path, map(dataclasses.asdict, predictions))
                results[f"{task.name} {split}"] = measure(predictions, majority)
    files.write_json(run_dir / RESULTS, results)
    return results


def cross_validate(config: FinetuneConfig, weights: Weights) -> dict[str, Any] | None:
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
