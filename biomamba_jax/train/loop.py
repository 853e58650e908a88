"""The training loop: trains a run directory to its last step, resuming from its newest checkpoint.

Run directory: config.yaml, checkpoints/, metrics.jsonl, timing.jsonl, tensorboard/, profile/, environment.json,
report.html.
`train` assembles a `TrainingRun` for pretraining, `supervised.finetune` one for fine-tuning.
"""

import dataclasses
import math
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from biomamba_jax import files
from biomamba_jax.config import ModelConfig, PretrainConfig, RunConfig
from biomamba_jax.data.mixture import MixedDocuments
from biomamba_jax.data.pipeline import Documents, TrainIterator
from biomamba_jax.data.shards import Manifest
from biomamba_jax.errors import UserError
from biomamba_jax.hardware import peak_memory_bytes
from biomamba_jax.interop.vocabulary import identity
from biomamba_jax.model.flops import training_flops_per_token
from biomamba_jax.model.language_model import compute_dtype
from biomamba_jax.parallel.mesh import host_batch, make_mesh, replicated, shard_batch
from biomamba_jax.train import setup
from biomamba_jax.train.checkpoints import Checkpoints
from biomamba_jax.train.heldout import held_out_evaluator
from biomamba_jax.train.meters import BestEvaluation, IntervalMeter, IntervalTotals, ThroughputMeter
from biomamba_jax.train.metrics import MetricsWriter
from biomamba_jax.train.optimizer import evaluation_weights
from biomamba_jax.train.profile import StepProfiler
from biomamba_jax.train.program import TrainProgram, pretrain_program
from biomamba_jax.train.progress import Progress
from biomamba_jax.train.report import RunReport
from biomamba_jax.train.step import TrainState
from biomamba_jax.train.stop import StopRequest

Metrics = Mapping[str, float]
Hook = Callable[[int, TrainState], Mapping[str, Metrics] | None]
"""(step, state) -> metrics by the name of what was measured, which are written into metrics.jsonl; or None."""
Measure = Callable[[ModelConfig, Any], Mapping[str, Metrics]]
"""(model, parameters) -> metrics of a model in training by the name of what was measured."""

NOT_FINITE = (
    "lower optimizer.learning_rate or lengthen the warm-up, and look at the documents in skipped.jsonl; --resume_from "
    "goes back to an earlier checkpoint"
)
"""Remedy for losses and gradients that are not finite."""


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """A training run: its config, program, data and hooks."""

    config: RunConfig
    """The resolved config; its model has a vocabulary."""
    program: TrainProgram
    """The training step."""
    steps: int
    """Optimizer steps of the run."""
    epoch_steps: float
    """Optimizer steps of one pass over the data."""
    documents: Documents | MixedDocuments
    """Training text, or examples."""
    evaluate: Callable[[Any], dict[str, float]]
    """Returns held-out metrics of parameters; the lowest "loss" marks the best ones."""
    num_workers: int = 0
    """Worker processes that read batches ahead; 0: a thread."""
    frozen: tuple[Any, ...] = ()
    """Further arguments of the step, which are not trained."""
    tokenizer: Path | None = None
    """Tokenizer file to copy into the run directory."""
    hooks: Sequence[tuple[int, Hook]] = ()
    """Extra hooks as (every_n_steps, hook); 0 runs only after the last step."""
    identity: dict[str, Any] = dataclasses.field(default_factory=dict)
    """JSON values saved with every checkpoint; a checkpoint with other values is refused."""
    messages: Sequence[str] = ()
    """Lines logged at the start."""


