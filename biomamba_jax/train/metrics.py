"""What a run writes down while it trains: `metrics.jsonl`, `timing.jsonl`, TensorBoard events, Weights & Biases.

`metrics.jsonl` holds only what the seed decides, so a run that was killed and resumed leaves the same bytes as one that
was not; `timing.jsonl` holds what differs from run to run (tokens/s, waits, memory, the time of day). One JSON object
a line:

    {"step": 10, "split": "train", "loss": 6.25, "learning_rate": 0.001, "tokens": 81920}
    {"step": 10, "split": "validation", "domain": "pubmed", "loss": 6.5, "perplexity": 665.1, "bits_per_byte": 2.1}
    {"step": 10, "time": 1795376876.12, "tokens_per_second": 5120.0, "data_wait_seconds": 0.001}

The order that makes resume exact: write every line of step s, `sync()`, save the checkpoint of step s. A run resumed
from it opens the writer with `last_step=s`, which drops the lines after s: they will be written again.
"""

import json
import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import jax
from tensorboardX import SummaryWriter

from biomamba_jax.errors import UserError

METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"

Record = dict[str, Any]

# JSON has no such numbers, and a diverged run's lines must still be readable by every JSON parser.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Sink(Protocol):
    """A place that records go to. A record's "step" comes first; strings say what it is about, numbers are values."""

    def write(self, record: Record) -> None: ...
    def write_timing(self, record: Record) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


