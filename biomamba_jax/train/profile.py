"""Traces chosen steps of a run with JAX's profiler, for XProf and Perfetto."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

STEP = "train_step"
"""Name of a step in the trace."""


class StepProfiler:
    """Traces the steps `first` to `last` of a run into a folder, one trace per process.

    Evaluations and checkpoints between these steps are in the trace too. A run that ends earlier, or by an exception,
    writes what it has.
    """

    def __init__(self, folder: Path, steps: Sequence[int]) -> None:
        """Choose the first and the last step; an empty sequence traces nothing."""
        self._folder, self._steps, self._tracing = folder, steps, False

    def step(self, number: int) -> AbstractContextManager[Any]:
        """Return a context for step `number`, by which the trace names it; begins the trace at the first step."""
        if not self._steps or not self._steps[0] <= number <= self._steps[1]:
            return nullcontext()
        if not self._tracing:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._tracing = True
        return jax.profiler.StepTraceAnnotation(STEP, step_num=number)

    def ended(self, number: int, results: Any) -> None:
        """End the trace after its last step, once that step's `results` are computed."""
        if self._tracing and number >= self._steps[1]:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()
