"""The start of a run: sizes that the shards determine, the run directory, and a line that describes it."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from biomamba_jax.config import DataConfig, ModelConfig, PretrainConfig, RunConfig
from biomamba_jax.data.examples import EncodedExamples
from biomamba_jax.data.mixture import MixedDocuments, mixture_epoch_tokens, open_mixture
from biomamba_jax.data.packing import RowPlan
from biomamba_jax.data.pipeline import Documents, PaddedDocuments
from biomamba_jax.data.shards import Manifest, open_split, tokenizer_file
from biomamba_jax.data.tokenizer import Tokenizer, load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.hardware import measure_matmul_flops, peak_flops
from biomamba_jax.interop import run_dir as run_files
from biomamba_jax.interop.configs import EXECUTION
from biomamba_jax.parallel import distributed
from biomamba_jax.train.report import record_start


def with_vocabulary(model: ModelConfig, manifest: Manifest) -> ModelConfig:
    """Return `model` with the vocabulary of the shards' tokenizer.

    Raises:
      UserError: the config names a vocabulary that is too small for the shards.
    """
    vocabulary = manifest.tokenizer.vocab_size
    if model.vocab_size is not None and model.vocab_size < vocabulary:
        raise UserError(
            f"model.vocab_size = {model.vocab_size}: the shards' tokenizer {manifest.tokenizer.name!r} has "
            f"{vocabulary} ids; leave vocab_size out to use that"
        )
    return dataclasses.replace(model, vocab_size=model.vocab_size or vocabulary)


def shards_tokenizer(folder: str, manifest: Manifest) -> Tokenizer | None:
    """Return the tokenizer of the shards in a folder or URL, None if it is not there.

    Raises:
      UserError: the manifest states another vocabulary or other special tokens than its own.
    """
    file, stated = tokenizer_file(folder), manifest.tokenizer
    if not file.is_file():
        return None
    found = load_tokenizer(file)
    start = found.start_id if stated.start_id is not None else None  # None: the shards begin each document with EOS
    if (found.vocab_size, found.eos_id, start) != (stated.vocab_size, stated.eos_id, stated.start_id):
        raise UserError(
            f"{folder}: its manifest states {stated.vocab_size} ids, start {stated.start_id} and end {stated.eos_id}, "
            f"{file.name} has {found.vocab_size}, {found.start_id} and {found.eos_id}; prepare the shards again"
        )
    return found


def with_execution_settings(model: ModelConfig, execution: ModelConfig) -> ModelConfig:
    """Return the sizes of `model`, those of its weights, with the execution settings of `execution`."""
    settings = {name: getattr(execution, name) for name in (*EXECUTION, "chunk_size")}
    return dataclasses.replace(model, **settings)


def training_documents(data: DataConfig, manifest: Manifest) -> Documents | MixedDocuments:
    """Open the training split, or that of every source of the mixture.

    Args:
      data: shards or mixture.
      manifest: that of data.path, whose tokenizer all sources must share.

    Raises:
      UserError: shards are missing, damaged or made with another tokenizer.
    """
    if not data.mixture.sources:
        documents = open_split(data.path, "train")[1]
        return PaddedDocuments(documents, data.sequence_length) if data.pad_rows else documents
    return open_mixture(data.mixture, tokenizer_sha256=manifest.tokenizer.sha256)


def epoch_tokens(data: DataConfig, manifest: Manifest) -> int:
    """Return the tokens of one epoch, at least 1: of the training split, or of a mixture's main source.

    Args:
      data: shards or mixture.
      manifest: that of data.path.
    """
    return max(mixture_epoch_tokens(data.mixture) if data.mixture.sources else manifest.splits["train"].tokens, 1)


def require_same_shards(data: DataConfig) -> None:
    """Raise a UserError if the shards here are others than those of process 0, which their paths do not tell."""
    digests = {}
    for folder in (data.path, *(source.path for source in data.mixture.sources.values())):
        text = json.dumps(dataclasses.asdict(Manifest.load(folder)), sort_keys=True)
        digests[f"the manifest in {folder}"] = f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"
    distributed.require_same("shards", digests)


def total_steps(config: PretrainConfig, manifest: Manifest) -> int:
    """Return the optimizer steps of the run; an epoch is as many as the training split's tokens fill."""
    if config.train.steps is not None:
        return config.train.steps
    tokens_a_step = config.data.batch_size * config.data.sequence_length
    return max(1, math.ceil(config.train.epochs * epoch_tokens(config.data, manifest) / tokens_a_step))


def example_steps(config: RunConfig, examples: EncodedExamples) -> tuple[int, float]:
    """Return the optimizer steps of a run on examples, and those of one pass over them."""
    plan = RowPlan(examples.lengths, config.data.sequence_length, seed=config.train.seed)
    epoch_steps = plan.rows_in_epoch() / config.data.batch_size
    return config.train.steps or max(1, math.ceil(config.train.epochs * epoch_steps)), epoch_steps


def changed_settings(config: RunConfig, start: int | None) -> list[str]:
    """Return "KEY was A, is B" for each setting that differs from those that trained the checkpoint of step `start`."""
    run_dir = Path(config.run_dir)
    if start is None or not (run_dir / run_files.CONFIG).exists():
        return []
    before = run_files.settings_by_step(run_dir, start)[-1][1]
    changed = run_files.changed(before, dataclasses.asdict(config))
    return [f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items()]


def record_settings(config: RunConfig, tokenizer: Path | None, start: int | None) -> None:
    """Write the resolved config, the tokenizer and this start into the run directory, from the first process.

    Args:
      config: the resolved config; its run directory is made if it does not exist.
      tokenizer: file to copy, so that the run's weights can be used without its data.
      start: step of the checkpoint that the run resumed from.
    """
    if jax.process_index() == 0:
        run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        run_files.write_settings(run_dir, dataclasses.asdict(dataclasses.replace(config, resume_from=None)), start or 0)
        if tokenizer is not None:
            load_tokenizer(tokenizer).save_to(run_dir)
        record_start(run_dir, start or 0)


def describe(config: RunConfig, epochs: float, steps: int, start: int | None, params: Any) -> str:
    """Return a line that describes the run: model, batches, length, devices and start."""
    data, model = config.data, config.model
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    tokens = steps * data.batch_size * data.sequence_length
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    where = f"resumed at step {start:,}" if start is not None else "from the start"
    return (
        f"{model.kind}, {model.n_layers} layers of {model.d_model}, {count / 1e6:.1f} M parameters, vocabulary "
        f"{model.vocab_size:,}; {data.batch_size} x {data.sequence_length:,} tokens per step, {steps:,} steps = "
        f"{tokens / 1e6:,.1f} M tokens = {epochs:.2f} epochs; {devices}; {where}"
    )


def compilation_cache() -> list[str]:
    """Return a line that names the folder of compiled programs, or none if there is no such folder."""
    settings: Any = jax.config
    if not (settings.jax_enable_compilation_cache and settings.jax_compilation_cache_dir):
        return []
    off = "JAX_ENABLE_COMPILATION_CACHE=false turns that off"
    return [f"compiled programs are kept in {settings.jax_compilation_cache_dir} ({off})"]


def total_peak_flops(dtype: jnp.dtype) -> float | None:
    """Return the peak FLOP/s of all devices for products of `dtype`: measured on a CPU, None where unknown."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return measure_matmul_flops()  # virtual devices share one CPU
    peak = peak_flops(device.device_kind, dtype)
    return peak and peak * jax.device_count()
