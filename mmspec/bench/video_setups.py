"""What `mmspec bench video` compares: pairs of models, routers by accept rate, and their meters."""

import importlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from mmspec.adapters.dense_attention import DenseAttention
from mmspec.assets import bundled_names, bundled_path
from mmspec.bench.measure import synchronize
from mmspec.bench.tasks import Unavailable
from mmspec.block_records import BlockRouter, BlockView
from mmspec.checks import require, require_known
from mmspec.latent_preview import LinearPreview
from mmspec.pipelines.video import SpeculativeVideoPipeline
from mmspec.routers import ROUTERS, AllRouter, build_router
from mmspec.routers.scoring import Scorer, ScoringRouter, Sight

#: Judges clips ``[N, F, 3, H, W]`` in [0, 1] by their prompts; "quality" is one of its figures.
Quality = Callable[[Tensor, Sequence[str]], list[dict[str, float]]]
#: Place routers in front and name of the scorer, of a setup whose threshold has to be measured.
ScoreKey = tuple[str, str]
Thresholds = Mapping[tuple[str, str, float], float]

#: What a router has to beat -> its setups, by what stands before the colon: the ends of a curve and
#: what is between.
BASELINES = {
    "random": ("always", "random", "never"),
    "first-block+random": ("first-block", "first-block+random", "never"),
    "every": ("first-block", "every", "never"),
}
#: How attention is computed, for all systems alike.
ATTENTION = ("dense", "flex")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two models and what to ask of them.

    Attributes:
        name: Of the pair.
        target: A pipeline of diffusers.
        drafter: Another; None where the target drafts for itself.
        options: Of a call: sizes, steps, guidance, blocks.
        prompts: To make videos of, and behind them those for thresholds.
        num_judged: Of the prompts, those that are judged.
        quality: Judges them. No router may look at what it looks at.
        preview: Makes cheap pictures of latents, for the setups that look at them.
    """

    name: str
    target: Any
    drafter: Any
    options: Mapping[str, Any]
    prompts: Sequence[str]
    num_judged: int
    quality: Quality
    preview: LinearPreview | None = None

    @property
    def num_blocks(self) -> int:
        """Of a video."""
        return len(self.block_sizes)

    @property
    def block_sizes(self) -> Sequence[int]:
        """Latent frames of each block."""
        sizes = self.options.get("block_sizes")
        return self.target.transformer.config.chunk_partition if sizes is None else sizes

    @property
    def drafter_steps(self) -> int:
        """Steps of a drafted block."""
        return self.options.get("drafter_steps", self.options["num_inference_steps"])


#: Of a pair's defaults, what is no option of a call, and what the benchmark sets itself.
_NO_OPTIONS = ("fps", "router", "attention")


#: Who drafts: the model in the folder NAME-drafter, or the target itself in fewer steps.
DRAFTERS = ("pair", "self")


def load_pair(
    name: str, attention: str, device: str, drafter: str = "pair", **steps: int | None
) -> Pair:
    """Loads a bundled pair: the folders NAME and NAME-drafter.

    Args:
        name: Of the pair.
        attention: "dense" or "flex".
        device: For all of it.
        drafter: One of `DRAFTERS`.
        **steps: ``num_inference_steps`` and ``drafter_steps`` instead of the pair's own.

    Raises:
        ValueError: If there is none, or it is not complete.
    """
    require_known("drafter", drafter, DRAFTERS)
    names = [one for one in bundled_names() if f"{one}-drafter" in bundled_names()]
    names = [one for one in names if (bundled_path(one) / "held_out.jsonl").exists()]
    require_known("pair of video models", name, names)
    folder = bundled_path(name)
    is_alone = drafter == "self"
    pipe = SpeculativeVideoPipeline.from_pretrained(
        folder, drafter="self" if is_alone else bundled_path(f"{name}-drafter")
    )
    pipe.to(device)
    if attention == "dense":
        for one in {id(one): one for one in (pipe.target, pipe.drafter)}.values():
            DenseAttention(one.transformer).install()
    options = {key: value for key, value in pipe.defaults.items() if key not in _NO_OPTIONS}
    options |= {key: value for key, value in steps.items() if value is not None}
    lines = (folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    splits = {
        is_calibration: [e for e in entries if (e["split"] == "calibration") is is_calibration]
        for is_calibration in (False, True)
    }
    scoring = importlib.import_module(f"mmspec.assets.{name}.scoring")
    return Pair(
        name=name,
        target=pipe.target,
        drafter=None if is_alone else pipe.drafter,
        options=options,
        prompts=[entry["prompt"] for entry in (*splits[False], *splits[True])],
        num_judged=len(splits[False]),
        quality=scoring.score_clips,
        preview=pipe.preview,
    )


# --------------------------------------------------------------------------- setups


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A router, by name, with accept rates where it needs thresholds.

    Attributes:
        name: As ``first-block+temporal@0.5/stitch:2``: of the drafts that temporal sees it keeps
            half, and where the target writes the drafter takes two steps. What a scorer is shown
            stands behind it, as ``noise:on=preview&pictures=2@0.5``.
        parts: Of the router.
        stitch: As in a call.
    """

    name: str
    parts: tuple[str, ...]
    stitch: int | None

    @classmethod
    def parse(cls, name: str) -> Self:
        """Reads a name.

        Raises:
            ValueError: If it is none.
        """
        router, slash, stitch = name.partition("/stitch:")
        rule = "a number of steps, as never/stitch:2"
        require(not slash or stitch.isdecimal(), "the stitch of a setup", rule, name)
        setup = cls(
            name=name,
            parts=tuple(router.split("+")),
            stitch=int(stitch) if slash else None,
        )
        for part in setup.parts:
            scorer, at, rate = part.partition("@")
            require_known("router", scorer.partition(":")[0], ROUTERS)
            if at:
                rule = "a number in (0, 1), as temporal@0.5"
                require(_is_rate(rate), f"the accept rate of {scorer!r}", rule, rate)
        setup.router(dict.fromkeys(setup.threshold_keys, 0.0), lambda _: _Nothing())
        return setup

    @property
    def base(self) -> str:
        """Its routers that look at no block."""
        return "+".join(part for part in self.parts if "@" not in part)

    @property
    def scorers(self) -> tuple[str, ...]:
        """What it looks at blocks with: names, and what each is shown."""
        return tuple(part.partition("@")[0] for part in self.parts if "@" in part)

    @property
    def decodes_drafts(self) -> bool:
        """Whether it looks at decoded pictures."""
        return any(sight_of(one).on == "decoded" for one in self.scorers)

    @property
    def chance(self) -> str | None:
        """The baseline that leaves the same places to chance; None where there is none."""
        names = {"": "random", "first-block": "first-block+random"}
        return names.get(self.base) if self.scorers and self.stitch is None else None

    @property
    def threshold_keys(self) -> list[tuple[str, str, float]]:
        """What its thresholds are called."""
        pairs = [part.split("@") for part in self.parts if "@" in part]
        return [(self.base, scorer, float(rate)) for scorer, rate in pairs]

    def router(self, thresholds: Thresholds, scorer: Callable[[str], Scorer]) -> BlockRouter:
        """Builds the router.

        Args:
            thresholds: By `threshold_keys`.
            scorer: Gives the scorer of a name, and of what it is shown.
        """
        routers: list[BlockRouter] = []
        for part in self.parts:
            name, at, rate = part.partition("@")
            if at:
                bar = thresholds[self.base, name, float(rate)]
                routers.append(ScoringRouter(scorer(name), bar, sight=sight_of(name)))
            else:
                routers.append(build_router(part))
        return routers[0] if len(routers) == 1 else AllRouter(routers)