def train(config: PretrainConfig, params: Any = None, measure: Measure | None = None) -> bool:
    """Pretrain as `config` says, from the newest checkpoint in its run directory where there is one.

    Args:
      config: the run.
      params: a nested dict of arrays to start from where there is no checkpoint; None for random ones.
      measure: evaluates the model on tasks every `config.evaluate.every` steps and after the last one.

    Returns:
      True if the run is complete; False after SIGTERM or Ctrl-C.

    Raises:
      UserError: shards, checkpoint and config do not fit together, or gradients stayed non-finite.
    """
    manifest = Manifest.load(config.data.path)
    config = dataclasses.replace(config, model=setup.with_vocabulary(config.model, manifest))
    data, steps = config.data, setup.total_steps(config, manifest)
    setup.require_same_shards(data)
    program = pretrain_program(config, make_mesh(config.mesh), steps)
    tokenizer = setup.shards_tokenizer(data.path, manifest)

    def on_tasks(step: int, state: TrainState) -> Mapping[str, Metrics] | None:
        return measure and measure(config.model, evaluation_weights(state.params, state.optimizer))

    training = TrainingRun(
        config=config,
        program=program,
        steps=steps,
        epoch_steps=setup.epoch_tokens(data, manifest) / (data.batch_size * data.sequence_length),
        evaluate=held_out_evaluator(program.graph, data, program.layout, config.train.eval_batches),
        documents=setup.training_documents(data, manifest),
        num_workers=data.num_workers,
        tokenizer=tokenizer.path if tokenizer else None,
        identity={"tokenizer": identity(tokenizer)} if tokenizer else {},
        hooks=[(config.evaluate.every, on_tasks)],
    )
    return run(training, params)


