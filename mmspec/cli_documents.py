"""The commands over documents and pictures: `mmspec parse`, `mmspec caption`.

Registered in `mmspec.cli`. Nothing here imports torch until a command runs.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mmspec.cli_common import (
    KNOWN_CAPTION_MODELS,
    KNOWN_PARSE_MODELS,
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    SeedOption,
    examples,
    load_pipeline,
    note,
    one_line_reasons,
)

PARSE_EXAMPLES = examples(
    "mmspec parse report.pdf",
    "mmspec parse scans/ --out parsed/",
    "mmspec parse a.pdf b.png --out both.md",
    "mmspec parse scans/ --recursive --to jsonl --out pages.jsonl --workers 2",
    "mmspec parse report.pdf --pages 1-3,7 --dpi 200 --ocr none",
    "",
    "PDF, PNG, JPEG, TIFF (all its pages) and WebP; of folders those files, in natural order.",
    "What a born-digital page holds as text, else what an OCR engine reads, is the draft that",
    "the model checks: it changes how fast the text comes, not what it is.",
    "",
    "--out FOLDER has a Markdown file of each document and pages.jsonl; --out FILE.md has all in",
    "one and FILE.jsonl beside it; --out FILE.jsonl has one line per page alone. Without --out",
    "the result goes to the terminal.",
    "",
    "Start the same command again after a kill: what is done is kept. A page that cannot be read",
    "is reported and gets its reason instead of a text; the others go on, and the exit code is 1.",
    "Such pages are left out of the next run too, unless it has --retry-errors.",
)
CAPTION_EXAMPLES = examples(
    "mmspec caption pictures/ --out captions.jsonl",
    "mmspec caption a.png b.jpg",
    "mmspec caption pictures/ --out captions.jsonl --temperature 0.8 --seed 7 --batch-size 8",
    "",
    "One line per picture. Its seed comes from SEED and the picture's content, so its caption is",
    "the same alone, in any batch, and after a kill: start the same command again to go on.",
    "A picture that cannot be read is reported, gets its reason, and the exit code is 1.",
)

PathsArgument = Annotated[list[Path], typer.Argument(help="Files and folders.")]
RecursiveOption = Annotated[
    bool, typer.Option("--recursive", help="Also the folders in the folders.")
]
PagesBatchOption = Annotated[int, typer.Option(min=1, help="Pages that are decoded together.")]
WorkersOption = Annotated[int, typer.Option(min=1, help="Processes, each with a model of its own.")]
ResumeOption = Annotated[
    bool, typer.Option("--resume/--overwrite", help="Keep what is done, or begin anew.")
]
RetryOption = Annotated[
    bool, typer.Option("--retry-errors", help="Do pages again that have failed before.")
]


def parse(
    paths: PathsArgument,
    to: Annotated[
        str | None, typer.Option(help="markdown or jsonl; left out, as --out is called.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A folder, FILE.md or FILE.jsonl.")] = None,
    model: Annotated[str, typer.Option(help=f"{KNOWN_PARSE_MODELS}.")] = "bundled:pages",
    pages: Annotated[str | None, typer.Option(help="Such as 1-3,7,10-.")] = None,
    recursive: RecursiveOption = False,
    dpi: Annotated[int, typer.Option(min=1, help="At which PDF pages are drawn.")] = 150,
    password: Annotated[str | None, typer.Option(help="Of protected PDF files.")] = None,
    ocr: Annotated[
        str, typer.Option(help="Drafts where there is no text layer: auto, none, or an engine.")
    ] = "auto",
    ocr_workers: Annotated[
        int, typer.Option(min=1, help="Threads of the engine, beside the model.")
    ] = 1,
    ocr_wait: Annotated[
        bool,
        typer.Option("--ocr-wait", help="Begin a page after its OCR instead of beside it."),
    ] = False,
    prefetch: Annotated[
        int, typer.Option(min=0, help="Batches drawn and begun by OCR while the model writes.")
    ] = 1,
    regions: Annotated[
        bool, typer.Option("--regions", help="Read regions first and draft from them.")
    ] = False,
    prompt: Annotated[str | None, typer.Option(help="Instead of the model's own.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a page; left out, as the model says.")
    ] = None,
    drafter: Annotated[
        str | None, typer.Option(help="auto; one that is named is used alone; none: plain.")
    ] = None,
    batch_size: PagesBatchOption = 1,
    workers: WorkersOption = 1,
    resume: ResumeOption = True,
    retry_errors: RetryOption = False,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Turn documents into Markdown, or into one JSON line per page.

    The text is the one that plain decoding of the model gives; drafts change how fast it comes.
    """
    with one_line_reasons(debug):
        from mmspec.documents import DOCUMENTS, Reader, find_files, page_ranges
        from mmspec.jobs.documents import MarkdownFiles, ParseJob, markdown, markdown_paths
        from mmspec.jobs.pages import list_tasks

        is_markdown = _is_markdown(to, out)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "drafter": drafter}
        job = ParseJob(
            load=_load("SpeculativeDocumentPipeline", model, KNOWN_PARSE_MODELS, dtype, device),
            model=model,
            dtype=dtype,
            reader=Reader(dpi=dpi, password=password),
            ocr=None if ocr == "none" else ocr,
            ocr_workers=ocr_workers,
            ocr_wait=ocr_wait,
            prompt=prompt,
            regions=regions,
            options=options,
        )
        ranges = None if pages is None else page_ranges(pages)
        files = find_files(paths, DOCUMENTS, recursive=recursive)
        targets = markdown_paths(files, out) if is_markdown and out is not None else None
        tasks = list_tasks(list(files), job.reader, ranges)
        written = None if targets is None else MarkdownFiles(targets, tasks, overwrite=not resume)
        _run(
            job,
            tasks,
            _journal_path(out, is_markdown),
            shown=markdown if is_markdown else _as_lines,
            written=written,
            as_json=as_json,
            resume=resume,
            batch_size=batch_size,
            num_workers=workers,
            prefetch=prefetch,
            retry_errors=retry_errors,
        )


