"""What the commands share: options, reasons in one line, loading. Imports no torch by itself."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

KNOWN_TEXT_MODELS = "smollm2, a folder, or a hub id OWNER/NAME"
KNOWN_IMAGE_MODELS = (
    "bundled:avatars, bundled:avatars-denoise, bundled:emoji, a folder, or a hub id OWNER/NAME"
)
KNOWN_PARSE_MODELS = "bundled:pages, a folder, or a hub id OWNER/NAME"
KNOWN_CAPTION_MODELS = "bundled:captioner, a folder, or a hub id OWNER/NAME"
KNOWN_VIDEO_MODELS = "bundled:clips, a folder, or a hub id OWNER/NAME"


def examples(*lines: str) -> str:
    """An epilog that keeps its lines (that is what the backspace mark tells typer)."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


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


def quiet() -> None:
    """Libraries keep their bars and notes to themselves; our own warnings are shown."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("mmspec: %(message)s"))
    logging.getLogger("mmspec").handlers[:] = [handler]


def load_pipeline(
    pipeline: str,
    model: str,
    known: str,
    dtype: str,
    device: str,
    *,
    bar: bool = True,
    **options: Any,
) -> Any:
    """Loads a pipeline; a model that cannot be had is reported by name with what can.

    Args:
        pipeline: Its class in `mmspec.pipelines`.
        model: A bundled name, a folder or a hub id.
        known: The models to name in a message.
        dtype: Of the weights.
        device: Where the model runs.
        bar: Show a progress bar of each call, where somebody can see it.
        **options: Passed to the pipeline's ``from_pretrained``.
    """
    check_model_name(model, known)
    quiet()
    import torch

    import mmspec.pipelines

    number_type = getattr(torch, dtype, None)
    if not isinstance(number_type, torch.dtype) or not number_type.is_floating_point:
        raise ValueError(f"unknown dtype {dtype!r}; known: float32, bfloat16, float16, float64")
    try:
        pipe = getattr(mmspec.pipelines, pipeline).from_pretrained(
            model, dtype=number_type, **options
        )
    except OSError as error:
        raise OSError(f"cannot load {model!r}: {one_line(error)} Known: {known}.") from error
    pipe.set_progress_bar_config(disable=not (bar and sys.stderr.isatty()))
    return pipe.to(device) if device != "cpu" else pipe


def check_model_name(model: str, known: str) -> None:
    """Refuses a name that is neither bundled, nor a folder, nor a hub id.

    Raises:
        ValueError: With the known ones.
    """
    is_name = not model.startswith(("bundled:", "smollm2")) and "/" not in model
    if is_name and not Path(model).is_dir():
        raise ValueError(f"unknown model {model!r}; known: {known}")


def loader(*arguments: str, **options: Any) -> Callable[[], Any]:
    """Loads at the first call and gives the same pipeline afterwards."""
    loaded: list[Any] = []

    def load() -> Any:
        if not loaded:
            loaded.append(load_pipeline(*arguments, **options))
        return loaded[0]

    return load


def note(line: str) -> None:
    """Says something that is no result."""
    typer.echo(line, err=True)