class MetricsWriter:
    """Writes the metrics of one run into its directory, and into every further sink.

    On other processes than the first it takes every call and writes nothing, so callers need no branch.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        last_step: int | None,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens the files, without the lines that a resumed run writes again.

        Args:
          run_dir: the run's directory; made if it does not exist.
          last_step: step of the restored checkpoint, whose later lines are dropped; None for a run from the start.
          tensorboard: also write TensorBoard events, under `tensorboard/`.
          wandb_project: also mirror to this Weights & Biases project.
          config: the resolved configuration, for Weights & Biases.

        Raises:
          UserError: a line in the middle of a file is not JSON, or wandb is not installed.
        """
        self._sinks: list[Sink] = []
        if jax.process_index() != 0:
            return
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._sinks.append(JsonLines(folder, last_step=last_step))
        if tensorboard:
            self._sinks.append(TensorBoard(folder, last_step=last_step))
        if wandb_project is not None:
            self._sinks.append(WeightsAndBiases(folder, wandb_project, config or {}, last_step=last_step))

    def write(self, step: int, split: str, values: Mapping[str, Any], *, domain: str | None = None) -> None:
        """Writes one line of values that the seed decides.

        Args:
          step: optimizer steps done so far.
          split: "train", "validation" or "test".
          values: name -> integer or float (Python, NumPy or JAX scalar), in the order in which they are written.
          domain: the text that was evaluated.
        """
        about: Record = {"step": int(step), "split": split}
        if domain is not None:
            about["domain"] = domain
        record = about | {name: _python(value) for name, value in values.items()}
        for sink in self._sinks:
            sink.write(record)

    def write_timing(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line of values that differ from run to run; the time of day is added. A None is left out."""
        stamped = {"step": int(step), "time": round(time.time(), 3)}
        record = stamped | {name: _python(value) for name, value in values.items() if value is not None}
        for sink in self._sinks:
            sink.write_timing(record)

    def sync(self) -> None:
        """Returns once every line is on the disk, safe from a crash of the machine. Call before each checkpoint."""
        for sink in self._sinks:
            sink.sync()

    def close(self) -> None:
        """Flushes and closes everything; may be called twice."""
        while self._sinks:
            self._sinks.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class JsonLines:
    """`metrics.jsonl` and `timing.jsonl`; every line is flushed, so that `tail -f` and a SIGKILL see whole lines."""

    def __init__(self, run_dir: Path, *, last_step: int | None) -> None:
        for name in (METRICS, TIMING):
            _drop_after(run_dir / name, last_step)
        self._metrics, self._timing = ((run_dir / name).open("ab") for name in (METRICS, TIMING))

    def write(self, record: Record) -> None:
        self._metrics.write(_line(record))
        self._metrics.flush()

    def write_timing(self, record: Record) -> None:
        self._timing.write(_line(record))
        self._timing.flush()

    def sync(self) -> None:
        for file in (self._metrics, self._timing):
            os.fsync(file.fileno())

    def close(self) -> None:
        self.sync()
        self._metrics.close()
        self._timing.close()


class TensorBoard:
    """Event files under `tensorboard/`, one curve for each split, domain and value."""

    def __init__(self, run_dir: Path, *, last_step: int | None) -> None:
        # Events can't be taken back; `purge_step` tells TensorBoard not to show what the resumed run writes again.
        purge_step = 0 if last_step is None else last_step + 1
        self._writer = SummaryWriter(logdir=str(run_dir / "tensorboard"), purge_step=purge_step)

    def write(self, record: Record) -> None:
        self._add("/".join(value for value in record.values() if isinstance(value, str)), record)

    def write_timing(self, record: Record) -> None:
        self._add("timing", {name: value for name, value in record.items() if name != "time"})

    def _add(self, prefix: str, record: Record) -> None:
        for name, value in record.items():
            if name != "step" and not isinstance(value, str):
                self._writer.add_scalar(f"{prefix}/{name}", value, record["step"])

    def sync(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """The same curves in Weights & Biases. A resumed run goes on in the same W&B run, whose id the directory keeps."""

    def __init__(self, run_dir: Path, project: str, config: Mapping[str, Any], *, last_step: int | None) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "wandb_project is set but wandb is not installed: pip install 'biomamba-jax[wandb]', "
                "or leave wandb_project out"
            ) from None
        id_file = run_dir / "wandb_id.txt"
        if last_step is None or not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12] + "\n")
        self._run = wandb.init(
            project=project,
            id=id_file.read_text().strip(),
            name=run_dir.resolve().name,
            resume="allow",
            dir=str(run_dir),
            config=dict(config),
        )
        # W&B's own step must never go back; ours does after a resume, so it is a value like the others.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        self._log("/".join(value for value in record.values() if isinstance(value, str)), record)

    def write_timing(self, record: Record) -> None:
        self._log("timing", {name: value for name, value in record.items() if name != "time"})

    def _log(self, prefix: str, record: Record) -> None:
        values = {name: value for name, value in record.items() if name != "step" and not isinstance(value, str)}
        self._run.log({f"{prefix}/{name}": value for name, value in values.items()} | {"step": record["step"]})

    def sync(self) -> None:
        pass  # wandb uploads in a process of its own

    def close(self) -> None:
        self._run.finish()


def read_metrics(run_dir: str | os.PathLike[str]) -> list[Record]:
    """The lines of `metrics.jsonl` in order; [] without the file. A last line still being written is left out.

    Raises:
      UserError: a line is not a record; names the file and the line.
    """
    return [record for _, record in _records(Path(run_dir) / METRICS)]


def read_timing(run_dir: str | os.PathLike[str]) -> list[Record]:
    """The lines of `timing.jsonl`, as `read_metrics` reads them."""
    return [record for _, record in _records(Path(run_dir) / TIMING)]


def _records(path: Path) -> Iterator[tuple[bytes, Record]]:
    """Each complete line with its record."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # cut off by SIGKILL, or being written right now
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                    raise ValueError
            except ValueError:
                raise UserError(
                    f"{path}, line {number}: not a record with a step; repair the line or delete it"
                ) from None
            yield line, {name: _number(value) for name, value in record.items()}


def _drop_after(path: Path, last_step: int | None) -> None:
    """Rewrites `path` without the lines after `last_step`, in one step that a kill can't leave half done."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for line, record in _records(path):
            if last_step is not None and record["step"] <= last_step:
                file.write(line)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps({name: _json(value) for name, value in record.items()}, allow_nan=False) + "\n").encode()


def _json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _number(value: Any) -> Any:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _python(value: Any) -> Any:
    """A Python number for a NumPy or JAX scalar: a float32 keeps its exact value, and JSON writes the repr of it."""
    return value.item() if hasattr(value, "item") else value
