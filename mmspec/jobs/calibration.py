"""The threshold of a router from a sample of prompts.

Every draft of the sample is scored and kept, and the scores are written down video by video: after
a kill the rest is made. One more video, by the target alone, says what a block of it costs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mmspec.checks import is_number, require
from mmspec.jobs import Report, check_writable, generators, lines_of
from mmspec.jobs.draft_losses import draft_losses, measured_losses
from mmspec.jobs.journal import Journal
from mmspec.jobs.requests import VisualRequest
from mmspec.jobs.video import block_fields, check_requests
from mmspec.routers import recording_router
from mmspec.routers.calibration import Calibration, calibrate
from mmspec.whole_file import whole_file

#: Name of the line of the video that the target makes alone.
TARGET = "target"
_NUM_BINS, _BAR = 10, 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """What the threshold is to do: one of the two.

    Attributes:
        accept_rate: Share of the drafts to keep, or None.
        budget: Mean loss per block that is allowed, or None.
        losses: With a budget, the loss of each drafted block, by name of its video and index; None
            measures it (`mmspec.jobs.draft_losses`).
    """

    accept_rate: float | None = None
    budget: float | None = None
    losses: Mapping[tuple[str, int], float] | None = None

    def check(self) -> None:
        """Refuses what is no aim.

        Raises:
            ValueError: With what was given.
        """
        given = (self.accept_rate, self.budget, self.losses is not None)
        is_rate = self.accept_rate is not None and self.budget is None and self.losses is None
        is_budget = self.accept_rate is None and is_number(self.budget) and self.losses != {}
        rule = "an accept rate, or a budget with or without losses"
        require(is_rate or is_budget, "the aim", rule, given)
        rate = self.accept_rate
        if rate is not None:
            is_good = is_number(rate) and 0 < rate <= 1
            require(is_good, "the accept rate", "in (0, 1]", rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRun:
    """What to calibrate, and where to write.

    Attributes:
        load: Gives a video pipeline; called only if something is missing.
        requests: The sample.
        num: Videos of each.
        router: As `mmspec.routers.recording_router` takes it.
        settings: What the sample is made with: names of models, and "options" of the call.
        aim: What the threshold is to do.
        out: The calibration; the scores are beside it.
        report: Told the progress, a line at a time.
    """

    load: Callable[[], Any]
    requests: Sequence[VisualRequest]
    num: int
    router: str
    settings: Mapping[str, Any]
    aim: Aim
    out: Path
    report: Report

    @property
    def scores_path(self) -> Path:
        """Where the scores are written down."""
        return self.out.with_suffix(".scores.jsonl")

    @property
    def losses_path(self) -> Path:
        """Where losses that were measured are written down."""
        return self.out.with_suffix(".losses.jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSummary:
    """What a calibration found.

    Attributes:
        out: The calibration's file.
        calibration: What it holds.
        router: The router with this calibration, as a user types it.
        num_videos: Videos of the sample.
        num_skipped: Those that were there already.
        target_seconds: Of a video by the target alone.
        expected_seconds: Of a video with this threshold, by the seconds of the sample.
    """

    out: Path
    calibration: Calibration
    router: str
    num_videos: int
    num_skipped: int
    target_seconds: float
    expected_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        found = self.calibration
        return {
            "out": str(self.out),
            "router": self.router,
            "threshold": found.threshold,
            "accept_rate": found.accept_rate,
            "mean_loss": found.mean_loss,
            "num_scores": len(found.scores),
            "num_videos": self.num_videos,
            "num_skipped": self.num_skipped,
            "target_seconds": self.target_seconds,
            "expected_seconds": self.expected_seconds,
        }

    def text(self) -> str:
        """For people."""
        found = self.calibration
        speed = self.target_seconds / max(self.expected_seconds, 1e-9)
        loss = "" if found.mean_loss is None else f", mean loss {found.mean_loss:.4g}"
        return "\n".join(
            [
                f"{self.out}: threshold {found.threshold:.6g} of {found.score_name} keeps "
                f"{found.accept_rate:.0%} of {len(found.scores)} drafted blocks{loss}",
                f"expected: {self.expected_seconds:.2f} s a video; the target alone "
                f"{self.target_seconds:.2f} s ({speed:.2f}x)",
                f"use it: --router {self.router}",
                *histogram(found),
            ]
        )


def run_calibration(run: CalibrationRun) -> CalibrationSummary:
    """Records the scores that are missing, finds the threshold, writes the calibration.

    Args:
        run: What to do.

    Raises:
        ValueError: If something is asked wrongly, before any video is made; if the scores beside
            the calibration were made otherwise; if no threshold does what is wanted.
        OSError: If it cannot be written.
    """
    run.aim.check()
    sizes = sorted({str(request.size) for request in run.requests})
    require(len(sizes) == 1, "the videos of a calibration", "of one height and width", sizes)
    check_writable(run.out.parent)
    settings = {**run.settings, "router": run.router}
    with Journal(run.scores_path, settings) as journal:
        names = [f"{row:04d}-{k:02d}" for row in range(len(run.requests)) for k in range(run.num)]
        missing = [name for name in [*names, TARGET] if not _is_made(run, name, journal)]
        if missing:
            _record(run, missing, journal)
        videos = [_kept(journal, name) for name in names]
        target = _kept(journal, TARGET)
    found = _found(run, dict(zip(names, videos, strict=True)), settings)
    with whole_file(run.out) as building:
        found.save(building)
    expected, alone = expected_seconds(videos, target, found.threshold)
    return CalibrationSummary(
        out=run.out,
        calibration=found,
        router=_with_calibration(run.router, found.score_name, run.out),
        num_videos=len(names),
        num_skipped=sum(name not in missing for name in names),
        target_seconds=alone,
        expected_seconds=expected,
    )


def read_losses(path: str | Path) -> dict[tuple[str, int], float]:
    """Losses of drafted blocks.

    Args:
        path: A ``.jsonl`` file of objects with ``file`` (as in the file of the scores), ``block``
            (its index) and ``loss``.

    Raises:
        ValueError: If a line is something else, or a block comes twice; names the line.
    """
    losses: dict[tuple[str, int], float] = {}
    for _, where, fields in lines_of(path):
        is_good = set(fields) == {"file", "block", "loss"} and is_number(fields["loss"])
        require(is_good, where, "an object of 'file', 'block' and a number 'loss'", fields)
        key = (fields["file"], fields["block"])
        require(key not in losses, where, "a block that did not come before", fields)
        losses[key] = fields["loss"]
    return losses


def expected_seconds(
    videos: Sequence[Mapping[str, Any]], target: Mapping[str, Any], threshold: float
) -> tuple[float, float]:
    """Seconds of a video with a threshold, and of one by the target alone.

    Drafting and judging cost what they did; a block that the target writes costs what it did in
    the target's own video, its share of everything else there (the VAE) included.

    Args:
        videos: Lines of the sample.
        target: The line of the target's video.
        threshold: The lowest score that keeps a draft.
    """
    blocks = target["blocks"]
    share = target["seconds"] / max(sum(block["target_time_s"] for block in blocks), 1e-9)
    by_target = [share * block["target_time_s"] for block in blocks]
    seconds = 0.0
    for video in videos:
        for block in video["blocks"]:
            seconds += block["draft_time_s"] + block["judge_time_s"]
            if block["score"] is None or block["score"] < threshold:
                seconds += by_target[block["index"]]
    return seconds / len(videos), sum(by_target)


def histogram(found: Calibration) -> list[str]:
    """Lines of text: how many blocks have which score; ``#`` is kept and ``.`` is not."""
    scores = [score for score in found.scores if score is not None]
    low, high = min(scores), max(scores)
    step = (high - low) / _NUM_BINS
    edges = [low + k * step for k in range(_NUM_BINS)] if step else [low]
    bins: list[list[float]] = [[] for _ in edges]
    for score in scores:
        bins[min(int((score - low) / step), _NUM_BINS - 1) if step else 0].append(score)
    most = max(map(len, bins))
    lines = []
    for edge, inside in zip(edges, bins, strict=True):
        kept = sum(score >= found.threshold for score in inside)
        length = math.ceil(_BAR * len(inside) / most)
        refused = round(length * (len(inside) - kept) / len(inside)) if inside else 0
        bar = "." * refused + "#" * (length - refused)
        lines.append(f"{edge:12.5g}  {bar:{_BAR}}  {len(inside)}")
    num_unjudged = len(found.scores) - len(scores)
    return lines + ([f"{num_unjudged} could not be judged"] if num_unjudged else [])


