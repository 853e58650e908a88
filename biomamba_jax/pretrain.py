"""Train a language model on tokenized shards.

python -m biomamba_jax.pretrain --config configs/quickstart.yaml [--optimizer.learning_rate 3e-4 ...]

Starts from random or given weights, or resumes from the newest checkpoint of its run directory. If data.path does not
exist and the config's prepare section names input, the shards are made first. Ends with held-out perplexity and bits
per byte before and after training, next to those of n-gram models of the same text.
"""

import dataclasses
import logging
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from biomamba_jax import files, folders, processor
from biomamba_jax.command_line import log_to_stderr, parse, run_command
from biomamba_jax.config import PretrainConfig
from biomamba_jax.errors import UserError

# Neither `--help` nor the data workers, which import this module again, need jax: it is imported inside functions.

_LOG = logging.getLogger(__name__)
_LARGEST_BASELINE = 100_000_000
"""Training tokens up to which n-gram models are counted, which takes seconds."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on `argv`, by default this process's arguments."""
    log_to_stderr()
    config = parse(PretrainConfig, argv, __doc__)
    processor.keep_freed_memory()
    from biomamba_jax.parallel import distributed

    with distributed.processes(config) as first, folders.locked(config.run_dir) if first else nullcontext():
        from biomamba_jax.train.loop import train  # late: a refused start ends sooner

        fetch_shards(config)
        if first:
            prepare_if_missing(config)
            write_baselines(config)
        distributed.barrier("data", timeout=distributed.DATA_TIMEOUT)
        complete = train(*with_initial_weights(config), measure=task_evaluation(config))
        if first:
            show_results(Path(config.run_dir))
    distributed.exit_if_stopped(complete)


def fetch_shards(config: PretrainConfig) -> None:
    """Fetch what the run reads of shards on object stores, here rather than where other hosts wait for this one."""
    from biomamba_jax.object_store import local_copy

    local_copy(config.data.path, "validation")
    sources = [source.path for source in config.data.mixture.sources.values()]
    for path in sources or [config.data.path]:
        local_copy(path, "train")


def prepare_if_missing(config: PretrainConfig) -> None:
    """Make the shards that the prepare section describes, unless data.path exists or the section names no input."""
    from biomamba_jax.data.inspection import manifest_tables
    from biomamba_jax.object_store import local_copy
    from biomamba_jax.prepare import prepare
    from biomamba_jax.tables import print_tables

    if config.prepare.input and not local_copy(config.data.path, "").exists():
        manifest = prepare(dataclasses.replace(config.prepare, output=config.data.path))
        print_tables(manifest_tables(manifest))


def with_initial_weights(config: PretrainConfig) -> tuple[PretrainConfig, Any]:
    """Return the config with the sizes of the weights that it starts from, and those weights; None: random weights.

    A run that has a checkpoint resumes from it and needs only the sizes, which are in its config.yaml.
    """
    if config.init_from is None:
        return config, None
    from biomamba_jax.interop import read_model, run_dir, runs
    from biomamba_jax.train.setup import with_execution_settings

    run = Path(config.run_dir)
    if (run / run_dir.CONFIG).exists() and run_dir.complete_steps(run):
        _, model, _ = runs.read_settings(run)
        params = None
    else:
        weights = for_shards(read_model(config.init_from), config)
        model, params = weights.config, weights.params
    return dataclasses.replace(config, model=with_execution_settings(model, config.model)), params


def for_shards(weights: Any, config: PretrainConfig) -> Any:
    """Return the weights to start from for the ids of the shards.

    Raises:
      UserError: the shards were made with another tokenizer than the weights', without new_tokenizer.
    """
    from biomamba_jax.data.shards import tokenizer_file
    from biomamba_jax.data.tokenizer import load_tokenizer
    from biomamba_jax.interop import vocabulary

    file = tokenizer_file(config.data.path)
    if weights.tokenizer_file is None or not file.is_file():
        _LOG.warning(f"{config.init_from}: has no tokenizer; the shards' ids are taken to be its rows, unchecked")
        return weights
    ours, theirs = load_tokenizer(weights.tokenizer_file), load_tokenizer(file)
    if config.new_tokenizer and ours.vocabulary_sha256 != theirs.vocabulary_sha256:
        weights, drawn = vocabulary.with_tokenizer(weights, theirs)
        _LOG.info(f"new tokenizer: {theirs.vocab_size - drawn:,} of {theirs.vocab_size:,} tokens keep their embeddings")
    elif not config.new_tokenizer:
        remedy = "prepare the text with that, or give --new_tokenizer to take this one and draw its other rows anew"
        vocabulary.require_same(ours, theirs, config.data.path, remedy)
    return weights


def task_evaluation(config: PretrainConfig) -> Any:
    """Return what measures the model on the tasks of the evaluate section; None if it names no task."""
    if not config.evaluate.measures_anything:
        return None
    from biomamba_jax.tasks.in_training import TrainingEvaluation

    return TrainingEvaluation(config)


def write_baselines(config: PretrainConfig) -> None:
    """Count n-gram models on the training split, for the results table and the report.

    Does nothing if they exist, unless damaged, or if there is no held-out text. What was counted is kept in the cache
    folder: another run on the same shards starts seconds sooner.
    """
    from biomamba_jax.data.ngrams import ngram_baselines
    from biomamba_jax.data.shards import open_split
    from biomamba_jax.train.report import BASELINES, read_baselines
    from biomamba_jax.train.setup import shards_tokenizer

    path = Path(config.run_dir) / BASELINES
    manifest, train = open_split(config.data.path, "train")
    shards_tokenizer(config.data.path, manifest)  # refuses a manifest whose vocabulary is not its own
    if manifest.splits["train"].tokens > _LARGEST_BASELINE:
        return
    try:
        if path.exists():
            read_baselines(config.run_dir)
            return
    except UserError as error:
        _LOG.warning(f"{error}; counted again")
    _, held_out = open_split(config.data.path, "validation")
    if not len(held_out):
        return
    kept, records = path.parent, []  # without a cache folder, in the run directory alone
    with suppress(UserError):
        kept = folders.cache_folder() / "baselines" / folders.state_of(train.folder.parent)
        records = read_baselines(kept)
    if not records:
        baselines = ngram_baselines(train, held_out, vocab_size=manifest.tokenizer.vocab_size)
        records = [dataclasses.asdict(b) | {"split": "validation"} for b in baselines]
        with suppress(UserError, OSError):
            kept.mkdir(parents=True, exist_ok=True)
            files.write_json(kept / BASELINES, records)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, records)


def show_results(run_dir: Path) -> None:
    """Print held-out perplexity and bits per byte of the run's first and last evaluation and of the baselines.

    Writes report.html where there is none, as after a full disk.
    """
    from biomamba_jax.tables import print_tables
    from biomamba_jax.train.metrics import read_metrics
    from biomamba_jax.train.report import held_out_table, write_report

    table = held_out_table(run_dir, read_metrics(run_dir))
    if table.rows:  # metrics.jsonl may have been deleted
        print_tables([table])
    report = run_dir / "report.html"
    print(f"report: {report if report.exists() else write_report(run_dir)}")


if __name__ == "__main__":
    run_command(main)