def scorer_name(scorer: str) -> str:
    """The name without what is shown."""
    return scorer.partition(":")[0]


def sight_of(scorer: str) -> Sight:
    """What a scorer of a setup is shown.

    Raises:
        ValueError: If it is something else.
    """
    text = scorer.partition(":")[2]
    settings = dict(one.split("=", 1) for one in text.split("&") if "=" in one)
    sight = Sight.from_settings(settings)
    typed = str(sight).removeprefix(",").replace(",", "&")
    rule = "on=preview, pictures=N, or both with & between"
    require(text == typed, f"what {scorer_name(scorer)!r} is shown", rule, text)
    return sight


def _is_rate(text: str) -> bool:
    try:
        return 0 < float(text) < 1
    except ValueError:
        return False


def default_setups(scorers: Sequence[str], rates: Sequence[float], pair: Pair) -> list[str]:
    """Names of what is compared: ends, baselines, and each scorer at each rate."""
    shares = ("0.25", "0.5", "0.75")
    names = ["never", "always", "first-block"]
    names += [f"random:{share}" for share in shares]
    names += [f"first-block+random:{share}" for share in shares]
    names += [f"every:{step}" for step in (2, 3, 4) if step < pair.num_blocks]
    for scorer in scorers:
        names += [f"first-block+{scorer}@{rate:g}" for rate in rates]
    names += [f"temporal@{rate:g}" for rate in rates] if "temporal" in scorers else []
    names += _glances(scorers, rates, pair.preview is not None)
    steps = pair.options["num_inference_steps"]
    shares_of_steps = {max(1, steps * quarters // 4) for quarters in (1, 2, 3)}
    return names + [f"never/stitch:{k}" for k in sorted(shares_of_steps)]


def _glances(scorers: Sequence[str], rates: Sequence[float], has_preview: bool) -> list[str]:
    """Scorers that are shown less: at all rates one of motion, at the middle rate the others."""
    names = []
    for scorer in scorers:
        sees_motion = scorer_class(scorer).sees_motion
        shown = [] if sees_motion else ["pictures=2"]
        if has_preview:
            shown += ["on=preview"] if sees_motion else ["on=preview", "on=preview&pictures=2"]
        chosen = rates if sees_motion else rates[len(rates) // 2 :][:1]
        names += [f"first-block+{scorer}:{one}@{rate:g}" for one in shown for rate in chosen]
    return names


def baseline_of(name: str, setups: Sequence[str]) -> list[str]:
    """Those of some setups that are on the curve of a baseline."""
    kinds = BASELINES[name]
    return [one for one in setups if one.partition(":")[0] in kinds and "/" not in one]


# --------------------------------------------------------------------------- scorers


def scorer_class(name: str) -> type[Scorer]:
    """The class of a scorer.

    Raises:
        ValueError: If no router of that name scores pictures.
    """
    module, _, attribute = ROUTERS[name].partition(":")
    found: Any = getattr(importlib.import_module(module, "mmspec.routers"), attribute)
    is_scorer = isinstance(found, type) and issubclass(found, Scorer)
    require(is_scorer, "what stands before @", "a router that scores pictures", name)
    kind: type[Scorer] = found
    return kind


def load_scorer(name: str) -> Scorer:
    """A scorer with its own defaults.

    Raises:
        ValueError: As `scorer_class`.
        Unavailable: If its weights are missing.
    """
    kind = scorer_class(name)
    try:
        return kind.from_settings({})
    except (ValueError, OSError) as error:
        raise Unavailable(str(error)) from error


@dataclass(slots=True)
class Meter:
    """What the scorers of one video were asked.

    Attributes:
        scored: Block -> pictures that were scored, by all scorers.
        offered: Block -> pictures that each scorer that was asked would have scored.
        scores: Block -> scores in order, of a scorer that gives all of them at once.
        time_s: Seconds of scoring, without decoding and previews.
        previews: Blocks of which previews were made, those before a judged one included.
        preview_time_s: Seconds of making them.
    """

    scored: dict[int, int] = field(default_factory=dict)
    offered: dict[int, int] = field(default_factory=dict)
    scores: dict[int, list[float]] = field(default_factory=dict)
    time_s: float = 0.0
    previews: int = 0
    preview_time_s: float = 0.0


class MeteredScorer(Scorer):
    """A scorer that is counted and clocked; with ``results`` it also remembers its scores."""

    def __init__(
        self,
        scorer: Scorer,
        meter: Meter,
        results: dict[Any, list[Tensor]] | None = None,
        *,
        on: str = "decoded",
    ) -> None:
        """Wraps a scorer.

        Args:
            scorer: The scorer.
            meter: Counts.
            results: Scores of blocks by their pictures, shared by videos; None scores anew.
            on: What pictures it is shown (`mmspec.routers.scoring.Sight`).
        """
        names = ("name", "needs_prompt", "sees_motion", "typed")
        vars(self).update({name: getattr(scorer, name) for name in names})
        self._scorer = scorer
        self._meter = meter
        self._results = results
        self._on = on

    def batches(self, block: BlockView) -> Iterator[Tensor]:
        """As the scorer's."""
        index, meter = block.place.index, self._meter
        meter.offered[index] = meter.offered.get(index, 0) + self._show(block)
        batches = iter(self._remembered(block) if self._results is not None else self._fresh(block))
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            meter.time_s += time.perf_counter() - started
            if batch is None:
                return
            meter.scored[index] = meter.scored.get(index, 0) + len(batch)
            meter.scores[index] = batch.tolist()
            yield batch

    def _show(self, block: BlockView) -> int:
        """Makes the pictures, which scoring then finds made; returns how many there are."""
        started = time.perf_counter()
        count = len(block.frames())
        before = block.previous_frames() if self.sees_motion else None
        if self._on == "preview":
            self._meter.preview_time_s += time.perf_counter() - started
            self._meter.previews += 1 if before is None else 2
        return count

    def _fresh(self, block: BlockView) -> Iterator[Tensor]:
        return self._scorer.batches(block)

    def _remembered(self, block: BlockView) -> list[Tensor]:
        assert self._results is not None
        before = block.previous_frames()
        pictures = [block.frames()] + ([] if before is None else [before])
        content = tuple(one.cpu().numpy().tobytes() for one in pictures)
        key = (self.name, self.typed, block.place.prompt if self.needs_prompt else None, content)
        if key not in self._results:
            self._results[key] = list(self._scorer.batches(block))
        return self._results[key]


class _Nothing(Scorer):
    """Stands for a scorer while a name is checked."""

    name = "nothing"


class TransformerClock:
    """Seconds of each forward of an AnyFlow-FAR transformer, whoever calls it.

    Attributes:
        steps: Of denoising steps.
        reads: Of forwards that read the committed blocks.
    """

    def __init__(self, transformer: Any) -> None:
        """Prepares to watch."""
        self._transformer = transformer
        self._handles: list[Any] = []
        self._started = 0.0
        self.steps: list[float] = []
        self.reads: list[float] = []

    def __enter__(self) -> Self:
        """Starts watching."""
        self._handles = [
            self._transformer.register_forward_pre_hook(self._start),
            self._transformer.register_forward_hook(self._stop, with_kwargs=True),
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops watching."""
        for handle in self._handles:
            handle.remove()

    def _start(self, module: torch.nn.Module, _: object) -> None:
        synchronize(next(module.parameters()).device)
        self._started = time.perf_counter()

    def _stop(
        self, module: torch.nn.Module, _: object, given: Mapping[str, Any], __: object
    ) -> None:
        synchronize(next(module.parameters()).device)
        elapsed = time.perf_counter() - self._started
        is_read = given["kv_cache_flag"]["is_cache_step"]
        (self.reads if is_read else self.steps).append(elapsed)
