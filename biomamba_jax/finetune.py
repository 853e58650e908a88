"""Fine-tune a model to answer questions: PubMedQA, BioASQ task B, or JSON lines of prompts and answers.

python -m biomamba_jax.finetune --config configs/finetune_pubmedqa.yaml --init_from DIR [--lora.rank 8 ...]

Trains the whole model or LoRA adapters, with the loss on the answers only, until the development loss stops improving;
resumes from its run directory's newest checkpoint. Ends with the answers of the best weights: predictions/ and
results.json in the run directory, and a table next to a baseline that always gives the most frequent answer. Every
command takes the run directory as a model, adapters merged.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from biomamba_jax import files
from biomamba_jax.command_line import parse, run_command
from biomamba_jax.config import FinetuneConfig
from biomamba_jax.data.examples import Example, encode_examples
from biomamba_jax.data.tokenizer import load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.interop import Weights, read_model
from biomamba_jax.interop.hub import local_folder
from biomamba_jax.parallel.distributed import exit_if_stopped, processes
from biomamba_jax.tables import summary_table
from biomamba_jax.tasks.answers import Prediction
from biomamba_jax.tasks.model import load
from biomamba_jax.tasks.pubmedqa import FOLDS
from biomamba_jax.tasks.supervision import Task, measure, most_frequent, predict, read_tasks
from biomamba_jax.train.setup import with_execution_settings
from biomamba_jax.train.supervised import finetune

RESULTS, PREDICTIONS = "results.json", "predictions"

_COLUMNS = {
    "questions": "questions",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "majority_accuracy": "majority: accuracy",
    "majority_macro_f1": "macro F1",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on `argv`, by default this process's arguments."""
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("biomamba_jax").setLevel(logging.INFO)
    config = parse(FinetuneConfig, argv, __doc__)
    with processes(config) as first:
        weights = read_model(local_folder(config.init_from or ""))
        results = cross_validate(config, weights) if config.cross_validate else train_and_answer(config, weights)
        if results is not None and jax.process_count() == 1:
            rows = [(name, *(_cell(values.get(key)) for key in _COLUMNS)) for name, values in results.items()]
            summary_table("What the best weights answer", ("questions of", *_COLUMNS.values()), rows)
            print(f"predictions and {RESULTS}: {config.run_dir}")
        elif results is not None and first:
            print(f"for predictions, on one host: python -m biomamba_jax.evaluate --models.tuned {config.run_dir} ...")
    exit_if_stopped(complete=results is not None)


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


def _cell(value: float | int | None) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None if value is None else f"{100 * value:.1f} %"


if __name__ == "__main__":
    run_command(main)
