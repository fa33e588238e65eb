"""A job over pages without a model: what it writes of a page are its size and its colour.

In a module of its own, where worker processes can import it.
"""

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from mmspec.documents import Reader
from mmspec.jobs.pages import Answer


@dataclass(frozen=True, kw_only=True)
class ColourJob:
    """Pages of which one may be more than the model or the process bears.

    Attributes:
        folder: Gets an empty file for each call of `write`, named for its process and size.
        lone: Files that can only be done alone.
        deadly: Files that kill the process.
        unreadable: What reading a file fails with, by its name.
        unwritable: What answering it fails with.
        load_error: What loading fails with.
        wait_s: Seconds of every batch.
        password: Of protected files.
    """

    folder: Path | None = None
    lone: tuple[str, ...] = ()
    deadly: tuple[str, ...] = ()
    unreadable: Mapping[str, BaseException] = field(default_factory=dict)
    unwritable: Mapping[str, BaseException] = field(default_factory=dict)
    load_error: Exception | None = None
    wait_s: float = 0.0
    password: str | None = None
    settings: ClassVar = {"model": "colour"}

    def load(self):
        if self.load_error is not None:
            raise self.load_error
        return "pipe"

    def read(self, task):
        if Path(task.file).name in self.unreadable:
            raise self.unreadable[Path(task.file).name]
        return Reader(dpi=72, password=self.password).read(task.file, task.page)

    def look(self, pipe, sheet):
        assert pipe == "pipe"
        return sheet

    def close(self, pipe):
        assert pipe == "pipe"

    def write(self, pipe, tasks, sheets):
        assert pipe == "pipe"
        time.sleep(self.wait_s)
        names = [Path(task.file).name for task in tasks]
        if set(names) & set(self.deadly):
            os.kill(os.getpid(), signal.SIGKILL)
        if len(tasks) > 1 and set(names) & set(self.lone):
            raise RuntimeError("out of memory")
        for name in names:
            if name in self.unwritable:
                raise self.unwritable[name]
        if "ugly.png" in names:
            raise ValueError("2 places for images and 1 images")
        if self.folder is not None:
            (self.folder / f"{os.getpid()}-{time.monotonic_ns()}-{len(tasks)}").touch()
        return [self._answer(task, sheet) for task, sheet in zip(tasks, sheets, strict=True)]

    def _answer(self, task, sheet):
        text = f"{sheet.image.size} {sheet.image.getpixel((0, 0))}"
        record = {"file": task.file, "page": task.page, "digest": task.digest}
        record |= {"text": text, "error": None}
        return Answer(record=record, num_tokens=len(text), num_row_steps=4)
