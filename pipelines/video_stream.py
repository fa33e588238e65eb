"""Videos while they are made: blocks come out as they are decided, and can be steered."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from mmspec.adapters.block_video import Prompt, Sampler, VideoRow
from mmspec.block_records import BlockProposal, BlockRecord, BlockScores, BlockVerdict
from mmspec.engine import Engine
from mmspec.pipelines.video_request import VideoRequest
from mmspec.records import Guarantee, Outcome, StepRecord

VideoEngine = Engine[BlockProposal, BlockScores, BlockVerdict]
#: Shows how far a stream is until it ends; gives what is called after each step.
Progress = AbstractContextManager[Callable[[StepRecord, Outcome], bool]]


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoStats:
    """Figures over a batch of videos.

    Attributes:
        num_blocks: Committed blocks.
        num_drafted: Blocks that were drafted to the end.
        num_kept: Of these, the ones that stayed.
        num_target_forwards: Denoising steps of the target, a row at a time.
        num_target_prefills: How often the target read the committed latents.
        num_drafter_forwards: The same of the drafter.
        num_drafter_prefills: Likewise; what both need of one model is counted where it came first.
        draft_time_s: Seconds drafting.
        judge_time_s: Seconds of the router, decoding for it included.
        target_time_s: Seconds of the target.
        decode_time_s: Seconds of the VAE, those for the router included.
        first_block_time_s: Seconds until the first block was out, of those in all; None before it.
        wall_time_s: Seconds in all, without those between two blocks of a stream.
        guarantee: What the router and the stitching promise.
        router: Name of the router.
        drafter: Name of the drafter.
    """

    num_blocks: int
    num_drafted: int
    num_kept: int
    num_target_forwards: int
    num_target_prefills: int
    num_drafter_forwards: int
    num_drafter_prefills: int
    draft_time_s: float
    judge_time_s: float
    target_time_s: float
    decode_time_s: float
    first_block_time_s: float | None
    wall_time_s: float
    guarantee: Guarantee
    router: str
    drafter: str

    def to_dict(self) -> dict[str, object]:
        """Returns the figures as plain JSON types."""
        figures = {name: getattr(self, name) for name in self.__slots__}
        return figures | {"guarantee": str(self.guarantee)}


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoBlock:
    """A block of every video, as soon as it is decided.

    Attributes:
        index: Of the block, from 0.
        frames: By ``output_type``: a list of PIL images per video, an array ``[B, F, H, W, 3]`` or
            tensor ``[B, F, 3, H, W]`` in [0, 1], or the latents for "latent".
        latents: ``[B, C, F, H, W]``, as the transformer makes them.
        records: How it came about, per video.
    """

    index: int
    frames: Any
    latents: Tensor
    records: tuple[BlockRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoOutput:
    """What a video pipeline returns.

    Attributes:
        frames: As `VideoBlock.frames`, of all blocks; None if there are none.
        blocks: How each block came about, per video.
        stats: Figures over the batch.
        interrupted: True if the call was stopped early; ``frames`` ends there.
    """

    frames: Any
    blocks: tuple[tuple[BlockRecord, ...], ...]
    stats: VideoStats
    interrupted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoParts:
    """What a stream is made of.

    Attributes:
        engine: The engine, wired.
        rows: The videos.
        target: The target's sampler.
        drafter: The drafter's.
        request: The call.
        read: Makes prompts, one per row, of a prompt and the options of a call.
    """

    engine: VideoEngine
    rows: Sequence[VideoRow]
    target: Sampler
    drafter: Sampler
    request: VideoRequest
    read: Callable[[Any, Mapping[str, Any]], list[Prompt]]


class VideoStream(Iterator[VideoBlock]):
    """Videos being made, block by block; nothing runs ahead of the reader.

    Only what the next block needs is kept: latents, caches, and what the VAE remembers. Pictures
    that were yielded are the reader's.
    """

    def __init__(
        self,
        parts: VideoParts,
        watch: Callable[["VideoStream"], Progress],
    ) -> None:
        """Runs nothing.

        Args:
            parts: What it is made of.
            watch: Makes the progress to show.
        """
        self._parts = parts
        self._steps = parts.engine.stream()
        self._processor = VideoProcessor()
        self._num_pictures = 0
        self._wall_time_s = 0.0
        self._first_block_time_s: float | None = None
        self._is_stopped = False
        self._open = ExitStack()
        self._after_step = self._open.enter_context(watch(self))

    def __next__(self) -> VideoBlock:
        """Makes the next block.

        Raises:
            StopIteration: Behind the last block, or once it was cancelled.
        """
        if self._is_stopped:
            raise StopIteration
        started = time.perf_counter()
        step = next(self._steps, None)
        if step is None:
            self.cancel()
            raise StopIteration
        if self._after_step(*step):
            self.cancel()
        block = self._block()
        self._wall_time_s += time.perf_counter() - started
        if self._first_block_time_s is None:
            self._first_block_time_s = self._wall_time_s
        if self._parts.engine.target.is_done:
            self._open.close()
        return block

    def cancel(self) -> None:
        """Ends the stream behind the last block that was made."""
        self._is_stopped = True
        self._open.close()

    @property
    def is_complete(self) -> bool:
        """True once every block was made."""
        return self._parts.engine.target.is_done

    def set_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_embeds: Tensor | None = None,
    ) -> None:
        """Another prompt from the next block on; the blocks that were made stay.

        Args:
            prompt: One text for all videos, or one for each.
            prompt_embeds: Instead of it, ``[B, tokens, channels]``.
            negative_prompt: As in the call.
            negative_prompt_embeds: As in the call.

        Raises:
            ValueError: As in the call.
        """
        options = {
            "prompt_embeds": prompt_embeds,
            "negative_prompt": negative_prompt,
            "negative_prompt_embeds": negative_prompt_embeds,
        }
        prompts = self._parts.read(prompt, options)
        for row, one in zip(self._parts.rows, prompts, strict=True):
            row.set_prompt(one)

    @property
    def records(self) -> tuple[tuple[BlockRecord, ...], ...]:
        """How each block so far came about, per video."""
        return tuple(tuple(row.records) for row in self._parts.rows)

    @property
    def stats(self) -> VideoStats:
        """Figures so far."""
        parts = self._parts
        stats = parts.engine.ledger.generation().stats
        records = [record for row in self.records for record in row]
        return VideoStats(
            num_blocks=stats.num_units,
            num_drafted=stats.num_drafted,
            num_kept=stats.num_accepted,
            num_target_forwards=parts.target.num_forwards,
            num_target_prefills=parts.target.num_prefills,
            num_drafter_forwards=parts.drafter.num_forwards,
            num_drafter_prefills=parts.drafter.num_prefills,
            draft_time_s=sum(record.draft_time_s for record in records),
            judge_time_s=sum(record.judge_time_s for record in records),
            target_time_s=sum(record.target_time_s for record in records),
            decode_time_s=sum(row.frames.decode_time_s for row in parts.rows),
            first_block_time_s=self._first_block_time_s,
            wall_time_s=self._wall_time_s,
            guarantee=stats.guarantee,
            router=parts.request.router.name,
            drafter=stats.drafter,
        )

    def output(self) -> VideoOutput:
        """Makes the blocks that are left, and joins all that this call made."""
        with self._open:
            blocks = [block.frames for block in self]
        return VideoOutput(
            frames=_joined(blocks, self._parts.request.output_type),
            blocks=self.records,
            stats=self.stats,
            interrupted=not self.is_complete,
        )

    def _block(self) -> VideoBlock:
        rows = self._parts.rows
        latents = torch.cat([row.context.blocks[-1] for row in rows])
        if self._parts.request.output_type == "latent":
            frames = latents
            for row in rows:
                row.frames.drop()
        else:
            frames = self._pictures()
        return VideoBlock(
            index=len(rows[0].context.blocks) - 1,
            frames=frames,
            latents=latents,
            records=tuple(row.records[-1] for row in rows),
        )

    def _pictures(self) -> Any:
        """The pictures of the new block, as they are asked for."""
        pixels = torch.cat([torch.cat(row.frames.take(), dim=2) for row in self._parts.rows])
        room = self._parts.request.layout.num_frames - self._num_pictures
        pixels = pixels[:, :, :room]
        self._num_pictures += pixels.shape[2]
        return self._processor.postprocess_video(
            pixels, output_type=self._parts.request.output_type
        )


def _joined(blocks: list[Any], output_type: str) -> Any:
    """Blocks behind each other."""
    if not blocks:
        return None
    if output_type == "pil":
        return [list(chain.from_iterable(of_row)) for of_row in zip(*blocks, strict=True)]
    if output_type == "np":
        return np.concatenate(blocks, axis=1)
    return torch.cat(blocks, dim=2 if output_type == "latent" else 1)
