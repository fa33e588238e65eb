"""What the document pipeline gives back, and the pages that it is at."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from mmspec.checks import require
from mmspec.drafters.reference import LateText, Reference
from mmspec.ocr import PageText
from mmspec.ocr_reading import PendingReading, Reading
from mmspec.pipelines.vlm_inputs import opened
from mmspec.pipelines.writing import WrittenOutput
from mmspec.records import Stats

#: What a page's reference is given as.
_ONE = (str, PageText, Reading, PendingReading)


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentStats:
    """Figures of a document.

    Attributes:
        num_pages: Pages written.
        num_units: Tokens of all pages.
        num_target_forwards: Steps of all batches, those of the region passes included.
        tau: Tokens per forward and row, region passes not included.
        ocr_time_s: Seconds that the OCR engine worked, mostly while the target did.
        ocr_wait_s: Seconds of the call in which the target waited for it, where it does.
        wall_time_s: Seconds in all.
    """

    num_pages: int
    num_units: int
    num_target_forwards: int
    tau: float
    ocr_time_s: float
    ocr_wait_s: float
    wall_time_s: float

    def to_dict(self) -> dict[str, int | float]:
        """Returns the figures as plain JSON types."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageOutput:
    """One page.

    Attributes:
        text: What the model wrote.
        tokens: The same, int64; the token that ended it included.
        stats: Figures of the page; its times are those of its batch.
        reference: Where its reference came from: "given", the name of an OCR engine, "regions", or
            "none".
        sources: How many of its tokens came from "reference", "ngram" and "target"; empty for other
            drafters.
        ocr_time_s: Seconds of OCR; of one that came too late, those until the page was complete.
        ocr_wait_s: Seconds of the call in which its batch waited for that.
        region_stats: Figures of its region pass.
        error: Why it has no reference although one was asked for, or only the beginning of one,
            such as that it came too late; the text is right all the same.
    """

    text: str
    tokens: Tensor
    stats: Stats
    reference: str
    sources: Mapping[str, int]
    ocr_time_s: float = 0.0
    ocr_wait_s: float = 0.0
    region_stats: Stats | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentOutput:
    """The pages, and figures over all of them.

    Attributes:
        pages: In the order given; those that were begun, if interrupted.
        stats: Figures over all pages.
        interrupted: True if the call was stopped before every page had ended.
    """

    pages: list[PageOutput]
    stats: DocumentStats
    interrupted: bool = False


@dataclass(slots=True)
class Page:
    """A page at work.

    Attributes:
        image: The page.
        source: As `PageOutput.reference`.
        text: Its reference, as far as it is known by now.
        error: As in `PageOutput`.
        ocr_time_s: As there.
        ocr_wait_s: As there.
        region_stats: As there.
        counts: Its `PageOutput.sources`.
        reading: The reading of it, as long as it may still bring a reference.
    """

    image: Image.Image
    source: str = "none"
    text: Reference = None
    error: str | None = None
    ocr_time_s: float = 0.0
    ocr_wait_s: float = 0.0
    region_stats: Stats | None = None
    counts: Counter[str] = field(default_factory=Counter)
    reading: PendingReading | None = None

    def take(self, given: Reference | Reading | PendingReading) -> None:
        """Takes a reference, if it has any text, and what is known of an engine's work."""
        if isinstance(given, PendingReading):
            self.reading = given
            return
        if isinstance(given, Reading):
            self.error, self.ocr_time_s = given.error, given.time_s
            source, given = given.engine, given.text
        else:
            source = "given"
        if given is not None and (given if isinstance(given, str) else given.text).strip():
            self.text, self.source = given, source

    def attend(self) -> None:
        """The model is at the page from now on."""
        if self.reading is not None:
            self.reading.attend()

    def reference(self) -> Reference | LateText:
        """The page's reference, as far as there is one by now."""
        reading = self.reading
        found = reading.poll() if reading is not None else None
        if reading is None or found is None:
            return self.text
        if found.text is None:
            self._settle(found)
            return None
        self.take(found)
        return LateText(found.text, reading.judge, found.is_final)

    def awaited_reference(self) -> Reference:
        """The page's reference; waits for the engine."""
        if self.reading is not None:
            started = time.perf_counter()
            self._settle(self.reading.wait())
            self.ocr_wait_s += time.perf_counter() - started
        return self.text

    def close(self) -> None:
        """Gives up what was not read of the page so far, and notes what became of it."""
        if self.reading is not None:
            self._settle(self.reading.end())

    def _settle(self, found: Reading) -> None:
        self.reading = None
        self.take(found)


def opened_pages(pages: Any, references: Any) -> list[Page]:
    """Pages in memory, with the references that were given.

    Raises:
        ValueError: If a page cannot be read, or there is not one reference for each.
    """
    given = list(pages) if isinstance(pages, list | tuple) else [pages]
    if not given:
        raise ValueError("at least one page is needed, got an empty list")
    if references is None or isinstance(references, _ONE):
        references = [references] if references is None or len(given) == 1 else references
        texts = references * len(given) if isinstance(references, list) else None
    else:
        texts = list(references) if isinstance(references, list | tuple) else None
    is_good = texts is not None and len(texts) == len(given)
    require(is_good, "references", f"one text or None for each of {len(given)} pages", references)
    work = []
    for index, (picture, text) in enumerate(zip(given, texts or [], strict=True)):
        is_text = text is None or isinstance(text, _ONE)
        rule = "a text, a PageText, a Reading, a PendingReading or None"
        require(is_text, f"reference {index}", rule, text)
        page = Page(opened(picture, f"page {index}"))
        page.take(text)
        work.append(page)
    return work


def gathered(
    work: list[Page], outputs: list[WrittenOutput], wall_time_s: float, num_batches: int
) -> DocumentOutput:
    """The output of a call: its pages as far as they were begun."""
    rows = [
        (text, tokens, stats)
        for output in outputs
        for text, tokens, stats in zip(output.texts, output.tokens, output.row_stats, strict=True)
    ]
    pages = [
        PageOutput(
            text=text,
            tokens=tokens,
            stats=stats,
            reference=page.source,
            sources=dict(page.counts),
            ocr_time_s=page.ocr_time_s,
            ocr_wait_s=page.ocr_wait_s,
            region_stats=page.region_stats,
            error=page.error,
        )
        for page, (text, tokens, stats) in zip(work, rows, strict=False)
    ]
    in_regions = [page.region_stats for page in pages if page.region_stats is not None]
    batches = [output.stats for output in outputs]
    num_row_steps = sum(sum(page.stats.accepted_histogram) for page in pages)
    num_units = sum(page.stats.num_units for page in pages)
    return DocumentOutput(
        pages=pages,
        stats=DocumentStats(
            num_pages=len(pages),
            num_units=num_units,
            num_target_forwards=sum(one.num_target_forwards for one in batches + in_regions),
            tau=num_units / num_row_steps if num_row_steps else 0.0,
            ocr_time_s=sum(page.ocr_time_s for page in pages),
            ocr_wait_s=sum(page.ocr_wait_s for page in pages),
            wall_time_s=wall_time_s,
        ),
        interrupted=len(outputs) < num_batches or outputs[-1].interrupted,
    )
