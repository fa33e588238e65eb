"""Documents to text: one JSON line for each page, and Markdown made of those lines."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmspec.documents import Reader, Sheet, name_of
from mmspec.jobs import check_writable
from mmspec.jobs.journal import Journal
from mmspec.jobs.pages import Answer, PageTask, check_drafter
from mmspec.jobs.recall import recalling
from mmspec.ocr import open_engine
from mmspec.whole_file import whole_file


@dataclass(frozen=True, slots=True, kw_only=True)
class ParseJob:
    """How pages are parsed.

    Attributes:
        load: Gives a `SpeculativeDocumentPipeline`; can be pickled.
        model: Its name, for the records.
        dtype: Name of the weights' type, likewise.
        reader: Draws the pages.
        options: ``max_new_tokens`` and ``drafter`` of the call; None is the model's or, where it
            says nothing, the pipeline's.
        ocr: Engine that drafts where a page has no text layer: "auto", a name, or None.
        ocr_workers: Threads of that engine.
        ocr_wait: Begin a page when the engine is through with it.
        prompt: What is asked of each page; None is what the model was trained on.
        regions: Read regions of a page first and the page with them.
    """

    load: Callable[[], Any]
    model: str
    dtype: str
    reader: Reader
    options: Mapping[str, Any]
    ocr: str | None = "auto"
    ocr_workers: int = 1
    ocr_wait: bool = False
    prompt: str | None = None
    regions: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What every record is made with. The password is not among it."""
        own = {"model": self.model, "dtype": self.dtype, "dpi": self.reader.dpi, "ocr": self.ocr}
        return own | {"prompt": self.prompt, "regions": self.regions} | dict(self.options)

    def after(self, journal: Journal) -> "ParseJob":
        """The job of a run that goes on: drafts from the pages before, the latest of them."""
        return replace(self, load=recalling(self.load, journal))

    def check(self) -> None:
        """Refuses options that no page could be parsed with, before a model is loaded.

        Raises:
            ValueError: If the drafter is unknown, or the OCR engine unknown or not installed.
        """
        if self.options["drafter"] != "auto":
            check_drafter(self.options["drafter"])
        if self.ocr not in (None, "auto"):
            open_engine(self.ocr)

    def read(self, task: PageTask) -> Sheet:
        """Draws a page.

        Raises:
            ValueError: If it cannot be read or there is nothing on it.
        """
        sheet = self.reader.read(task.file, task.page or 1)
        if sheet.is_blank:
            raise ValueError(f"{task} is blank: there is no text to read")
        return sheet

    def look(self, pipe: Any, sheet: Sheet) -> Sheet:
        """Has the OCR begin with a page that has no text layer."""
        if sheet.text is not None:
            return sheet
        reading = pipe.read_ahead(
            sheet.image,
            ocr=self.ocr,
            ocr_workers=self.ocr_workers,
            drafter=self.options["drafter"],
        )
        return replace(sheet, text=reading)

    def close(self, pipe: Any) -> None:
        """Gives up the pages that the OCR has not begun with."""
        pipe.stop_reading()

    def write(self, pipe: Any, tasks: Sequence[PageTask], sheets: Sequence[Sheet]) -> list[Answer]:
        """Parses pages together.

        Raises:
            ValueError: If the prompt does not fit the model.
        """
        started = time.perf_counter()
        options = {name: value for name, value in self.options.items() if value is not None}
        result = pipe(
            [sheet.image for sheet in sheets],
            references=[sheet.text for sheet in sheets],
            ocr=self.ocr,
            ocr_workers=self.ocr_workers,
            ocr_wait=self.ocr_wait,
            prompt=self.prompt,
            regions=self.regions,
            batch_size=len(tasks),
            **options,
        )
        seconds = (time.perf_counter() - started) / len(tasks)
        return [
            _answer(task, page, sheet.wait_time_s, seconds)
            for task, page, sheet in zip(tasks, result.pages, sheets, strict=True)
        ]


