"""Paired timing: programs run in turns, each in its own process, which is fair on a shared or warming machine.

A contender is a function that prepares some work and returns a function that does it once. It runs in a new process,
since the C library reads the settings of its memory allocator when a process starts.
"""

import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NamedTuple, Self

from biomamba_jax.errors import UserError

# glibc returns large blocks to the system at once and maps them again, page fault by page fault. Kept, and in huge
# pages, they cost nothing the next time. One arena, since only the first may keep a block of more than 64 MB; without
# it a step after a pause is a third slower on a virtual machine whose host reclaims free pages.
ALLOCATORS: Mapping[str, str | None] = {
    "default": None,
    "huge-pages": "glibc.malloc.hugetlb=1"
    ":glibc.malloc.mmap_threshold=8000000000"
    ":glibc.malloc.trim_threshold=16000000000"
    ":glibc.malloc.arena_max=1",
}
"""Name -> value of GLIBC_TUNABLES."""

TRIAL_STEPS = 3
"""Runs with which a setting is tried."""


class Spread(NamedTuple):
    """Median and range of some figures."""

    median: float
    """Median."""
    least: float
    """Smallest figure."""
    most: float
    """Largest figure."""

    @classmethod
    def of(cls, figures: Iterable[float]) -> Self:
        """Return median and range of `figures`."""
        values = sorted(figures)
        return cls(statistics.median(values), values[0], values[-1])


@dataclass(frozen=True)
class Contender:
    """A program and the setting of the allocator that it runs with."""

    name: str
    """Name in tables."""
    allocator: str
    """Key of `ALLOCATORS`."""
    prepare: Callable[[], Callable[[], None]]
    """Called in the new process; must be picklable, bound arguments included."""


class Timing(NamedTuple):
    """Timings of one contender."""

    each: list[float]
    """Seconds of each run, in order."""
    peak_memory: int
    """Peak memory of its process in bytes."""

    @property
    def seconds(self) -> Spread:
        """Median and range of the seconds."""
        return Spread.of(self.each)


class ContenderError(UserError):
    """A contender could not be prepared, or its process died."""


def try_out(contender: Contender, limit_seconds: float) -> Timing | str:
    """Return the timing of a few runs of one contender alone, or why there are none."""
    try:
        return alternate([contender], TRIAL_STEPS, limit_seconds)[0]
    except ContenderError as error:
        return str(error)


def fastest(tried: Mapping[Contender, Timing | str], among: Sequence[Contender]) -> Contender:
    """Return the contender with the shortest median.

    Raises:
      UserError: all failed; the message is that of the first.
    """
    medians = {c: trial.seconds.median for c in among if not isinstance(trial := tried[c], str)}
    if not medians:
        raise UserError(f"{among[0].name}: {tried[among[0]]}")
    return min(medians, key=lambda c: medians[c])


def alternate(contenders: Sequence[Contender], rounds: int, limit_seconds: float) -> list[Timing]:
    """Run all contenders in turns, `rounds` times, after a warm-up round.

    Args:
      contenders: the contenders.
      rounds: number of timed rounds.
      limit_seconds: time limit for a contender's preparation and first run.

    Raises:
      ContenderError: a contender failed.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker(contender)) for contender in contenders]
        for worker in workers:
            _ask(worker, limit_seconds)
        answers = [[_ask(worker, limit_seconds) for worker in workers] for _ in range(rounds)]
    return [Timing([seconds for seconds, _ in each], each[-1][1]) for each in zip(*answers, strict=True)]


@contextmanager
def _worker(contender: Contender) -> Iterator[Connection]:
    """Start a process with the contender's allocator that does the work once per request."""
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=_serve, args=(its, contender.prepare), daemon=True)
    tunables = ALLOCATORS[contender.allocator]
    before = os.environ.get("GLIBC_TUNABLES")
    try:
        _set_tunables(tunables)
        process.start()
    finally:
        _set_tunables(before)
    its.close()
    try:
        yield ours
    finally:
        ours.close()  # ends a worker that waits for a request
        process.join(timeout=5)
        process.kill()
        process.join()


def _set_tunables(value: str | None) -> None:
    if value is None:
        os.environ.pop("GLIBC_TUNABLES", None)
    else:
        os.environ["GLIBC_TUNABLES"] = value


def _ask(worker: Connection, limit_seconds: float) -> tuple[float, int]:
    """Request one run; return its seconds and the process's peak memory."""
    try:
        worker.send(None)
        if not worker.poll(limit_seconds):
            raise ContenderError(f"not ready within {limit_seconds:.0f} s")
        answer = worker.recv()
    except (EOFError, BrokenPipeError, ConnectionResetError) as error:
        raise ContenderError("its process died: out of memory?") from error
    if isinstance(answer, str):
        raise ContenderError(answer)
    return answer


def _serve(requests: Connection, prepare: Callable[[], Callable[[], None]]) -> None:
    """Answer requests in a worker process until it is killed."""
    try:
        work = prepare()
        while True:
            requests.recv()
            start = time.perf_counter()
            work()
            seconds = time.perf_counter() - start
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            requests.send((seconds, resident if sys.platform == "darwin" else resident * 1024))
    except EOFError:  # the parent has gone
        return
    except Exception as error:  # any exception of a baseline's library is its result
        requests.send(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