def run(training: TrainingRun, params: Any = None) -> bool:
    """Run the loop; see `train`."""
    config, program, steps = training.config, training.program, training.steps
    run_dir, mesh = Path(config.run_dir), program.layout.mesh
    frozen = jax.device_put(training.frozen, replicated(mesh))

    with (
        files.naming_full_disks(run_dir, "free space, then run the same command to resume from the newest checkpoint"),
        Progress(steps) as progress,
        StopRequest() as stop,
        TrainIterator(
            training.documents,
            sequence_length=config.data.sequence_length,
            seed=config.train.seed,
            num_workers=training.num_workers,
            **host_batch(config.data.batch_size, mesh, config.train.accumulation),
        ) as batches,
        Checkpoints(run_dir, config.checkpoint, config.resume_from) as checkpoints,
    ):
        # --- Restore the newest checkpoint, or start from initial weights ------------------------------------------
        start = checkpoints.start
        changed = setup.changed_settings(config, start)
        saved: dict[str, Any] = {}
        if start is not None:
            state, saved = checkpoints.restore(program.state, changed)
            batches.set_state(saved["data"])
            for name, value in training.identity.items():
                if saved.get(name, value) != value:  # one of an earlier version names no tokenizer
                    raise UserError(
                        f"{run_dir}: was started with {name} {saved.get(name)}, not {value}; name another run_dir"
                    )
        elif params is None and config.init_from is not None:
            raise UserError(f"{run_dir}: its checkpoint disappeared during the start; run again to use init_from")
        else:
            state = program.init(params)
        best = BestEvaluation(**saved.get("best", {}))
        if start is not None and (start >= steps or best.is_stale(config.train.patience)):
            progress.log(f"nothing to do: the run is at step {start:,} of the {steps:,} steps of this config")
            return True
        if start is None:
            setup.record_settings(config, training.tokenizer, start)

        with (
            RunReport(run_dir if jax.process_index() == 0 else None, progress.log) as page,
            MetricsWriter(config, start) as metrics,
            StepProfiler(run_dir / "profile", config.train.profile_steps) as profiler,
        ):
            about = setup.describe(config, steps / training.epoch_steps, steps, start, state.params)
            news = (*training.messages, *(f"changed since this run began: {each}" for each in changed))
            for message in (about, *setup.compilation_cache(), *news):
                progress.log(message)

            recorded = start is None

            traced = config.train.profile_steps
            if traced and (traced[1] <= (start or 0) or traced[0] > steps):
                where = f"this start goes from step {start or 0:,} to {steps:,}"
                progress.log(f"train.profile_steps = {traced}: no trace, {where}")

            # --- Hooks between steps -------------------------------------------------------------------------------
            def report_metrics(step: int, split: str, values: Metrics, name: str = "") -> None:
                metrics.write(step, split, values)
                shown = ", ".join(
                    f"{key.replace('_', ' ')} {f'{value:,}' if isinstance(value, int) else f'{value:,.4f}'}"
                    for key, value in values.items()
                )
                progress.log(f"step {step:,}: {name or split} {shown}")

            def evaluate(step: int, state: TrainState) -> None:
                values = training.evaluate(evaluation_weights(state.params, state.optimizer))
                report_metrics(step, "validation", values, name="held-out")
                best.add(step, values["loss"])
                if config.checkpoint.keep_best and best.step == step:
                    save(step, state)
                is_last = step == steps or best.is_stale(config.train.patience)
                if (is_last or not step) and not math.isfinite(values["loss"]):
                    if step:
                        save(step, state)
                    raise UserError(
                        f"step {step:,}: the held-out loss is {values['loss']}; "
                        + (NOT_FINITE if step else "check the weights of init_from and the held-out text")
                    )

            def save(step: int, state: TrainState) -> None:
                nonlocal recorded
                if not recorded and step != start:  # from here on, the new settings have trained
                    setup.record_settings(config, training.tokenizer, start)
                    recorded = True
                metrics.sync()
                loop = {"data": batches.get_state(), "totals": interval.state(), "best": dataclasses.asdict(best)}
                kept = best.step if config.checkpoint.keep_best else None
                checkpoints.save(step, state, loop | training.identity, best=kept)
                page.update()

            def log(step: int, state: TrainState) -> None:
                drawn = {f"tokens/{name}": tokens for name, tokens in batches.tokens_by_source.items()}
                values = interval.values()
                rate = float(program.schedule(max(step - 1 - interval.skipped, 0)))  # skipped updates do not count
                metrics.write(step, "train", values | {"learning_rate": rate} | drawn)
                throughput.update(interval.totals.tokens)
                metrics.write_timing(step, throughput.speed._asdict() | {"peak_memory_bytes": peak_memory_bytes()})
                throughput.restart(interval.totals.tokens)

            def report_skipped(origin: Any, loss: float, norm: float) -> None:
                if jax.process_index() == 0:
                    step, rows = origin[0], batches.documents_of(origin[1])
                    metrics.write_skipped(step, {"loss": loss, "gradient_norm": norm, "rows": rows})
                    names = [document["pmid"] or document["document"] for row in rows for document in row["documents"]]
                    progress.log(
                        f"step {step:,}: update skipped, loss {loss}, gradient norm {norm}; rows {rows[0]['row']} to "
                        f"{rows[-1]['row']} hold documents {', '.join(map(str, names[:5]))} ... ({len(names)}, all in "
                        "skipped.jsonl)"
                    )

            hooks = [  # checkpoints come last: a checkpoint's metrics are written before it
                *training.hooks,
                (config.train.log_every, log),
                (config.train.eval_every, evaluate),
                (config.checkpoint.every, save),
            ]

            # --- The loop ------------------------------------------------------------------------------------------
            failure: UserError | None = None
            step, interval = start or 0, IntervalMeter(IntervalTotals(**saved.get("totals", {})), report_skipped)
            peak = setup.total_peak_flops(compute_dtype(config.model))
            throughput = ThroughputMeter(training_flops_per_token(config.model), peak)
            if start is None:
                if stop.requested:  # nothing is worth saving
                    raise SystemExit(128 + signal.Signals[stop.requested])
                evaluate(0, state)
            while step < steps and not stop.at(step) and not best.is_stale(config.train.patience):
                try:
                    with throughput.waiting():
                        batch = next(batches)
                except UserError as error:  # of a data worker or a shard; the state is healthy
                    failure = error
                    break
                step += 1
                with profiler.step(step):
                    state, report = program.step(state, shard_batch(batch, mesh), *frozen)
                profiler.ended(step, report)
                interval.add(report, (step, batches.origin))
                if step == (start or 0) + 1:  # leave compilation out of the speed
                    interval.finish()
                    throughput.restart(interval.totals.tokens)
                throughput.update(interval.totals.tokens)
                progress.update(step, interval.last_loss, throughput.speed)
                for every, hook in hooks:
                    if step == steps or (every and step % every == 0):
                        with throughput.pause():
                            for name, values in (hook(step, state) or {}).items():
                                report_metrics(step, name, values)
                trained = step - (start or 0)
                most = min(config.train.max_skipped_steps, trained if step == steps else math.inf)
                if interval.skipped_in_a_row >= most:
                    reason = f"{interval.skipped_in_a_row} consecutive losses or gradients were not finite"
                    raise UserError(f"step {step}: {reason}; {NOT_FINITE}")
            if stop.requested:
                progress.log(f"{stop.requested}: saving step {step:,}; run the same command to resume")
                save(step, state)
            elif failure is not None:
                if jax.process_count() > 1 or step == start:  # the other processes cannot save this step
                    raise failure
                save(step, state)
                raise UserError(f"{failure}; step {step:,} is saved: run the same command to resume")
            elif step < steps:
                progress.log(f"step {step:,}: no better since step {best.step or 0:,}; ending early")
                save(step, state)
    return not stop.requested