def _answer(task: PageTask, page: Any, wait_s: float, seconds: float) -> Answer:
    """The record of a page; its seconds are its share of its batch, and those it was waited for."""
    record = {
        "file": task.file,
        "page": task.page,
        "digest": task.digest,
        "text": page.text,
        "num_tokens": len(page.tokens),
        "drafts": "text layer" if page.reference == "given" else page.reference,
        "note": page.error,
        "tau": round(page.stats.tau, 3),
        "seconds": round(seconds + wait_s, 3),
        "ocr_seconds": round(page.ocr_time_s, 3),
        "wait_seconds": round(page.ocr_wait_s + wait_s, 3),
        "error": None,
    }
    return Answer(
        record=record,
        ocr_time_s=page.ocr_time_s,
        wait_time_s=page.ocr_wait_s + wait_s,
        num_tokens=len(page.tokens),
        num_row_steps=sum(page.stats.accepted_histogram),
    )


def markdown_paths(files: Mapping[Path, str], out: Path) -> dict[str, Path]:
    """Where the Markdown of each document goes.

    Args:
        files: Document to its name in its folder.
        out: A file ``*.md`` for all of them, or a folder for a file of each: ``a.pdf.md``.

    Raises:
        ValueError: If two documents would go to one file of the folder.
    """
    if out.suffix.lower() == ".md":
        return {str(file): out for file in files}
    owners: dict[Path, Path] = {}
    for file, name in files.items():
        target = out / f"{name}.md"
        other = owners.setdefault(target, file)
        if other != file:
            raise ValueError(f"{other} and {file} would both be written to {target}")
    return {str(file): target for target, file in owners.items()}


def markdown(records: Iterable[Mapping[str, Any]]) -> str:
    """Pages as one text, each below a comment that names it; a failed one has its reason there."""
    pieces = []
    for record in records:
        pieces.append(_comment(name_of(record["file"], record["page"])))
        error = record["error"]
        pieces.append(record["text"].strip() if error is None else _comment(f"missing: {error}"))
    return "\n\n".join(pieces) + "\n"


def _comment(text: str) -> str:
    """Two hyphens would end the comment, and so may a line end a page's first line."""
    return f"<!-- {' '.join(text.split()).replace('--', '- -')} -->"


class MarkdownFiles:
    """Markdown files that are written when the last of their pages is done."""

    def __init__(
        self, targets: Mapping[str, Path], tasks: Sequence[PageTask], *, overwrite: bool
    ) -> None:
        """Writes nothing yet.

        Args:
            targets: Document to its file.
            tasks: All pages.
            overwrite: Replace files that no run before this one has written.
        """
        self._targets = targets
        self._overwrite = overwrite
        self._tasks: dict[Path, list[PageTask]] = {}
        for task in tasks:
            self._tasks.setdefault(targets[task.file], []).append(task)
        self._num_missing: Counter[Path] = Counter()

    def begin(self, journal: Journal, missing: Sequence[PageTask]) -> None:
        """Writes the files whose pages are all done already, if they are not there.

        Raises:
            ValueError: If a file is in the way that is none of the journal's.
            OSError: If a folder cannot be written to.
        """
        known = {file for file, _ in journal.entries}
        for target, tasks in self._tasks.items():
            is_known = any(task.file in known for task in tasks)
            if target.exists() and not (is_known or self._overwrite):
                raise ValueError(f"{target} exists already; use --overwrite or another --out")
        for folder in dict.fromkeys(target.parent for target in self._tasks):
            check_writable(folder)
        self._num_missing.update(self._targets[task.file] for task in missing)
        for target in self._tasks:
            if not self._num_missing[target]:
                self._write(target, journal)

    def after_batch(self, journal: Journal, answers: Sequence[Answer]) -> None:
        """Writes the files that have become complete.

        Raises:
            OSError: If one cannot be written.
        """
        for answer in answers:
            target = self._targets[answer.record["file"]]
            self._num_missing[target] -= 1
            if not self._num_missing[target]:
                self._write(target, journal)

    def _write(self, target: Path, journal: Journal) -> None:
        text = markdown(records_of(journal, self._tasks[target]))
        try:
            with whole_file(target) as building:
                building.write_text(text, encoding="utf-8")
        except OSError as error:
            raise OSError(f"cannot write to {target}: {error.strerror}") from error


def records_of(journal: Journal, tasks: Iterable[PageTask]) -> Iterable[dict[str, Any]]:
    """The records of pages that have one, in order."""
    found = (journal.get(task.key) for task in tasks)
    return (record for record in found if record is not None)
