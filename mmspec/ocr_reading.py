"""Pages that are read by an OCR engine in threads, while the model writes them or others.

A page is read part by part from the top. Of a page that the model is at no more than the first part
is read until the model has written something of it: an engine that cannot read a page would only
take the processor from the model.
"""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from mmspec.ocr import Engine, PageText, open_engine
from mmspec.ocr_parts import Cuts, cuts_of, joined

logger = logging.getLogger("mmspec")

# Letters and digits from which on it can be told whether a text is the page's.
_LEAST_LETTERS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What an OCR engine made of a page.

    Attributes:
        engine: Name of the engine; "none" if there was none.
        text: What it found; None if that was nothing.
        error: Why there is no text, or no more than this, or None.
        time_s: Seconds that it took.
        is_final: False while more may come.
    """

    engine: str
    text: PageText | None = None
    error: str | None = None
    time_s: float = 0.0
    is_final: bool = True


class PendingReading:
    """A page that waits for an engine, is being read by it, or was; made by `OcrReader.begin`."""

    def __init__(self, reader: "OcrReader", image: Image.Image, number: int) -> None:
        """Begins nothing; the reader does.

        Args:
            reader: What reads it.
            image: The page.
            number: How many were begun before.
        """
        self._reader = reader
        self._image = image
        self._number = number
        self._cuts: Cuts | None = None
        self._num_read = 0
        self._text = PageText("")
        self._told: PageText | None = None
        self._error: str | None = None
        self._time_s = 0.0
        self._busy_since: float | None = None
        self._is_over = False
        # Of the model: it is at the page, waits for the text, has written something of it.
        self._is_at_work = self._is_awaited = self._agrees = False

    def attend(self) -> None:
        """The model is at the page from now on, and will judge what was found."""
        with self._reader.changed:
            self._is_at_work = True

    def poll(self) -> Reading | None:
        """What was found by now; None before that, and where the reading was given up."""
        with self._reader.changed:
            found = self._found()
            self._told = found.text if found is not None else None
        return found

    def wait(self) -> Reading:
        """What was found on the whole page, or why it was given up."""
        with self._reader.changed:
            self._is_awaited = True
            self._reader.wake()
            self._reader.changed.wait_for(lambda: self._is_over and self._busy_since is None)
            return self._found() or self._given_up()

    def judge(self, agrees: bool) -> None:
        """Learns whether the model writes what was found; if not, no more of the page is read."""
        with self._reader.changed:
            self._reader.is_trusted = self._agrees = agrees
            if not agrees and not self._is_over:
                self._error = f"{self._reader.name}'s text did not agree with the page"
                self.give_up()
            self._reader.wake()

    def end(self) -> Reading:
        """Gives up what was not read when the page was complete.

        A part that an engine is at goes on in its thread, and its seconds are those until now.

        Returns:
            What was told of the page, or why there was no text for it.
        """
        with self._reader.changed:
            self.give_up()
            if self._told is None and self._error is None:
                return self._given_up()
            return self._reading(self._told)

    def give_up(self) -> None:
        """Has no further part read; the reader's lock is held."""
        self._is_over = True
        self._reader.changed.notify_all()

    @property
    def is_over(self) -> bool:
        """No further part will be read."""
        return self._is_over

    @property
    def is_busy(self) -> bool:
        """An engine is at a part."""
        return self._busy_since is not None

    @property
    def is_ready(self) -> bool:
        """The next part may be read."""
        if self._is_over or self.is_busy:
            return False
        has_leave = self._is_awaited or self._agrees
        is_ahead = self._reader.is_trusted and not self._is_at_work
        return has_leave or is_ahead or sum(map(str.isalnum, self._text.text)) < _LEAST_LETTERS

    @property
    def urgency(self) -> tuple[int, ...]:
        """The least comes first: pages at work part by part, behind them the others."""
        if self._is_at_work or self._is_awaited:
            return 0, self._num_read, self._number
        return 1, self._number

    def begin_part(self) -> None:
        """Notes that an engine begins with the next part; the reader's lock is held."""
        self._busy_since = time.perf_counter()

    def read_part(self, engine: Engine) -> PageText:
        """Reads the next part; the text with it."""
        if self._cuts is None:
            self._cuts = cuts_of(self._image)
        edges, pitch = self._cuts.edges, self._cuts.pitch
        if len(edges) == 2:
            return engine(self._image)
        top, bottom = edges[self._num_read : self._num_read + 2]
        part = engine(self._image.crop((0, top, self._image.width, bottom)), pitch)
        return joined(self._text, part, top, pitch)

    def end_part(self, text: PageText | None, error: str | None) -> None:
        """Takes what `read_part` returned, or why it failed; the reader's lock is held."""
        self._time_s, self._busy_since = self._seconds(), None
        self._num_read += 1
        self._text = text or self._text
        is_whole = self._cuts is not None and self._num_read == len(self._cuts.edges) - 1
        if is_whole and not error and not self._text.text.strip():
            error = f"{self._reader.name} found no text"
        self._error = self._error or error
        if is_whole or error:
            self._is_over = True
        self._reader.changed.notify_all()

    def _found(self) -> Reading | None:
        text = self._text if self._text.text.strip() else None
        return self._reading(text) if text or self._error else None

    def _given_up(self) -> Reading:
        has_begun = self._num_read or self.is_busy
        why = "came too late: the page was complete"
        if not has_begun:
            why = "had not begun when the page was complete"
        return Reading(
            engine=self._reader.name, error=f"{self._reader.name} {why}", time_s=self._seconds()
        )

    def _reading(self, text: PageText | None) -> Reading:
        return Reading(
            engine=self._reader.name,
            text=text,
            error=self._error,
            time_s=self._seconds(),
            is_final=self._is_over,
        )

    def _seconds(self) -> float:
        if self._busy_since is None:
            return self._time_s
        return self._time_s + time.perf_counter() - self._busy_since


