"""SIGTERM (from preemption or a scheduler) and Ctrl-C end a run after the step in progress.

With several processes, any may get a SIGTERM: JAX's runtime then agrees on a step that none has begun yet, after which
all stop. Ctrl-C ends them at once.
"""

import signal
from types import FrameType
from typing import Self

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """A context in which the first SIGTERM or SIGINT only sets `requested`; the next one has its usual effect.

    With several processes, signals are left to JAX's runtime.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[int, signal.Handlers | int | object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ():
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def at(self, step: int) -> bool:
        """Return True to stop after this step; every process calls this once per step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.requested = "SIGTERM"
        return self.requested is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]
