"""The measurements of `mmspec bench video`: scores for thresholds, videos for quality, times."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from mmspec.bench.measure import Budget, Sample, Store, timed
from mmspec.bench.tasks import System, Task
from mmspec.bench.video_pool import Pool, PooledVideoPipeline
from mmspec.bench.video_setups import (
    Meter,
    MeteredScorer,
    Pair,
    ScoreKey,
    Setup,
    Thresholds,
    TransformerClock,
    scorer_name,
    sight_of,
)
from mmspec.pipelines.video import SpeculativeVideoPipeline
from mmspec.pipelines.video_stream import VideoOutput
from mmspec.routers.calibration import calibrate
from mmspec.routers.scoring import Scorer

#: diffusers' own call of the target.
DIFFUSERS = "diffusers"
#: Any accept rate: the threshold is minus infinity while scores are recorded.
_ANY = 0.5


@dataclass(slots=True, kw_only=True)
class Videos:
    """Makes videos of a pair, and keeps what was measured.

    Attributes:
        pair: The models.
        scorers: Name -> scorer, loaded.
        store: Of samples.
        seed: Of the noise; prompt k takes ``seed + k``.
        variant: What else the samples depend on, for their keys.
        chunk: Prompts whose videos are made together.
        thresholds: Measured so far.
    """

    pair: Pair
    scorers: Mapping[str, Scorer]
    store: Store
    seed: int
    variant: str
    chunk: int
    thresholds: dict[tuple[str, str, float], float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What all samples depend on."""
        options = json.dumps(self.pair.options, sort_keys=True)
        digest = blake2b(options.encode(), digest_size=4).hexdigest()
        return f"{self.pair.name}/{self.variant}/{digest}/s{self.seed}"

    def video_key(self, setup: Setup, index: int) -> str:
        """Of one video's sample: a setup with other thresholds is another one."""
        bars = [f"{self.thresholds[key]:.9g}" for key in setup.threshold_keys]
        return f"video/{self.key}/{'/'.join([setup.name, *bars])}/{index}"

    def scores(self, base: str, scorer: str, indices: Iterable[int]) -> list[float]:
        """Recorded scores of the drafts of some prompts; NaN of what could not be judged."""
        names = [f"scores/{self.key}/{base}+{scorer}/{index}" for index in indices]
        found = [one for name in names for one in self.store.samples[name]["scores"]]
        return [float("nan") if one is None else one for one in found]

    def noise(self, index: int) -> torch.Generator:
        """What the video of a prompt is made from, in every setup."""
        return torch.Generator().manual_seed(self.seed + index)

    def metered(
        self, scorer: str, meter: Meter, results: dict[Any, list[Tensor]] | None = None
    ) -> MeteredScorer:
        """A scorer as a setup names it, counted."""
        one = self.scorers[scorer_name(scorer)]
        return MeteredScorer(one, meter, results, on=sight_of(scorer).on)

    def call(self, setup: Setup, index: int) -> dict[str, Any]:
        """Arguments of our call, but the router."""
        options = dict(self.pair.options)
        if setup.stitch is not None:
            # Two models can only share a block that both make in the same steps.
            options |= {"stitch": setup.stitch, "drafter_steps": options["num_inference_steps"]}
        return options | {"generator": self.noise(index), "output_type": "pt"}


# --------------------------------------------------------------------------- in a pool


def score_keys(setups: Iterable[Setup]) -> list[ScoreKey]:
    """What scores thresholds are made from; where a scorer is shown less, also those of all."""
    keys = [key[:2] for setup in setups for key in setup.threshold_keys]
    full = [(base, scorer_name(one)) for base, one in keys]
    return list(dict.fromkeys([*keys, *full]))


