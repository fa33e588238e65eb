"""A folder of rendered pages through the job of `mmspec parse`, with the OCR beside the model.

    python benchmarks/parse_folder.py --out benchmarks/results

Every system parses the same held-out pages of `bundled:pages` into a journal of its own, with the
model loaded once: ``plain`` without drafts, ``ocr`` with the drafts of an OCR engine that begins
with a batch, ``ocr_wait`` where the batch waits for it, ``ahead`` with one that goes on with the
next batch while this one is written, and ``ahead_2`` the same in two threads. On pages of the kind
``failed`` 60 % of what the engine finds in each part is replaced by other letters. The clock runs
from the first page that is read to the last that is written; waiting is a part of it. A reading
that comes too late counts for the seconds of the OCR until its page is complete.
"""

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image

from mmspec.bench.document import garbling
from mmspec.bench.measure import (
    Budget,
    Sample,
    csv,
    final_line,
    in_turn,
    median,
    open_store,
    provenance,
)
from mmspec.bench.report import Output, percent, publish, table
from mmspec.bench.vlm_setups import PAGE_KINDS, load_pages
from mmspec.documents import PICTURES, Reader, find_files
from mmspec.jobs.documents import ParseJob
from mmspec.jobs.journal import Journal
from mmspec.jobs.page_run import run_pages
from mmspec.jobs.pages import list_tasks
from mmspec.ocr import ENGINES, open_engine
from mmspec.pipelines import SpeculativeDocumentPipeline

MODEL, FAILED = "bundled:pages", "failed"


@dataclass(frozen=True)
class System:
    """How a folder is parsed.

    Attributes:
        drafter: As in the job; None is its own.
        prefetch: Batches that are read ahead.
        ocr_workers: Threads of the OCR.
        ocr_wait: Pages are begun after their OCR.
    """

    drafter: str | None
    prefetch: int
    ocr_workers: int = 1
    ocr_wait: bool = False


SYSTEMS = {
    "plain": System("none", 0),
    "ocr": System(None, 0),
    "ocr_wait": System(None, 0, ocr_wait=True),
    "ahead": System(None, 1),
    "ahead_2": System(None, 1, 2),
}


def main(
    kinds: Annotated[str, typer.Option(help="Kinds of pages, a folder each.")] = (
        ",".join(PAGE_KINDS)
    ),
    systems: Annotated[str, typer.Option(help="What to compare.")] = ",".join(SYSTEMS),
    ocr: Annotated[str, typer.Option(help="An engine.")] = "tesserocr",
    dtype: Annotated[str, typer.Option(help="Of float32, bfloat16.")] = "float32,bfloat16",
    batch: Annotated[str, typer.Option(help="Pages per batch.")] = "1,8",
    pages: Annotated[int, typer.Option(help="Pages of a folder.")] = 16,
    repeats: Annotated[int, typer.Option(help="Repetitions.")] = 1,
    minutes: Annotated[float | None, typer.Option(help="Stop then; run again to go on.")] = None,
    label: Annotated[str, typer.Option(help="Added to the names of the files.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of samples and report.")] = Path("mmspec-bench"),
) -> None:
    """Measures what is missing and writes the report."""
    budget, output = Budget(minutes), Output(json_only=False)
    ENGINES[FAILED] = (ENGINES[ocr][0], lambda: garbling(open_engine(ocr)))
    facts = provenance(torch.device("cpu"), ["pages"])
    store = open_store(out, "parse_folder", label, facts)
    names, missing = csv(systems, list(SYSTEMS)), []
    places = product(csv(dtype), map(int, csv(batch)), csv(kinds, list(PAGE_KINDS)))
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        bench = _Bench(Path(scratch), ocr, pages)
        for dtype_name, size, kind in places:
            for repeat in range(repeats):
                for name in in_turn(names, repeat):
                    place = {"dtype": dtype_name, "batch": size, "kind": kind, "system": name}
                    key = "/".join(map(str, [*place.values(), ocr, pages, repeat]))
                    if key not in store and budget.is_spent:
                        missing.append(key)
                        continue
                    if key not in store:
                        store.add([{"key": key, **place, "repeat": repeat} | bench.run(**place)])
                    found.append(store.samples[key])
                    output.say(f"{key}: {found[-1]['seconds']:.2f} s")
    rows, failures = _rows(found)
    line = final_line(
        "parse_folder", facts, rows, left_out=missing, failures=failures, time_s=budget.elapsed_s
    )
    publish(line, _sections(rows), out, output)


