"""Checkpoints of a run, on orbax: written in the background, atomic, and checked against the run before restoring.

A checkpoint holds the train state (parameters, optimizer state, moving average, step, random key, counters) and, as
JSON, what the loop needs to resume exactly: the data iterator's state and the sums of the metrics line in progress.
Before it gets its name, the sha256 of each of its files is written next to them.
"""

import asyncio
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from orbax.checkpoint import checkpoint_managers as policies

from biomamba_jax import folders
from biomamba_jax.config import CheckpointConfig
from biomamba_jax.errors import UserError
from biomamba_jax.interop import run_dir as run_files
from biomamba_jax.parallel.distributed import DATA_TIMEOUT, barrier
from biomamba_jax.parallel.sharding import leaves_by_path

# Orbax and, for each array of a write that failed, asyncio log with a traceback what is raised later.
for _logger in (absl_logging.get_absl_logger(), logging.getLogger("asyncio")):
    _logger.addFilter(lambda record: not record.exc_info)

REPLACED = "replaced_after_{step}"
"""Folder that keeps the checkpoints after the one that `resume_from` went back to."""


class _Best(policies.PreservationPolicy):
    """Preserves one step."""

    step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [checkpoint.step == self.step for checkpoint in checkpoints]


class _WithDigests(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A checkpoint's folder before it gets its name."""

    _checkpoint_metadata_store: Any

    async def finalize(self) -> None:
        """Write the digests of all files, and rename the folder."""
        if self.get_final().name.isdigit():  # the checkpoint, not one of its items
            store, self._checkpoint_metadata_store = self._checkpoint_metadata_store, None
            if store:  # writes its file in a thread; without the store orbax does not write a time after the digests
                await asyncio.to_thread(store.wait_until_finished)
            (self.get() / ocp.path.atomicity.COMMIT_SUCCESS_FILE).write_text(
                f"Checkpoint commit was successful to {self.get_final()}"  # as orbax does, after the digests
            )
            await asyncio.to_thread(folders.write_digests, Path(self.get()))
        await super().finalize()


class Checkpoints:
    """The checkpoints of one run directory; a context manager that waits for writes in progress when it closes."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, resume_from: int | None = None):
        """Find the checkpoint to resume from and check its files.

        Args:
          run_dir: the run's directory.
          config: how often checkpoints are kept, and whether their files are checked.
          resume_from: step to go back to, once: later checkpoints are moved to `replaced_after_STEP/`.

        Raises:
          UserError: the checkpoint is damaged, or `resume_from` has none.
        """
        self.folder, self._run_dir = run_dir / run_files.CHECKPOINTS, run_dir
        self.start = self._find_start(resume_from, config.verify)
        """The step to resume from; None without checkpoints."""
        self._best = _Best()
        kept: list[policies.PreservationPolicy] = [policies.LatestN(config.keep_last), self._best]
        if config.keep_every:
            kept.append(policies.EveryNSteps(config.keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,  # left half-written by a killed process
            enable_async_checkpointing=True,
            temporary_path_class=_WithDigests,
            lightweight_initialize=True,  # or a damaged file of another checkpoint would be an error here
        )
        # Handlers are named here so that a new process can read what an earlier one wrote.
        handlers = {"state": ocp.StandardCheckpointHandler(), "loop": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder.absolute(), options=options, item_handlers=handlers)

    def _find_start(self, resume_from: int | None, verify: bool) -> int | None:
        steps = run_files.complete_steps(self._run_dir)
        replaced = self._run_dir / REPLACED.format(step=resume_from)
        if resume_from is not None and resume_from not in steps:
            raise UserError(f"resume_from = {resume_from}: {self.folder} has checkpoints of steps {steps}; give one")
        go_back = resume_from is not None and not replaced.exists()
        start = resume_from if go_back else max(steps, default=None)
        if start is not None and verify:
            run_files.verify(self._run_dir, start, jax.process_index(), jax.process_count())
        barrier("checkpoint verified", timeout=DATA_TIMEOUT)
        if go_back and jax.process_index() == 0:
            moved = replaced.with_name(f"{replaced.name}.partial")  # a start that is killed here does not count
            moved.mkdir(exist_ok=True)
            for step in steps:
                if start is not None and step > start:
                    os.rename(self.folder / str(step), moved / str(step))
            os.rename(moved, replaced)
        barrier("checkpoints replaced", timeout=DATA_TIMEOUT)
        return start

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def save(self, step: int, state: Any, loop: dict[str, Any], *, best: int | None = None) -> None:
        """Start writing a checkpoint, unless the step has one; return as soon as the arrays have been copied.

        Args:
          step: optimizer steps done.
          state: a pytree of arrays.
          loop: JSON values.
          best: a step whose checkpoint is preserved however many follow.
        """
        self._best.step = best
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), loop=ocp.args.JsonSave(loop))
        self._manager.save(step, args=items, force=True)

    def restore(self, like: Any, changed: Sequence[str] = ()) -> tuple[Any, dict[str, Any]]:
        """Return the state and loop data of the checkpoint to resume from.

        Args:
          like: the state expected, as arrays or `jax.ShapeDtypeStruct`s with shardings.
          changed: what differs from the settings that trained the checkpoint, for the message.

        Raises:
          UserError: there is none, it is damaged, or its tree, shapes or dtypes differ; the message says how.
        """
        if self.start is None:
            raise UserError(f"{self.folder}: no checkpoint")
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        with run_files.reading(self._run_dir, self.start):
            saved = self._manager.item_metadata(self.start)["state"]
            check_same_tree(saved, like, f"{self.folder / str(self.start)}", changed)
            items = ocp.args.Composite(state=ocp.args.StandardRestore(like))
            return self._manager.restore(self.start, args=items)["state"], run_files.read_loop(
                self._run_dir, self.start
            )


def check_same_tree(saved: Any, expected: Any, where: str, changed: Sequence[str] = ()) -> None:
    """Compare two trees of arrays (or of anything with shape and dtype) by path, shape and dtype.

    Raises:
      UserError: they differ; the message has those of `changed` that concern it, or else the first differences.
    """
    left, right = (
        {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves_by_path(tree).items()}
        for tree in (saved, expected)
    )
    keys = [key for key in sorted(left | right) if left.get(key) != right.get(key)]
    if keys:
        rows = [f"{key}: saved {left.get(key, '-')}, expected {right.get(key, '-')}" for key in keys[:3]]
        settings = [each for each in changed if each.startswith(("model.", "optimizer.", "lora."))]
        reason = "; ".join((settings or rows)[:3] + ["..."] * (len(settings or keys) > 3))
        raise UserError(
            f"{where} does not fit this config ({len(keys)} tensors differ): {reason}; restore the setting or name "
            "another run_dir"
        )