def _request_of(run: CalibrationRun, name: str) -> tuple[VisualRequest, int]:
    """The request of a video, and its seed."""
    if name == TARGET:
        return run.requests[0], run.requests[0].seed
    row, k = map(int, name.split("-"))
    return run.requests[row], run.requests[row].seed + k


def _is_made(run: CalibrationRun, name: str, journal: Journal) -> bool:
    """Whether a video was recorded.

    Raises:
        ValueError: If it was of another prompt or seed.
    """
    record = journal.get((name, None))
    if record is None:
        return False
    request, seed = _request_of(run, name)
    for field, wanted in (request.fields() | {"seed": seed}).items():
        rule = f"made with {wanted!r}, or in another place (--out)"
        got = record.get(field)
        require(got == wanted, f"{field} of {name} in {run.scores_path}", rule, got)
    return True


def _record(run: CalibrationRun, missing: Sequence[str], journal: Journal) -> None:
    """Makes the videos that are missing."""
    router, score_name = recording_router(run.router)
    pipe, options = run.load(), dict(run.settings["options"])
    requests = list(dict.fromkeys(_request_of(run, name)[0] for name in missing))
    check_requests(pipe, requests, options | {"router": router})
    for number, name in enumerate(missing, 1):
        request, seed = _request_of(run, name)
        stream = pipe.stream(
            **_call(run, request),
            router="never" if name == TARGET else router,
            generator=generators([seed]),
            output_type="pt",
        )
        for _ in stream:  # the pictures are decoded for their seconds, and nobody keeps them
            pass
        record = {
            "file": name,
            **request.fields(),
            "seed": seed,
            "score_name": score_name,
            "seconds": stream.stats.wall_time_s,
            "blocks": [block_fields(record) for record in stream.records[0]],
        }
        journal.add([record])
        run.report(f"{number}/{len(missing)} {name}: {stream.stats.wall_time_s:.1f} s")


