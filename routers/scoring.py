"""Routers that score the pictures of a block: scorer, aggregation, threshold, early exit.

Shape suffixes as in `mmspec.block_records`; N is the scores of a block, mostly one per picture.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from mmspec.block_records import BlockPlace, BlockView, Judgement
from mmspec.checks import is_integer, is_number, require, require_known
from mmspec.records import Guarantee
from mmspec.routers.calibration import Calibration
from mmspec.routers.thresholds import FixedThreshold, RunningQuantile, Threshold

#: Settings that say from which score on a block is kept.
THRESHOLDS = ("threshold", "calibration", "accept", "mean", "std", "weight")
#: What every scorer's argument may hold besides its own settings.
_COMMON = (*THRESHOLDS, "aggregate", "on")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What a scorer is shown of a block: all of its decoded pictures, or less.

    Attributes:
        on: "decoded" or "preview": cheap pictures made of the latents, so that a draft that is
            refused is never decoded.
        pictures: Pictures of a block that are shown at most, spread evenly over it, the first and
            the last among them if there are several; None shows all.
    """

    on: str = "decoded"
    pictures: int | None = None

    def __post_init__(self) -> None:
        """Refuses what is none."""
        require(self.on in ("decoded", "preview"), "on", "'decoded' or 'preview'", self.on)
        is_good = self.pictures is None or (is_integer(self.pictures) and self.pictures >= 1)
        require(is_good, "pictures", "an integer >= 1", self.pictures)

    @classmethod
    def from_settings(cls, settings: Mapping[str, str]) -> Self:
        """Reads "on" and "pictures", where they are.

        Raises:
            ValueError: If one is bad.
        """
        pictures: Any = settings.get("pictures")
        if pictures is not None and pictures.isdecimal():
            pictures = int(pictures)
        return cls(on=settings.get("on", "decoded"), pictures=pictures)

    def __str__(self) -> str:
        """As a user types it behind other settings."""
        on = "" if self.on == "decoded" else f",on={self.on}"
        return on if self.pictures is None else f"{on},pictures={self.pictures}"

    def of(self, block: BlockView) -> BlockView:
        """The block as it is shown."""
        shown = block.preview if self.on == "preview" else block
        if shown is None:
            raise ValueError("the view of a block must be with previews, got None")
        if self.pictures is None:
            return shown
        frames, most = shown.frames, self.pictures
        return replace(shown, frames=lambda: spread_pictures(frames(), most))


#: What a scorer is shown unless it is said.
_EVERYTHING = Sight()


class Scorer:
    """Gives the pictures of a block scores; higher is better.

    Attributes:
        name: As a user types it.
        needs_prompt: Whether it reads the text of the prompt.
        sees_motion: Whether it needs all pictures of a block; else it judges each alone, and may
            be shown a few.
        settings: Names of what a user may set besides threshold, aggregation and sight.
        typed: Those that were set and change what the score means, as ",name=value".
    """

    name: ClassVar[str]
    needs_prompt: ClassVar[bool] = False
    sees_motion: ClassVar[bool] = False
    settings: ClassVar[tuple[str, ...]] = ()
    typed: str = ""

    @classmethod
    def from_settings(cls, settings: Mapping[str, str]) -> Self:
        """Builds the scorer; loads its weights.

        Raises:
            ValueError: If a value is bad or weights are missing.
        """
        return cls(**settings)

    def batches(self, block: BlockView) -> Iterator[Tensor]:
        """Scores a block, a few pictures at a time: what is not asked for is not computed.

        Yields:
            Scores ``[n]``, in any order of the pictures; NaN where one cannot be judged.
        """
        raise NotImplementedError

    @classmethod
    def from_argument(
        cls, argument: str | None, loaded: "LoadedScorers | None" = None
    ) -> "ScoringRouter":
        """Builds the router that judges by this score.

        Args:
            argument: Settings ``name=value`` with commas between; a value alone is the threshold.
            loaded: Where a scorer with weights is taken from, if it is there, and left.

        Raises:
            ValueError: If a setting is unknown, bad or missing, or weights are.
        """
        given = _parsed(cls, argument)
        own = {name: value for name, value in given.items() if name in cls.settings}
        aggregate = _aggregate(given.get("aggregate", "worst"))
        sight = Sight.from_settings(given)
        threshold = _threshold(_score_name(cls.name, given), given)
        # Weights are loaded when everything else is known to be good.
        scorer = cls.from_settings(own) if loaded is None else loaded.get(cls, own)
        return ScoringRouter(
            scorer,
            threshold,
            aggregate=aggregate,
            sight=sight,
            name=f"{cls.name}:{argument}",
            score_name=_score_name(cls.name, given),
        )


