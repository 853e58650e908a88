"""A pool of worker processes with ordered results and bounded look-ahead, of which none outlives its parent."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import TypeVar

from biomamba_jax import processor
from biomamba_jax.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
_AHEAD = 4  # pending tasks per worker: bounds memory whatever the number of tasks


class Workers:
    """A pool of `count` processes; with one, functions run in the calling process."""

    def __init__(self, count: int, pool: ProcessPoolExecutor | None):
        self.count = count
        self._pool = pool

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Yield function(task) in the order of the tasks; an exception is raised in the result's place."""
        if self._pool is None:
            yield from map(function, tasks)
            return
        waiting: deque[Future[Result]] = deque()
        for task in tasks:
            with blocked_signals():  # a task may start a worker
                waiting.append(self._pool.submit(function, task))
            if len(waiting) >= self.count * _AHEAD:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Block SIGINT and SIGTERM in this thread and in the workers that it starts, which inherit that.

    Otherwise a signal to the process group ends workers that have not come to ignore it yet.
    """
    resource_tracker.ensure_running()  # which unblocks them when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def start_workers(count: int) -> Iterator[Workers]:
    """Yield a pool; its processes end with the block, also after an error or Ctrl-C.

    Args:
      count: processes; 0: one per core.
    """
    count = count or processor.cores()
    if count == 1:
        yield Workers(1, None)
        return
    others = multiprocessing.active_children()
    # Forking a process with threads (JAX, tokenizers) can deadlock.
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


def _begin() -> None:
    """Initialize a worker: it ignores Ctrl-C, uses one thread, and ends with its parent or by its SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"  # else MinHash uses all cores
    end_with_parent()


def end_with_parent() -> None:
    """End this worker process as soon as its parent ends, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="follow-parent", daemon=True).start()
