"""Pages that are read by an OCR engine in threads, while the model writes others."""

import logging
import time
from collections import deque
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


class OcrReader:
    """Reads pages with one kind of engine, in as many threads as call it.

    An engine reads one page at a time, so each thread that reads beside another one gets an engine
    of its own. They are kept.

    Attributes:
        name: Of the engine.
    """

    def __init__(self, name: str) -> None:
        """Opens the first engine.

        Args:
            name: Of `mmspec.ocr.ENGINES`.

        Raises:
            ValueError: If the name is unknown, or the engine's package or data is missing.
        """
        self.name = name
        self._idle = deque([open_engine(name)])

    def __call__(self, image: Image.Image) -> Reading:
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

    def _taken(self) -> Engine:
        try:
            return self._idle.pop()
        except IndexError:
            return open_engine(self.name)
