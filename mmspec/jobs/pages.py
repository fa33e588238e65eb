"""Pages of documents to do, and what becomes of a batch of them.

A page that cannot be read or answered gets a record with the reason, and the others go on, whatever
kind of error it was: decoders of broken data and models at odd input raise many.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from mmspec.checks import reason_of
from mmspec.documents import Reader, Sheet, name_of
from mmspec.drafters import parse_spec
from mmspec.jobs.journal import Key


@dataclass(frozen=True, slots=True, kw_only=True)
class PageTask:
    """One page to do.

    Attributes:
        file: Path of the document.
        page: Its number from 1, or None for a document that could not be opened.
        digest: Of the content of the file.
        error: Why it could not be opened, or None.
    """

    file: str
    page: int | None
    digest: str = ""
    error: str | None = None

    @property
    def key(self) -> Key:
        """By which its record is found."""
        return self.file, self.page

    def __str__(self) -> str:
        return name_of(self.file, self.page)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of a page.

    Attributes:
        record: For the journal.
        num_tokens: Tokens written.
        num_row_steps: Forwards in which the page took part.
        ocr_time_s: Seconds of OCR.
        wait_time_s: Seconds in which the model waited for the page to be drawn and, where it does,
            for its OCR.
    """

    record: Mapping[str, Any]
    num_tokens: int = 0
    num_row_steps: int = 0
    ocr_time_s: float = 0.0
    wait_time_s: float = 0.0

    @property
    def error(self) -> str | None:
        """Why there is no text, or None."""
        return self.record["error"]


class PageJob(Protocol):
    """What a job does with a page. Worker processes get it pickled."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What every record is made with, in JSON types."""

    def load(self) -> Any:
        """Loads the pipeline."""

    def read(self, task: PageTask) -> Sheet:
        """Reads a page.

        Raises:
            Exception: If it is of no use.
        """

    def look(self, pipe: Any, sheet: Sheet) -> Sheet:
        """Begins to find out what can be known of a page; in a thread, while the model writes."""

    def close(self, pipe: Any) -> None:
        """Gives up what `look` has begun and nobody waits for."""

    def write(self, pipe: Any, tasks: Sequence[PageTask], sheets: Sequence[Sheet]) -> list[Answer]:
        """Answers pages together.

        Raises:
            Exception: If one of them cannot be answered. They are then tried one by one.
        """


def list_tasks(
    files: Sequence[Path], reader: Reader, ranges: Sequence[range] | None = None
) -> list[PageTask]:
    """The pages of documents, in order. One that cannot be opened is a task with the reason.

    Args:
        files: The documents.
        reader: Opens them.
        ranges: Pages to take; None takes all.
    """
    tasks = []
    for file in files:
        try:
            document = reader.open(file)
        except ValueError as error:
            tasks.append(PageTask(file=str(file), page=None, error=str(error)))
            continue
        pages = range(1, document.num_pages + 1)
        wanted = [n for n in pages if ranges is None or any(n in span for span in ranges)]
        tasks += [PageTask(file=str(file), page=n, digest=document.digest) for n in wanted]
        if not wanted:
            reason = f"{file} has {document.num_pages} page(s), and none of those asked for"
            tasks.append(PageTask(file=str(file), page=None, digest=document.digest, error=reason))
    return tasks


def check_drafter(drafter: str | None) -> None:
    """Refuses a drafter that is not known; None is the pipeline's own.

    Raises:
        ValueError: With the known ones.
    """
    if drafter is not None:
        parse_spec(drafter)


def failure(task: PageTask, reason: str | Exception) -> Answer:
    """The record of a page that could not be done."""
    if isinstance(reason, Exception):
        reason = reason_of(reason)
    named = reason if task.file in reason else f"{task}: {reason}"
    record = {"file": task.file, "page": task.page, "digest": task.digest}
    return Answer(record=record | {"text": None, "num_tokens": 0, "error": named})


def answer(
    job: PageJob,
    pipe: Any,
    tasks: Sequence[PageTask],
    read: Callable[[PageTask], Sheet] | None = None,
) -> list[Answer]:
    """Does a batch of pages; the bad ones among them get their reason.

    Args:
        job: What to do with a page.
        pipe: What the job has loaded.
        tasks: The pages.
        read: Gives a page that was read ahead, or raises; None reads it now.
    """
    answers: dict[Key, Answer] = {}
    good: list[PageTask] = []
    sheets: list[Sheet] = []
    for task in tasks:
        started = time.perf_counter()
        try:
            sheet = (read or job.read)(task)
        except Exception as error:
            answers[task.key] = failure(task, error)
            continue
        good.append(task)
        sheets.append(replace(sheet, wait_time_s=time.perf_counter() - started))
    written = _written(job, pipe, good, sheets) if good else []
    answers |= {task.key: one for task, one in zip(good, written, strict=True)}
    return [answers[task.key] for task in tasks]


def _written(
    job: PageJob, pipe: Any, tasks: Sequence[PageTask], sheets: Sequence[Sheet]
) -> list[Answer]:
    try:
        return job.write(pipe, tasks, sheets)
    except Exception as error:
        if len(tasks) == 1:
            return [failure(tasks[0], error)]
    alone = zip(tasks, sheets, strict=True)
    return [_written(job, pipe, [task], [sheet])[0] for task, sheet in alone]
