"""Pages that are read by an OCR engine in threads, while the model writes them or others."""

import logging
import time
from collections import deque
from concurrent.futures import CancelledError, Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from PIL import Image

from mmspec.ocr import Engine, PageText, open_engine

logger = logging.getLogger("mmspec")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What an OCR engine made of a page.

    Attributes:
        engine: Name of the engine; "none" if there was none.
        text: What it found; None if that was nothing.
        error: Why there is no text, or None.
        time_s: Seconds that it took.
    """

    engine: str
    text: PageText | None = None
    error: str | None = None
    time_s: float = 0.0


class PendingReading:
    """A page that waits for an engine, is being read by it, or was; made by `OcrReader.begin`."""

    def __init__(self, reader: "OcrReader", image: Image.Image, pool: Executor) -> None:
        """Puts the page behind those that the pool is to read."""
        self._engine = reader.name
        self._begun_at: float | None = None
        self._future = pool.submit(self._read, reader, image)

    def poll(self) -> Reading | None:
        """What was found; None before that, and where the reading was given up."""
        is_there = self._future.done() and not self._future.cancelled()
        return self._future.result() if is_there else None

    def wait(self) -> Reading:
        """What was found, or why it was given up."""
        with suppress(CancelledError):
            return self._future.result()
        return self.end()

    def end(self) -> Reading:
        """Gives the reading up where the page was complete first.

        One that an engine is at goes on in its thread, and its seconds are those until now.

        Returns:
            Why there was no text for the page.
        """
        if self._future.cancel():
            why, time_s = "had not begun when the page was complete", 0.0
        else:
            found, now = self.poll(), time.perf_counter()
            if found is not None and found.error is not None:
                return found
            why = "came too late: the page was complete"
            time_s = found.time_s if found is not None else now - (self._begun_at or now)
        return Reading(engine=self._engine, error=f"{self._engine} {why}", time_s=time_s)

    def _read(self, reader: "OcrReader", image: Image.Image) -> Reading:
        self._begun_at = time.perf_counter()
        return reader.read(image)


class OcrReader:
    """Reads pages with one kind of engine in threads, in the order in which they are begun.

    An engine reads one page at a time, so each thread that reads beside another one gets an engine
    of its own. They are kept.

    Attributes:
        name: Of the engine.
    """

    def __init__(self, name: str, num_threads: int = 1) -> None:
        """Opens the first engine.

        Args:
            name: Of `mmspec.ocr.ENGINES`.
            num_threads: Pages that are read at once.

        Raises:
            ValueError: If the name is unknown, or the engine's package or data is missing.
        """
        self.name = name
        self._num_threads = num_threads
        self._idle = deque([open_engine(name)])
        self._pool = self._new_pool()
        self._is_stopped = False

    def begin(self, image: Image.Image) -> PendingReading:
        """Has a thread read a page as soon as one is free."""
        if self._is_stopped:
            self._pool, self._is_stopped = self._new_pool(), False
        return PendingReading(self, image, self._pool)

    def stop(self, *, wait: bool = False) -> None:
        """Gives up the pages that no engine is at.

        Args:
            wait: Until the engines are through with the others.
        """
        self._is_stopped = True
        self._pool.shutdown(wait=wait, cancel_futures=True)

    def read(self, image: Image.Image) -> Reading:
        """Reads a page. What goes wrong is in `Reading.error`: a draft is no reason to stop."""
        started = time.perf_counter()
        text, error = PageText(""), None
        try:
            engine = self._taken()
            text = engine(image)
            self._idle.append(engine)
        except Exception as failure:  # whatever the engine does
            error = f"{self.name} failed: {failure}"
            logger.warning("a page is drafted from n-grams alone: %s", error)
        if error is None and not text.text.strip():
            error = f"{self.name} found no text"
        return Reading(
            engine=self.name,
            text=None if error else text,
            error=error,
            time_s=time.perf_counter() - started,
        )

    def _new_pool(self) -> Executor:
        return ThreadPoolExecutor(self._num_threads, thread_name_prefix="mmspec-ocr")

    def _taken(self) -> Engine:
        try:
            return self._idle.pop()
        except IndexError:
            return open_engine(self.name)
