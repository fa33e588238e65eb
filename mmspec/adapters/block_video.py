"""Videos that are written block by block: what drafter, router and target of the engine do there.

A block is a few latent frames, denoised in a few steps. The drafter denoises the next block, the
router judges it, and the target denoises it again where it is not kept. Noise is drawn once per
video and shared by both; the committed latents are the only state that they share. A model reads
them when it is asked for a block, not before, so a target whose block is not needed costs nothing.

Rows of a batch are run one after the other: a row equals its single run to the bit, whatever the
kernels do with a batch, and one cache serves all of them. A block of a real model fills a device.

Shape suffixes as in `mmspec.block_records`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b
from typing import Protocol

from torch import Tensor

from mmspec.adapters.block_frames import NUM_PREVIOUS, BlockFrames, Codec, pictures
from mmspec.block_records import (
    BlockPlace,
    BlockProposal,
    BlockRecord,
    BlockRouter,
    BlockScores,
    BlockVerdict,
    BlockView,
    Judgement,
)
from mmspec.latent_preview import LinearPreview
from mmspec.records import Guarantee, Outcome, Plan, StepRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One video's prompt.

    Attributes:
        text: What the user wrote; None where only embeddings were given.
        embeds: ``[1, tokens, channels]``.
        negative_embeds: The same of the negative prompt; None without guidance.
    """

    text: str | None
    embeds: Tensor
    negative_embeds: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """What a block is made from. A model knows by identity whether its cache belongs to it.

    Attributes:
        prompt: The prompt.
        blocks: The committed latents, ``[1, C, F, H, W]`` each.
    """

    prompt: Prompt
    blocks: tuple[Tensor, ...] = ()


class BlockModel(Protocol):
    """A transformer that denoises blocks.

    Attributes:
        num_prefills: How often it has read the committed latents into its cache.
    """

    num_prefills: int

    def denoise(
        self, context: Context, sample: Tensor, *, num_steps: int, first: int, last: int
    ) -> Tensor:
        """Takes steps ``first`` to ``last`` of ``num_steps`` from a state ``[1, C, F, H, W]``.

        It reads the context into its cache if the cache is of another one.
        """


class Sampler:
    """A model and in how many steps it denoises a block.

    Attributes:
        model: The model; two samplers may share one.
        num_steps: Steps of a block.
        num_forwards: Steps taken.
        num_prefills: How often the model had to read the committed latents for them.
    """

    def __init__(self, model: BlockModel, num_steps: int) -> None:
        """Keeps the two."""
        self.model = model
        self.num_steps = num_steps
        self.num_forwards = 0
        self.num_prefills = 0

    def run(
        self, context: Context, sample: Tensor, first: int = 0, last: int | None = None
    ) -> Tensor:
        """Takes the steps from ``first`` to ``last``, which is the end if it is left out."""
        last = self.num_steps if last is None else last
        if first == last:
            return sample
        num_before = self.model.num_prefills
        state = self.model.denoise(
            context, sample, num_steps=self.num_steps, first=first, last=last
        )
        self.num_forwards += last - first
        self.num_prefills += self.model.num_prefills - num_before
        # Two models may be on two devices; what is shared stays where the noise is.
        return state.to(sample.device)


@dataclass(frozen=True, slots=True)
class Stitch:
    """Both models share the steps of a block that the target writes, the first block excepted.

    Attributes:
        num_steps: Steps of the model that begins.
        begins: "drafter" or "target".
    """

    num_steps: int
    begins: str = "drafter"