def caption(
    paths: PathsArgument,
    out: Annotated[Path | None, typer.Option(help="A .jsonl; else the terminal.")] = None,
    model: Annotated[str, typer.Option(help=f"{KNOWN_CAPTION_MODELS}.")] = "bundled:captioner",
    prompt: Annotated[
        str | None, typer.Option(help="What to ask of each; left out, as it was trained.")
    ] = None,
    recursive: RecursiveOption = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the likeliest of this mass.")
    ] = None,
    drafter: Annotated[
        str | None,
        typer.Option(
            help="Left out: n-grams, of earlier captions too; one that is named is used alone; "
            "none: plain."
        ),
    ] = None,
    seed: SeedOption = 0,
    batch_size: PagesBatchOption = 4,
    workers: WorkersOption = 1,
    resume: ResumeOption = True,
    retry_errors: RetryOption = False,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what is on pictures, with a vision-language model.

    The captions are those of plain decoding with the same seeds.
    """
    with one_line_reasons(debug):
        from mmspec.documents import PICTURES, Reader, find_files
        from mmspec.jobs.captions import CaptionJob
        from mmspec.jobs.pages import list_tasks

        options = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        job = CaptionJob(
            load=_load("SpeculativeVLMPipeline", model, KNOWN_CAPTION_MODELS, dtype, device),
            model=model,
            dtype=dtype,
            prompt=prompt,
            seed=seed,
            options=options | {"top_p": top_p, "drafter": drafter},
        )
        files = find_files(paths, PICTURES, recursive=recursive)
        _run(
            job,
            list_tasks(list(files), Reader()),
            out,
            shown=_as_table,
            as_json=as_json,
            resume=resume,
            batch_size=batch_size,
            num_workers=workers,
            retry_errors=retry_errors,
        )


def _load(*arguments: str) -> Callable[[], Any]:
    """Loads without a bar of its own, in this process or in a worker."""
    return partial(load_pipeline, *arguments, bar=False)


def _is_markdown(to: str | None, out: Path | None) -> bool:
    """Whether Markdown is asked for.

    Raises:
        ValueError: If ``--to`` is unknown or contradicts the name of ``--out``.
    """
    from mmspec.checks import require, require_known

    suffix = "" if out is None else out.suffix.lower()
    kind = to or ("jsonl" if suffix == ".jsonl" else "markdown")
    require_known("--to", kind, ("markdown", "jsonl"))
    if kind == "jsonl" and out is not None:
        require(suffix == ".jsonl", "--out", "FILE.jsonl for --to jsonl", str(out))
    if kind == "markdown":
        require(suffix != ".jsonl", "--out", "a folder or FILE.md for --to markdown", str(out))
    return kind == "markdown"


def _journal_path(out: Path | None, is_markdown: bool) -> Path | None:
    """The JSONL of a run."""
    if out is None or not is_markdown:
        return out
    return out.with_suffix(".jsonl") if out.suffix.lower() == ".md" else out / "pages.jsonl"


def _as_lines(records: Any) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _as_table(records: Any) -> str:
    good = (record for record in records if record["error"] is None)
    return "".join(f"{record['file']}: {record['text']}\n" for record in good)


def _run(
    job: Any,
    tasks: Sequence[Any],
    path: Path | None,
    *,
    shown: Callable[[Any], str],
    written: Any = None,
    as_json: bool,
    resume: bool,
    retry_errors: bool,
    **options: Any,
) -> None:
    """Runs a job over pages and ends with its summary; exit code 1 if any page failed."""
    from mmspec.jobs.documents import records_of
    from mmspec.jobs.journal import Journal
    from mmspec.jobs.page_run import missing_tasks, run_pages

    if as_json and path is None:
        raise typer.BadParameter("prints the summary; the result needs --out", param_hint="--json")
    job.check()
    with Journal(path, job.settings, overwrite=not resume) as journal:
        missing = missing_tasks(tasks, journal, retry_errors=retry_errors)
        if written is not None:
            written.begin(journal, missing)
        if missing:
            job = job.after(journal)
        with _stoppable(path), _page_bar(len(tasks), len(missing)) as bar:
            for record in records_of(journal, _failed_before(tasks, missing, journal)):
                _say(f"mmspec: {record['error']} (before; --retry-errors tries again)")
            after_batch = _follower(bar, written, journal)
            summary = run_pages(
                job, tasks, missing, journal, report=_say, after_batch=after_batch, **options
            )
        if path is None:
            typer.echo(shown(records_of(journal, tasks)), nl=False)
    line = json.dumps({"out": str(path), **summary.to_dict()}) if as_json else summary.table()
    typer.echo(line, err=path is None)
    if summary.num_failed:
        raise typer.Exit(1)


@contextmanager
def _stoppable(path: Path | None) -> Iterator[None]:
    """Ends a run that is interrupted from the keyboard with a word instead of a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        kept = "" if path is None else f"; what is done is in {path}"
        note(f"mmspec: stopped{kept}")
        raise typer.Exit(130) from None


def _page_bar(num_pages: int, num_missing: int) -> Any:
    from tqdm import tqdm

    is_hidden = not sys.stderr.isatty()
    done = num_pages - num_missing
    return tqdm(total=num_pages, initial=done, unit="page", disable=is_hidden)


def _say(line: str) -> None:
    """A line above the bar."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


def _follower(bar: Any, written: Any, journal: Any) -> Callable[[Sequence[Any]], None]:
    """What follows on a batch: the bar moves, reasons are told, Markdown is written."""

    def after_batch(answers: Sequence[Any]) -> None:
        bar.update(len(answers))
        for answer in answers:
            if answer.error is not None:
                _say(f"mmspec: {answer.error}")
        if written is not None:
            written.after_batch(journal, answers)

    return after_batch


def _failed_before(tasks: Sequence[Any], missing: Sequence[Any], journal: Any) -> list[Any]:
    """The pages that are left out because they have failed."""
    again = {task.key for task in missing}
    kept = [task for task in tasks if task.key not in again]
    return [task for task in kept if journal.entries[task.key].has_failed]
