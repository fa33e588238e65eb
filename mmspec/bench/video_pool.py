"""Many videos at once, for measuring what they are worth: shared work is done once, in batches.

Every video is made by the pipeline, engine and router that a user has, in a thread of its own. Only
models and VAE are stood in for: what they are asked is answered from memory if the same was asked
before (videos whose blocks have the same sources so far), and else together with what the other
videos ask for. One thread runs at a time, so the order, and every batch, is the same in each run.

Kernels round a batch in another way than a row, so pictures may differ from those of a single run
in the last bits. Seconds mean nothing here; counts are those of a single run.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmspec.adapters.block_frames import Codec
from mmspec.adapters.block_video import BlockModel, Context, Prompt
from mmspec.adapters.video_family import VideoFamily, VideoLayout
from mmspec.pipelines.video import SpeculativeVideoPipeline

T = TypeVar("T")
Compute = Callable[[Sequence[Any]], Sequence[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Something that a video waits for.

    Attributes:
        key: The same for the same answer.
        group: Questions of one group can be answered together.
        compute: Answers inputs of one group.
        inputs: What it is asked about.
    """

    key: bytes
    group: Hashable
    compute: Compute
    inputs: Any


class Pool:
    """Runs videos in turn until each waits for a model, then answers all of them."""

    def __init__(self, max_batch: int = 32) -> None:
        """Remembers nothing yet.

        Args:
            max_batch: Rows that are computed together at most.
        """
        self._max_batch = max_batch
        self._answers: dict[bytes, Any] = {}
        self._waiting: list[Question] = []
        self._num_running = 0
        self._error: BaseException | None = None
        self._is_given_up = False
        # Its lock is the right to run: waiting for the condition gives it away.
        self._baton = threading.Condition()

    def ask(self, question: Question) -> Any:
        """Waits for an answer; to be called by what `run` runs."""
        if question.key not in self._answers:
            self._waiting.append(question)
            self._leave()
            self._baton.wait_for(lambda: question.key in self._answers or self._is_given_up)
        if self._is_given_up:
            raise RuntimeError("another video failed")
        return self._answers[question.key]

    def run(self, videos: Sequence[Callable[[], T]]) -> list[T]:
        """Runs all of them, and forgets the answers.

        Raises:
            BaseException: The first that one of them raises.
        """
        found: dict[int, T] = {}
        self._num_running = len(videos)
        self._error, self._is_given_up = None, False

        def work(number: int, video: Callable[[], T]) -> None:
            with self._baton:
                try:
                    found[number] = video()
                except BaseException as error:
                    self._error = self._error or error
                finally:
                    self._leave()

        threads = [threading.Thread(target=work, args=pair) for pair in enumerate(videos)]
        with self._baton:
            for thread in threads:
                thread.start()
            self._answer_all()
        for thread in threads:
            thread.join()
        self._answers.clear()
        if self._error is not None:
            raise self._error
        return [found[number] for number in range(len(videos))]

    def _leave(self) -> None:
        self._num_running -= 1
        if self._num_running == 0:
            self._baton.notify_all()

    def _answer_all(self) -> None:
        while True:
            self._baton.wait_for(lambda: self._num_running == 0)
            waiting, self._waiting = self._waiting, []
            if not waiting:
                return
            try:
                if self._error is None:
                    self._answer(waiting)
            except BaseException as error:
                self._error = error
            # Only here, where nobody runs: one who gives up on his own is counted twice.
            self._is_given_up = self._error is not None
            self._num_running += len(waiting)
            self._baton.notify_all()

    @torch.no_grad()
    def _answer(self, waiting: Sequence[Question]) -> None:
        groups: dict[Hashable, dict[bytes, Question]] = defaultdict(dict)
        # Threads come in any order; sorted, the batches are the same in each run.
        for question in sorted(waiting, key=lambda question: question.key):
            groups[question.group][question.key] = question
        for group in groups.values():
            questions = list(group.values())
            for first in range(0, len(questions), self._max_batch):
                batch = questions[first : first + self._max_batch]
                answers = batch[0].compute([question.inputs for question in batch])
                for question, answer in zip(batch, answers, strict=True):
                    self._answers[question.key] = answer


class PooledModel:
    """A `BlockModel` whose steps a pool takes, for many videos at once.

    Attributes:
        num_prefills: How often a model of one video would have read its committed latents.
    """

    def __init__(self, pool: Pool, name: Hashable, make: Callable[[], BlockModel]) -> None:
        """Runs nothing.

        Args:
            pool: Takes the steps.
            name: Of the model.
            make: Makes one with an empty cache; its tensors may have several rows.
        """
        self._pool = pool
        self._name = name
        self._make = make
        self._read: Context | None = None
        self.num_prefills = 0

    def denoise(
        self, context: Context, sample: Tensor, *, num_steps: int, first: int, last: int
    ) -> Tensor:
        """As `BlockModel.denoise`."""
        if context.blocks and self._read is not context:
            self._read = context
            self.num_prefills += 1
        what = (self._name, num_steps, first, last)
        prompt = context.prompt
        negative = () if prompt.negative_embeds is None else (prompt.negative_embeds,)
        tensors = (prompt.embeds, *negative, *context.blocks, sample)

        def compute(inputs: Sequence[Any]) -> Sequence[Tensor]:
            contexts, samples = zip(*inputs, strict=True)
            state = self._make().denoise(
                _joined(contexts), torch.cat(samples), num_steps=num_steps, first=first, last=last
            )
            return state.split(1)

        question = Question(
            key=_digest(what, tensors),
            group=(*what, len(context.blocks), prompt.embeds.shape, len(negative)),
            compute=compute,
            inputs=(context, sample),
        )
        answer: Tensor = self._pool.ask(question)
        return answer


