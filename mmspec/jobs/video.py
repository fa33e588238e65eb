"""Videos of many requests: a file each, and a line each in a journal of how they came about.

A folder is continued after a kill: what the journal has is left as it is. A line or a file that was
made otherwise is refused.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from mmspec.block_records import BlockRecord
from mmspec.checks import require
from mmspec.jobs import Report, check_writable, generators
from mmspec.jobs.journal import Journal, Key
from mmspec.jobs.requests import VisualRequest
from mmspec.pictures import save_png
from mmspec.timeline import spread, timeline
from mmspec.video_files import (
    FORMATS,
    as_bytes,
    check_format,
    check_sides,
    open_video,
    read_video_metadata,
)
from mmspec.whole_file import remove_partial

JOURNAL = "videos.jsonl"
PACKAGES = ("mmspec", "torch", "diffusers")
#: Where neither the user nor the model says how many pictures a second has.
DEFAULT_FPS = 16.0
#: Pictures of a block in a timeline.
NUM_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSettings:
    """What all videos of a run share.

    Attributes:
        model: Name of the target.
        drafter: Name of the drafter, or None for the one that belongs to the target.
        dtype: Name of the weights' type.
        options: Options of the pipeline's call; what is left out is the model's own.
        format: One of `mmspec.video_files.FORMATS`.
        fps: Pictures a second, or None for the model's own.
        scale: Enlargement of the saved files.
    """

    model: str
    drafter: str | None
    dtype: str
    options: Mapping[str, Any]
    format: str
    fps: float | None
    scale: int

    def check(self) -> None:
        """Refuses a file that cannot be written before a model is loaded.

        Raises:
            ValueError: As `mmspec.video_files.check_format`.
            ImportError: Likewise.
        """
        check_format(self.format, self.fps if self.fps is not None else 1, self.scale)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the options among them."""
        own: dict[str, Any] = asdict(self)
        return own.pop("options") | own