class LoadedScorers:
    """The scorers with weights that were asked for last, so that the next router has them at once.

    Thresholds and calibrations are no part of a scorer: they are read anew for every router.
    """

    def __init__(self, size: int = 4) -> None:
        """Holds none yet, and at most ``size``."""
        self._size = size
        self._kept: OrderedDict[tuple[Any, ...], Scorer] = OrderedDict()

    def get(self, kind: type[Scorer], settings: Mapping[str, str]) -> Scorer:
        """The scorer of these settings; loads it if it is not among those that are kept.

        Raises:
            ValueError: As `Scorer.from_settings`.
        """
        if "weights" not in kind.settings:
            return kind.from_settings(settings)
        key = (kind, *sorted(settings.items()))
        if key not in self._kept:
            self._kept[key] = kind.from_settings(settings)
        self._kept.move_to_end(key)
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)
        return self._kept[key]


class ScoringRouter:
    """Keeps a block whose score reaches a threshold.

    With the worst picture as the score and a threshold that does not depend on earlier scores, it
    stops at the first pictures below the threshold: the worst of all cannot be better. The
    decision is that of scoring every picture; the score that is reported is then the worst seen.
    Nothing is ever kept early, for a later picture may be worse.

    Attributes:
        guarantee: `lossy`.
        name: As a user types it.
        needs_prompt: That of the scorer.
        needs_preview: Whether it looks at previews.
        reads_history: That of the threshold.
        score_name: What the score is, whatever the threshold; samples of it can be compared.
    """

    guarantee = Guarantee.LOSSY

    def __init__(
        self,
        scorer: Scorer,
        threshold: float | Threshold,
        *,
        aggregate: str | float = "worst",
        sight: Sight = _EVERYTHING,
        name: str | None = None,
        score_name: str | None = None,
    ) -> None:
        """Combines the three.

        Args:
            scorer: Scores the pictures.
            threshold: From which score on a block is kept.
            aggregate: Of the pictures: "worst", "mean", or a number q in [0, 1] for the q-quantile.
            sight: What the scorer is shown.
            name: As a user types it; without it, made from the rest.
            score_name: As a calibration names it; without it, made from scorer and aggregation.

        Raises:
            ValueError: If threshold or aggregation is bad, or a scorer of motion is shown a few
                pictures.
        """
        if isinstance(threshold, float | int):
            threshold = FixedThreshold(threshold)
        require(hasattr(threshold, "at"), "threshold", "a number or a Threshold", threshold)
        _check_aggregate(aggregate)
        is_good = sight.pictures is None or not scorer.sees_motion
        rule = f"left out for {scorer.name!r}, which sees motion"
        require(is_good, "pictures", rule, sight.pictures)
        self._scorer = scorer
        self._threshold = threshold
        self._aggregate = aggregate
        self._sight = sight
        more = "" if aggregate == "worst" else f",aggregate={aggregate}"
        more += f"{sight}{scorer.typed}"
        self.name = f"{scorer.name}:{threshold}{more}" if name is None else name
        self.score_name = scorer.name + more if score_name is None else score_name
        self.needs_prompt = scorer.needs_prompt
        self.needs_preview = sight.on == "preview"
        self.reads_history = threshold.reads_history

    def wants_draft(self, place: BlockPlace) -> bool:
        """True: every block may be good."""
        return True

    @torch.no_grad()
    def judge(self, block: BlockView) -> Judgement:
        """Scores the block; a block without scores gets NaN."""
        bar = self._threshold.at(block.place.history)
        may_stop = self._aggregate == "worst" and not self.reads_history
        scores = [torch.zeros(0, dtype=torch.float64)]
        for batch in self._scorer.batches(self._sight.of(block)):
            scores.append(batch.double().cpu())
            # A NaN is not at the threshold either.
            if may_stop and not bool((scores[-1] >= bar).all()):
                break
        score = _aggregated(torch.cat(scores), self._aggregate)
        return Judgement(score=score, keep=score >= bar)


