"""The training loop: from a config to a trained run directory, resumed by itself where one exists.

Run directory: config.yaml, checkpoints/, metrics.jsonl, timing.jsonl, tensorboard/, environment.json, report.html.
What is trained on what is a `Training`: pretraining's is made here, fine-tuning's in `finetune`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from biomamba_jax.config import PretrainConfig, RunConfig
from biomamba_jax.data.pipeline import TrainIterator, train_iterator
from biomamba_jax.data.shards import Manifest
from biomamba_jax.errors import UserError
from biomamba_jax.hardware import peak_memory_bytes
from biomamba_jax.model.flops import training_flops_per_token
from biomamba_jax.model.language_model import compute_dtype
from biomamba_jax.parallel.layout import Layout
from biomamba_jax.parallel.mesh import make_mesh, reader, replicated, rows_per_host, shard_rows
from biomamba_jax.train.checkpoints import Checkpoints
from biomamba_jax.train.heldout import HeldOut
from biomamba_jax.train.meters import Best, Interval, Stopwatch, Totals
from biomamba_jax.train.metrics import MetricsWriter
from biomamba_jax.train.optimizer import Params, decay_mask, evaluated_weights, make_optimizer
from biomamba_jax.train.progress import Progress
from biomamba_jax.train.report import write_report
from biomamba_jax.train.schedule import learning_rate
from biomamba_jax.train.setup import (
    abstract_model,
    describe,
    initial_state,
    open_run_dir,
    total_peak_flops,
    total_steps,
    with_vocabulary,
)
from biomamba_jax.train.step import LossFunction, TrainState, jit_step, language_model_loss, make_train_step
from biomamba_jax.train.stop import StopRequest
from biomamba_jax.train.training_text import epoch_tokens, mixture_of

Hook = Callable[[int, TrainState], None]


@dataclasses.dataclass(frozen=True)
class Training:
    """What one kind of training brings to the loop."""

    config: RunConfig
    """As resolved: its model has a vocabulary."""
    steps: int
    """Optimizer steps of the run."""
    epoch_steps: float
    """Optimizer steps of one pass over the data."""
    batches: TrainIterator
    """This host's batches; closed when the run ends."""
    loss: LossFunction
    """What is minimised."""
    held_out: Callable[[Any], dict[str, float]]
    """Evaluates parameters; "loss" is compared to find the best ones."""
    fixed: tuple[Any, ...] = ()
    """Further arguments of the loss, which are not trained."""
    decayed: Callable[[Params], Params] = decay_mask
    """Which parameters weight decay applies to; see `make_optimizer`."""
    tokenizer: Path | None = None
    """File that is copied into the run directory."""
    hooks: Sequence[tuple[int, Hook]] = ()
    """What else happens between steps: every so many, and at the last; 0: only at the last."""
    kept: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What every checkpoint holds besides, as JSON can."""
    notes: Sequence[str] = ()
    """Lines shown at the start."""


def train(config: PretrainConfig, params: Any = None) -> bool:
    """Pretrains as `config` says, from the newest checkpoint in its run directory where there is one.

    Args:
      params: a nested dict of arrays to start from where there is no checkpoint; None starts from random ones.

    Returns:
      Whether the run is complete. It is not after SIGTERM or Ctrl-C.

    Raises:
      UserError: shards, checkpoint and config do not fit together, or gradients stayed non-finite.
    """
    manifest = Manifest.load(config.data.path)
    config = dataclasses.replace(config, model=with_vocabulary(config.model, manifest))
    graph, layout = abstract_model(config.model, make_mesh(config.mesh))
    tokens_a_step = config.data.batch_size * config.data.sequence_length
    training = Training(
        config=config,
        steps=total_steps(config, manifest),
        epoch_steps=epoch_tokens(config.data, manifest) / tokens_a_step,
        loss=language_model_loss(graph, config.loss, layout.collectives),
        held_out=HeldOut(graph, config.data, layout, batches=config.train.eval_batches),
        batches=train_iterator(
            config.data.path,
            sequence_length=config.data.sequence_length,
            batch_size=rows_per_host(config.data.batch_size, layout.mesh, config.train.accumulation),
            seed=config.train.seed,
            num_workers=config.data.num_workers,
            mixture=mixture_of(config.data),
            process_index=reader(layout.mesh).index,
            process_count=reader(layout.mesh).count,
        ),
        tokenizer=Path(config.data.path) / manifest.tokenizer.file,
    )
    return run(training, layout, params)


def run(training: Training, layout: Layout, params: Any = None) -> bool:
    """The loop, of any training; see `train`."""
    # --- The step --------------------------------------------------------------------------------------------------
    config, steps, batches = training.config, training.steps, training.batches
    run_dir = Path(config.run_dir)
    schedule = learning_rate(config.schedule, config.optimizer.learning_rate, steps)
    optimizer = make_optimizer(config.optimizer, config.model, schedule, training.decayed)
    step_of = make_train_step(training.loss, optimizer, config.train.accumulation, layout)
    train_step = jit_step(step_of, config.train.compiler_options, layout.mesh)
    fixed = jax.device_put(training.fixed, replicated(layout.mesh))

    with batches, Checkpoints(run_dir, config.checkpoint) as checkpoints:
        # --- A fresh start, or on from the newest checkpoint -------------------------------------------------------
        start = checkpoints.latest
        begin = partial(initial_state, config.model, optimizer, config.train.seed)
        like = jax.eval_shape(begin, params)
        shardings = layout.shardings(like)
        best = Best()
        if start is None and params is None and config.init_from is not None:
            raise UserError(f"{run_dir}: its checkpoint went away during the start; run again to begin from init_from")
        if start is None:
            state, totals = jax.jit(begin, out_shardings=shardings)(params), Totals()
        else:
            like = jax.tree.map(lambda x, sharding: x.update(sharding=sharding), like, shardings)
            state, saved = checkpoints.restore(like)
            batches.set_state(saved["data"])
            for name, value in training.kept.items():
                if saved.get(name) != value:
                    raise UserError(
                        f"{run_dir}: began with {name} {saved.get(name)}, not {value}; name another run_dir"
                    )
            totals, best = Totals(**saved["totals"]), Best(**saved.get("best", {}))
        notes = open_run_dir(run_dir, config, training.tokenizer, start)

        with (
            MetricsWriter(
                run_dir,
                last_step=start,
                tensorboard=config.tensorboard,
                wandb_project=config.wandb_project,
                config=dataclasses.asdict(config),
            ) as metrics,
            Progress(steps, start or 0) as progress,
            StopRequest() as stop,
        ):
            about = describe(config, steps / training.epoch_steps, steps, start, state.params)
            for note in (about, *training.notes, *notes):
                progress.log(note)
            if start is not None and start > steps:
                progress.log(f"nothing to do: the run is at step {start:,}, beyond the {steps:,} steps asked for")

            # --- What happens between steps ------------------------------------------------------------------------
            def evaluate(step: int, state: TrainState) -> None:
                values = training.held_out(evaluated_weights(state.params, state.optimizer))
                metrics.write(step, "validation", values)
                shown = ", ".join(
                    f"{name.replace('_', ' ')} {f'{value:,}' if isinstance(value, int) else f'{value:,.4f}'}"
                    for name, value in values.items()
                )
                progress.log(f"step {step:,}: held-out {shown}")
                best.add(step, values["loss"])
                if config.checkpoint.keep_best and best.step == step:
                    save(step, state)

            def save(step: int, state: TrainState) -> None:
                metrics.sync()
                loop = {"data": batches.get_state(), "totals": interval.state(), "best": dataclasses.asdict(best)}
                kept = best.step if config.checkpoint.keep_best else None
                checkpoints.save(step, state, loop | training.kept, best=kept)
                if jax.process_index() == 0:
                    write_report(run_dir)

            def log(step: int, state: TrainState) -> None:
                drawn = {f"tokens/{name}": tokens for name, tokens in batches.tokens_by_source.items()}
                line = interval.line()
                rate = float(schedule(max(step - 1 - interval.skipped, 0)))  # a skipped update does not count
                metrics.write(step, "train", line | {"learning_rate": rate} | drawn)
                watch.update(interval.tokens)
                metrics.write_timing(step, watch.speed._asdict() | {"peak_memory_bytes": peak_memory_bytes()})
                watch.restart(interval.tokens)

            hooks = [  # a checkpoint is last: its metrics lines are written before it is
                *training.hooks,
                (config.train.log_every, log),
                (config.train.eval_every, evaluate),
                (config.checkpoint.every, save),
            ]

            # --- The loop ------------------------------------------------------------------------------------------
            step, interval = start or 0, Interval(totals)
            watch = Stopwatch(training_flops_per_token(config.model), total_peak_flops(compute_dtype(config.model)))
            if start is None:
                evaluate(0, state)
            while step < steps and not stop.at(step) and not best.is_stale(config.train.patience):
                with watch.waiting():
                    batch = next(batches)
                state, report = train_step(state, shard_rows(batch, layout.mesh), *fixed)
                step += 1
                interval.add(report)
                if step == (start or 0) + 1:  # compilation says nothing of the speed
                    interval.finish()
                    watch.restart(interval.tokens)
                watch.update(interval.tokens)
                progress.update(step, interval.last_loss, *watch.speed)
                for every, hook in hooks:
                    if step == steps or (every and step % every == 0):
                        with watch.pause():
                            hook(step, state)
                if interval.skipped_in_a_row >= config.train.max_skipped_steps:
                    raise UserError(
                        f"step {step}: {interval.skipped_in_a_row} gradients in a row were not finite; lower "
                        "optimizer.learning_rate or lengthen the warm-up, then run again from the last checkpoint"
                    )
            if stop.requested:
                progress.log(f"{stop.requested}: saving step {step:,}; the same command goes on from there")
                save(step, state)
            elif step < steps:
                progress.log(f"step {step:,}: no better since step {best.step or 0:,}; ending early")
                save(step, state)
    return not stop.requested
