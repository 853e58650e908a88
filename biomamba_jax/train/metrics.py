"""Metrics of a run: `metrics.jsonl`, `timing.jsonl`, `skipped.jsonl`, TensorBoard events and Weights & Biases.

`metrics.jsonl` holds only values that the seed determines, so a run that was killed and resumed writes the same bytes
as an uninterrupted one; `timing.jsonl` holds what differs from run to run (tokens/s, waits, memory, the time of day).
`skipped.jsonl` exists once an update was skipped, and holds the documents of such steps.
One JSON object per line:

    {"step": 10, "split": "train", "loss": 6.25, "learning_rate": 0.001, "tokens": 81920}
    {"step": 10, "split": "validation", "loss": 6.5, "perplexity": 665.1, "bits_per_byte": 2.1}
    {"step": 10, "time": 1795376876.12, "tokens_per_second": 5120.0, "data_wait_share": 0.001}

Resume is exact because of the order: write every line of step s, `sync()`, save the checkpoint of step s. A run resumed
from it opens the writer with `last_step=s`, which drops the lines after s: they will be written again.
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import jax

from biomamba_jax import files
from biomamba_jax.config import RunConfig
from biomamba_jax.errors import UserError
from biomamba_jax.extras import extra

METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"
SKIPPED = "skipped.jsonl"

Record = dict[str, Any]

_NEEDED = {METRICS: ("split",), TIMING: ("time",)}
"""Keys that every line of a file has in addition to its step."""
# JSON has no such numbers, and a diverged run's lines must still be readable by every JSON parser.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsWriter:
    """Writes the metrics of one run: JSON lines, and optionally TensorBoard events and a Weights & Biases run.

    Every line is flushed, so that `tail -f` and a SIGKILL see whole lines. Only the first process writes; on the others
    all methods do nothing.
    """

    def __init__(self, config: RunConfig, last_step: int | None) -> None:
        """Open the files, without the lines that a resumed run writes again.

        Args:
          config: the run; its directory is made if it does not exist.
          last_step: step of the restored checkpoint, whose later lines are dropped; None for a new run.

        Raises:
          UserError: a line in the middle of a file is not JSON, or wandb is not installed.
        """
        self._folder, self._open = Path(config.run_dir), contextlib.ExitStack()
        self._files: dict[str, BinaryIO] = {}
        self._events: _Events | None = None
        self._wandb: Any = None
        if jax.process_index() != 0:
            return
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / SKIPPED).exists():
            _drop_after(folder / SKIPPED, last_step)
        for name in (METRICS, TIMING):
            _drop_after(folder / name, last_step)
            self._files[name] = self._open.enter_context((folder / name).open("ab"))
        if config.tensorboard:
            self._events = _Events(folder / "tensorboard", 0 if last_step is None else last_step + 1)
            self._open.callback(self._events.close)
        if config.wandb_project is not None:
            self._wandb = _wandb_run(config, resumed=last_step is not None)
            self._open.callback(self._wandb.finish)

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Write one line of values that the seed determines.

        Args:
          step: optimizer steps done so far.
          split: "train", "validation", or "evaluate/" and the name of a task.
          values: name -> integer or float (Python, NumPy or JAX scalar), in the order of the line.
        """
        self._write(METRICS, {"step": int(step), "split": split}, split, values)

    def write_timing(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line of values that differ from run to run, with the time of day; a None is left out."""
        given = {name: value for name, value in values.items() if value is not None}
        self._write(TIMING, {"step": int(step), "time": round(time.time(), 3)}, "timing", given)

    def write_skipped(self, step: int, values: Mapping[str, Any]) -> None:
        """Add one line of JSON values about a step whose update was skipped to `skipped.jsonl`."""
        with (self._folder / SKIPPED).open("ab") as file:
            file.write(_line({"step": int(step)} | dict(values)))

    def _write(self, file: str, about: Record, prefix: str, values: Mapping[str, Any]) -> None:
        if file not in self._files:
            return
        # A float32's Python number is exact, and JSON writes its repr.
        numbers = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
        self._files[file].write(_line(about | numbers))
        self._files[file].flush()
        curves = {f"{prefix}/{name}": value for name, value in numbers.items()}
        if self._events is not None:
            self._events.write(about["step"], curves)
        if self._wandb is not None:
            self._wandb.log(curves | {"step": about["step"]})

    def sync(self) -> None:
        """Return once every line is on disk, safe from a crash of the machine. Call before each checkpoint."""
        for file in self._files.values():
            os.fsync(file.fileno())
        if self._events is not None:
            self._events.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.sync()
        self._open.close()


class _Events:
    """A file of TensorBoard events, written by its caller: the thread of the library's writer dies of a full disk."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        """Begin a file; TensorBoard hides events of earlier files from `purge_step` on, which cannot be taken back."""
        hidden = {"torch": None} if "torch" not in sys.modules else {}  # which the library would import (5 s, 460 MB)
        sys.modules.update(hidden)  # type: ignore[arg-type]
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.summary import scalar
        finally:
            for name in hidden:
                del sys.modules[name]
        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._scalar, self._file = Event, scalar, EventsWriter(str(folder / "events"))
        begin = SessionLog(status=SessionLog.START)
        self._file.write_event(Event(wall_time=time.time(), step=purge_step, session_log=begin))
        self.flush, self.close = self._file.flush, self._file.close

    def write(self, step: int, curves: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        for name, value in curves.items():
            self._file.write_event(self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value)))


