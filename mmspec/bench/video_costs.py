"""Seconds of a video from what was done for it and what each thing costs.

Wall time on a busy machine says little about a loop, and nothing about another model. What is done
for a video is certain: steps of both models, readings of the committed blocks, decoded blocks and
judged pictures. Times a price each, that is a time which can be compared to the last digit, on
the machine at hand or on one whose prices are known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from mmspec.bench.measure import Sample
from mmspec.bench.report import Section, percent, table
from mmspec.checks import is_number, require

#: Largest share of a video's time that judging should take.
JUDGING_GOAL = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What is done for a video; means over several may be fractions.

    Attributes:
        target_forwards: Denoising steps of the target.
        target_reads: How often it reads the committed blocks.
        drafter_forwards: Denoising steps of the drafter.
        drafter_reads: How often it reads the committed blocks.
        decodes: Blocks that the VAE decodes.
        pictures: Pictures that a router scores.
        previews: Blocks of which a router has cheap pictures made of the latents.
    """

    target_forwards: float
    target_reads: float
    drafter_forwards: float
    drafter_reads: float
    decodes: float
    pictures: float = 0.0
    previews: float = 0.0

    @classmethod
    def mean(cls, found: Sequence[Mapping[str, Any]]) -> Self:
        """The mean over videos, given as mappings with the fields among others."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: sum(one[name] for one in found) / len(found) for name in names})


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds of one of each, as in `Counts`.

    Attributes:
        rest: Seconds of a video that belong to none of them.
    """

    target_forward: float
    target_read: float
    drafter_forward: float
    drafter_read: float
    decode: float
    picture: float = 0.0
    preview: float = 0.0
    rest: float = 0.0

    def __post_init__(self) -> None:
        """Refuses what is no time."""
        for name, value in asdict(self).items():
            require(is_number(value) and value >= 0, name, "seconds >= 0", value)

    def phases(self, counts: Counts) -> dict[str, float]:
        """Seconds of a video by phase."""
        return {
            "target": counts.target_forwards * self.target_forward
            + counts.target_reads * self.target_read,
            "draft": counts.drafter_forwards * self.drafter_forward
            + counts.drafter_reads * self.drafter_read,
            "decode": counts.decodes * self.decode,
            "judge": counts.pictures * self.picture + counts.previews * self.preview,
            "rest": self.rest,
        }

    def seconds(self, counts: Counts) -> float:
        """Seconds of a video."""
        return sum(self.phases(counts).values())

    def judging_share(self, counts: Counts, num_vain: float = 0.0) -> float:
        """Share of the seconds that goes into scoring pictures, previews included.

        Args:
            counts: Of a video.
            num_vain: Blocks that were decoded for nothing but scoring, to be counted as well:
                drafts that were looked at and refused.
        """
        judging = self.phases(counts)["judge"] + num_vain * self.decode
        return judging / self.seconds(counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """How the blocks of a video came about, whatever the loop that made them.

    Attributes:
        num_blocks: Of the video; the target writes the first.
        num_kept: Blocks whose draft is kept.
        num_steps: Denoising steps of a block.
        pictures_per_block: Pictures of every block but the first.
    """

    num_blocks: int
    num_kept: float
    num_steps: int
    pictures_per_block: int

    @property
    def num_judged(self) -> int:
        """Blocks that are drafted and scored: all but the first."""
        return self.num_blocks - 1

    @property
    def num_refused(self) -> float:
        """Drafts that are not kept."""
        return self.num_judged - self.num_kept

    def as_published(self) -> Counts:
        """SDVG's loop: both models read before every block, every picture of a draft is scored."""
        return Counts(
            target_forwards=self.num_steps * (1 + self.num_refused),
            target_reads=self.num_blocks - 1,
            drafter_forwards=self.num_steps * self.num_blocks,
            drafter_reads=self.num_blocks - 1,
            decodes=self.num_blocks + self.num_refused,
            pictures=self.num_judged * self.pictures_per_block,
        )

    def as_ours(
        self, refused_share: float = 1.0, *, on: str = "decoded", pictures: int | None = None
    ) -> Counts:
        """Our loop: the target reads where it writes, and nothing is drafted for the first block.

        Args:
            refused_share: Share of its pictures that is scored of a block that is not kept: the
                scoring may stop at the first bad one.
            on: "decoded" or "preview".
            pictures: Of a block that are shown; None is all.
        """
        scored = self.num_kept + refused_share * self.num_refused
        shown = self.pictures_per_block if pictures is None else pictures
        is_decoded = on == "decoded"
        return Counts(
            target_forwards=self.num_steps * (1 + self.num_refused),
            target_reads=self.num_refused,
            drafter_forwards=self.num_steps * self.num_judged,
            drafter_reads=self.num_judged,
            decodes=self.num_blocks + self.num_refused * is_decoded,
            pictures=scored * shown,
            previews=self.num_judged * (not is_decoded),
        )


#: Krea Realtime 14B, Wan 2.1 1.3B and ImageReward on two A6000 at 832 x 480, fitted to the tables
#: of SDVG (arXiv:2604.17397): nine blocks of twelve pictures, five steps each where the paper says
#: four.
PUBLISHED = Costs(
    target_forward=1.66,
    target_read=0.8 * 1.66,
    drafter_forward=0.06,
    drafter_read=0.8 * 0.06,
    decode=1.3,
    picture=0.14,
)
PUBLISHED_BLOCKS, PUBLISHED_STEPS, PUBLISHED_PICTURES = 9, 5, 12
#: ImageReward over all pictures of a block at once, against one at a time.
BATCHED = 0.25
#: Threshold of SDVG -> share of the nine blocks that is kept, and seconds of a video.
PUBLISHED_ROWS = {
    "-0.7": (0.731, 60.9),
    "-1.0": (0.780, 57.2),
    "-1.5": (0.834, 51.6),
    "-2.0": (0.875, 47.4),
}
#: Seconds of the published target and drafter alone; the drafter's loop let the target read.
PUBLISHED_ALONE = {"target": 97.0, "drafter": 25.7}


def published_decisions(share_kept: float) -> Decisions:
    """The decisions of a published row.

    Args:
        share_kept: Of all nine blocks.
    """
    return Decisions(
        num_blocks=PUBLISHED_BLOCKS,
        num_kept=share_kept * PUBLISHED_BLOCKS,
        num_steps=PUBLISHED_STEPS,
        pictures_per_block=PUBLISHED_PICTURES,
    )


def published_alone(name: str) -> Counts:
    """What the published "target" or "drafter" does alone."""
    steps, reads = PUBLISHED_STEPS * PUBLISHED_BLOCKS, PUBLISHED_BLOCKS - 1
    is_target = name == "target"
    return Counts(
        target_forwards=steps * is_target,
        target_reads=reads,
        drafter_forwards=steps * (not is_target),
        drafter_reads=reads * (not is_target),
        decodes=PUBLISHED_BLOCKS,
    )


def affordable(costs: Costs, counts: Counts, goal: float = JUDGING_GOAL) -> float | None:
    """Seconds that a picture may cost for scoring to take that share; None if none is scored."""
    if counts.pictures == 0:
        return None
    others = costs.seconds(counts) - costs.phases(counts)["judge"]
    left = goal / (1 - goal) * others - counts.previews * costs.preview
    return max(left, 0.0) / counts.pictures


def published_rows(refused_share: float) -> list[Sample]:
    """The published videos: as stated, as the model has them, and as our loop would make them.

    Args:
        refused_share: As in `Decisions.as_ours`.
    """
    plain = PUBLISHED.seconds(published_alone("target"))
    rows = []
    for threshold, (share, stated) in PUBLISHED_ROWS.items():
        decisions = published_decisions(share)
        deferred = decisions.as_ours()
        ours = decisions.as_ours(refused_share)
        batched = Costs(**asdict(PUBLISHED) | {"picture": BATCHED * PUBLISHED.picture})
        as_published = decisions.as_published()
        rows.append(
            {
                "type": "published",
                "threshold": threshold,
                "share_kept": share,
                "stated_s": stated,
                "model_s": PUBLISHED.seconds(as_published),
                "deferred_s": PUBLISHED.seconds(deferred),
                "ours_s": batched.seconds(ours),
                "speedup_stated": PUBLISHED_ALONE["target"] / stated,
                "speedup_ours": plain / batched.seconds(ours),
                "judging_model": PUBLISHED.judging_share(as_published),
                "judging_ours": batched.judging_share(ours),
                "judging_ours_decoding": batched.judging_share(ours, decisions.num_refused),
                "affordable_ms": 1e3 * (affordable(batched, ours) or 0.0),
            }
        )
    return rows


def published_costs(preview_ratio: float, picture: float = 1.0) -> Costs:
    """The published prices with one of a preview.

    Args:
        preview_ratio: Seconds of a block's previews over those of decoding it.
        picture: Share of the published price of a picture.
    """
    return replace(
        PUBLISHED,
        picture=picture * PUBLISHED.picture,
        preview=preview_ratio * PUBLISHED.decode,
    )


#: What a scorer is shown of a published block, in the order of the table.
PUBLISHED_SIGHTS = (
    *(("decoded", number) for number in (PUBLISHED_PICTURES, 4, 2, 1)),
    *(("preview", number) for number in (PUBLISHED_PICTURES, 4, 2, 1)),
)


def published_sight_rows(preview_ratio: float) -> list[Sample]:
    """What judging takes in our loop where a scorer is shown less, with the published decisions.

    Every picture that is shown is scored: no early exit.

    Args:
        preview_ratio: As in `published_costs`.
    """
    rows = []
    for price in (1.0, BATCHED):
        costs = published_costs(preview_ratio, price)
        for on, number in PUBLISHED_SIGHTS:
            shares, seconds = {}, {}
            for threshold, (share_kept, _) in PUBLISHED_ROWS.items():
                decisions = published_decisions(share_kept)
                counts = decisions.as_ours(on=on, pictures=number)
                num_vain = decisions.num_refused if on == "decoded" else 0.0
                shares[threshold] = costs.judging_share(counts, num_vain)
                seconds[threshold] = costs.seconds(counts)
            row = {"type": "published_sight", "on": on, "pictures": number, "price": price}
            rows.append(row | {"judging": shares, "seconds": seconds})
    return rows


def published_sight_section(rows: Sequence[Sample], preview_ratio: float) -> Section:
    """The table of `published_sight_rows`."""
    headers = ["shown", "pictures of 12", "a picture costs"]
    headers += [f"judging at {threshold}" for threshold in PUBLISHED_ROWS]
    headers += [f"s at {next(iter(PUBLISHED_ROWS))}", f"at most {percent(JUDGING_GOAL)}"]
    lines = [
        [
            *(row["on"], row["pictures"], f"{row['price'] * PUBLISHED.picture:g} s"),
            *(percent(share) for share in row["judging"].values()),
            next(iter(row["seconds"].values())),
            is_within(max(row["judging"].values())),
        ]
        for row in rows
    ]
    words = (
        "Scoring, and decoding refused drafts or making previews, as a share of all seconds. That "
        "the decisions stay as published where less is shown is an assumption; how often ours do "
        "is in the table of agreement. A preview of a block costs "
        f"{percent(preview_ratio)} of decoding it, as measured on the models of this run. "
        f"{PUBLISHED.picture:g} s is a picture alone, the rest the assumption for batches. All "
        "pictures that are shown are scored (no early exit)."
    )
    title = "Published costs: SDVG's decisions where a scorer is shown less"
    return title, f"{words}\n\n{table(headers, lines)}"


def is_within(share: float | None) -> str:
    """Whether judging takes no more than it should, in a word."""
    return "–" if not share else "yes" if share <= JUDGING_GOAL else "no"


#: Of `published_rows`.
_SHARES = ("judging_model", "judging_ours", "judging_ours_decoding")


def published_section(rows: Sequence[Sample], refused_share: float) -> Section:
    """The table of `published_rows`."""
    headers = ["threshold", "kept", "stated s", "model s", "deferred s", "ours s"]
    headers += ["× stated", "× ours", "judging, model", "judging, ours"]
    headers += ["with decoding refused drafts", "ms/picture for 5 % without decoding"]
    lines = [
        [
            *(row["threshold"], percent(row["share_kept"])),
            *(row[name] for name in ("stated_s", "model_s", "deferred_s", "ours_s")),
            *(row[name] for name in ("speedup_stated", "speedup_ours")),
            *(percent(row[name]) for name in _SHARES),
            row["affordable_ms"],
        ]
        for row in rows
    ]
    words = (
        "SDVG's own decisions at published prices. *model*: its loop; *deferred*: the target reads "
        "where it writes, no draft of the first block; *ours*: also pictures scored in batches, at "
        f"{BATCHED:g} of the price (an assumption), and {percent(refused_share)} of those of a "
        "refused block (early exit, counted in this run)."
    )
    return "Published costs: SDVG's decisions in our loop", f"{words}\n\n{table(headers, lines)}"
