"""From recorded scores to the threshold for a wanted accept rate or quality, kept as JSON."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from mmspec.block_records import BlockRecord
from mmspec.checks import is_list, is_number, require
from mmspec.routers.thresholds import score_at_rate

#: Of the file; a reader refuses others.
FORMAT = "mmspec router calibration 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A threshold and the sample that it comes from.

    Attributes:
        score_name: What was measured (`ScoringRouter.score_name`).
        threshold: The lowest score that keeps a block.
        scores: Of drafted blocks; None where one could not be judged (NaN is no JSON).
        provenance: Where they come from, as the user says: models, steps, prompts, date.
        mean_loss: Mean quality that the threshold gives up per block of the sample; None where it
            was chosen by accept rate.
    """

    score_name: str
    threshold: float
    scores: tuple[float | None, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    mean_loss: float | None = None

    @property
    def accept_rate(self) -> float:
        """Share of the sample that the threshold keeps."""
        return sum(one >= self.threshold for one in self._judged) / len(self.scores)

    @property
    def mean(self) -> float:
        """Of the scores: the prior of a `RunningQuantile`."""
        return statistics.fmean(self._judged)

    @property
    def std(self) -> float:
        """Standard deviation of the scores."""
        return statistics.pstdev(self._judged)

    @property
    def _judged(self) -> list[float]:
        return [one for one in self.scores if one is not None]

    def save(self, path: str | Path) -> None:
        """Writes JSON, the accept rate of the sample included."""
        content = {"format": FORMAT, "accept_rate": self.accept_rate} | asdict(self)
        Path(path).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            ValueError: If the file is missing or is something else.
        """
        try:
            content = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read the calibration {str(path)!r}: {error}") from error
        found = content.get("format") if isinstance(content, dict) else None
        require(found == FORMAT, "the calibration's format", repr(FORMAT), found)
        _check_content(content)
        loss = content["mean_loss"]
        return cls(
            score_name=content["score_name"],
            threshold=content["threshold"],
            scores=tuple(content["scores"]),
            provenance=content["provenance"],
            mean_loss=loss,
        )


def recorded_scores(blocks: Iterable[Sequence[BlockRecord]]) -> list[float]:
    """The scores of the drafted blocks of videos, as `VideoOutput.blocks` holds them.

    Record them with a threshold of "-inf", which keeps every draft and scores all of its pictures.
    """
    return [one.score for video in blocks for one in video if one.score is not None]


def calibrate(
    score_name: str,
    scores: Sequence[float],
    *,
    accept_rate: float | None = None,
    losses: Sequence[float] | None = None,
    budget: float | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Calibration:
    """Finds the threshold for a wanted accept rate, or for a quality budget.

    Args:
        score_name: What the scores are (`ScoringRouter.score_name`).
        scores: Of drafted blocks, two or more; a NaN is a block that no threshold keeps.
        accept_rate: The share to keep, in (0, 1]: the highest threshold that keeps at least this.
        losses: Instead, for each block the quality lost if its draft is kept (that of the target's
            block less that of the draft, by any measure; negative where the draft is better) ...
        budget: ... and the mean loss per block that is allowed: the lowest threshold within it.
        provenance: Anything that JSON holds.

    Raises:
        ValueError: If not exactly one of the two ways is given, or no threshold does what is
            wanted.
    """
    numbers = [float(one) for one in scores]
    require(len(numbers) > 1, "scores", "two or more", scores)
    is_good = not any(map(math.isinf, numbers))
    require(is_good, "scores", "finite, or NaN where a block could not be judged", scores)
    given = (accept_rate is not None, losses is not None, budget is not None)
    rule = "accept_rate, or losses and budget"
    require(given in ((1, 0, 0), (0, 1, 1)), "the aim", rule, given)
    mean_loss = None
    if accept_rate is not None:
        threshold = score_at_rate(numbers, accept_rate)
    elif losses is not None and budget is not None:
        threshold, mean_loss = _within(numbers, losses, budget)
    return Calibration(
        score_name=score_name,
        threshold=threshold,
        scores=tuple(None if math.isnan(one) else one for one in numbers),
        provenance=dict(provenance or {}),
        mean_loss=mean_loss,
    )


def _within(scores: list[float], losses: Sequence[float], budget: float) -> tuple[float, float]:
    """The lowest threshold whose mean loss over all blocks stays within the budget, and that loss.

    Raises:
        ValueError: If none does.
    """
    is_good = len(losses) == len(scores) and all(map(is_number, losses))
    require(is_good, "losses", f"finite numbers, one per score, {len(scores)}", losses)
    require(is_number(budget), "budget", "a finite number", budget)
    pairs = list(zip(scores, losses, strict=True))
    least = math.inf
    # A threshold of the sample keeps its ties too, so each is tried with all of them.
    for threshold in sorted({one for one in scores if not math.isnan(one)}):
        kept = [loss for score, loss in pairs if score >= threshold]
        mean_loss = math.fsum(kept) / len(scores)
        if mean_loss <= budget:
            return threshold, mean_loss
        least = min(least, mean_loss)
    reason = f"the least mean loss is {least:.6g}"
    raise ValueError(f"no threshold keeps a block within the budget {budget}: {reason}")


def _check_content(content: Mapping[str, Any]) -> None:
    """Refuses a file whose fields are of another kind.

    Raises:
        ValueError: With the field.
    """
    scores: Any = content.get("scores")
    checks = {
        "score_name": ("a string", lambda one: isinstance(one, str)),
        "threshold": ("a finite number", is_number),
        "scores": (
            "numbers or null, with a number among them",
            lambda _: (
                is_list(scores, lambda one: one is None or is_number(one))
                and any(one is not None for one in scores)
            ),
        ),
        "provenance": ("an object", lambda one: isinstance(one, dict)),
        "mean_loss": ("a number or null", lambda one: one is None or is_number(one)),
    }
    for name, (rule, is_good) in checks.items():
        value = content.get(name)
        require(is_good(value), f"{name!r} of the calibration", rule, value)