def measure_scores(
    videos: Videos, keys: Sequence[ScoreKey], indices: Sequence[int], say: Callable[[str], None]
) -> None:
    """Records the scores of drafts that are all kept, and adds them to the store."""

    def key_of(score: ScoreKey, index: int) -> str:
        return f"scores/{videos.key}/{'+'.join(score)}/{index}"

    for number, chunk in enumerate(_chunks(indices, videos.chunk)):
        wanted = [(s, i) for i in chunk for s in keys if key_of(s, i) not in videos.store]
        setups = {score: _scoring_setup(score) for score in keys}
        everything = {setup.threshold_keys[0]: float("-inf") for setup in setups.values()}
        found = _pooled(videos, [(setups[score], i) for score, i in wanted], everything)
        samples = [
            {
                "key": key_of(score, index),
                "type": "scores",
                "scores": [_number(one.score) for one in out.blocks[0] if one.score is not None],
                "picture_scores": [[*map(_number, block)] for block in made["picture_scores"]],
            }
            for (score, index), (out, made) in zip(wanted, found, strict=True)
        ]
        if samples:
            videos.store.add(samples)
            say(f"scores for thresholds: {number * videos.chunk + len(chunk)}/{len(indices)}")


def set_thresholds(
    videos: Videos, setups: Iterable[Setup], indices: Sequence[int]
) -> dict[str, Sample]:
    """Finds the thresholds of all accept rates from the recorded scores.

    Returns:
        Setup -> its thresholds, for the report.

    Raises:
        ValueError: If too few drafts could be judged for a rate.
    """
    found: dict[str, Sample] = {}
    for setup in setups:
        bars = []
        for base, scorer, rate in setup.threshold_keys:
            numbers = videos.scores(base, scorer, indices)
            bar = calibrate(scorer, numbers, accept_rate=rate).threshold
            videos.thresholds[base, scorer, rate] = bar
            bars.append(bar)
        found[setup.name] = {"thresholds": bars}
    return found


def measure_quality(
    videos: Videos,
    setups: Sequence[Setup],
    indices: Sequence[int],
    budget: Budget,
    say: Callable[[str], None],
) -> None:
    """Makes the videos of all setups for a few prompts at a time, until the time is over."""
    chunks = _chunks(indices, videos.chunk)
    for number, chunk in enumerate(chunks):
        if budget.is_spent:
            return
        wanted = [
            (s, i) for i in chunk for s in setups if videos.video_key(s, i) not in videos.store
        ]
        if not wanted:
            continue
        found = _pooled(videos, wanted, videos.thresholds)
        frames = torch.cat([out.frames for out, _ in found])
        scores = videos.pair.quality(frames, [videos.pair.prompts[i] for _, i in wanted])
        samples = [
            {
                "key": videos.video_key(setup, index),
                "type": "video",
                "setup": setup.name,
                "prompt": index,
                **{name: value for name, value in figures.items() if name != "picture_scores"},
                "scores": score,
            }
            for (setup, index), (_, figures), score in zip(wanted, found, scores, strict=True)
        ]
        videos.store.add(samples)
        say(
            f"[{budget.elapsed_s:6.0f} s] videos: {len(wanted)} of chunk {number + 1}/{len(chunks)}"
        )


def _pooled(
    videos: Videos, wanted: Sequence[tuple[Setup, int]], thresholds: Thresholds
) -> list[tuple[VideoOutput, Sample]]:
    """Makes videos together; returns each with what was done for it."""
    pool, pair = Pool(), videos.pair
    results: dict[Any, list[Tensor]] = {}

    def job(setup: Setup, index: int) -> Callable[[], tuple[VideoOutput, Sample]]:
        def make() -> tuple[VideoOutput, Sample]:
            meter = Meter()
            pipe = PooledVideoPipeline(pair.target, pair.drafter, pool)
            pipe.set_progress_bar_config(disable=True)
            pipe.preview = pair.preview
            router = setup.router(thresholds, lambda one: videos.metered(one, meter, results))
            out = pipe(pair.prompts[index], router=router, **videos.call(setup, index))
            figures = _figures(out, meter) | {"decodes": pipe.num_decoded}
            return out, figures | {"picture_scores": list(meter.scores.values())}

        return make

    return pool.run([job(setup, index) for setup, index in wanted])


def exit_rows(videos: Videos, setups: Sequence[Setup], indices: Sequence[int]) -> list[Sample]:
    """How many pictures of a refused draft are scored until it is refused, by the order of them.

    Counted on the drafts that thresholds are made from, one picture at a time.
    """
    rows = []
    for base, scorer, rate in dict.fromkeys(key for s in setups for key in s.threshold_keys):
        bar = videos.thresholds[base, scorer, rate]
        names = [f"scores/{videos.key}/{base}+{scorer}/{index}" for index in indices]
        of_videos = [videos.store.samples[name]["picture_scores"] for name in names]
        row = {"type": "exit", "base": base, "scorer": scorer, "rate": rate}
        rows.append(row | count_exits(of_videos, bar))
    return rows


