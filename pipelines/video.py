"""Text to video in blocks: a drafter writes them, a router judges them, the target redoes some."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from mmspec.adapters.block_video import (
    BlockDrafter,
    BlockRule,
    BlockSchedule,
    BlockTarget,
    Prompt,
    Sampler,
    VideoRow,
)
from mmspec.adapters.video_family import check_pair, video_family
from mmspec.engine import Engine
from mmspec.pipelines.base import SpeculativePipeline
from mmspec.pipelines.video_request import (
    VideoOptions,
    VideoRequest,
    check_noise,
    check_prompts,
    encode_prompts,
    video_request,
)
from mmspec.pipelines.video_stream import AfterStep, VideoOutput, VideoParts, VideoStream
from mmspec.records import StepRecord


class SpeculativeVideoPipeline(SpeculativePipeline):
    """Block-wise video models of diffusers, faster where a router finds a small model good enough.

    Attributes:
        target: The pipeline whose quality is wanted.
        drafter: The pipeline that drafts; the target itself, in fewer steps, if there is no other.

    Example:
        >>> pipe = SpeculativeVideoPipeline.from_pretrained(
        ...     "nvidia/AnyFlow-FAR-Wan2.1-14B-Diffusers",
        ...     drafter="nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers",
        ... )  # doctest: +SKIP
        >>> for block in pipe.stream("a cat on a lawn", router="first-block"):  # doctest: +SKIP
        ...     show(block.frames[0])
    """

    def __init__(self, target: Any, drafter: Any = None) -> None:
        """Wraps loaded pipelines; see `from_pretrained` and `from_model`."""
        self._target = video_family(target)
        self._drafter = self._target
        if drafter is not None:
            self._drafter = video_family(drafter)
            check_pair(target, drafter)
            drafter.transformer.eval()
        super().__init__(target.transformer)
        self.target = target
        self.drafter = self._drafter.pipe

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | Path,
        *,
        drafter: str | Path | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> "SpeculativeVideoPipeline":
        """Loads pipelines of diffusers from folders or hub repositories.

        Args:
            id_or_path: The target.
            drafter: A smaller model of the same family. Its text encoder is not loaded: it gets
                the target's embeddings. None is the target itself, in fewer steps.
            dtype: Floating-point type; None is that of diffusers.
            **kwargs: Passed to diffusers' ``from_pretrained``, for both.

        Raises:
            ValueError: If a model is of no known family, or the two do not fit together.
        """
        kwargs = kwargs if dtype is None else kwargs | {"dtype": dtype}
        target = DiffusionPipeline.from_pretrained(id_or_path, **kwargs)
        if drafter is None:
            return cls(target)
        without = {"text_encoder": None, "tokenizer": None}
        return cls(target, DiffusionPipeline.from_pretrained(drafter, **kwargs, **without))

    @classmethod
    def from_model(cls, target: Any, *, drafter: Any = None) -> "SpeculativeVideoPipeline":
        """Uses pipelines of diffusers that are loaded already.

        Args:
            target: The pipeline whose quality is wanted.
            drafter: One of the same class with a smaller transformer; its text encoder and VAE
                are not used. None is the target itself, in fewer steps.

        Raises:
            ValueError: As in `from_pretrained`.
        """
        return cls(target, drafter)

    @property
    def device(self) -> torch.device:
        """Where the target runs."""
        return self.target._execution_device

    def to(self, *args: Any, **kwargs: Any) -> "SpeculativeVideoPipeline":
        """Moves or casts both pipelines, as diffusers does; returns this one."""
        for pipe in {id(pipe): pipe for pipe in (self.target, self.drafter)}.values():
            pipe.to(*args, **kwargs)
        return self

    def __call__(
        self, prompt: str | Sequence[str] | None = None, **options: Unpack[VideoOptions]
    ) -> VideoOutput:
        """Makes videos.

        Args:
            prompt: One prompt or several; None with ``prompt_embeds``.
            **options: See `VideoOptions`.

        Raises:
            ValueError: On any argument out of its range, before any forward.
        """
        return self.stream(prompt, **options).output()

    @torch.no_grad()
    def stream(
        self, prompt: str | Sequence[str] | None = None, **options: Unpack[VideoOptions]
    ) -> VideoStream:
        """As a call, but every block comes as soon as it is decided, with the same bytes.

        Nothing runs before the first block is asked for but the text encoder.

        Raises:
            ValueError: On any argument out of its range, before any forward.
        """
        request = video_request(self._target, self._drafter, options)
        checked = check_prompts(self.target, prompt, options, request)
        num_rows = len(checked)
        check_noise(request, num_rows)
        layout, router, stitch = request.layout, request.router, request.stitch
        noise = self._target.noise(layout, num_rows, request.generator, request.latents)
        prompts = encode_prompts(self.target, checked, request)
        rows = [
            VideoRow(of_row, layout.block_sizes, one, self._target.codec())
            for of_row, one in zip(noise.split(1), prompts, strict=True)
        ]
        target, drafter = self._samplers(request)
        name = f"{type(self.drafter.transformer).__name__}, {drafter.num_steps} steps"
        engine = Engine(
            BlockTarget(rows, target, router, drafter, stitch),
            BlockDrafter(rows, drafter, router, stitch, name=name),
            BlockRule(request.guarantee),
            BlockSchedule(rows, router),
        )

        def read(prompt: Any, options: Mapping[str, Any]) -> list[Prompt]:
            checked = check_prompts(self.target, prompt, options, request, num_rows)
            return encode_prompts(self.target, checked, request)

        def watch(stream: VideoStream) -> tuple[tqdm, AfterStep]:
            return self._watch(
                num_rows * len(layout.block_sizes),
                request.callback_on_step_end,
                more={"stream": stream},
                unit="block",
                mover=_kept_mover,
            )

        parts = VideoParts(
            engine=engine, rows=rows, target=target, drafter=drafter, request=request, read=read
        )
        return VideoStream(parts, watch)

    def _samplers(self, request: VideoRequest) -> tuple[Sampler, Sampler]:
        """Target and drafter; one model, and so one cache, where they are the same."""
        layout, scale = request.layout, request.drafter_guidance_scale
        model = draft_model = self._target.model(layout, request.guidance_scale)
        if self._drafter is not self._target or scale != request.guidance_scale:
            draft_model = self._drafter.model(layout, scale)
        steps = request.num_inference_steps
        return Sampler(model, steps), Sampler(draft_model, request.drafter_steps)


def _kept_mover(bar: tqdm) -> Callable[[StepRecord], None]:
    """Moves a bar of blocks, and writes beside it how many drafts were kept."""
    num_kept = 0

    def move(record: StepRecord) -> None:
        nonlocal num_kept
        num_kept += sum(record.num_accepted)
        bar.update(sum(record.num_emitted))
        bar.set_postfix_str(f"{num_kept} drafts kept", refresh=False)

    return move