def _wandb_run(config: RunConfig, *, resumed: bool) -> Any:
    """Return a new Weights & Biases run, or the one of the resumed run, whose id the folder keeps."""
    wandb = extra("wandb", "wandb", "wandb_project: wandb is not installed; leave wandb_project out, or")
    folder = Path(config.run_dir)
    id_file = folder / "wandb_id.txt"
    if not resumed or not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:12] + "\n")
    run = wandb.init(
        project=config.wandb_project,
        id=id_file.read_text().strip(),
        name=folder.resolve().name,
        resume="allow",
        dir=str(folder),
        config=dataclasses.asdict(config),
    )
    # W&B's own step must never go back, but a resumed run's does: it is a value like the others.
    run.define_metric("*", step_metric="step")
    return run


def read_metrics(run_dir: str | os.PathLike[str]) -> list[Record]:
    """Return the lines of `metrics.jsonl` in order, without a last one still being written; [] without the file.

    Raises:
      UserError: a line is not a record; names the file and the line.
    """
    return [record for _, record in _records(Path(run_dir) / METRICS)]


def read_timing(run_dir: str | os.PathLike[str]) -> list[Record]:
    """Return the lines of `timing.jsonl`, as `read_metrics` does."""
    return [record for _, record in _records(Path(run_dir) / TIMING)]


def _records(path: Path) -> Iterator[tuple[bytes, Record]]:
    """Yield each complete line with its record, of which all values but the split are numbers."""
    lines = enumerate(files.read_step_lines(path), start=1) if path.exists() else ()
    for number, (line, record) in lines:
        record = {key: _NOT_FINITE.get(x, x) if isinstance(x, str) else x for key, x in record.items()}
        needed = {key: record.get(key) for key in (*_NEEDED[path.name], *record)} if path.name in _NEEDED else {}
        if not all(isinstance(x, str if key == "split" else int | float) for key, x in needed.items()):
            raise UserError(f"{path}, line {number}: lacks a value, or holds one that is not a number; delete it")
        yield line, record


def _drop_after(path: Path, last_step: int | None) -> None:
    """Rewrite `path` without the lines after `last_step`, whole or not at all."""
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        for line, record in _records(path):
            if last_step is not None and record["step"] <= last_step:
                file.write(line)


def _line(record: Record) -> bytes:
    not_finite = {name: json.dumps(x) for name, x in record.items() if isinstance(x, float) and not math.isfinite(x)}
    return (json.dumps(record | not_finite, allow_nan=False) + "\n").encode()  # as strings: "NaN", "-Infinity"
