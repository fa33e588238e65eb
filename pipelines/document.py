"""Pages to text with a vision-language model, drafted from OCR, text layers and earlier pages."""

import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from mmspec.adapters import encoder_decoder
from mmspec.checks import require, require_generator
from mmspec.drafters import DrafterSpec, parse_spec
from mmspec.drafters.trie import NgramTrie
from mmspec.layout import split_into_regions
from mmspec.ocr import Box, PageText, installed_engines
from mmspec.ocr_reading import OcrReader, PendingReading, Reading
from mmspec.pipelines.base import SpeculativePipeline, check_positive
from mmspec.pipelines.document_pages import DocumentOutput, Page, gathered, opened_pages
from mmspec.pipelines.vlm import SpeculativeVLMPipeline, bundled_spec, with_loaded
from mmspec.pipelines.vlm_inputs import Picture
from mmspec.pipelines.writing import Prompt, WrittenOutput

logger = logging.getLogger("mmspec")

#: What models were trained to be asked for a page's text, by bundled name or by the model type of
#: transformers.
PARSE_PROMPTS = {
    "bundled:pages": "Convert to Markdown.",
    "florence2": "<OCR>",
    "glm_ocr": "Text Recognition:",
    "got_ocr2": " OCR: ",
    "granite_docling": "Convert this page to docling.",
    "idefics3": "Convert this page to docling.",
    "paddleocr_vl": "OCR:",
    "paligemma": "ocr",
}
#: What all others are asked.
PARSE_PROMPT = "Convert this page to Markdown."

#: Drafters that are given the pages' references.
_GUIDED = ("auto", "reference")
_UNREAD = Reading(
    engine="none",
    error="no OCR engine is installed; pip install 'mmspec[ocr]' and the data of a language "
    "(Debian: apt-get install tesseract-ocr-eng), or pass ocr=None or references",
)
#: Options of a call that say nothing of how a region is read.
_OF_THE_PAGE_ALONE = {"callback_on_step_end", "streamer"}
# Pixels around a region.
_MARGIN = 4