def agreement_rows(videos: Videos, setups: Sequence[Setup], indices: Sequence[int]) -> list[Sample]:
    """How often a scorer that is shown less decides as it does where it sees all.

    Counted on the drafts that thresholds are made from, which are the same for both.
    """
    rows = []
    for base, scorer, rate in dict.fromkeys(key for s in setups for key in s.threshold_keys):
        plain = scorer_name(scorer)
        if plain == scorer:
            continue
        less, full = (videos.scores(base, one, indices) for one in (scorer, plain))
        own, wanted = (calibrate("", one, accept_rate=rate).threshold for one in (less, full))
        pairs = list(zip(less, full, strict=True))

        def share(bar: float, wanted: float = wanted, pairs: Any = pairs) -> float:
            return sum((a >= bar) == (b >= wanted) for a, b in pairs) / len(pairs)

        row = {"type": "agreement", "base": base, "scorer": scorer, "rate": rate}
        row |= {"drafts": len(pairs), "own_threshold": share(own), "same_threshold": share(wanted)}
        rows.append(row | {"by_chance": rate**2 + (1 - rate) ** 2})
    return rows


def count_exits(videos: Sequence[Sequence[Sequence[float | None]]], bar: float) -> Sample:
    """Mean share of the pictures that is scored of a refused draft.

    Args:
        videos: For each, blocks in order, of each the scores of its pictures; None refuses too.
        bar: The lowest score that keeps.

    Returns:
        Refused drafts, and by order the mean share; None where nothing is refused.
    """
    shares: dict[str, list[float]] = {name: [] for name in ("first", "last", "worst_before")}
    for blocks in videos:
        before = 0
        for scores in blocks:
            is_bad = [score is None or score < bar for score in scores]
            length, worst = len(scores), min(before, len(scores) - 1)
            orders = {
                "first": range(length),
                "last": reversed(range(length)),
                "worst_before": [worst, *(n for n in range(length) if n != worst)],
            }
            if any(is_bad):
                for name, order in orders.items():
                    needed = next(k for k, n in enumerate(order, start=1) if is_bad[n])
                    shares[name].append(needed / length)
            known = [float("-inf") if score is None else score for score in scores]
            before = known.index(min(known)) if known else 0
    refused = len(shares["first"])
    means = {name: sum(found) / refused if refused else None for name, found in shares.items()}
    return {"refused": refused, **means}


def _figures(out: VideoOutput, meter: Meter) -> Sample:
    """What was done for one video; names as in `mmspec.bench.video_costs.Counts`."""
    [records], stats = out.blocks, out.stats
    return {
        "sources": "".join(record.source[0].upper() for record in records),
        "target_forwards": stats.num_target_forwards,
        "target_reads": stats.num_target_prefills,
        "drafter_forwards": stats.num_drafter_forwards,
        "drafter_reads": stats.num_drafter_prefills,
        "drafted": stats.num_drafted,
        "kept": stats.num_kept,
        "judged": len(meter.scored),
        "pictures": sum(meter.scored.values()),
        "offered": sum(meter.offered.values()),
        "previews": meter.previews,
    }


def _scoring_setup(score: ScoreKey) -> Setup:
    base, scorer = score
    parts = (*(base.split("+") if base else ()), f"{scorer}@{_ANY}")
    return Setup(name="+".join(parts), parts=parts, stitch=None)


def _number(score: float | None) -> float | None:
    """NaN is no JSON."""
    return None if score is None or score != score else score