class OcrReader:
    """Reads pages with one kind of engine in threads.

    Parts of pages that the model is at come first, then the pages in the order in which they are
    begun. An engine reads one part at a time, so each thread that reads beside another one gets an
    engine of its own. They are kept.

    Attributes:
        name: Of the engine.
        changed: Lock of all readings; notified when a part was read or a page given up.
        is_trusted: The model wrote what was found on the page that was judged last. If it did not,
            or none was judged, no more than the first parts of pages are read ahead.
    """

    def __init__(
        self,
        name: str,
        num_threads: int = 1,
        *,
        adapt: Callable[[Engine], Engine] = lambda engine: engine,
    ) -> None:
        """Opens the first engine.

        Args:
            name: Of `mmspec.ocr.ENGINES`.
            num_threads: Parts that are read at once.
            adapt: Makes of an engine what reads.

        Raises:
            ValueError: If the name is unknown, or the engine's package or data is missing.
        """
        self.name = name
        self.changed = threading.Condition()
        self.is_trusted = False
        self._num_threads = num_threads
        self._adapt = adapt
        self._idle = deque([adapt(open_engine(name))])
        self._open: list[PendingReading] = []
        self._numbers = itertools.count()
        self._num_working = 0
        self._pool = self._new_pool()
        self._is_stopped = False

    def begin(self, image: Image.Image) -> PendingReading:
        """Has a thread read a page as soon as one is free."""
        reading = PendingReading(self, image, next(self._numbers))
        with self.changed:
            if self._is_stopped:
                self._pool, self._is_stopped = self._new_pool(), False
            self._open.append(reading)
            self.wake()
        return reading

    def stop(self, *, wait: bool = False) -> None:
        """Gives up what no engine is at.

        Args:
            wait: Until the engines are through with the rest.
        """
        with self.changed:
            for reading in self._open:
                reading.give_up()
            self._is_stopped = True
        self._pool.shutdown(wait=wait)

    def wake(self) -> None:
        """Sets threads to the parts that may be read by now; the lock is held."""
        self._open = [one for one in self._open if not one.is_over]
        num_wanted = sum(one.is_ready or one.is_busy for one in self._open)
        while not self._is_stopped and self._num_working < min(num_wanted, self._num_threads):
            self._num_working += 1
            self._pool.submit(self._work, self._pool)

    def _work(self, pool: ThreadPoolExecutor) -> None:
        """Reads parts as long as there are any that may be read, or the pool is stopped."""
        while True:
            with self.changed:
                ready = [one for one in self._open if one.is_ready]
                if not ready or pool is not self._pool:
                    self._num_working -= 1
                    self.wake()
                    return
                reading = min(ready, key=lambda one: one.urgency)
                reading.begin_part()
            text, error = self._read(reading)
            with self.changed:
                reading.end_part(text, error)

    def _read(self, reading: PendingReading) -> tuple[PageText | None, str | None]:
        """What goes wrong is told: a draft is no reason to stop."""
        try:
            engine = self._taken()
            text = reading.read_part(engine)
            self._idle.append(engine)
        except Exception as failure:  # whatever the engine does
            error = f"{self.name} failed: {failure}"
            logger.warning("a page is drafted from n-grams alone: %s", error)
            return None, error
        return text, None

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._num_threads, thread_name_prefix="mmspec-ocr")

    def _taken(self) -> Engine:
        try:
            return self._idle.pop()
        except IndexError:
            return self._adapt(open_engine(self.name))