class SpeculativeDocumentPipeline(SpeculativePipeline):
    """Reads pages with a vision-language model; the same text as its plain decoding, sooner.

    Attributes:
        reader: The pipeline of the model, which answers the prompts.
        drafter: Used where a call names none; "auto" drafts from references and earlier pages.
        prompt: What the model is asked where a call does not say.

    Example:
        >>> pipe = SpeculativeDocumentPipeline.from_pretrained("bundled:pages")  # doctest: +SKIP
        >>> out = pipe(["1.png", "2.png"])  # doctest: +SKIP
        >>> out.pages[0].text, out.stats.tau  # doctest: +SKIP
        ('# Title ...', 9.7)
    """

    def __init__(self, reader: SpeculativeVLMPipeline, *, drafter: DrafterSpec = "auto") -> None:
        """Wraps a pipeline; see `from_pretrained` and `from_model`.

        Raises:
            ValueError: If the drafter is unknown.
        """
        super().__init__(reader.model)
        self.reader = reader
        self.drafter: DrafterSpec = "auto" if drafter is None else drafter
        _name_of(self.drafter)
        self.prompt = PARSE_PROMPTS.get(reader.model.config.model_type, PARSE_PROMPT)
        self._ocr_readers: dict[tuple[str, int], OcrReader] = {}
        self._has_warned = False

    @classmethod
    def from_pretrained(
        cls, id_or_path: str | Path, *, drafter: DrafterSpec = "auto", **kwargs: Any
    ) -> "SpeculativeDocumentPipeline":
        """Loads a bundled model, a local folder or a hub repository of a plain transformers model.

        Args:
            id_or_path: ``"bundled:pages"``, a folder, or a hub id.
            drafter: Default of the calls; may be bundled, as in `SpeculativeVLMPipeline`.
            **kwargs: Others of `SpeculativeVLMPipeline.from_pretrained`.

        Raises:
            ValueError: If the model's family, the drafter or the schedule is unknown.
        """
        drafter = bundled_spec(drafter)
        _name_of(drafter)
        reader = SpeculativeVLMPipeline.from_pretrained(id_or_path, **kwargs)
        options = {"dtype": kwargs.get("dtype") or "auto", "device_map": kwargs.get("device_map")}
        pipe = cls(reader, drafter=with_loaded(drafter, **options))
        pipe.prompt = PARSE_PROMPTS.get(str(id_or_path), pipe.prompt)
        return pipe

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        processor: Any,
        *,
        drafter: DrafterSpec = "auto",
        schedule: str | None = None,
    ) -> "SpeculativeDocumentPipeline":
        """Uses objects that are loaded already; see `from_pretrained` for the arguments."""
        reader = SpeculativeVLMPipeline.from_model(model, processor, schedule=schedule)
        return cls(reader, drafter=drafter)

    @property
    def processor(self) -> Any:
        """The model's processor."""
        return self.reader.processor

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.reader.tokenizer

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves the model and its processor as transformers does."""
        self.reader.save_pretrained(folder)

    def set_progress_bar_config(self, **kwargs: object) -> None:
        """Options for tqdm, such as ``disable=True``."""
        self.reader.set_progress_bar_config(**kwargs)

    def interrupt(self) -> None:
        """Stops the running call, as in all pipelines, and what the reader is writing for it."""
        super().interrupt()
        self.reader.interrupt()

    @property
    def store(self) -> NgramTrie:
        """What was written on earlier pages, to draft from."""
        return self.reader.store

    def clear_store(self) -> None:
        """Forgets earlier pages."""
        self.reader.clear_store()

    def remember(self, texts: Iterable[str]) -> None:
        """Adds texts of pages that an earlier process wrote to the store, the oldest first."""
        self.reader.remember(texts)

    def read_ahead(
        self,
        image: Image.Image,
        *,
        ocr: str | None = "auto",
        ocr_workers: int = 1,
        drafter: DrafterSpec = None,
    ) -> PendingReading | Reading | None:
        """Has an OCR engine read a page, to be given to a later call as its reference.

        It returns at once; pages are read in the order in which they are begun. May be called in
        a thread beside a running call.

        Args:
            image: The page.
            ocr: As in the call.
            ocr_workers: As in the call.
            drafter: As in the call.

        Returns:
            What the engine is at; None if ``ocr`` is None or the drafter is given no references.

        Raises:
            ValueError: If the engine is unknown or not installed.
        """
        if _name_of(drafter or self.drafter) not in _GUIDED:
            return None
        reader = self._ocr_reader(ocr, ocr_workers)
        if reader is None:
            return None if ocr is None else _UNREAD
        return reader.begin(image)

    def stop_reading(self, *, wait: bool = False) -> None:
        """Gives up the pages of `read_ahead` that no engine is at.

        Args:
            wait: Until the engines are through with the others.
        """
        for reader in self._ocr_readers.values():
            reader.stop(wait=wait)

    @torch.no_grad()
    def __call__(
        self,
        pages: Picture | Sequence[Picture],
        *,
        references: Any = None,
        ocr: str | None = "auto",
        ocr_workers: int = 1,
        ocr_wait: bool = False,
        prompt: str | None = None,
        store: bool = True,
        regions: bool = False,
        batch_size: int = 1,
        **options: Any,
    ) -> DocumentOutput:
        """Writes the text of pages.

        Args:
            pages: A PIL image or the path of a file, or a list of them.
            references: Texts that the output probably resembles, such as a PDF's text layer: one
                for a single page, or a list with a text, a `PageText`, what `read_ahead` returned
                or None for each.
            ocr: What reads pages without a reference: a name of `mmspec.ocr.ENGINES`, "auto" (the
                first that is installed), or None. It works beside the target, which begins at
                once and drafts from a page's text from when it is there; a reading is given up
                when its page is complete.
            ocr_workers: Threads in which it does, each with an engine of its own.
            ocr_wait: Begin a batch when its pages are read. Nothing depends on the speed of the
                engine then but the time.
            prompt: What the model is asked; None is what its family was trained on, or
                `PARSE_PROMPT`.
            store: Draft from earlier pages, those of earlier calls included, and keep these.
            regions: First read the parts of each page, as one batch, and draft the page from them.
            batch_size: Pages that are written together.
            **options: Of `SpeculativeVLMPipeline.__call__`; ``max_new_tokens`` is what the model's
                generation config says, else 1024. A ``drafter`` that is named is used alone,
                without references.

        Raises:
            ValueError: On any argument out of its range, an image that cannot be read, or an OCR
                engine that is named and not installed; before any forward.
        """
        started = time.perf_counter()
        own_budget = getattr(self.model.generation_config, "max_new_tokens", None)
        options = {"max_new_tokens": own_budget or 1024} | options
        drafter = options.pop("drafter", None) or self.drafter
        name = _name_of(drafter)
        check_positive("batch_size", batch_size)
        check_positive("ocr_workers", ocr_workers)
        require(isinstance(ocr_wait, bool), "ocr_wait", "True or False", ocr_wait)
        require(prompt is None or isinstance(prompt, str), "prompt", "None or a text", prompt)
        if prompt is None and self.model.config.model_type == "vision-encoder-decoder":
            raise ValueError(
                "prompt must be given: what begins a page depends on the checkpoint (Nougat's "
                "start token, the token of one of Donut's tasks)"
            )
        work = opened_pages(pages, references)
        batches = [work[first : first + batch_size] for first in range(0, len(work), batch_size)]
        seeds = _seeds_by_batch(options.pop("generator", None), batches)
        self.reader.check(len(batches[0]), **options)
        is_guided = name in _GUIDED and options.get("decoder") != "sequential"
        drafter = None if name == "auto" else drafter
        memory = self.store if store else None
        outputs: list[WrittenOutput] = []
        read: list[Page] = []
        with self._running() as interrupted:
            try:
                if is_guided:
                    read = self._begin_reading(work, ocr, ocr_workers)
                for batch, generator in zip(batches, seeds, strict=True):
                    if regions and is_guided:
                        self._read_regions(batch, drafter, prompt, options)
                    if interrupted.is_set():
                        break
                    spec = drafter
                    if is_guided:
                        spec = _guided(drafter, batch, self.tokenizer, memory, ocr_wait)
                    images = [page.image for page in batch]
                    outputs.append(
                        self._ask(images, prompt, drafter=spec, generator=generator, **options)
                    )
                    for page in batch:
                        page.close()
                    if outputs[-1].interrupted:
                        break
            finally:
                for page in read:
                    page.close()
        return gathered(work, outputs, time.perf_counter() - started, len(batches))

    def _ask(self, images: list[Image.Image], prompt: str | None, **options: Any) -> WrittenOutput:
        """What the model answers for each image."""
        if prompt is None:
            prompt = self.prompt
        asked: Prompt
        if self.model.config.model_type in encoder_decoder.FAMILIES:
            asked = prompt
        elif getattr(self.processor, "chat_template", None) is not None:
            parts = [{"type": "image"}, *([{"type": "text", "text": prompt}] if prompt else [])]
            asked = [{"role": "user", "content": parts}]
        else:
            asked = f"{self.processor.image_token}{prompt}"
        answer = self.reader([asked] * len(images), images=[[one] for one in images], **options)
        assert isinstance(answer, WrittenOutput)
        return answer

    def _begin_reading(self, work: list[Page], ocr: str | None, num_threads: int) -> list[Page]:
        """Sets the OCR engine to work on the pages without a reference, which are returned."""
        unread = [
            page
            for page in work
            if page.source == "none" and page.error is None and page.reading is None
        ]
        reader = self._ocr_reader(ocr, num_threads) if unread or ocr != "auto" else None
        for page in unread:
            if reader is not None:
                page.take(reader.begin(page.image))
            elif ocr == "auto":
                page.take(_UNREAD)
        return unread

    def _ocr_reader(self, ocr: str | None, num_threads: int) -> OcrReader | None:
        """What reads pages; None if nothing does."""
        if ocr == "auto":
            ocr = next(iter(installed_engines()), None)
            if ocr is None and not self._has_warned:
                self._has_warned = True
                logger.warning("pages are drafted from n-grams alone: %s", _UNREAD.error)
        if ocr is None:
            return None
        key = ocr, num_threads
        if key not in self._ocr_readers:
            self._ocr_readers[key] = OcrReader(ocr, num_threads)
        return self._ocr_readers[key]

    def _read_regions(
        self, batch: list[Page], drafter: DrafterSpec, prompt: str | None, options: dict[str, Any]
    ) -> None:
        """Has the model read the parts of each page; what it writes is the page's reference."""
        kept = {name: options[name] for name in options.keys() - _OF_THE_PAGE_ALONE}
        for page in batch:
            boxes = split_into_regions(page.image)
            if len(boxes) < 2:
                continue
            text = page.awaited_reference()
            crops = [_with_margin(page.image, box) for box in boxes]
            if self._shows_one_size([page.image, crops[0]]):
                crops = [_on_paper(crop, page.image) for crop in crops]
            parts = []
            for crop, (left, top, right, bottom) in zip(crops, boxes, strict=True):
                part = Page(crop, text=text)
                if isinstance(text, PageText) and text.words:
                    part.text = text.between(top, bottom, left, right)
                parts.append(part)
            spec = _guided(drafter, parts, self.tokenizer, None, False)
            answer = self._ask(
                [part.image for part in parts],
                prompt,
                **kept | {"drafter": spec, "generator": torch.Generator()},
            )
            page.text, page.source = "\n\n".join(map(str.strip, answer.texts)), "regions"
            page.region_stats = answer.stats

    def _shows_one_size(self, images: list[Image.Image]) -> bool:
        """Whether the model sees all of these at one size, whatever theirs is."""
        prepare = self.processor.image_processor
        seen = [prepare(images=[image], return_tensors="pt")["pixel_values"] for image in images]
        return len({tuple(pixels.shape) for pixels in seen}) == 1


