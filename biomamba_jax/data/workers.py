"""Worker processes for work on files: results in the order of the tasks, bounded look-ahead, and none left behind."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from biomamba_jax.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
_AHEAD = 4  # tasks per worker whose results may wait: bounds memory whatever the number of tasks


class Workers:
    """Runs functions on tasks in `count` processes, or in this one if count is 1."""

    def __init__(self, count: int, pool: ProcessPoolExecutor | None):
        self.count = count
        self._pool = pool

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[tuple[Task, Result]]:
        """Yields (task, function(task)) in the order of the tasks; the first error is raised in its place."""
        if self._pool is None:
            yield from ((task, function(task)) for task in tasks)
            return
        waiting: deque[tuple[Task, Future[Result]]] = deque()
        for task in tasks:
            waiting.append((task, self._pool.submit(function, task)))
            if len(waiting) >= self.count * _AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()


@contextmanager
def start_workers(count: int) -> Iterator[Workers]:
    """Workers for the block; at its end, also by an error or Ctrl-C, they are gone. count 0: one per core."""
    count = count or _cores()
    if count == 1:
        yield Workers(1, None)
        return
    others = multiprocessing.active_children()
    # spawn: forking a process that has threads (JAX, tokenizers) can deadlock.
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        yield Workers(count, pool)
    except BrokenProcessPool:
        raise UserError("a worker process was killed (out of memory?); give fewer --workers") from None
    except BaseException:
        for child in multiprocessing.active_children():
            if child not in others:
                child.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _cores() -> int:
    """Cores that this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin() -> None:
    """In a new worker: Ctrl-C is the parent's to handle, one thread is enough, and nobody outlives the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"  # what MinHash would take all cores by
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
