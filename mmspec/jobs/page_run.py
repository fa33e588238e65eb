"""A job over pages from its beginning, or from where a kill has left it, to its end."""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from mmspec.documents import Sheet
from mmspec.jobs import Report
from mmspec.jobs.journal import Entry, Journal, Key
from mmspec.jobs.pages import Answer, PageJob, PageTask, answer, failure
from mmspec.jobs.read_ahead import read_ahead
from mmspec.jobs.workers import deal


@dataclass(slots=True, kw_only=True)
class PagesSummary:
    """What a run did.

    Attributes:
        num_pages: Pages of the input; a document that cannot be opened counts as one.
        num_failed: Those without a text now.
        num_skipped: Those that were done before.
        num_tokens: Tokens written now.
        num_row_steps: Forwards that took, counted once for every page that took part.
        ocr_seconds: Of OCR, mostly while the model wrote.
        wait_seconds: In which the model waited for pages to be drawn and, where it does, for their
            OCR.
        seconds: Of this run.
    """

    num_pages: int = 0
    num_failed: int = 0
    num_skipped: int = 0
    num_tokens: int = 0
    num_row_steps: int = 0
    ocr_seconds: float = 0.0
    wait_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def tau(self) -> float | None:
        """Tokens per forward and page; None where nothing was written."""
        return self.num_tokens / self.num_row_steps if self.num_row_steps else None

    @property
    def pages_per_minute(self) -> float:
        """Pages that were done now, failed ones included."""
        return 60 * (self.num_pages - self.num_skipped) / max(self.seconds, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "pages": self.num_pages,
            "failed": self.num_failed,
            "skipped": self.num_skipped,
            "tokens": self.num_tokens,
            "tau": None if self.tau is None else round(self.tau, 3),
            "ocr_seconds": round(self.ocr_seconds, 3),
            "wait_seconds": round(self.wait_seconds, 3),
            "seconds": round(self.seconds, 3),
            "pages_per_minute": round(self.pages_per_minute, 2),
        }

    def table(self) -> str:
        """Names above figures, for people."""
        cells = {
            name: "-" if value is None else str(value) for name, value in self.to_dict().items()
        }
        widths = [max(len(name), len(cell)) for name, cell in cells.items()]
        rows = (cells.keys(), cells.values())
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        )


def missing_tasks(
    tasks: Sequence[PageTask], journal: Journal, *, retry_errors: bool
) -> list[PageTask]:
    """Those without a record of their content.

    Args:
        tasks: All pages.
        journal: What was done.
        retry_errors: Do pages again that have failed.
    """

    def is_done(task: PageTask) -> bool:
        entry = journal.entries.get(task.key)
        if entry is None or entry.digest != task.digest:
            return False
        return not (entry.has_failed and retry_errors)

    return [task for task in tasks if not is_done(task)]


def run_pages(
    job: PageJob,
    tasks: Sequence[PageTask],
    missing: Sequence[PageTask],
    journal: Journal,
    *,
    batch_size: int,
    num_workers: int,
    report: Report,
    after_batch: Callable[[Sequence[Answer]], None],
    prefetch: int = 1,
) -> PagesSummary:
    """Does the pages that are missing.

    Args:
        job: What to do with a page.
        tasks: All pages.
        missing: Those to do; see `missing_tasks`.
        journal: What was done; gets a record for each page, and is in the order of ``tasks`` in
            the end. With several workers it is filled in the order in which they finish.
        batch_size: Pages that go through the model together.
        num_workers: Processes, each with a model; 1 is this process.
        report: Told of workers that died.
        after_batch: Told the answers of each batch when they are on the disk.
        prefetch: Batches whose pages are read ahead while the model writes; no others are in
            memory. Several workers read nothing ahead: while one reads, another one writes.

    Raises:
        OSError: If the records cannot be written.
        RuntimeError: If a worker died while it loaded the model.
    """
    started = time.perf_counter()
    summary = PagesSummary(num_pages=len(tasks), num_skipped=len(tasks) - len(missing))
    closed = [failure(task, task.error) for task in missing if task.error is not None]
    if closed:
        journal.add([one.record for one in closed])
        after_batch(closed)
    todo = [task for task in missing if task.error is None]
    batches = [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
    if num_workers == 1 or len(batches) <= 1:
        done = _one_by_one(job, batches, prefetch)
    else:
        done = deal(job, batches, num_workers=num_workers, report=report)
    with closing(done):  # ends the workers, whatever happens here
        for answers in done:
            journal.add([one.record for one in answers])
            summary.num_tokens += sum(one.num_tokens for one in answers)
            summary.num_row_steps += sum(one.num_row_steps for one in answers)
            summary.ocr_seconds += sum(one.ocr_time_s for one in answers)
            summary.wait_seconds += sum(one.wait_time_s for one in answers)
            after_batch(answers)
    journal.sort([task.key for task in tasks], _stale_in(tasks))
    summary.num_failed = sum(journal.entries[task.key].has_failed for task in tasks)
    summary.seconds = time.perf_counter() - started
    return summary


def _one_by_one(
    job: PageJob, batches: Sequence[Sequence[PageTask]], prefetch: int
) -> Generator[list[Answer], None, None]:
    if not batches:
        return
    pipe = job.load()
    if not prefetch:
        yield from (answer(job, pipe, batch) for batch in batches)
        return

    def read(task: PageTask) -> Sheet:
        return job.look(pipe, job.read(task))

    try:
        with closing(read_ahead(read, batches, prefetch)) as coming:
            for batch, sheet_of in coming:
                yield answer(job, pipe, batch, sheet_of)
    finally:
        job.close(pipe)


def _stale_in(tasks: Sequence[PageTask]) -> Callable[[Key, Entry], bool]:
    """Whether a record tells of another content of a file, or of one that opens by now."""
    digests = {task.file: task.digest for task in tasks}
    keys = {task.key for task in tasks}

    def is_stale(key: Key, entry: Entry) -> bool:
        file, page = key
        if key in keys or file not in digests:
            return False
        return page is None or entry.digest != digests[file]

    return is_stale