def _with_margin(page: Image.Image, box: Box) -> Image.Image:
    """A region of a page, and a little around it."""
    left, top, right, bottom = box
    left, top = max(left - _MARGIN, 0), max(top - _MARGIN, 0)
    return page.crop(
        (left, top, min(right + _MARGIN, page.width), min(bottom + _MARGIN, page.height))
    )


def _on_paper(crop: Image.Image, page: Image.Image) -> Image.Image:
    """A region in the corner of an empty page, where its letters are as large as on the page."""
    shade = np.median(np.asarray(page.convert("RGB")).reshape(-1, 3), axis=0).astype(int)
    paper = Image.new("RGB", page.size, tuple(shade.tolist()))
    paper.paste(crop, (0, 0))
    return paper


def _name_of(drafter: DrafterSpec) -> str:
    """The name of a drafter.

    Raises:
        ValueError: If it is unknown.
    """
    return "auto" if drafter == "auto" else parse_spec(drafter)[0]


def _guided(
    drafter: DrafterSpec,
    batch: Sequence[Page],
    tokenizer: Any,
    memory: NgramTrie | None,
    waits: bool,
) -> DrafterSpec:
    """The drafter of a batch, which the model is at from now on: references and earlier pages."""
    if not waits:
        for page in batch:
            page.attend()
    options = {} if drafter is None else parse_spec(drafter)[1]
    return {
        "name": "reference",
        "memory": memory,
        **options,
        "references": [page.awaited_reference if waits else page.reference for page in batch],
        "tokenizer": tokenizer,
        "sources": [page.counts for page in batch],
    }


def _seeds_by_batch(generator: Any, batches: list[list[Page]]) -> list[Any]:
    """The generators of each batch.

    Raises:
        ValueError: If it is no generator, nor a list with one for each page.
    """
    require_generator(generator)
    if not isinstance(generator, list | tuple):
        return [generator] * len(batches)
    num_pages = sum(map(len, batches))
    require(len(generator) == num_pages, "generator", f"one per page, {num_pages}", generator)
    ordered = iter(generator)
    return [[next(ordered) for _ in batch] for batch in batches]