class _Bench:
    """The folders and the models, each made when it is first needed."""

    def __init__(self, scratch: Path, ocr: str, num_pages: int) -> None:
        self._scratch = scratch
        self._ocr = ocr
        self._num_pages = num_pages
        self._pipes: dict[str, Any] = {}
        self._num_runs = 0

    def run(self, *, dtype: str, batch: int, kind: str, system: str) -> Sample:
        """One job from its beginning to its end."""
        how, pipe = SYSTEMS[system], self._pipe(dtype)
        ocr = None if how.drafter else FAILED if kind == FAILED else self._ocr
        job = ParseJob(
            load=lambda: pipe,
            model=MODEL,
            dtype=dtype,
            reader=Reader(),
            options={"max_new_tokens": 480, "drafter": how.drafter},
            ocr=ocr,
            ocr_workers=how.ocr_workers,
            ocr_wait=how.ocr_wait,
        )
        files = find_files([self._folder(kind)], PICTURES)
        tasks = list_tasks(list(files), job.reader)
        for number in range(how.ocr_workers if ocr else 0):
            blank = Image.new("RGB", (64, 64 + number))
            pipe.read_ahead(blank, ocr=ocr, ocr_workers=how.ocr_workers).wait()
        pipe.clear_store()
        self._num_runs += 1
        with Journal(self._scratch / f"{self._num_runs}.jsonl", job.settings) as journal:
            summary = run_pages(
                job,
                tasks,
                tasks,
                journal,
                batch_size=batch,
                num_workers=1,
                report=print,
                after_batch=lambda answers: None,
                prefetch=how.prefetch,
            )
            pipe.stop_reading(wait=True)  # else the next run would share the machine with it
            records = [journal.get(task.key) or {} for task in tasks]
        return {
            "digests": [hashlib.sha256(one["text"].encode()).hexdigest()[:12] for one in records],
            "num_units": summary.num_tokens,
            "num_row_steps": summary.num_row_steps,
            "seconds": summary.seconds,
            "ocr_s": summary.ocr_seconds,
            "wait_s": summary.wait_seconds,
        }

    def _pipe(self, dtype: str) -> Any:
        if dtype not in self._pipes:
            pipe = SpeculativeDocumentPipeline.from_pretrained(MODEL, dtype=getattr(torch, dtype))
            pipe.set_progress_bar_config(disable=True)
            self._pipes[dtype] = pipe
            # The first page pays for what is loaded late.
            pipe(load_pages("pages", ["clean"], 1)[0]["image"], ocr=self._ocr, max_new_tokens=32)
        return self._pipes[dtype]

    def _folder(self, kind: str) -> Path:
        folder = self._scratch / kind
        if not folder.exists():
            folder.mkdir()
            for entry in load_pages("pages", [kind], self._num_pages):
                entry["image"].save(folder / f"{entry['id']}.png")
        return folder


def _rows(samples: Sequence[Sample]) -> tuple[list[Sample], list[str]]:
    """A row for each place and system, and where a text was not that of plain decoding."""
    groups: dict[tuple[Any, ...], dict[str, list[Sample]]] = {}
    for sample in samples:
        place = tuple(sample[name] for name in ("dtype", "batch", "kind"))
        groups.setdefault(place, {}).setdefault(sample["system"], []).append(sample)
    rows, failures = [], []
    for place, systems in groups.items():
        for name, runs in systems.items():
            rows.append(_row(runs, systems.get("plain", [])))
            is_exact = rows[-1]["equal"] in (None, 1.0)
            if place[0] == "float32" and not is_exact:
                failures.append(f"{place}, {name}: {rows[-1]['equal']:.1%} of the pages are plain")
    return rows, failures


def _row(runs: Sequence[Sample], plain: Sequence[Sample]) -> Sample:
    """Sums over the repetitions; the speed is the median of neighbours."""
    first = runs[0]
    seconds = {one["repeat"]: one["seconds"] for one in plain}
    speeds = [seconds[one["repeat"]] / one["seconds"] for one in runs if one["repeat"] in seconds]
    digests = plain[0]["digests"] if plain else []
    pairs = [pair for one in runs for pair in zip(one["digests"], digests, strict=False)]
    return {
        **{name: first[name] for name in ("dtype", "batch", "kind", "system")},
        "num_pages": len(first["digests"]),
        "num_units": first["num_units"],
        "tau": _sum(runs, "num_units") / _sum(runs, "num_row_steps"),
        **{name: _sum(runs, name) / len(runs) for name in ("seconds", "ocr_s", "wait_s")},
        "speedup_median": median(speeds),
        "equal": sum(one == other for one, other in pairs) / len(pairs) if pairs else None,
    }


def _sum(runs: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(one[name] for one in runs)


def _sections(rows: Sequence[Sample]) -> list[tuple[str, str]]:
    names = ("kind", "system", "num_pages", "tau", "seconds", "ocr_s", "wait_s", "speedup_median")
    headers = ["kind", "system", "pages", "tau", "seconds", "OCR s", "waited s", "× plain"]
    sections = []
    for dtype, size in dict.fromkeys((row["dtype"], row["batch"]) for row in rows):
        chosen = [row for row in rows if (row["dtype"], row["batch"]) == (dtype, size)]
        lines = [[*(row[name] for name in names), percent(row["equal"])] for row in chosen]
        sections.append((f"{dtype}, batch {size}", table([*headers, "= plain"], lines)))
    return sections


if __name__ == "__main__":
    typer.run(main)
