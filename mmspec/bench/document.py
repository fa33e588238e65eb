"""Pages: tokens per forward and wall time with a text to draft from, and without one.

As `mmspec.bench.vlm`, on pages of a document. A *document* is some pages of one kind in order; a
system decodes them batch after batch, and those with a store draft later pages from earlier ones.
The OCR reads the pages of a batch in a thread beside the model, part by part from the batch's
beginning on, anew for every system that drafts from it; what is not read when the batch is complete
is given up. On pages of the kind ``failed`` it runs too, and what it finds in each part is garbled
until most of it is wrong; how sure it was is kept.
"""

import random
import string
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image

from mmspec.bench.measure import Budget, Sample, csv, provenance, stem
from mmspec.bench.report import Output, Section, table
from mmspec.bench.setups import DTYPES
from mmspec.bench.tasks import Unavailable
from mmspec.bench.vlm import (
    GENERATE,
    SINGLE_ROW,
    Draft,
    EndOcr,
    bundles_of,
    card_of,
    drafter_of,
    measure_with,
    new_store,
    sight_tables,
    variant_of,
)
from mmspec.bench.vlm import OURS as WITHOUT_TEXT
from mmspec.bench.vlm_setups import PAGE_KINDS, VisionModel, load_pages, load_vlm
from mmspec.bench.written import Bench, Entry, Session, make_card, make_configs, run_bench
from mmspec.drafters import DrafterSpec
from mmspec.drafters.reference import AskedReference
from mmspec.ocr import ENGINES, Engine, PageText, installed_engines
from mmspec.ocr_reading import OcrReader
from mmspec.pipelines.document_pages import Page

#: Systems of ours that read a text beside the page. With a store, later pages are drafted from
#: earlier ones too.
REFERENCES = ("reference", "reference_store", "text_layer")
OURS = (*WITHOUT_TEXT, *REFERENCES)
SYSTEMS = (*GENERATE, *OURS)
DEFAULT_SYSTEMS = (*GENERATE, "plain", "ngram", "ngram_store", *REFERENCES, "model_uniform")
#: Share of the letters that a failed OCR got wrong.
GARBLED = 0.6


def run(
    model: Annotated[str, typer.Option(help="pages, or tiny-vlm: random")] = "pages",
    kinds: Annotated[str, typer.Option(help="Kinds of pages.")] = ",".join(PAGE_KINDS),
    systems: Annotated[str, typer.Option(help="What to compare.")] = ",".join(DEFAULT_SYSTEMS),
    ocr: Annotated[str, typer.Option(help=f"Of {', '.join(ENGINES)}; auto: an installed one.")] = (
        "auto"
    ),
    ocr_wait: Annotated[
        bool, typer.Option("--ocr-wait", help="Begin a batch after its OCR instead of beside it.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Of float32, bfloat16, ...")] = "float32,bfloat16",
    temperature: Annotated[str, typer.Option(help="0 is greedy.")] = "0",
    batch: Annotated[str, typer.Option(help="Pages per call.")] = "1,8",
    pages: Annotated[int | None, typer.Option(help="Pages of each kind; all if unset.")] = None,
    document: Annotated[int, typer.Option(help="Pages of a document; at least a batch.")] = 4,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "--tokens", help="Cap on a page.")
    ] = None,
    schedule: Annotated[
        str, typer.Option(help="Width of our steps: adaptive, or fixed for equal work.")
    ] = "adaptive",
    width: Annotated[int | None, typer.Option(help="Most tokens per row and forward.")] = None,
    repeats: Annotated[int, typer.Option(help="Repetitions of each input.")] = 3,
    minutes: Annotated[float | None, typer.Option(help="Stop then; run again to go on.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampled outputs.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of samples and report.")] = Path("mmspec-bench"),
    label: Annotated[str, typer.Option(help="Part of the names of both files.")] = "",
    json_only: Annotated[bool, typer.Option("--json", help="Only the last line.")] = False,
) -> dict[str, Any]:
    """Measure pages: drafts from OCR, a text layer, earlier pages and a smaller model.

    Returns:
        The object of the last line; see `mmspec.bench.measure.FINAL_LINE`.

    Raises:
        ValueError: If an option is out of range.
        typer.Exit: With code 1 if an exact output was not identical in float32 or float64.
    """
    stem("document", label)
    session = Session(
        out=out,
        label=label,
        repeats=repeats,
        budget=Budget(minutes),
        output=Output(json_only=json_only),
    )
    model, chosen = model.removeprefix("bundled:"), csv(systems, SYSTEMS)
    reader = Reader(ocr, waits=ocr_wait)
    models = {name: load_vlm(model, name, device) for name in csv(dtype, list(DTYPES))}
    bench = Bench(
        name="document",
        model=model,
        kinds=list(PAGE_KINDS),
        systems=[name for name in SYSTEMS if name in chosen],
        ours=OURS,
        single_row=SINGLE_ROW,
        measure=measure_with(partial(_new_draft, reader), schedule, width),
        variant=f"{variant_of(schedule, width)}-{reader.name}{'-wait' * ocr_wait}",
        inputs_per_task=document,
    )
    configs = make_configs(models, batch, temperature, seed=seed, max_new_tokens=max_new_tokens)
    entries = load_pages(model, csv(kinds, list(PAGE_KINDS)), pages)
    facts = provenance(torch.device(device), bundles_of(model))
    card = make_card(configs, model, card_of(entries))
    return run_bench(bench, configs, entries, facts, card, session, tables=_tables)


