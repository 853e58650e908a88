"""The training loop: from a config to a trained run directory, resumed by itself where one exists.

Run directory: config.yaml, checkpoints/, metrics.jsonl, timing.jsonl, tensorboard/, environment.json, report.html.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from biomamba_jax.config import PretrainConfig
from biomamba_jax.data.pipeline import train_iterator
from biomamba_jax.data.shards import Manifest
from biomamba_jax.errors import UserError
from biomamba_jax.model import LanguageModel
from biomamba_jax.model.flops import training_flops_per_token
from biomamba_jax.model.language_model import compute_dtype
from biomamba_jax.parallel.hardware import peak_memory_bytes
from biomamba_jax.parallel.mesh import data_mesh, replicated, rows_per_host, shard_rows
from biomamba_jax.train.checkpoints import Checkpoints
from biomamba_jax.train.heldout import HeldOut
from biomamba_jax.train.interval import Interval, Stopwatch, Totals
from biomamba_jax.train.metrics import MetricsWriter
from biomamba_jax.train.optimizer import evaluated_weights, make_optimizer
from biomamba_jax.train.progress import Progress
from biomamba_jax.train.report import write_report
from biomamba_jax.train.schedule import learning_rate
from biomamba_jax.train.setup import (
    describe,
    initial_state,
    open_run_dir,
    total_peak_flops,
    total_steps,
    with_vocabulary,
)
from biomamba_jax.train.step import TrainState, language_model_loss, make_train_step
from biomamba_jax.train.stop import StopRequest


def train(config: PretrainConfig, params: Any = None) -> int:
    """Trains as `config` says, from the newest checkpoint in its run directory where there is one.

    Args:
      params: a nested dict of arrays to start from where there is no checkpoint; None starts from random ones.

    Returns:
      The step that was reached: less than asked for only after SIGTERM or Ctrl-C.

    Raises:
      UserError: shards, checkpoint and config do not fit together, or gradients stayed non-finite.
    """
    # --- Data, model and optimizer ---------------------------------------------------------------------------------
    run_dir, mesh = Path(config.run_dir), data_mesh()
    manifest = Manifest.load(config.data.path)
    config = dataclasses.replace(config, model=with_vocabulary(config.model, manifest))
    steps = total_steps(config, manifest)
    schedule = learning_rate(config.schedule, config.optimizer.learning_rate, steps)
    optimizer = make_optimizer(config.optimizer, config.model, schedule)
    graph = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config.model, rngs=nnx.Rngs(0))))
    loss = language_model_loss(graph, config.loss)
    train_step = jax.jit(make_train_step(loss, optimizer, config.train.accumulation, mesh), donate_argnums=0)
    held_out = HeldOut(graph, config.data, mesh, batches=config.train.eval_batches)
    batches = train_iterator(
        config.data.path,
        sequence_length=config.data.sequence_length,
        batch_size=rows_per_host(config.data.batch_size, mesh, config.train.accumulation),
        seed=config.train.seed,
        num_workers=config.data.num_workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )

    with batches, Checkpoints(run_dir, config.checkpoint) as checkpoints:
        # --- A fresh start, or on from the newest checkpoint -------------------------------------------------------
        start = checkpoints.latest
        fresh = jax.jit(
            lambda params: initial_state(config.model, optimizer, config.train.seed, params),
            out_shardings=replicated(mesh),
        )
        if start is None:
            state, totals = fresh(params), Totals()
        else:
            like = jax.tree.map(lambda x: x.update(sharding=replicated(mesh)), jax.eval_shape(fresh, params))
            state, saved = checkpoints.restore(like)
            batches.set_state(saved["data"])
            totals = Totals(**saved["totals"])
        notes = open_run_dir(run_dir, config, manifest, start)

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
            for note in (describe(config, manifest, steps, start, state.params), *notes):
                progress.log(note)

            # --- What happens between steps ------------------------------------------------------------------------
            def evaluate(step: int, state: TrainState) -> None:
                values = held_out(evaluated_weights(state.params, state.optimizer))
                metrics.write(step, "validation", values)
                text = f"{values['perplexity']:.2f}, {values['bits_per_byte']:.4f} bits per byte"
                progress.log(f"step {step:,}: held-out perplexity {text}")

            def save(step: int, state: TrainState) -> None:
                metrics.sync()
                checkpoints.save(step, state, {"data": batches.get_state(), "totals": interval.state()})
                if jax.process_index() == 0:
                    write_report(run_dir)

            def log(step: int, state: TrainState) -> None:
                metrics.write(step, "train", interval.line() | {"learning_rate": float(schedule(step - 1))})
                watch.update(interval.tokens)
                metrics.write_timing(step, watch.speed._asdict() | {"peak_memory_bytes": peak_memory_bytes()})
                watch.restart(interval.tokens)

            hooks = [  # a checkpoint is last: its metrics lines are written before it is
                (config.train.log_every, log),
                (config.train.eval_every, evaluate),
                (config.checkpoint.every, save),
            ]

            # --- The loop ------------------------------------------------------------------------------------------
            step, interval = start or 0, Interval(totals)
            watch = Stopwatch(training_flops_per_token(config.model), total_peak_flops(compute_dtype(config.model)))
            if start is None:
                evaluate(0, state)
            while step < steps and not stop.requested:
                with watch.waiting():
                    batch = next(batches)
                state, report = train_step(state, shard_rows(batch, mesh))
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
    return step