def _call(run: CalibrationRun, request: VisualRequest) -> dict[str, Any]:
    """Arguments of the pipeline's call."""
    return {"prompt": request.prompt, **run.settings["options"], **request.options()}


def _kept(journal: Journal, name: str) -> dict[str, Any]:
    record = journal.get((name, None))
    assert record is not None
    return record


def _found(
    run: CalibrationRun, videos: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]
) -> Calibration:
    """The threshold.

    Raises:
        ValueError: If a loss is missing or too much, or no threshold does what is wanted.
    """
    scores = {
        (name, block["index"]): math.nan if block["score"] is None else block["score"]
        for name, video in videos.items()
        for block in video["blocks"]
        if block["is_drafted"]
    }
    losses = None
    if run.aim.budget is not None:
        given = run.aim.losses or _measured(run, scores, settings)
        others = sorted(set(scores) ^ set(given))
        rule = f"one for each drafted block of {run.scores_path}"
        require(not others, "the losses", rule, f"others or none for {others[:3]}")
        losses = [given[key] for key in scores]
    first = next(iter(videos.values()))
    return calibrate(
        first["score_name"],
        list(scores.values()),
        accept_rate=run.aim.accept_rate,
        losses=losses,
        budget=run.aim.budget,
        provenance={**run.settings, "router": run.router, "num_videos": len(videos)},
    )


def _measured(
    run: CalibrationRun, scores: Mapping[tuple[str, int], float], settings: Mapping[str, Any]
) -> dict[tuple[str, int], float]:
    """The losses of drafted blocks, by the pipeline itself."""
    # The target wrote the blocks that could not be judged, and no threshold keeps their drafts.
    unjudged = {key: 0.0 for key, score in scores.items() if math.isnan(score)}
    drafted: dict[str, list[int]] = {name: [] for name, _ in scores}
    for name, index in scores.keys() - unjudged.keys():
        drafted[name].append(index)
    load = cache(run.load)

    def measure(name: str) -> dict[int, float]:
        request, seed = _request_of(run, name)
        return draft_losses(load(), _call(run, request), seed, sorted(drafted[name]))

    return unjudged | measured_losses(run.losses_path, settings, drafted, measure, run.report)


def _with_calibration(router: str, score_name: str, path: Path) -> str:
    """The router with its threshold, as a user types it."""
    scorer = score_name.partition(",")[0]
    parts = []
    for part in router.split("+"):
        name, _, argument = part.partition(":")
        more = [argument] if argument else []
        settings = ",".join([*more, f"calibration={path}"])
        parts.append(f"{name}:{settings}" if name == scorer else part)
    return "+".join(parts)