@dataclass(slots=True, kw_only=True)
class VideoSummary:
    """What a video run did.

    Attributes:
        out: The folder.
        num_videos: Videos made.
        num_skipped: Videos that were there already.
        stats: Figures of each video made.
    """

    out: Path
    num_videos: int = 0
    num_skipped: int = 0
    stats: list[Mapping[str, Any]] = field(default_factory=list)

    def total(self, name: str) -> Any:
        """Sum of a figure over the videos made."""
        return sum(stats[name] for stats in self.stats)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "out": str(self.out),
            "num_videos": self.num_videos,
            "num_skipped": self.num_skipped,
            "stats": list(self.stats),
        }

    def line(self) -> str:
        """One line for people."""
        made = f"{self.out}: {self.num_videos} made"
        if self.num_skipped:
            made += f", {self.num_skipped} were there already"
        if not self.stats:
            return made
        blocks, drafted, kept = map(self.total, ("num_blocks", "num_drafted", "num_kept"))
        phases = {"drafter": "draft", "router": "judge", "target": "target", "VAE": "decode"}
        seconds = [f"{name} {self.total(f'{of}_time_s'):.1f}" for name, of in phases.items()]
        first = self.stats[0]
        return (
            f"{made}; {blocks} blocks, {drafted} drafted, {kept} kept; "
            f"{self.total('wall_time_s'):.1f} s ({', '.join(seconds)}); "
            f"{first['router']}, {first['guarantee']}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoRun:
    """What to make, and where to.

    Attributes:
        load: Gives a video pipeline; called only if something is missing.
        requests: What to show; height and width of a request win over those of the options.
        out: The folder.
        num: Videos of each request.
        settings: What the videos share.
        timeline: Also draw who made which block, as ``NAME.timeline.png``.
        report: Told the progress, a line at a time.
    """

    load: Callable[[], Any]
    requests: Sequence[VisualRequest]
    out: Path
    num: int
    settings: VideoSettings
    timeline: bool
    report: Report


@dataclass(frozen=True, slots=True)
class _Video:
    """One video of a request."""

    path: Path
    request: VisualRequest
    seed: int

    @property
    def key(self) -> Key:
        return self.path.name, None

    @property
    def timeline_path(self) -> Path:
        return self.path.with_name(f"{self.path.stem}.timeline.png")

    def identity(self) -> dict[str, Any]:
        """By what a video is known again, besides the settings."""
        return self.request.fields() | {"seed": self.seed}


def run_videos(run: VideoRun) -> VideoSummary:
    """Makes videos; those that the journal has are left as they are.

    Files are called ``REQUEST-VIDEO.FORMAT``, both counted from 0; "frames" are folders
    ``REQUEST-VIDEO``. The journal is `videos.jsonl` beside them.

    Args:
        run: What to make.

    Returns:
        What was done.

    Raises:
        ValueError: If the folder has something that was made otherwise, or a request cannot be
            met; before any video is made.
        ImportError: If mp4 is asked for without its package, likewise.
        OSError: If the folder cannot be written to, likewise.
    """
    out, settings = run.out, run.settings
    settings.check()
    rule = "a folder; --format says what files it holds"
    require(out.suffix.lower()[1:] not in FORMATS, "--out", rule, str(out))
    check_writable(out)
    ending = "" if settings.format == "frames" else f".{settings.format}"
    videos = [
        _Video(out / f"{row:04d}-{k:02d}{ending}", request, request.seed + k)
        for row, request in enumerate(run.requests)
        for k in range(run.num)
    ]
    with Journal(out / JOURNAL, settings.to_dict()) as journal:
        missing = [video for video in videos if not _is_made(video, journal, run)]
        summary = VideoSummary(out=out, num_skipped=len(videos) - len(missing))
        pipe = _checked(run, missing)
        for video in missing:
            record = _make(pipe, video, run)
            journal.add([record])
            summary.num_videos += 1
            summary.stats.append(record["stats"])
            run.report(_progress(summary, len(missing), video))
        journal.sort([video.key for video in videos], lambda key, entry: False)
    return summary


def check_requests(
    pipe: Any, requests: Sequence[VisualRequest], options: Mapping[str, Any]
) -> list[tuple[int, int, int]]:
    """Refuses requests that a pipeline cannot meet.

    Returns:
        Pictures, height and width of each.

    Raises:
        ValueError: With the line of the request, where it is of a file.
    """
    sizes = []
    for request in requests:
        with request.named_in_errors():
            sizes.append(pipe.check_request(request.prompt, **{**options, **request.options()}))
    return sizes


def block_fields(record: BlockRecord) -> dict[str, Any]:
    """How a block came about in JSON; a score that is no finite number becomes null."""
    own: dict[str, Any] = asdict(record)
    score = record.score
    is_number = score is not None and math.isfinite(score)
    return own | {"is_drafted": score is not None, "score": score if is_number else None}


def _checked(run: VideoRun, videos: Sequence[_Video]) -> Any:
    """The pipeline, once it is known that it can make all of them; None if there are none."""
    if not videos:
        return None
    pipe, settings = run.load(), run.settings
    check_format(settings.format, _fps(pipe, settings), settings.scale)
    requests = list(dict.fromkeys(video.request for video in videos))
    for _, height, width in check_requests(pipe, requests, settings.options):
        check_sides(settings.format, height * settings.scale, width * settings.scale)
    return pipe


def _fps(pipe: Any, settings: VideoSettings) -> float:
    own: float = pipe.defaults.get("fps", DEFAULT_FPS)
    return own if settings.fps is None else settings.fps


def _is_made(video: _Video, journal: Journal, run: VideoRun) -> bool:
    """Whether a video is there, and the one that is asked for.

    Raises:
        ValueError: If what is there was made otherwise.
    """
    found = record = journal.get(video.key)
    if found is None and video.path.exists():
        # A kill between the file and its line leaves a file that says how it was made.
        found = read_video_metadata(video.path) or {}
    if found is not None:
        _check_same(video, found, run.settings.to_dict())
    is_there = record is not None and video.path.exists()
    return is_there and (not run.timeline or video.timeline_path.exists())


def _check_same(video: _Video, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    wanted = {**video.identity(), "settings": settings}
    names = ("prompt", "negative_prompt", "height", "width", "seed", "settings")
    others = [
        f"{name} {found.get(name, 'none')!r} (asked for: {wanted.get(name, 'none')!r})"
        for name in names
        if found.get(name) != wanted.get(name)
    ]
    if others:
        raise ValueError(
            f"{video.path} was made with {', '.join(others)}; use the same settings to continue, "
            "or another --out"
        )


def _make(pipe: Any, video: _Video, run: VideoRun) -> dict[str, Any]:
    """Makes a video, block by block, and gives its line for the journal."""
    settings, shown = run.settings, []
    stream = pipe.stream(
        video.request.prompt,
        **{**settings.options, **video.request.options()},
        generator=generators([video.seed]),
        output_type="pt",
    )
    identity = video.identity() | {"settings": settings.to_dict()}
    made_by = {"router": stream.stats.router, "guarantee": str(stream.stats.guarantee)}
    metadata = identity | made_by | {name: version(name) for name in PACKAGES}
    _clear(video)
    file_options: dict[str, Any] = {"fps": _fps(pipe, settings), "scale": settings.scale}
    with open_video(video.path, metadata=metadata, **file_options) as file:
        for block in stream:
            frames = block.frames[0]
            file.add(frames)
            if run.timeline:
                some = spread(range(len(frames)), NUM_SHOWN)
                shown.append([Image.fromarray(picture) for picture in as_bytes(frames[some])])
        if run.timeline:  # before the video, whose presence says that both are done
            drawn = timeline(stream.records[0], shown, title=video.request.prompt)
            save_png(drawn, video.timeline_path, {"prompt": video.request.prompt})
    return {
        "file": video.path.name,
        **video.identity(),
        "num_frames": file.num_frames,
        "blocks": [block_fields(record) for record in stream.records[0]],
        "stats": stream.stats.to_dict(),
    }


def _clear(video: _Video) -> None:
    """Makes room: what a kill left half-done, and a folder that was made without its line."""
    for path in (video.path, video.timeline_path):
        remove_partial(path)
    if video.path.is_dir():
        shutil.rmtree(video.path)


def _progress(summary: VideoSummary, num_missing: int, video: _Video) -> str:
    stats = summary.stats[-1]
    return (
        f"{summary.num_videos}/{num_missing} {video.path.name}: {stats['num_kept']} of "
        f"{stats['num_blocks']} blocks by the drafter, {stats['wall_time_s']:.1f} s"
    )
