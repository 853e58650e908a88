"""Two programs timed in turns, each in a process of its own: the only fair way on a machine that is shared or warms up.

A candidate is a function that prepares some work and returns another that does it once. It runs in a new process, since
settings of the C library's memory allocator are read when a process starts.
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

# glibc gives large blocks back at once and fetches them anew, page fault by page fault. Kept, and in huge pages, they
# cost nothing the next time. One arena, since only the first may keep a block of more than 64 MB; without it a step
# that comes after a pause is a third slower on a virtual machine whose host takes free pages back.
ALLOCATORS: Mapping[str, str | None] = {
    "default": None,
    "huge-pages": "glibc.malloc.hugetlb=1"
    ":glibc.malloc.mmap_threshold=8000000000"
    ":glibc.malloc.trim_threshold=16000000000"
    ":glibc.malloc.arena_max=1",
}
"""Name -> value of GLIBC_TUNABLES."""

TRIAL_STEPS = 3


class Spread(NamedTuple):
    """Median and range of some figures."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, figures: Iterable[float]) -> Self:
        values = sorted(figures)
        return cls(statistics.median(values), values[0], values[-1])


@dataclass(frozen=True)
class Candidate:
    """A program and the allocator's setting that it runs under."""

    name: str
    allocator: str
    prepare: Callable[[], Callable[[], None]]
    """Called in the new process; it and what it is bound to must be picklable."""


class Timing(NamedTuple):
    """Seconds of each run of a candidate, in order, and the largest memory of its process in bytes."""

    each: list[float]
    peak_memory: int

    @property
    def seconds(self) -> Spread:
        return Spread.of(self.each)


class Failed(UserError):
    """A candidate could not be prepared, or its process died; the message is one line."""


def try_out(candidate: Candidate, limit_seconds: float) -> Timing | str:
    """A few runs of one candidate alone, or why there are none."""
    try:
        return alternate([candidate], TRIAL_STEPS, limit_seconds)[0]
    except Failed as error:
        return str(error)


def fastest(tried: Mapping[Candidate, Timing | str], among: Sequence[Candidate]) -> Candidate:
    """The candidate with the shortest median.

    Raises:
      UserError: none could be run; the message says why the first could not.
    """
    medians = {c: trial.seconds.median for c in among if not isinstance(trial := tried[c], str)}
    if not medians:
        raise UserError(f"{among[0].name}: {tried[among[0]]}")
    return min(medians, key=lambda c: medians[c])


def alternate(candidates: Sequence[Candidate], rounds: int, limit_seconds: float) -> list[Timing]:
    """Runs all candidates one after the other, `rounds` times over, after a first round that does not count.

    Args:
      limit_seconds: longest time for a candidate to prepare itself and run once.

    Raises:
      Failed: a candidate could not be run.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker(candidate)) for candidate in candidates]
        for worker in workers:
            _ask(worker, limit_seconds)
        answers = [[_ask(worker, limit_seconds) for worker in workers] for _ in range(rounds)]
    return [Timing([seconds for seconds, _ in each], each[-1][1]) for each in zip(*answers, strict=True)]


@contextmanager
def _worker(candidate: Candidate) -> Iterator[Connection]:
    """A new process under the candidate's allocator that runs the work each time it is asked to."""
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=_serve, args=(its, candidate.prepare), daemon=True)
    tunables = ALLOCATORS[candidate.allocator]
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
    """Seconds of one more run, and the process's peak memory."""
    try:
        worker.send(None)
        if not worker.poll(limit_seconds):
            raise Failed(f"not ready within {limit_seconds:.0f} s")
        answer = worker.recv()
    except (EOFError, BrokenPipeError, ConnectionResetError) as error:
        raise Failed("its process died: out of memory?") from error
    if isinstance(answer, str):
        raise Failed(answer)
    return answer


def _serve(requests: Connection, prepare: Callable[[], Callable[[], None]]) -> None:
    """The body of a worker process: one answer to each request, until it is killed."""
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
    except Exception as error:  # whatever a peer's library raises is its result
        requests.send(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
