"""Checkpoints of a run, on orbax: written in the background, atomic, and checked against the run before restoring.

A checkpoint holds the train state (parameters, optimizer state, moving average, step, random key, counters) and, as
JSON, what the loop needs to resume exactly: the data iterator's state and the sums of the metrics line in progress.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from biomamba_jax.config import CheckpointConfig
from biomamba_jax.errors import UserError
from biomamba_jax.parallel.sharding import leaves_by_path

_FOLDER = "checkpoints"


class _Best(policies.PreservationPolicy):
    """Preserves one step."""

    step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [checkpoint.step == self.step for checkpoint in checkpoints]


def has_checkpoint(run_dir: Path) -> bool:
    """Return True if a run has a complete checkpoint; one that a killed process left half-written does not count."""
    return bool(ocp.utils.checkpoint_steps(run_dir / _FOLDER))


class Checkpoints:
    """The checkpoints of one run directory; a context manager that waits for writes in progress when it closes."""

    def __init__(self, run_dir: Path, config: CheckpointConfig):
        self.folder = run_dir / _FOLDER
        self._best = _Best()
        kept: list[policies.PreservationPolicy] = [policies.LatestN(config.keep_last), self._best]
        if config.keep_every:
            kept.append(policies.EveryNSteps(config.keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,  # left half-written by a killed process
            enable_async_checkpointing=True,
        )
        # Handlers are named here so that a new process can read what an earlier one wrote.
        handlers = {"state": ocp.StandardCheckpointHandler(), "loop": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder.absolute(), options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

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

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """Return the newest checkpoint's state and loop data.

        Args:
          like: the state expected, as arrays or `jax.ShapeDtypeStruct`s with shardings.

        Raises:
          UserError: there is none, or its tree, shapes or dtypes differ; the message lists every difference.
        """
        step = self.latest
        if step is None:
            raise UserError(f"{self.folder}: no checkpoint")
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        metadata = self._manager.item_metadata(step)
        check_same_tree(metadata["state"], like, f"{self.folder / str(step)}")
        items = ocp.args.Composite(state=ocp.args.StandardRestore(like), loop=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        return restored["state"], restored["loop"]


def check_same_tree(saved: Any, expected: Any, where: str) -> None:
    """Compare two trees of arrays (or of anything with shape and dtype) by path, shape and dtype.

    Raises:
      UserError: they differ; the message lists key, saved and expected.
    """
    left, right = (
        {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves_by_path(tree).items()}
        for tree in (saved, expected)
    )
    keys = [key for key in sorted(left | right) if left.get(key) != right.get(key)]
    if keys:
        rows = "; ".join(f"{key}: saved {left.get(key, '-')}, expected {right.get(key, '-')}" for key in keys)
        raise UserError(f"{where} does not fit this config ({len(keys)} differences): {rows}")