def _chunks(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    return [indices[first : first + size] for first in range(0, len(indices), size)]


# --------------------------------------------------------------------------- one at a time


def time_tasks(videos: Videos, setups: Sequence[Setup], indices: Sequence[int]) -> list[Task]:
    """One task per prompt: diffusers' own call and every setup, back to back."""
    pair = videos.pair
    pipe = SpeculativeVideoPipeline.from_model(pair.target, drafter=pair.drafter)
    pipe.preview = pair.preview
    for one in (pipe, pair.target):
        one.set_progress_bar_config(disable=True)

    def systems(index: int) -> dict[str, System]:
        own = {setup.name: _timed(videos, pipe, setup, index) for setup in setups}
        return {DIFFUSERS: _timed_diffusers(videos, index), **own}

    bars = [f"{videos.thresholds[key]:.9g}" for s in setups for key in s.threshold_keys]
    digest = blake2b(" ".join(bars).encode(), digest_size=4).hexdigest()
    return [
        Task(
            key=f"time/{videos.key}/{digest}/{index}",
            label="times",
            systems=systems(index),
            facts={"type": "time", "prompt": index},
            warm_up=lambda: _warm_up(videos, pipe, setups),
            finish=_compare,
        )
        for index in indices
    ]


def _warm_up(videos: Videos, pipe: SpeculativeVideoPipeline, setups: Sequence[Setup]) -> None:
    for setup in [s for s in setups if s.name in ("never", "always")]:
        _timed(videos, pipe, setup, 0)(0)


def _timed(videos: Videos, pipe: SpeculativeVideoPipeline, setup: Setup, index: int) -> System:
    def measure(repeat: int) -> Sample:
        meter = Meter()
        router = setup.router(videos.thresholds, lambda one: videos.metered(one, meter))
        with TransformerClock(pipe.target.transformer) as target:  # noqa: SIM117
            with TransformerClock(pipe.drafter.transformer) as drafter:
                out, time_s = timed(
                    lambda: pipe(
                        videos.pair.prompts[index], router=router, **videos.call(setup, index)
                    ),
                    pipe.device,
                )
        stats, figures = out.stats, _figures(out, meter)
        clocks = [target] if pipe.drafter is pipe.target else [target, drafter]
        inside = sum(sum(clock.steps) + sum(clock.reads) for clock in clocks)
        # A forward with what is done around it: guidance, the step of the sampler.
        whole = (stats.target_time_s + stats.draft_time_s) / inside
        phases = {
            "target": stats.target_time_s,
            "draft": stats.draft_time_s,
            "decode": stats.decode_time_s,
            "judge": meter.time_s + meter.preview_time_s,
        }
        refused = stats.num_drafted - stats.num_kept if setup.decodes_drafts else 0
        return {
            "time_s": time_s,
            # What is not done in blocks is done before the first.
            "first_s": time_s - stats.wall_time_s + (stats.first_block_time_s or 0.0),
            "phases_s": phases | {"rest": time_s - sum(phases.values())},
            "forward_s": {
                name: whole * sum(seconds) / len(seconds) if seconds else None
                for name, seconds in (
                    ("target_forward", target.steps),
                    ("target_read", target.reads),
                    ("drafter_forward", drafter.steps),
                    ("drafter_read", drafter.reads),
                )
            },
            "vain_s": stats.decode_time_s * refused / (stats.num_blocks + refused),
            "preview_s": meter.preview_time_s,
            "scorers": list(setup.scorers),
            "frames": out.frames,
            **{name: figures[name] for name in ("sources", "pictures", "previews")},
        }

    return measure


def _timed_diffusers(videos: Videos, index: int) -> System:
    def measure(repeat: int) -> Sample:
        pipe, options = videos.pair.target, dict(videos.pair.options)
        for name in ("drafter_steps", "drafter_guidance_scale"):
            options.pop(name, None)
        options["chunk_partition"] = options.pop("block_sizes", None)
        options |= {"generator": videos.noise(index), "output_type": "pt"}
        out, time_s = timed(
            lambda: pipe(videos.pair.prompts[index], **options), pipe._execution_device
        )
        return {"time_s": time_s, "frames": out.frames}

    return measure


def _compare(samples: Mapping[str, Sample]) -> None:
    """Takes the pictures away; says whether ours without drafts are those of diffusers."""
    frames: dict[str, Tensor] = {
        name: torch.as_tensor(sample.pop("frames")) for name, sample in samples.items()
    }
    if "never" in frames:
        samples["never"]["is_equal"] = torch.equal(frames["never"], frames[DIFFUSERS])
