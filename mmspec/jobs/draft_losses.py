"""What is lost where a draft is kept: its distance to what the target would have made in its place.

The target goes on from the same drafts with the same noise, so that one block is compared and not
all that follows from it. This costs a video about one more of the target's, and its drafts again
for each block.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from mmspec.block_records import BlockPlace
from mmspec.jobs import Report, generators
from mmspec.jobs.journal import Journal
from mmspec.routers.fixed import PlaceRouter


class _Chosen(PlaceRouter):
    """Keeps the drafts of given blocks; the target writes the others."""

    name = "chosen"

    def __init__(self, drafted: Collection[int]) -> None:
        self._drafted = drafted

    def wants_draft(self, place: BlockPlace) -> bool:
        return place.index in self._drafted


def draft_losses(
    pipe: Any, call: Mapping[str, Any], seed: int, drafted: Sequence[int]
) -> dict[int, float]:
    """The loss of each drafted block of a video, behind the drafts before it.

    Args:
        pipe: A video pipeline.
        call: Arguments of its call, without router, generator and output type.
        seed: Of the video.
        drafted: Indices of the blocks that are drafted.

    Returns:
        Index to loss: the root of the mean square over pixels, which are in 0 .. 1.
    """

    def pictures(kept: Collection[int]) -> Iterator[Tensor]:
        stream = pipe.stream(
            **call, router=_Chosen(kept), generator=generators([seed]), output_type="pt"
        )
        return (block.frames for block in stream)

    drafts = list(islice(pictures(drafted), max(drafted, default=-1) + 1))
    losses = {}
    for index in drafted:
        earlier = [one for one in drafted if one < index]
        wanted = next(islice(pictures(earlier), index, None))
        losses[index] = float((drafts[index] - wanted).square().mean().sqrt())
    return losses


def measured_losses(
    path: Path,
    settings: Mapping[str, Any],
    drafted: Mapping[str, Sequence[int]],
    measure: Callable[[str], Mapping[int, float]],
    report: Report,
) -> dict[tuple[str, int], float]:
    """Losses of the videos of a sample, written down video by video.

    Args:
        path: Where they are written, and where a call that was stopped goes on.
        settings: What the sample is made with.
        drafted: The drafted blocks of each video, by its name.
        measure: Gives the losses of a video; called for those that are missing.
        report: Told the progress, a line at a time.

    Raises:
        ValueError: If what is there was made with other settings.
        OSError: If it cannot be written.
    """
    found: dict[tuple[str, int], float] = {}
    with Journal(path, settings) as journal:
        for number, name in enumerate(drafted, 1):
            record = journal.get((name, None))
            if record is None:
                record = {"file": name, "losses": list(measure(name).items())}
                journal.add([record])
                report(f"{number}/{len(drafted)} {name}: {len(drafted[name])} losses")
            found |= {(name, index): loss for index, loss in record["losses"]}
    return found
