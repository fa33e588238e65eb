"""Images of many requests: single PNG files, or one sheet of all.

Every file says in its text chunks how it was made. A folder is continued after a kill: what is
there with the same chunks is left as it is, and a file that was made otherwise is refused.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from mmspec.checks import require, require_known
from mmspec.jobs import Report, check_writable, generators
from mmspec.jobs.requests import VisualRequest
from mmspec.pictures import (
    contact_sheet,
    read_png_metadata,
    save_gif,
    save_png,
    steps_shown,
    upscale,
)
from mmspec.pipelines.image import ImageOutput
from mmspec.pipelines.image_decoders import DECODERS, refills
from mmspec.records import Stats
from mmspec.whole_file import remove_partial

PACKAGES = ("mmspec", "torch", "transformers")
#: Chunks that may differ where a folder is continued: another version, and what follows from
#: the decoder.
NOT_COMPARED = {"guarantee", *PACKAGES}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSettings:
    """What all images of a run share.

    Attributes:
        model: Name of the model.
        decoder: As in the image pipeline.
        window: Codes per forward, or None for the pipeline's own choice.
        guidance: Guidance scale.
        temperature: 0 is greedy.
        scale: Enlargement of the saved files.
        dtype: Name of the weights' type.
    """

    model: str
    decoder: str
    window: int | None
    guidance: float
    temperature: float
    scale: int
    dtype: str

    def check(self) -> None:
        """Refuses an unknown decoder before a model is loaded.

        Raises:
            ValueError: With the known ones.
        """
        require_known("decoder", self.decoder, DECODERS)

    def call_options(self) -> dict[str, Any]:
        """The arguments of the pipeline's call."""
        return {
            "decoder": self.decoder,
            "window": self.window,
            "guidance_scale": self.guidance,
            "temperature": self.temperature,
        }


@dataclass(slots=True, kw_only=True)
class ImageSummary:
    """What an image run did.

    Attributes:
        out: The sheet or the folder.
        num_images: Images made.
        num_skipped: Images that were there already.
        batches: Figures of each call of the pipeline.
    """

    out: Path
    num_images: int = 0
    num_skipped: int = 0
    batches: list[Stats] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "out": str(self.out),
            "num_images": self.num_images,
            "num_skipped": self.num_skipped,
            "batches": [stats.to_dict() for stats in self.batches],
        }

    def line(self) -> str:
        """One line for people."""
        made = f"{self.out}: {self.num_images} made"
        if self.num_skipped:
            made += f", {self.num_skipped} were there already"
        if not self.batches:
            return made
        forwards = sum(stats.num_target_forwards for stats in self.batches)
        seconds = sum(stats.wall_time_s for stats in self.batches)
        # Rows that go through a forward together count one each: units are codes of an image.
        row_steps = sum(stats.num_units / max(stats.tau, 1e-9) for stats in self.batches)
        tau = sum(stats.num_units for stats in self.batches) / max(row_steps, 1e-9)
        return (
            f"{made}, {forwards} forwards, tau {tau:.2f}, {seconds:.2f} s "
            f"({self.batches[0].guarantee})"
        )


def steps_path(path: Path) -> Path:
    """Where the step map of an image goes: ``a.png`` to ``a.steps.png``."""
    return path.with_suffix(".steps.png")


@dataclass(frozen=True, slots=True)
class _Picture:
    """One image of a request."""

    path: Path
    request: VisualRequest
    seed: int

    def chunks(self, settings: ImageSettings) -> dict[str, str]:
        """The text chunks by which an image is known again."""
        own = self.request.fields() | {"seed": self.seed} | asdict(settings)
        shown = {name: str(value) for name, value in own.items()}
        return shown | ({"window": "auto"} if settings.window is None else {})

    def chunks_to_save(self, settings: ImageSettings, stats: Stats) -> dict[str, str]:
        """The same and what follows from them."""
        versions = {name: version(name) for name in PACKAGES}
        return {**self.chunks(settings), "guarantee": str(stats.guarantee), **versions}


