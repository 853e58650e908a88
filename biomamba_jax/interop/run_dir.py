"""Settings, checkpoints and digests of a run directory, for training and for every command that reads a run.

config.yaml           the settings that trained the newest checkpoint
history.jsonl         {"step": s, "config": settings from step s on}, a line for each change
checkpoints/STEP/     state and loop of orbax, and SHA256SUMS of all files, written last
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
import yaml
from etils import epath
from flax.traverse_util import flatten_dict

from biomamba_jax import files, folders
from biomamba_jax.errors import UserError
from biomamba_jax.interop import native

CHECKPOINTS, CONFIG, HISTORY = "checkpoints", "config.yaml", "history.jsonl"
_PLACES = r"run_dir|resume_from|distributed\."
"""Settings of where a run is and how its processes meet, which differ from start to start."""


# --- Settings --------------------------------------------------------------------------------------------------------


def read_settings(run_dir: Path) -> dict[str, Any]:
    """Return the settings of config.yaml.

    Raises:
      UserError: the file cannot be read or holds no settings.
    """
    try:
        return files.read_yaml(run_dir / CONFIG)
    except UserError as error:
        raise UserError(f"{run_dir / CONFIG}: is not the config of a run ({error})") from None


def settings_by_step(run_dir: Path, end: int) -> list[tuple[int, dict[str, Any]]]:
    """Return (first step, settings) of each change of settings before step `end`, in order; at least one.

    Raises:
      UserError: history.jsonl or, without one, config.yaml is damaged.
    """
    path = run_dir / HISTORY
    if not path.exists():  # a run of an earlier version
        return [(0, read_settings(run_dir))]
    changes = []
    for number, line in files.read_json_lines(path):
        step, settings = line.get("step"), line.get("config")
        if type(step) is not int or not isinstance(settings, dict):
            raise UserError(f"{path}, line {number}: does not hold a step and a config; delete it")
        changes.append((step, settings))
    return [change for change in changes if change[0] < max(end, 1)] or changes[:1] or [(0, read_settings(run_dir))]


def write_settings(run_dir: Path, settings: Mapping[str, Any], start: int) -> None:
    """Write config.yaml and history.jsonl of a run whose steps from `start` on are trained with `settings`."""
    earlier = settings_by_step(run_dir, start) if start and (run_dir / CONFIG).exists() else []
    if not earlier or changed(earlier[-1][1], settings):
        earlier.append((start, dict(settings)))
    files.write_json_lines(run_dir / HISTORY, [{"step": step, "config": config} for step, config in earlier])
    files.write_text(run_dir / CONFIG, yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return (value before, value now) of every setting of training that differs, by its dotted key."""
    old, new = (flatten_dict(settings, sep=".") for settings in (before, now))
    return {key: (old.get(key), new[key]) for key in new if old.get(key) != new[key] and not re.match(_PLACES, key)}


# --- Checkpoints -----------------------------------------------------------------------------------------------------


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return run_dir / CHECKPOINTS / str(step)


def complete_steps(run_dir: Path) -> list[int]:
    """Return the steps that have a checkpoint, ascending; one that was deleted or copied in part does not count."""
    folders = (run_dir / CHECKPOINTS).glob("[0-9]*")
    return sorted(int(each.name) for each in folders if each.name.isdigit() and (each / "state").is_dir())


def verify(run_dir: Path, step: int, part: int = 0, parts: int = 1) -> None:
    """Compare a checkpoint with its digests; see `folders.check_digests`.

    Raises:
      UserError: a file is damaged; names it, and the newest checkpoint that is whole.
    """
    try:
        folders.check_digests(checkpoint_folder(run_dir, step), part, parts)
    except UserError as error:
        raise _damaged(run_dir, step, str(error)) from None


@contextmanager
def reading(run_dir: Path, step: int) -> Iterator[None]:
    """Convert damage that a block finds in a checkpoint into an error that also names the newest one that is whole."""
    try:
        with native.naming_errors(checkpoint_folder(run_dir, step)):
            yield
    except native.Damaged as error:
        raise _damaged(run_dir, step, str(error)) from None


def _damaged(run_dir: Path, step: int, reason: str) -> UserError:
    remedy = "no other checkpoint is whole: use a copy, or start again in another run_dir"
    for other in reversed([each for each in complete_steps(run_dir) if each != step]):
        with suppress(UserError):
            folders.check_digests(checkpoint_folder(run_dir, other))
            resume = f"resume with --resume_from {other}, or " if other < step else ""
            remedy = f"the newest whole checkpoint is of step {other}: {resume}move {step} elsewhere"
            break
    return UserError(f"checkpoint {step}: {reason}; {remedy}")


def read_loop(run_dir: Path, step: int) -> dict[str, Any]:
    """Return the training loop's entry of a checkpoint, {} if it has none.

    Raises:
      UserError: the entry is damaged.
    """
    folder = checkpoint_folder(run_dir, step) / "loop"
    if not folder.exists():
        return {}
    with reading(run_dir, step), native.naming_errors(folder), closing(ocp.JsonCheckpointHandler()) as handler:
        loop = handler.restore(epath.Path(folder.absolute()))
        if not isinstance(loop, dict) or not isinstance(loop.get("best") or {}, dict):
            raise native.Damaged(f"{folder}: was not written by the training loop")
        return loop
