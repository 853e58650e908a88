"""Fine-tuning of third-party encoders, such as BioBERT, by transformers' Trainer on our data and splits."""

import importlib
import logging
import math
import shutil
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from biomamba_jax.config import FinetuneConfig
from biomamba_jax.config.checks import check
from biomamba_jax.config.heads import HeadConfig
from biomamba_jax.data.examples import NOT_COUNTED, Encoded, EncodedExamples
from biomamba_jax.errors import UserError
from biomamba_jax.extras import extra
from biomamba_jax.interop.hub import local_folder
from biomamba_jax.tasks.architectures import TRANSFORMERS_PREFIX
from biomamba_jax.tasks.encoders import EncoderHeadModel
from biomamba_jax.train import setup
from biomamba_jax.train.metrics import MetricsWriter
from biomamba_jax.train.report import write_report
from biomamba_jax.train.schedule import learning_rate
from biomamba_jax.train.supervised import data_messages

_LOG = logging.getLogger(__name__)
_IGNORED = -100
"""Label that the losses of transformers leave out."""
_TRAINER = "trainer"
"""Folder of the Trainer's checkpoints in the run directory, until the run is finished."""
_ONLY = {"reading": "once", "lora.rank": 0, "loss.z_loss": 0, "optimizer.layer_decay": 1, "optimizer.ema": 0}
"""Settings that apply to our models alone, and the values at which they have no effect."""


def start(config: FinetuneConfig) -> EncoderHeadModel:
    """Load the encoder of `config.init_from` with a new head, whose random numbers come from the run's seed.

    Raises:
      UserError: it cannot be loaded, or a setting applies to our models alone.
    """
    head = config.head_config
    check(head is not None, "head", config.head, f"{config.init_from} is an encoder: give a head such as classifier")
    assert head is not None
    for key, only in _ONLY.items():
        value = attrgetter(key)(config)
        check(value == only, key, value, f"must be {only} for an encoder")
    _, transformers = (extra("hf", name, f"init_from: encoders need {name}") for name in ("accelerate", "transformers"))
    transformers.set_seed(config.train.seed)
    folder = local_folder((config.init_from or "").removeprefix(TRANSFORMERS_PREFIX))
    return EncoderHeadModel("init_from", folder, head, "float32")


def train(
    config: FinetuneConfig, encoder: EncoderHeadModel, examples: EncodedExamples, development: EncodedExamples
) -> None:
    """Train an encoder and write it into the run directory: the weights with the lowest development loss.

    A run that was interrupted resumes from its newest checkpoint; a finished one is left as it is.

    Args:
      config: the run; a batch is of `data.batch_size` examples, not of packed rows.
      encoder: what `start` returned.
      examples: to train on.
      development: for early stopping and the choice of the weights.

    Raises:
      UserError: the run directory has a run with other settings, or whose newest checkpoint is damaged.
    """
    run_dir, folder = Path(config.run_dir), Path(config.run_dir, _TRAINER)
    if changed := setup.changed_settings(config, 0):
        raise UserError(f"{run_dir}: {changed[0]}; give another run_dir")
    if (run_dir / "config.json").exists() and not folder.exists():
        return
    setup.record_settings(config, None, None)
    for message in data_messages(examples, development):
        _LOG.info(message)
    trainer = _trainer(config, encoder, examples, development)
    resumed = any(folder.glob("checkpoint-*"))
    try:
        trainer.train(resume_from_checkpoint=resumed)
    except Exception as error:  # of transformers, safetensors or PyTorch where a file is damaged
        if not resumed:
            raise
        reason = f"{error} ".splitlines()[0].strip() or type(error).__name__
        raise UserError(f"{folder}: its newest checkpoint cannot be resumed ({reason}); remove it") from None
    with MetricsWriter(config, None) as metrics:
        for logged in trainer.state.log_history:
            for key, split in (("loss", "train"), ("eval_loss", "validation")):
                if key in logged:
                    metrics.write(logged["step"], split, {"loss": logged[key]})
    encoder.tokenizer.library.save_pretrained(run_dir)
    encoder.model.save_pretrained(run_dir)
    shutil.rmtree(folder)
    write_report(run_dir)


def _trainer(
    config: FinetuneConfig, encoder: EncoderHeadModel, examples: EncodedExamples, development: EncodedExamples
) -> Any:
    """Return transformers' Trainer of the run, with our learning-rate schedule."""
    transformers = importlib.import_module("transformers")
    optimizer, parts = config.optimizer, config.train.accumulation
    steps = config.train.steps or math.ceil(config.train.epochs * len(examples) / config.data.batch_size)
    every = min(config.train.eval_every or steps, steps)
    arguments = transformers.TrainingArguments(
        output_dir=str(Path(config.run_dir, _TRAINER)),
        per_device_train_batch_size=config.data.batch_size // parts,
        gradient_accumulation_steps=parts,
        max_steps=steps,
        seed=config.train.seed,
        learning_rate=optimizer.learning_rate,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.clip,
        label_smoothing_factor=config.loss.label_smoothing,
        eval_strategy="steps",
        eval_steps=every,
        save_steps=every,
        save_total_limit=1,
        logging_steps=config.train.log_every,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    splits = [[split[index] for index in range(len(split))] for split in (examples, development)]
    stopping = transformers.EarlyStoppingCallback(config.train.patience or steps)
    trainer = transformers.Trainer(encoder.model, arguments, partial(_batch, encoder), *splits, callbacks=[stopping])
    schedule, scheduler = learning_rate(config.schedule, 1.0, steps), encoder.torch.optim.lr_scheduler.LambdaLR
    trainer.lr_scheduler = scheduler(trainer.create_optimizer(), lambda step: float(schedule(step)))
    return trainer


def labels(targets: np.ndarray, head: HeadConfig, length: int) -> dict[str, Any]:
    """Return an example's targets (see `model.heads`) as transformers' heads take them, for rows of `length` tokens."""
    if head.kind == "token_classifier":
        known = np.where(targets == NOT_COUNTED, _IGNORED, targets).tolist()
        return {"labels": [*known, *[_IGNORED] * (length - len(known))]}
    if head.kind == "span":
        marks = np.maximum(targets, 0)
        return {"start_positions": int((marks & 1).argmax()), "end_positions": int((marks & 2).argmax())}
    last = targets[-1]
    if head.kind == "multi_label":
        return {"labels": [float(last >> index & 1) for index in range(len(head.labels))]}
    return {"labels": float(last.view(np.float32)) if head.kind == "regression" else int(last)}


def _batch(encoder: EncoderHeadModel, examples: Sequence[Encoded]) -> dict[str, Any]:
    """Return examples as the model's inputs, labels included."""
    found = encoder.inputs([[*example.inputs.tolist(), encoder.tokenizer.end_id] for example in examples])
    length = found["input_ids"].shape[1]
    wanted = [labels(example.targets, encoder.head, length) for example in examples]
    return found | {name: encoder.torch.tensor([each[name] for each in wanted]) for name in wanted[0]}