class VideoRow:
    """One video of a batch.

    Attributes:
        context: The prompt and the committed latents.
        frames: Its pictures.
        history: What the router said of each block.
        records: How each block came about.
    """

    def __init__(
        self,
        noise: Tensor,
        block_sizes: Sequence[int],
        prompt: Prompt,
        codec: Codec,
        preview: LinearPreview | None = None,
    ) -> None:
        """Starts a video.

        Args:
            noise: Of the whole video, ``[1, C, F, H, W]``.
            block_sizes: Latent frames of each block.
            prompt: The prompt.
            codec: Decodes the blocks.
            preview: Makes cheap pictures of latents, for routers that ask for them.
        """
        self._noises = noise.split(list(block_sizes), dim=2)
        # A seed of its own from the noise: it is there too where the noise was passed in.
        digest = blake2b(noise.float().cpu().numpy().tobytes(), digest_size=8).digest()
        self._seed = int.from_bytes(digest, "little", signed=True)
        self.context = Context(prompt)
        self.frames = BlockFrames(codec)
        self._starts_anew = not codec.remembers
        self._preview = preview
        self.history: list[Judgement | None] = []
        self.records: list[BlockRecord] = []

    @property
    def index(self) -> int:
        """Of the next block."""
        return len(self.context.blocks)

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole video."""
        return len(self._noises)

    @property
    def is_done(self) -> bool:
        """True once every block is committed."""
        return self.index == self.num_blocks

    @property
    def noise(self) -> Tensor:
        """Of the next block."""
        return self._noises[self.index]

    @property
    def place(self) -> BlockPlace:
        """Where the next block stands."""
        return BlockPlace(
            index=self.index,
            num_blocks=self.num_blocks,
            seed=self._seed,
            prompt=self.context.prompt.text,
            history=tuple(self.history),
        )

    def view(self, draft: Tensor) -> BlockView:
        """The next block as a router sees it."""

        def frames() -> Tensor:
            return pictures(self.frames.draft(draft))

        def previous() -> Tensor | None:
            last = self.frames.last()
            return None if last is None else pictures(last)

        view = BlockView(
            place=self.place,
            latents_FCHW=draft[0].transpose(0, 1),
            frames=frames,
            previous_frames=previous,
        )
        return view if self._preview is None else replace(view, preview=self._previewed(view))

    def _previewed(self, view: BlockView) -> BlockView:
        """The block and the one before it by their previews, each made once, when asked for."""
        make, blocks = self._preview, self.context.blocks
        assert make is not None

        def of_block(latents_FCHW: Tensor, index: int) -> Tensor:
            return make(latents_FCHW, is_start=index == 0 or self._starts_anew)

        def previous() -> Tensor | None:
            if not blocks:
                return None
            return of_block(blocks[-1][0].transpose(0, 1), len(blocks) - 1)[-NUM_PREVIOUS:]

        return replace(
            view,
            frames=cache(lambda: of_block(view.latents_FCHW, len(blocks))),
            previous_frames=cache(previous),
        )

    def commit(self, latents: Tensor, judgement: Judgement | None, record: BlockRecord) -> None:
        """Appends a block."""
        self.context = replace(self.context, blocks=(*self.context.blocks, latents))
        self.frames.commit(latents)
        self.history.append(judgement)
        self.records.append(record)

    def set_prompt(self, prompt: Prompt) -> None:
        """Another prompt from the next block on."""
        self.context = replace(self.context, prompt=prompt)


class BlockSchedule:
    """Drafts the next block of the rows if the router wants it of any."""

    def __init__(self, rows: Sequence[VideoRow], router: BlockRouter) -> None:
        """Keeps the two."""
        self._rows = rows
        self._router = router

    def plan(self) -> Plan:
        """Returns the plan of the next step."""
        return Plan(width=1 + any(self._router.wants_draft(row.place) for row in self._rows))

    def observe(self, record: StepRecord) -> None:
        """Learns nothing: routers decide by what the rows remember."""


class BlockDrafter:
    """Denoises the next block of every row that the router wants drafted."""

    def __init__(
        self,
        rows: Sequence[VideoRow],
        sampler: Sampler,
        router: BlockRouter,
        stitch: Stitch | None,
        *,
        name: str = "model",
    ) -> None:
        """Runs nothing.

        Args:
            rows: The videos.
            sampler: The drafting model.
            router: Says of which rows a draft is wanted.
            stitch: How blocks that are not kept are shared with the target.
            name: For the figures.
        """
        self.name = name
        self._rows = rows
        self._sampler = sampler
        self._router = router
        self._stitch = stitch

    def prefill(self) -> None:
        """Does nothing: the model reads the committed latents when it drafts."""

    def propose(self, plan: Plan) -> BlockProposal:
        """Drafts, and begins the blocks that the target will take over."""
        drafts, begun, seconds = [], [], []
        for row in self._rows:
            started = time.perf_counter()
            state, num_taken = self._begin(row)
            begun.append(state if num_taken else None)
            is_wanted = plan.width > 1 and self._router.wants_draft(row.place)
            drafts.append(self._sampler.run(row.context, state, num_taken) if is_wanted else None)
            seconds.append(time.perf_counter() - started)
        return BlockProposal(drafts=tuple(drafts), begun=tuple(begun), draft_time_s=tuple(seconds))

    def _begin(self, row: VideoRow) -> tuple[Tensor, int]:
        """The state that drafter and target go on from, and the steps that it has behind it."""
        stitch = self._stitch
        if stitch is None or stitch.begins != "drafter" or row.index == 0:
            return row.noise, 0
        state = self._sampler.run(row.context, row.noise, 0, stitch.num_steps)
        return state, stitch.num_steps

    def commit(
        self,
        proposal: BlockProposal,
        scores: BlockScores,
        verdict: BlockVerdict,
        outcome: Outcome,
    ) -> None:
        """Learns nothing: what was committed is in the rows."""


@dataclass(frozen=True, slots=True)
class BlockRule:
    """Keeps what the router keeps, unless its score is NaN.

    Attributes:
        guarantee: `exact` where the target writes every block from the noise, else `lossy`.
    """

    guarantee: Guarantee

    def verify(self, proposal: BlockProposal, scores: BlockScores) -> BlockVerdict:
        """Decides per row."""
        keep = tuple(
            # A NaN is the one number that does not equal itself.
            judged is not None and judged.keep and judged.score == judged.score
            for judged in scores.judgements
        )
        return BlockVerdict(keep=keep, scores=scores)


class BlockTarget:
    """Writes the blocks that are not kept, and commits.

    Attributes:
        rows: The videos.
    """

    def __init__(
        self,
        rows: Sequence[VideoRow],
        sampler: Sampler,
        router: BlockRouter,
        drafter: Sampler,
        stitch: Stitch | None,
    ) -> None:
        """Runs nothing.

        Args:
            rows: The videos.
            sampler: The model whose quality is wanted.
            router: Judges the drafts.
            drafter: The drafting model, which may finish a stitched block.
            stitch: How the two share a block.
        """
        self.rows = rows
        self._sampler = sampler
        self._router = router
        self._drafter = drafter
        self._stitch = stitch

    @property
    def is_done(self) -> bool:
        """True once every video is complete."""
        return all(row.is_done for row in self.rows)

    def prefill(self) -> None:
        """Does nothing: the model reads the committed latents when its block is needed."""

    def score(self, proposal: BlockProposal) -> BlockScores:
        """Asks the router about every draft. One that is not finite gets NaN."""
        judgements: list[Judgement | None] = []
        seconds = []
        for row, draft in zip(self.rows, proposal.drafts, strict=True):
            started = time.perf_counter()
            judgements.append(None if draft is None else self._judge(row, draft))
            seconds.append(time.perf_counter() - started)
        return BlockScores(judgements=tuple(judgements), judge_time_s=tuple(seconds))

    def _judge(self, row: VideoRow, draft: Tensor) -> Judgement:
        if not draft.isfinite().all():
            return Judgement(score=float("nan"), keep=False)
        return self._router.judge(row.view(draft))

    def commit(self, proposal: BlockProposal, verdict: BlockVerdict) -> Outcome:
        """Lets the target write what is not kept; appends a block to every row."""
        index = self.rows[0].index
        for number, row in enumerate(self.rows):
            started = time.perf_counter()
            draft = proposal.drafts[number]
            if draft is not None and verdict.keep[number]:
                latents, source = draft, "drafter"
            else:
                latents, source = self._write(row, proposal.begun[number])
            judgement = verdict.scores.judgements[number]
            record = BlockRecord(
                index=index,
                source=source,
                score=None if judgement is None else judgement.score,
                draft_time_s=proposal.draft_time_s[number],
                judge_time_s=verdict.scores.judge_time_s[number],
                target_time_s=time.perf_counter() - started,
            )
            row.commit(latents, judgement, record)
        return Outcome(
            new_units=tuple([index] for _ in self.rows),
            num_accepted=tuple(map(int, verdict.keep)),
            done=tuple(row.is_done for row in self.rows),
            was_active=(True,) * len(self.rows),
        )

    def _write(self, row: VideoRow, begun: Tensor | None) -> tuple[Tensor, str]:
        """The block by the target, or by both where it is stitched."""
        stitch = self._stitch
        if stitch is None or row.index == 0:
            return self._sampler.run(row.context, row.noise), "target"
        begin, end = self._sampler, self._drafter
        if stitch.begins == "drafter":
            begin, end = end, begin
        # The drafter has begun already; the target is asked for its steps here.
        state = begin.run(row.context, row.noise, 0, stitch.num_steps) if begun is None else begun
        source = stitch.begins if stitch.num_steps == end.num_steps else "stitched"
        return end.run(row.context, state, stitch.num_steps), source