@dataclass(frozen=True, slots=True, eq=False)
class PooledState:
    """What the VAE remembers of a video, and the key of all that it has seen."""

    key: bytes
    memory: Any


class PooledCodec:
    """A `Codec` whose blocks a pool decodes, for many videos at once.

    Attributes:
        num_decoded: Blocks that a single video would have decoded.
        remembers: That of the codec.
    """

    def __init__(self, pool: Pool, codec: Codec) -> None:
        """Keeps the two."""
        self._pool = pool
        self._codec = codec
        self.remembers = codec.remembers
        self.num_decoded = 0

    def decode(self, latents: Tensor, state: PooledState | None) -> tuple[Tensor, PooledState]:
        """As `Codec.decode`."""
        self.num_decoded += 1
        before = b"" if state is None else state.key
        key = _digest(("decode", before), (latents,))

        def compute(inputs: Sequence[Any]) -> Sequence[Any]:
            samples, states = zip(*inputs, strict=True)
            memory = None if state is None else _joined_memory([one.memory for one in states])
            pixels, after = self._codec.decode(torch.cat(samples), memory)
            rows = zip(pixels.split(1), _split_memory(after, len(inputs)), strict=True)
            return list(rows)

        question = Question(
            key=key,
            group=("decode", state is None, latents.shape),
            compute=compute,
            inputs=(latents, state),
        )
        pixels, memory = self._pool.ask(question)
        return pixels, PooledState(key, memory)


class PooledFamily:
    """A `VideoFamily` for one video, whose model and VAE are those of a pool."""

    def __init__(self, pool: Pool, family: VideoFamily, name: str) -> None:
        """Keeps the three."""
        self.pipe = family.pipe
        self.can_stitch = family.can_stitch
        self.attentions = family.attentions
        self.layout = family.layout
        self.noise = family.noise
        self.codecs: list[PooledCodec] = []
        self._pool = pool
        self._family = family
        self._name = name

    def model(
        self, layout: VideoLayout, guidance_scale: float, attention: str | None = None
    ) -> BlockModel:
        """The transformer, shared with the other videos."""
        what = (layout, guidance_scale, attention)
        return PooledModel(self._pool, (self._name, *what), lambda: self._family.model(*what))

    def codec(self) -> Codec:
        """The VAE, shared likewise."""
        self.codecs.append(PooledCodec(self._pool, self._family.codec()))
        return self.codecs[-1]


class PooledVideoPipeline(SpeculativeVideoPipeline):
    """The pipeline, for one call with one prompt, with the work given to a pool."""

    def __init__(self, target: Any, drafter: Any, pool: Pool) -> None:
        """Wraps pipelines of diffusers."""
        super().__init__(target, drafter)
        self._shared = PooledFamily(pool, self._target, "target")
        self._target = self._shared
        is_alone = drafter is None
        self._drafter = self._shared if is_alone else PooledFamily(pool, self._drafter, "drafter")

    @property
    def num_decoded(self) -> int:
        """Blocks that were decoded, those that a router looked at and did not keep included."""
        return sum(codec.num_decoded for codec in self._shared.codecs)


def _joined(contexts: Sequence[Context]) -> Context:
    prompts = [context.prompt for context in contexts]
    negative = [one.negative_embeds for one in prompts if one.negative_embeds is not None]
    prompt = Prompt(
        text=None,
        embeds=torch.cat([one.embeds for one in prompts]),
        negative_embeds=torch.cat(negative) if negative else None,
    )
    columns = zip(*(context.blocks for context in contexts), strict=True)
    return Context(prompt, tuple(torch.cat(column) for column in columns))


def _joined_memory(memories: Sequence[Sequence[Any]]) -> list[Any]:
    """One memory of the VAE's layers, of those of several videos that stand at the same block."""
    columns = zip(*memories, strict=True)
    # A layer that has seen one frame may hold a mark, the same in every video.
    return [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns]


def _split_memory(memory: Sequence[Any], num_rows: int) -> list[list[Any]]:
    columns = [
        # Copied, for a part of a tensor keeps all of it alive.
        [part.clone() for part in entry.split(1)]
        if isinstance(entry, Tensor)
        else [entry] * num_rows
        for entry in memory
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def _digest(what: Hashable, tensors: Sequence[Tensor]) -> bytes:
    digest = blake2b(repr(what).encode(), digest_size=16)
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()
