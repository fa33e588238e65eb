"""Worker processes for a job over pages, each with its own model.

Batches are dealt in order, the next one to whoever is free. A worker that dies takes nothing with
it: its pages are tried once more, each alone, and another worker takes its place.
"""

import multiprocessing
import pickle
import signal
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from mmspec.jobs import Report
from mmspec.jobs.journal import Key
from mmspec.jobs.pages import Answer, PageJob, PageTask, answer, failure

_STOP_SECONDS = 5.0
_LOADED = "loaded"


class _Worker:
    """A process, and the batch that it works on."""

    def __init__(self, job: PageJob, num_workers: int) -> None:
        # A fork would copy threads and locks of torch in any state.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, job, num_workers), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the connection
        self.batch: list[PageTask] = []
        self.has_loaded = False

    def give(self, batch: list[PageTask]) -> None:
        self.batch = batch
        with suppress(OSError):  # it has died; the connection says so when it is read
            self.connection.send(batch)

    def receive(self) -> list[Answer] | None:
        """The next message: answers, or none yet, or None if the process has died.

        Raises:
            Exception: What it failed with.
        """
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            return None
        if isinstance(message, Exception):
            raise message
        if message == _LOADED:
            self.has_loaded = True
            return []
        self.batch = []
        return message

    def end(self) -> int | None:
        """Ends the process; returns its exit code."""
        self.connection.close()
        self.process.terminate()
        self.process.join(_STOP_SECONDS)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        return self.process.exitcode


def deal(
    job: PageJob, batches: Sequence[list[PageTask]], *, num_workers: int, report: Report
) -> Generator[list[Answer], None, None]:
    """Does batches in worker processes.

    Args:
        job: Pickled for each of them.
        batches: Dealt in order.
        num_workers: At most this many processes.
        report: Told of workers that died.

    Yields:
        The answers of a batch, in the order in which they come.

    Raises:
        RuntimeError: If a worker died before it had loaded the model.
        Exception: What a worker failed with that is no fault of a page, such as a model that
            cannot be loaded.
    """
    queue = deque(batches)
    tried: set[Key] = set()
    workers = [_Worker(job, num_workers) for _ in range(min(num_workers, len(queue)))]
    try:
        while queue or any(worker.batch for worker in workers):
            for worker in workers:
                if queue and not worker.batch:
                    worker.give(queue.popleft())
            ready = wait([worker.connection for worker in workers if worker.batch])
            for place, worker in enumerate(workers):
                if worker.connection not in ready:
                    continue
                answers = worker.receive()
                if answers is None:
                    again, answers = _lost(worker, tried, report)
                    queue.extendleft([task] for task in reversed(again))
                    workers[place] = _Worker(job, num_workers)
                if answers:
                    yield answers
    finally:
        for worker in workers:
            worker.end()


def _lost(worker: _Worker, tried: set[Key], report: Report) -> tuple[list[PageTask], list[Answer]]:
    """What to do with the pages of a worker that died: those to try again, and those given up."""
    code = worker.end()
    if not worker.has_loaded:
        raise RuntimeError(f"a worker died while it loaded the model (exit code {code})")
    again = [task for task in worker.batch if task.key not in tried]
    reason = f"the worker died at it twice (exit code {code})"
    lost = [failure(task, reason) for task in worker.batch if task.key in tried]
    if again:
        names = ", ".join(map(str, again))
        report(f"a worker died (exit code {code}); tried once more: {names}")
    tried.update(task.key for task in again)
    return again, lost


def _work(connection: Connection, job: PageJob, num_workers: int) -> None:
    """The life of a worker: loads, then answers batches until the other end is closed."""
    # Ctrl-C reaches the whole group; the parent decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(max(1, torch.get_num_threads() // num_workers))
    try:
        pipe = job.load()
        connection.send(_LOADED)
        while True:
            connection.send(answer(job, pipe, connection.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent has ended
    except Exception as error:
        connection.send(_portable(error))


def _portable(error: Exception) -> Any:
    """The error, or one of the same message if it cannot travel."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
