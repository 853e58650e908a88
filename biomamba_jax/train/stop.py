"""Being asked to stop: SIGTERM (preemption, a scheduler) and Ctrl-C end a run after the step in progress."""

import signal
from types import FrameType
from typing import Self


class StopRequest:
    """While active, the first SIGTERM or SIGINT only sets `requested`; the next one acts as it would otherwise."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[int, signal.Handlers | int | object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]
