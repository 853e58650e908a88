"""SIGTERM (from preemption or a scheduler) and Ctrl-C end a run after the step in progress.

With several processes, any may get a SIGTERM: JAX's runtime then agrees on a step that none has begun yet, after which
all stop. Ctrl-C ends them at once.
"""

import os
import signal
import sys
import threading
import time
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

_ONE_REQUEST_SECONDS = 1.0  # a scheduler may signal the process group and its shell, which forwards the signal


class StopRequest:
    """A context in which the first SIGTERM or SIGINT only sets `requested`; the next one ends the process at once.

    A thread reads the signals, so that they also count while the main thread compiles. What is saved stays whole:
    checkpoints get their names when they are complete. With several processes, signals are left to JAX's runtime.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        """Name of the signal that asked to stop."""
        self._previous: dict[int, Any] = {}
        self._wakeup = self._pipe = -1

    def __enter__(self) -> Self:
        if jax.process_count() == 1:
            read, self._pipe = os.pipe()
            os.set_blocking(self._pipe, False)
            self._wakeup = signal.set_wakeup_fd(self._pipe)
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, lambda *_: None)
            threading.Thread(target=self._watch, args=(read,), name="stop-request", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._previous:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._pipe)  # which ends the thread

    def at(self, step: int) -> bool:
        """Return True to stop after this step; every process calls this once per step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.requested = "SIGTERM"
        return self.requested is not None

    def _watch(self, read: int) -> None:
        """Read the numbers of signals, as Python's C handler writes them, until the pipe is closed."""
        first = -1.0
        with open(read, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] not in self._previous:
                    continue
                if self.requested is None:
                    self.requested, first = signal.Signals(number[0]).name, time.monotonic()
                elif number[0] != signal.SIGTERM or time.monotonic() - first > _ONE_REQUEST_SECONDS:
                    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
                    message = f"{show_cursor}{self.requested} again: ended at once; the checkpoints before stay\n"
                    os.write(2, message.encode())
                    os._exit(128 + number[0])