# --------------------------------------------------------------------------- systems


class Reader:
    """An OCR engine in a thread beside the model.

    Attributes:
        name: Of the engine; "none" where none is installed.
    """

    def __init__(self, name: str, *, waits: bool = False) -> None:
        """Chooses an engine; "auto" is the preferred one of those that are installed.

        Raises:
            ValueError: If it is unknown or not installed.
        """
        if name == "auto":
            name = (installed_engines() or ["none"])[0]
        self.name = name
        self._waits = waits
        self._readers: dict[bool, OcrReader] = {}
        if name != "none":
            self._readers = {False: OcrReader(name), True: OcrReader(name, adapt=garbling)}

    def begin(self, entries: Sequence[Entry]) -> tuple[list[AskedReference], EndOcr]:
        """Begins to read pages.

        Returns:
            What gives the text of each as far as it is there, and what gives up the parts that are
            not begun, waits for the others, and returns the seconds that they took.

        Raises:
            Unavailable: If there is no engine.
        """
        if not self._readers:
            raise Unavailable("no OCR engine is installed")
        readings = [
            self._readers[entry["kind"] == "failed"].begin(entry["image"]) for entry in entries
        ]
        pages = [
            Page(entry["image"], reading=reading)
            for entry, reading in zip(entries, readings, strict=True)
        ]

        def end() -> float:
            for reading in readings:
                reading.end()
            return sum(reading.wait().time_s for reading in readings)

        if self._waits:
            return [page.awaited_reference for page in pages], end
        for page in pages:
            page.attend()
        return [page.reference for page in pages], end


def garbling(engine: Engine) -> Engine:
    """An engine that gets most letters wrong."""

    def read(image: Image.Image, *pitch: float | None) -> PageText:
        found = engine(image, *pitch)
        text = garbled(found.text)
        starts = [word.end - len(word.text) for word in found.words]
        words = [
            replace(word, text=text[start : word.end])
            for word, start in zip(found.words, starts, strict=True)
        ]
        return PageText(text, tuple(words))

    return read


def _spoilt(text: str, entry: Entry) -> str:
    return garbled(text) if entry["kind"] == "failed" else text


def garbled(text: str, share: float = GARBLED) -> str:
    """A text in which a share of what is not white is another letter; always the same ones."""
    dice = random.Random(text)
    letters = [
        dice.choice(string.ascii_letters) if not one.isspace() and dice.random() < share else one
        for one in text
    ]
    return "".join(letters)


def _new_draft(reader: Reader, name: str) -> Draft:
    """The drafter of a system for one document; its store lives as long."""
    if name not in REFERENCES:
        return drafter_of(name)
    more = {"memory": new_store()} if name == "reference_store" else {}

    def draft(loaded: VisionModel, entries: Sequence[Entry]) -> tuple[DrafterSpec, EndOcr | None]:
        spec = {"name": "reference", "tokenizer": loaded.processor.tokenizer, **more}
        if name == "text_layer":
            return spec | {"references": [_spoilt(one["text"], one) for one in entries]}, None
        references, end = reader.begin(entries)
        return spec | {"references": references}, end

    return draft


# --------------------------------------------------------------------------- tables


def _tables(rows: Sequence[Sample]) -> list[Section]:
    """Speed and the seconds of the OCR beside it; what the bundled drafter reads."""
    names = ("kind", "system", "tau", "speedup_median")
    lines = [
        [
            *(row[name] for name in names),
            row["phases_s"]["OCR"] / row["num_samples"],
            row["ms_per_token"] * row["num_units"] / row["num_samples"] / 1e3,
        ]
        for row in rows
        if "OCR" in row["phases_s"]
    ]
    headers = ["kind", "system", "tau", "× generate", "OCR s per document", "all s per document"]
    sections = [("OCR beside the model", table(headers, lines))] if lines else []
    return sections + sight_tables(rows)


if __name__ == "__main__":
    typer.run(run)