def spread_pictures(frames_F3HW: Tensor, most: int) -> Tensor:
    """Picks pictures at equal distances: the middle one, or the first, the last and between.

    Args:
        frames_F3HW: The pictures.
        most: How many are picked, if there are as many.
    """
    count = len(frames_F3HW)
    if count <= most:
        return frames_F3HW
    last = count - 1
    places = [last // 2] if most == 1 else [round(k * last / (most - 1)) for k in range(most)]
    return frames_F3HW[places]


def spread_batches(frames_F3HW: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Cuts pictures into batches that are each spread over the whole block.

    The first batch is then a sample of the whole block.

    Args:
        frames_F3HW: The pictures.
        batch_size: Of a batch at most.
    """
    num_batches = -(-len(frames_F3HW) // batch_size)
    for first in range(num_batches):
        yield frames_F3HW[first::num_batches]


def checked_batch_size(value: str | int) -> int:
    """Reads the size of a batch of pictures.

    Raises:
        ValueError: If it is no integer of at least 1.
    """
    size = int(value) if isinstance(value, str) and value.isdecimal() else value
    require(is_integer(size) and size >= 1, "batch_size", "an integer >= 1", value)
    return int(size)


def _aggregated(scores_N: Tensor, aggregate: str | float) -> float:
    if len(scores_N) == 0:
        return float("nan")
    if aggregate == "worst":
        return scores_N.min().item()
    if aggregate == "mean":
        return scores_N.mean().item()
    return scores_N.quantile(float(aggregate)).item()


def _check_aggregate(value: str | float) -> None:
    is_good = value in ("worst", "mean") or (is_number(value) and 0 <= value <= 1)
    require(is_good, "aggregate", "'worst', 'mean' or a quantile in [0, 1]", value)


def _aggregate(text: str) -> str | float:
    value: str | float = text
    with suppress(ValueError):
        value = float(text)
    _check_aggregate(value)
    return value


def _parsed(scorer: type[Scorer], argument: str | None) -> dict[str, str]:
    """Reads ``name=value`` pairs.

    Raises:
        ValueError: If a name is unknown or comes twice.
    """
    given: dict[str, str] = {}
    for item in argument.split(",") if argument else ():
        name, equals, value = item.partition("=")
        if not equals:
            name, value = "threshold", item
        known = (*_COMMON, *(() if scorer.sees_motion else ("pictures",)), *scorer.settings)
        require_known(f"setting of router {scorer.name!r}", name, known)
        rule = "given once"
        require(name not in given, f"{name!r} of router {scorer.name!r}", rule, argument)
        given[name] = value
    return given


def _score_name(name: str, given: Mapping[str, str]) -> str:
    # Where the weights lie and how many pictures go at once does not change what a score means.
    silent = (*THRESHOLDS, "weights", "batch_size")
    default = {"on": "decoded"}
    more = [
        f"{key}={value}"
        for key, value in sorted(given.items())
        if key not in silent and default.get(key) != value
    ]
    return ",".join([name, *more])


def _threshold(score_name: str, given: Mapping[str, str]) -> Threshold:
    """Reads the threshold out of the settings.

    Raises:
        ValueError: If there is none, more than one, or one out of its range.
    """
    ways = [name for name in ("threshold", "calibration", "accept") if name in given]
    prior = [name for name in ("mean", "std", "weight") if name in given]
    is_good = ways in (["threshold"], ["calibration"], ["accept"], ["calibration", "accept"])
    rule = (
        "a threshold as 'temporal:-0.05', 'calibration=FILE', or 'accept=RATE' with "
        "'mean=' and 'std=' of the prior or 'calibration=FILE'"
    )
    require(is_good, f"the argument of router {score_name!r}", rule, dict(given))
    calibration = None
    if "calibration" in given:
        calibration = Calibration.load(given["calibration"])
        got = calibration.score_name
        require(got == score_name, "the calibration's score", repr(score_name), got)
    if "accept" not in given:
        require(not prior, "mean, std and weight", "left out without accept", prior)
        if calibration is not None:
            return FixedThreshold(calibration.threshold)
        return FixedThreshold(_number("threshold", given["threshold"]))
    numbers = {name: _number(name, given[name]) for name in prior}
    if calibration is not None:
        numbers = {"mean": calibration.mean, "std": calibration.std} | numbers
    require({"mean", "std"} <= set(numbers), "the prior of accept", rule, dict(given))
    weight = numbers.pop("weight", 5)
    return RunningQuantile(
        _number("accept", given["accept"]), **numbers, weight=int(weight) if weight % 1 == 0 else 0
    )


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{name} must be a number, got {text!r}") from error
