"""The training loop: trains a run directory to its last step, resuming from its newest checkpoint.

Run directory: config.yaml, checkpoints/, metrics.jsonl, timing.jsonl, tensorboard/, profile/, environment.json,
report.html.
`train` assembles a `TrainingRun` for pretraining, `supervised.finetune` one for fine-tuning, and
`contrastive.train_embeddings` one for embeddings; `run` runs it.
"""

import dataclasses
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax

from biomamba_jax import files
from biomamba_jax.config import ModelConfig, PretrainConfig, RunConfig
from biomamba_jax.data.mixture import MixedDocuments
from biomamba_jax.data.pipeline import Batch, Documents, TrainIterator
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
    run_dir = Path(training.config.run_dir)
    remedy = "free space, then run the same command to resume from the newest checkpoint"
    with files.naming_full_disks(run_dir, remedy), ExitStack() as contexts:
        loop = _Loop(training, params, contexts)
        if loop.start is not None and (loop.start >= loop.steps or loop.is_stale()):
            where = f"the run is at step {loop.start:,} of the {loop.steps:,} steps of this config"
            loop.progress.log(f"nothing to do: {where}")
            return True
        loop.open_writers(contexts)
        loop.run()
        return not loop.stop.requested


class _Loop:
    """The steps of one start of a run, and the evaluations, metrics and checkpoints between them."""

    def __init__(self, training: TrainingRun, params: Any, contexts: ExitStack) -> None:
        """Restore the newest checkpoint, or start from initial weights.

        Args:
          training: the run.
          params: see `train`.
          contexts: closes what the loop opens.
        """
        config, program = training.config, training.program
        self.training, self.config, self.program, self.steps = training, config, program, training.steps
        self.run_dir, self.mesh = Path(config.run_dir), program.layout.mesh
        self.frozen = jax.device_put(training.frozen, replicated(self.mesh))
        self.progress = contexts.enter_context(Progress(self.steps))
        self.stop = contexts.enter_context(StopRequest())
        batches = TrainIterator(
            training.documents,
            sequence_length=config.data.sequence_length,
            seed=config.train.seed,
            num_workers=training.num_workers,
            **host_batch(config.data.batch_size, self.mesh, config.train.accumulation),
        )
        self.batches = contexts.enter_context(batches)
        self.checkpoints = contexts.enter_context(Checkpoints(self.run_dir, config.checkpoint, config.resume_from))
        self.start = self.checkpoints.start
        self.changed = setup.changed_settings(config, self.start)
        saved: dict[str, Any] = {}
        if self.start is not None:
            self.state, saved = self._restore()
        elif params is None and config.init_from is not None:
            raise UserError(f"{self.run_dir}: its checkpoint disappeared during the start; run again to use init_from")
        else:
            self.state = program.init(params)
        self.step = self.first_step = self.start or 0
        self.best = BestEvaluation(**saved.get("best", {}))
        self.interval = IntervalMeter(IntervalTotals(**saved.get("totals", {})), self._report_skipped)

    def _restore(self) -> tuple[TrainState, dict[str, Any]]:
        """Return the newest checkpoint's state and loop data, and continue its batches."""
        state, saved = self.checkpoints.restore(self.program.state, self.changed)
        self.batches.set_state(saved["data"])
        for name, value in self.training.identity.items():
            if saved.get(name, value) != value:  # one of an earlier version names no tokenizer
                raise UserError(
                    f"{self.run_dir}: was started with {name} {saved.get(name)}, not {value}; name another run_dir"
                )
        return state, saved

    def open_writers(self, contexts: ExitStack) -> None:
        """Open the files that the run writes, and log what is about to run."""
        if self.start is None:
            setup.record_settings(self.config, self.training.tokenizer, self.start)
        self.settings_recorded = self.start is None
        page = RunReport(self.run_dir if jax.process_index() == 0 else None, self.progress.log)
        self.page = contexts.enter_context(page)
        self.metrics = contexts.enter_context(MetricsWriter(self.config, self.start))
        profiler = StepProfiler(self.run_dir / "profile", self.config.train.profile_steps)
        self.profiler = contexts.enter_context(profiler)
        for message in self._messages():
            self.progress.log(message)
        peak = setup.total_peak_flops(compute_dtype(self.config.model))
        self.throughput = ThroughputMeter(training_flops_per_token(self.config.model), peak)

    def _messages(self) -> Iterator[str]:
        """Yield the lines that are logged before the first step."""
        epochs, traced = self.steps / self.training.epoch_steps, self.config.train.profile_steps
        yield setup.describe(self.config, epochs, self.steps, self.start, self.state.params)
        yield from setup.compilation_cache()
        yield from self.training.messages
        yield from (f"changed since this run began: {each}" for each in self.changed)
        if traced and (traced[1] <= self.first_step or traced[0] > self.steps):
            where = f"this start goes from step {self.first_step:,} to {self.steps:,}"
            yield f"train.profile_steps = {traced}: no trace, {where}"

    def is_stale(self) -> bool:
        """Return True if evaluations have been no better for as long as the config's patience."""
        return self.best.is_stale(self.config.train.patience)

    def run(self) -> None:
        """Train to the last step, or until a signal, patience or a failure ends the run early.

        Raises:
          UserError: gradients stayed non-finite, a batch could not be read, or a hook refused to go on.
        """
        if self.start is None:
            if self.stop.requested:  # nothing is worth saving
                raise SystemExit(128 + signal.Signals[self.stop.requested])
            self._evaluate()
        failure: UserError | None = None
        while self.step < self.steps and not self.stop.at(self.step) and not self.is_stale():
            try:
                with self.throughput.waiting():
                    batch = next(self.batches)
            except UserError as error:  # of a data worker or a shard; the state is healthy
                failure = error
                break
            self._train(batch)
            self._run_hooks()
            self._check_skipped()
        self._end(failure)

    def _train(self, batch: Batch) -> None:
        self.step += 1
        with self.profiler.step(self.step):
            self.state, report = self.program.step(self.state, shard_batch(batch, self.mesh), *self.frozen)
        self.profiler.ended(self.step, report)
        self.interval.add(report, (self.step, self.batches.origin))
        if self.step == self.first_step + 1:  # leave compilation out of the speed
            self.interval.finish()
            self.throughput.restart(self.interval.totals.tokens)
        self.throughput.update(self.interval.totals.tokens)
        self.progress.update(self.step, self.interval.last_loss, self.throughput.speed)

    def _run_hooks(self) -> None:
        train, checkpoint = self.config.train, self.config.checkpoint
        hooks: list[tuple[int, Callable[[], None]]] = [
            *((every, partial(self._measure, hook)) for every, hook in self.training.hooks),
            (train.log_every, self._log),
            (train.eval_every, self._evaluate),
            (checkpoint.every, self._save),  # last: a checkpoint's metrics are written before it
        ]
        for every, hook in hooks:
            if self.step == self.steps or (every and self.step % every == 0):
                with self.throughput.pause():
                    hook()

    def _check_skipped(self) -> None:
        """Raise a UserError if too many updates in a row, or all of a start that has ended, were skipped."""
        trained = self.step - self.first_step
        most = min(self.config.train.max_skipped_steps, trained if self.step == self.steps else math.inf)
        if self.interval.skipped_in_a_row >= most:
            reason = f"{self.interval.skipped_in_a_row} consecutive losses or gradients were not finite"
            raise UserError(f"step {self.step}: {reason}; {NOT_FINITE}")

    def _end(self, failure: UserError | None) -> None:
        """Save the step at which a run ends early, and say why it does."""
        if self.stop.requested:
            self.progress.log(f"{self.stop.requested}: saving step {self.step:,}; run the same command to resume")
            self._save()
        elif failure is not None:
            if jax.process_count() > 1 or self.step == self.start:  # the other processes cannot save this step
                raise failure
            self._save()
            raise UserError(f"{failure}; step {self.step:,} is saved: run the same command to resume")
        elif self.step < self.steps:
            self.progress.log(f"step {self.step:,}: no better since step {self.best.step or 0:,}; ending early")
            self._save()

    # --- Hooks -------------------------------------------------------------------------------------------------------

    def _measure(self, hook: Hook) -> None:
        for name, values in (hook(self.step, self.state) or {}).items():
            self._write_metrics(name, values, name)

    def _log(self) -> None:
        drawn = {f"tokens/{name}": tokens for name, tokens in self.batches.tokens_by_source.items()}
        values = self.interval.values()
        updates = self.step - self.interval.skipped  # skipped updates do not count
        rate = float(self.program.schedule(max(updates - 1, 0)))
        self.metrics.write(self.step, "train", values | {"learning_rate": rate} | drawn)
        self.throughput.update(self.interval.totals.tokens)
        speed = self.throughput.speed._asdict()
        self.metrics.write_timing(self.step, speed | {"peak_memory_bytes": peak_memory_bytes()})
        self.throughput.restart(self.interval.totals.tokens)

    def _evaluate(self) -> None:
        values = self.training.evaluate(evaluation_weights(self.state.params, self.state.optimizer))
        self._write_metrics("validation", values, "held-out")
        self.best.add(self.step, values["loss"])
        if self.config.checkpoint.keep_best and self.best.step == self.step:
            self._save()
        is_first, is_last = self.step == 0, self.step == self.steps or self.is_stale()
        if (is_first or is_last) and not math.isfinite(values["loss"]):
            if not is_first:
                self._save()
            remedy = "check the weights of init_from and the held-out text" if is_first else NOT_FINITE
            raise UserError(f"step {self.step:,}: the held-out loss is {values['loss']}; {remedy}")

    def _save(self) -> None:
        if not self.settings_recorded and self.step != self.start:  # from here on, the new settings have trained
            setup.record_settings(self.config, self.training.tokenizer, self.start)
            self.settings_recorded = True
        self.metrics.sync()
        loop = {
            "data": self.batches.get_state(),
            "totals": self.interval.state(),
            "best": dataclasses.asdict(self.best),
            **self.training.identity,
        }
        kept = self.best.step if self.config.checkpoint.keep_best else None
        self.checkpoints.save(self.step, self.state, loop, best=kept)
        self.page.update()

    # --- Reports -----------------------------------------------------------------------------------------------------

    def _write_metrics(self, split: str, values: Metrics, name: str) -> None:
        self.metrics.write(self.step, split, values)
        shown = ", ".join(
            f"{key.replace('_', ' ')} {f'{value:,}' if isinstance(value, int) else f'{value:,.4f}'}"
            for key, value in values.items()
        )
        self.progress.log(f"step {self.step:,}: {name} {shown}")

    def _report_skipped(self, origin: Any, loss: float, norm: float) -> None:
        if jax.process_index() != 0:
            return
        step, rows = origin[0], self.batches.documents_of(origin[1])
        self.metrics.write_skipped(step, {"loss": loss, "gradient_norm": norm, "rows": rows})
        names = [document["pmid"] or document["document"] for row in rows for document in row["documents"]]
        self.progress.log(
            f"step {step:,}: update skipped, loss {loss}, gradient norm {norm}; rows {rows[0]['row']} to "
            f"{rows[-1]['row']} hold documents {', '.join(map(str, names[:5]))} ... ({len(names)}, all in "
            "skipped.jsonl)"
        )