class Preview:
    """The sheet while it fills: a PNG drawn anew every few steps, or a GIF of all of them."""

    def __init__(self, path: Path, *, every: int) -> None:
        """Draws nothing yet.

        Args:
            path: A ``.png`` or ``.gif``.
            every: Steps from one drawing to the next.

        Raises:
            ValueError: If it is neither.
        """
        self._is_film = path.suffix.lower() == ".gif"
        is_good = self._is_film or path.suffix.lower() == ".png"
        require(is_good, "--preview", "a .png or a .gif", str(path))
        self.path = path
        self._every = every
        self._frames: list[Image.Image] = []

    def watcher(
        self, done: Sequence[Image.Image], total: int, scale: int
    ) -> Callable[[Any, int, dict[str, Any]], None]:
        """The pipeline's callback for the images that follow on ``done``."""

        def draw(pipe: Any, step: int, details: dict[str, Any]) -> None:
            if step % self._every == 0:
                images = [*done, *(upscale(image, scale) for image in details["preview"]())]
                to_come = Image.new("RGB", images[0].size, (128, 128, 128))
                self.add(contact_sheet(images + [to_come] * (total - len(images))))

        return draw

    def add(self, frame: Image.Image) -> None:
        """Draws a PNG, or keeps a frame of a film."""
        if self._is_film:
            self._frames.append(frame)
        else:
            save_png(frame, self.path, {})

    def end(self, sheet: Image.Image) -> None:
        """The last drawing is the sheet itself."""
        self.add(sheet)
        if self._is_film:
            save_gif(self._frames, self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRun:
    """What to make, and where to.

    Attributes:
        load: Gives an image pipeline; called only if something is missing.
        requests: What to draw.
        out: The folder, or the sheet.
        num: Images of each request.
        settings: What the images share.
        batch_size: Images under way together.
        steps_map: Also write step maps over the images, as ``NAME.steps.png``.
        report: Told the progress, a line at a time.
    """

    load: Callable[[], Any]
    requests: Sequence[VisualRequest]
    out: Path
    num: int
    settings: ImageSettings
    batch_size: int
    steps_map: bool
    report: Report


def run_image_files(run: ImageRun) -> ImageSummary:
    """Makes single PNG files; those that exist with the same settings are left as they are.

    Files are called ``REQUEST-IMAGE.png``, both counted from 0.

    Args:
        run: What to make; its ``out`` is the folder.

    Returns:
        What was done.

    Raises:
        ValueError: If the folder has a file that was made with other settings, or a request
            cannot be met; before any image is made.
        OSError: If the folder cannot be written to, likewise.
    """
    out, settings, steps_map = run.out, run.settings, run.steps_map
    check_writable(out)
    pictures = [
        _Picture(out / f"{row:04d}-{k:02d}.png", request, request.seed + k)
        for row, request in enumerate(run.requests)
        for k in range(run.num)
    ]
    missing = [picture for picture in pictures if not _is_made(picture, settings, steps_map)]
    summary = ImageSummary(out=out, num_skipped=len(pictures) - len(missing))
    pipe = _checked(run.load, missing)
    for picture in missing:
        for path in (picture.path, steps_path(picture.path)):
            remove_partial(path)

    def save(picture: _Picture, output: ImageOutput) -> None:
        chunks = picture.chunks_to_save(settings, output.stats)
        image = upscale(output.images[0], settings.scale)
        if steps_map:  # before the image, whose presence says that both are done
            shown = steps_shown(image, output.step_maps[0])
            save_png(shown, steps_path(picture.path), chunks)
        save_png(image, picture.path, chunks)
        summary.num_images += 1
        run.report(f"{summary.num_images}/{len(missing)} {picture.path.name}")

    for called in _calls(missing, run):
        summary.batches.append(_draw(pipe, called, run, save))
    return summary


def save_sheet(run: ImageRun, *, preview: Preview | None = None) -> ImageSummary:
    """Makes the images and saves them on one sheet.

    Args:
        run: What to make; its ``out`` is the sheet.
        preview: Draws it meanwhile.

    Returns:
        What was done.

    Raises:
        ValueError: If the images are of several sizes or a request cannot be met.
        OSError: If the sheet cannot be written; all before any image is made.
    """
    out, settings = run.out, run.settings
    for path in [out] + ([preview.path] if preview else []):
        check_writable(path.parent)
        if path.is_dir():
            raise OSError(f"cannot write to {path}: it is a folder")
    sizes = sorted({str(request.size) for request in run.requests})
    require(len(sizes) == 1, "the images of a sheet", "of one height and width", sizes)
    pictures = [_Picture(out, r, r.seed + k) for r in run.requests for k in range(run.num)]
    pipe = _checked(run.load, pictures)
    summary = ImageSummary(out=out)
    made: dict[_Picture, ImageOutput] = {}
    images: list[Image.Image] = []

    def take(picture: _Picture, output: ImageOutput) -> None:
        made[picture] = output
        summary.num_images += 1
        if len(pictures) > 1:
            run.report(f"{summary.num_images}/{len(pictures)}")

    for called in _calls(pictures, run):
        watcher = preview.watcher(images, len(pictures), settings.scale) if preview else None
        summary.batches.append(_draw(pipe, called, run, take, watcher))
        images += [upscale(made[picture].images[0], settings.scale) for picture in called]
    stats = summary.batches[0]
    chunks = _joined([picture.chunks_to_save(settings, stats) for picture in pictures])
    if run.steps_map:
        pairs = zip(images, pictures, strict=True)
        maps = [steps_shown(image, made[picture].step_maps[0]) for image, picture in pairs]
        save_png(contact_sheet(maps), steps_path(out), chunks)
    save_png(contact_sheet(images), out, chunks)
    if preview:
        preview.end(contact_sheet(images))
    return summary


def _is_made(picture: _Picture, settings: ImageSettings, steps_map: bool) -> bool:
    """Whether a picture is there, whole, and the one that is asked for.

    Raises:
        ValueError: If it was made with other settings.
    """
    found, wanted = read_png_metadata(picture.path), picture.chunks(settings)
    if found is None:
        return False
    names = sorted({*found, *wanted} - NOT_COMPARED)
    others = [
        f"{name} {found.get(name, 'none')!r} (asked for: {wanted.get(name, 'none')!r})"
        for name in names
        if found.get(name) != wanted.get(name)
    ]
    if others:
        raise ValueError(
            f"{picture.path} was made with {', '.join(others)}; use the same settings to "
            "continue, or another --out"
        )
    return not steps_map or read_png_metadata(steps_path(picture.path)) is not None


def _checked(load: Callable[[], Any], pictures: Sequence[_Picture]) -> Any:
    """The pipeline, once it is known that it can draw them all; None if there are none.

    Raises:
        ValueError: With the line of the request that it cannot.
    """
    if not pictures:
        return None
    pipe = load()
    for request in dict.fromkeys(picture.request for picture in pictures):
        with request.named_in_errors():
            pipe.check_request(request.prompt, **request.options())
    return pipe


def _calls(pictures: Sequence[_Picture], run: ImageRun) -> Iterator[list[_Picture]]:
    """Neighbours that go through one call: all of a kind, or batches if rows cannot be refilled."""
    most = len(pictures) if refills(run.settings.decoder) else run.batch_size

    def kind(picture: _Picture) -> tuple[Any, ...]:
        return *picture.request.size, picture.request.negative_prompt is None

    called: list[_Picture] = []
    for picture in pictures:
        if called and (len(called) == most or kind(picture) != kind(called[0])):
            yield called
            called = []
        called.append(picture)
    if called:
        yield called


def _draw(
    pipe: Any,
    pictures: Sequence[_Picture],
    run: ImageRun,
    take: Callable[[_Picture, ImageOutput], None],
    watcher: Any = None,
) -> Stats:
    """Makes pictures in one call; each is handed over when it is complete."""
    requests = [picture.request for picture in pictures]
    negatives = [request.negative_prompt for request in requests]
    height, width = requests[0].size
    output = pipe(
        [request.prompt for request in requests],
        negative_prompt=None if None in negatives else negatives,
        height=height,
        width=width,
        batch_size=run.batch_size,
        generator=generators([picture.seed for picture in pictures]),
        callback_on_step_end=watcher,
        callback_on_image_end=lambda _, index, output: take(pictures[index], output),
        **run.settings.call_options(),
    )
    stats: Stats = output.stats
    return stats


def _joined(all_chunks: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Chunks of a sheet: one text where its images agree, else a JSON list with one for each."""
    joined = {}
    for name in dict.fromkeys(name for chunks in all_chunks for name in chunks):
        values = [chunks.get(name) for chunks in all_chunks]
        first = values[0]
        if first is not None and values.count(first) == len(values):
            joined[name] = first
        else:
            joined[name] = json.dumps(values, ensure_ascii=False)
    return joined
