"""Frozen records that travel when the unit is a block of video.

Nothing here computes. Shape suffixes:
    C  channels
    F  frames: latent frames of latents, pictures of decoded frames
    H  height, W width
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mmspec.protocols import Router


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A router's word on a drafted block.

    Attributes:
        score: Higher is better; NaN where the block could not be judged, which never keeps it.
        keep: Whether the router would keep it.
    """

    score: float
    keep: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPlace:
    """What is known of a block before anything of it exists.

    Attributes:
        index: Of the block in its video, from 0.
        num_blocks: Blocks of the whole video.
        seed: Made from the noise of the video: a key for `mmspec.noise`, int64. It is the same
            whether the video is made alone or as a row of a batch.
        prompt: The prompt, or None where only its embeddings were given.
        history: What the router said of each earlier block, the oldest first; None for a block
            that was not drafted. A router keeps no state of its own, so that a row of a batch is
            judged as it is alone.
    """

    index: int
    num_blocks: int
    seed: int
    prompt: str | None
    history: tuple[Judgement | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockView:
    """A drafted block, as a router sees it.

    Attributes:
        place: Where it stands.
        latents_FCHW: The drafted latents, normalised as the transformer makes them.
        frames: Gives the pictures, float32 ``[F, 3, H, W]`` in [0, 1]. They are decoded when first
            asked for, and serve as the output if the block is kept.
        previous_frames: Gives the last pictures of the block before, at most 4, in the same
            layout; None for the first block.
        preview: The same block with cheap pictures made of latents (`mmspec.latent_preview`), those
            of the block before as well; None where the pipeline has no such map.
    """

    place: BlockPlace
    latents_FCHW: Tensor
    frames: Callable[[], Tensor]
    previous_frames: Callable[[], Tensor | None]
    preview: "BlockView | None" = None


BlockRouter = Router[BlockPlace, BlockView, Judgement]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockProposal:
    """What the drafter made of the next block of each row.

    Attributes:
        drafts: Drafted latents ``[1, C, F, H, W]`` per row; None where none was wanted.
        begun: The state that the target takes over if it writes the block itself; None where it
            starts from the noise.
        draft_time_s: Seconds of the drafter per row.
    """

    drafts: tuple[Tensor | None, ...]
    begun: tuple[Tensor | None, ...]
    draft_time_s: tuple[float, ...]

    @property
    def num_drafted(self) -> tuple[int, ...]:
        """Drafted blocks per row: one or none."""
        return tuple(int(draft is not None) for draft in self.drafts)

    @property
    def num_levels(self) -> tuple[int, ...]:
        """Deepest draft per row: a block is one level."""
        return self.num_drafted

    @property
    def width(self) -> int:
        """The block itself and its draft."""
        return 1 + max(self.num_drafted)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScores:
    """What the router says of the drafts.

    Attributes:
        judgements: Per row; None where nothing was drafted.
        judge_time_s: Seconds of the router per row, decoding for it included.
    """

    judgements: tuple[Judgement | None, ...]
    judge_time_s: tuple[float, ...]

    @property
    def forward_time_s(self) -> float:
        """Seconds of the router in this step."""
        return sum(self.judge_time_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockVerdict:
    """Which drafts stay.

    Attributes:
        keep: Per row.
        scores: What it was decided by.
    """

    keep: tuple[bool, ...]
    scores: BlockScores


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRecord:
    """How a committed block came about.

    Attributes:
        index: Of the block, from 0.
        source: "target", "drafter", or "stitched" where both took steps of it.
        score: The router's score of the draft; None where nothing was drafted.
        draft_time_s: Seconds of the drafter before the decision.
        judge_time_s: Seconds of the router.
        target_time_s: Seconds of the target, and of a drafter that finishes its block.
    """

    index: int
    source: str
    score: float | None
    draft_time_s: float
    judge_time_s: float
    target_time_s: float
