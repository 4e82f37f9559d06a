"""A few threads of our own, each with one torch thread, for work that falls into independent tasks.

An attention call in tiles is hundreds of small torch ops. Shared out by torch itself, each op ends in a wait of its
threads for each other, and beside other busy processes each such wait costs a turn of the scheduler. Tasks that run in
threads of their own wait for each other once. As every op of a task runs in one thread, no result depends on how many
threads there are.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
U = TypeVar("U")
CPU = torch.device("cpu")


def run(tasks: Sequence[Callable[[], T]], then: Callable[[list[T]], U], device: torch.device = CPU) -> U:
    """Run the tasks in as many threads as torch would use here, one torch thread each; return ``then(their results)``.

    How many threads there are decides when a task runs, never what it computes. The tasks must not write to the same
    memory; ``then`` runs in the thread that ends last. All run without gradients, in the caller's inference mode. With
    one torch thread, on another device or where a dispatch mode watches this thread, they run in the caller.

    Raises:
        BaseException: the first that a task raised, or an interrupt of the caller; no task runs any longer then.
    """
    alone = device.type != "cpu" or torch.get_num_threads() == 1
    if not alone and not torch._C._len_torch_dispatch_stack() and _own_thread_counts():
        workers = _first_workers(min(torch.get_num_threads(), len(tasks)))
        if workers:
            return _Run(tasks, then).by(workers)
    with torch.no_grad():
        return then([task() for task in tasks])


class _Run(Generic[T, U]):
    """One call of :func:`run`: whoever is free takes the next task."""

    def __init__(self, tasks: Sequence[Callable[[], T]], then: Callable[[list[T]], U]):
        self._todo = iter(list(enumerate(tasks)))
        self._open = len(tasks)
        self._results: dict[int, T] = {}
        self._then = then
        self._outcome: list[U] = []
        self._failure: BaseException | None = None
        self._inference = torch.is_inference_mode_enabled()
        self._lock = threading.Lock()
        self._running = 0  # workers
        self._stopped = False
        self._over = threading.Event()

    def by(self, workers: Sequence[_Worker]) -> U:
        """Have these workers do it, and wait for them."""
        try:
            for worker in workers:
                worker.queue.put(self._work)
            self._over.wait()
        except BaseException:  # an interrupt, at any point: a worker that begins from here on does nothing
            with self._lock:
                self._stopped = True
            while self._running and not self._over.is_set():  # what the tasks write to must be the caller's again
                with suppress(KeyboardInterrupt):
                    self._over.wait()
            raise
        if self._failure is not None:
            raise self._failure
        return self._outcome[0]

    def _work(self) -> None:
        with self._lock:
            if self._stopped or not self._open:
                return
            self._running += 1
        try:
            with torch.inference_mode(self._inference), torch.no_grad():
                while (one := self._next()) is not None:
                    n, task = one
                    self._results[n] = task()
                    if self._was_last():
                        self._outcome.append(self._then([self._results[i] for i in range(len(self._results))]))
        except BaseException as error:
            with self._lock:
                self._stopped = True
                self._failure = self._failure or error
        with self._lock:
            self._running -= 1
            if not self._running and (self._stopped or not self._open):
                self._over.set()

    def _next(self) -> tuple[int, Callable[[], T]] | None:
        with self._lock:
            return None if self._stopped else next(self._todo, None)

    def _was_last(self) -> bool:
        with self._lock:
            self._open -= 1
            return self._open == 0


class _Worker:
    """A thread that has one torch thread, and what it is to do."""

    def __init__(self, number: int):
        self.queue: SimpleQueue[Callable[[], None]] = SimpleQueue()
        ready = threading.Event()
        self._before = 0
        threading.Thread(target=self._live, args=(ready,), name=f"i2am-{number}", daemon=True).start()
        ready.wait()
        # torch.set_num_threads sets the calling thread's number, and what threads to come begin with: as it was.
        restore = threading.Thread(target=torch.set_num_threads, args=(self._before,))
        restore.start()
        restore.join()

    def _live(self, ready: threading.Event) -> None:
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)
        ready.set()
        while True:
            work = self.queue.get()
            work()
            del work  # and what it holds


_workers: list[_Worker] = []
_starting = threading.Lock()


def _first_workers(n: int) -> list[_Worker]:
    """Return ``n`` workers; none where the interpreter starts no threads any more."""
    with _starting:
        try:
            while len(_workers) < n:
                _workers.append(_Worker(len(_workers)))
        except RuntimeError:
            return []
        return _workers[:n]


@cache
def _own_thread_counts() -> bool:
    """Return whether each thread has a torch thread count of its own, as with OpenMP."""
    return "parallel backend: OpenMP" in torch.__config__.parallel_info()


def _forget() -> None:
    """Begin anew in a forked child, which has the parent's objects and none of its threads."""
    global _starting
    _workers.clear()
    _starting = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
