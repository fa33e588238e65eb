"""Text to video in blocks: a drafter writes them, a router judges them, the target redoes some."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from mmspec.adapters.block_frames import pictures
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
from mmspec.assets import bundled_names, bundled_path
from mmspec.engine import Engine
from mmspec.latent_preview import PREVIEW_FILE, DecodedBlock, LinearPreview
from mmspec.pipelines.base import SpeculativePipeline
from mmspec.pipelines.video_request import (
    OF_DRAFTER,
    GivenPrompt,
    VideoOptions,
    VideoRequest,
    check_noise,
    check_prompts,
    encode_prompts,
    read_defaults,
    video_request,
)
from mmspec.pipelines.video_stream import Progress, VideoOutput, VideoParts, VideoStream
from mmspec.records import StepRecord
from mmspec.routers import LoadedScorers


class SpeculativeVideoPipeline(SpeculativePipeline):
    """Block-wise video models of diffusers, faster where a router finds a small model good enough.

    Attributes:
        target: The pipeline whose quality is wanted.
        drafter: The pipeline that drafts; the target itself, in fewer steps, if there is no other.
        defaults: Options that a call takes where it names none, and "fps" where it is known: those
            of `defaults.json` in the folder of the target.
        preview: Cheap pictures of latents for routers with ``on=preview``: those of
            `preview.safetensors` in the folder of the target, else None. It may be set
            (`LinearPreview.load`), or made (`fit_preview`).

    Example:
        >>> pipe = SpeculativeVideoPipeline.from_pretrained("bundled:clips")  # doctest: +SKIP
        >>> pipe = SpeculativeVideoPipeline.from_pretrained(
        ...     "nvidia/AnyFlow-FAR-Wan2.1-14B-Diffusers",
        ...     drafter="nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers",
        ... )  # doctest: +SKIP
        >>> for block in pipe.stream("a cat on a lawn", router="first-block"):  # doctest: +SKIP
        ...     show(block.frames[0])
    """

    def __init__(
        self, target: Any, drafter: Any = None, defaults: Mapping[str, Any] | None = None
    ) -> None:
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
        self.defaults: dict[str, Any] = dict(defaults or {})
        self.preview: LinearPreview | None = None
        self._loaded = LoadedScorers()

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
            id_or_path: The target: ``"bundled:clips"``, a folder, or a hub id.
            drafter: A smaller model of the same family. Its text encoder is not loaded: it gets
                the target's embeddings. None is the drafter that is bundled with a bundled target
                (``"bundled:clips-drafter"``), and for all others the target itself, in fewer
                steps; ``"self"`` is the target itself in any case.
            dtype: Floating-point type; None is that of diffusers.
            **kwargs: Passed to diffusers' ``from_pretrained``, for both.

        Raises:
            ValueError: If a bundled name is unknown, a model is of no known family, the two do not
                fit together, or the `defaults.json` of one, or `preview.safetensors`, cannot be
                used.
        """
        path, drafter_path = _found(id_or_path), _drafter_path(id_or_path, drafter)
        defaults = read_defaults(path)
        kwargs = kwargs if dtype is None else kwargs | {"dtype": dtype}
        target = DiffusionPipeline.from_pretrained(path, **kwargs)
        drafting = None
        if drafter_path is not None:
            without = {"text_encoder": None, "tokenizer": None}
            drafting = DiffusionPipeline.from_pretrained(drafter_path, **kwargs, **without)
            of_drafter = read_defaults(drafter_path)
            defaults |= {name: of_drafter[name] for name in OF_DRAFTER if name in of_drafter}
        pipe = cls(target, drafting, defaults)
        preview = Path(path) / PREVIEW_FILE
        if preview.is_file():
            pipe.preview = LinearPreview.load(preview)
        return pipe

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
        options = self._with_defaults(options)
        request, checked = self._checked(prompt, options)
        num_rows = len(checked)
        layout, router, stitch = request.layout, request.router, request.stitch
        noise = self._target.noise(layout, num_rows, request.generator, request.latents)
        prompts = self._encode(checked, request)
        rows = [
            VideoRow(of_row, layout.block_sizes, one, self._target.codec(), self.preview)
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
            return self._encode(checked, request)

        def watch(stream: VideoStream) -> Progress:
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

    def check_request(
        self, prompt: str | Sequence[str] | None = None, **options: Unpack[VideoOptions]
    ) -> tuple[int, int, int]:
        """Refuses what a call would refuse; runs nothing, but loads the weights of the router.

        Returns:
            Pictures, height and width in pixels of the videos that the call makes.

        Raises:
            ValueError: As a call.
        """
        layout = self._checked(prompt, self._with_defaults(options))[0].layout
        scale = self.target.vae_scale_factor_spatial
        return layout.num_frames, layout.height * scale, layout.width * scale

    def fit_preview(self, calls: Iterable[Mapping[str, Any]]) -> LinearPreview:
        """Fits the map that ``on=preview`` needs, to videos that it makes and decodes.

        Some dozens of short videos are enough. Both models should have written in them, as with
        ``router="random:0.5"``: drafts are what is judged.

        Args:
            calls: Arguments of calls, prompt and generator among them.

        Returns:
            The map, which is `preview` from now on.

        Raises:
            ValueError: As a call.
        """
        self.preview = LinearPreview.fit(
            block for one in calls for block in self._decoded_blocks(one)
        )
        return self.preview

    @torch.no_grad()
    def _decoded_blocks(self, arguments: Mapping[str, Any]) -> Iterator[DecodedBlock]:
        """Latents and pictures of the blocks of a call."""
        codec = self._target.codec()
        states: dict[int, Any] = {}
        options: Any = {**arguments, "output_type": "latent"}
        for block in self.stream(**options):
            is_start = block.index == 0 or not codec.remembers
            for row, latents in enumerate(block.latents.split(1)):
                pixels, states[row] = codec.decode(latents, states.get(row))
                yield latents[0].transpose(0, 1), pictures(pixels).to(latents.device), is_start

    def _with_defaults(self, options: VideoOptions) -> VideoOptions:
        more: Any = {name: value for name, value in self.defaults.items() if name != "fps"}
        return {**more, **options}

    def _checked(
        self, prompt: str | Sequence[str] | None, options: VideoOptions
    ) -> tuple[VideoRequest, list[GivenPrompt]]:
        request = video_request(self._target, self._drafter, options, self._loaded, self.preview)
        checked = check_prompts(self.target, prompt, options, request)
        check_noise(request, len(checked))
        return request, checked

    def _encode(self, prompts: Sequence[GivenPrompt], request: VideoRequest) -> list[Prompt]:
        if self.target.tokenizer is not None:
            texts = [
                (one.text, one.negative_text if request.is_guided else None) for one in prompts
            ]
            given = [text for of_row in texts for text in of_row if text is not None]
            self._warn_of_unknown_words(self.target.tokenizer, given)
        return encode_prompts(self.target, prompts, request)

    def _samplers(self, request: VideoRequest) -> tuple[Sampler, Sampler]:
        """Target and drafter; one model, and so one cache, where they are the same."""
        layout, scale, attention = request.layout, request.drafter_guidance_scale, request.attention
        model = draft_model = self._target.model(layout, request.guidance_scale, attention)
        if self._drafter is not self._target or scale != request.guidance_scale:
            draft_model = self._drafter.model(layout, scale, attention)
        steps = request.num_inference_steps
        return Sampler(model, steps), Sampler(draft_model, request.drafter_steps)


def _found(id_or_path: str | Path) -> str | Path:
    """A bundled name as its folder.

    Raises:
        ValueError: If nothing of that name is bundled; lists what is.
    """
    name = str(id_or_path)
    return bundled_path(name) if name.startswith("bundled:") else id_or_path


def _drafter_path(target: str | Path, drafter: str | Path | None) -> str | Path | None:
    """Where the drafter is; None is the target itself.

    Raises:
        ValueError: As `_found`.
    """
    if drafter is None:
        name = f"{target}-drafter"
        is_there = name.startswith("bundled:") and name.removeprefix("bundled:") in bundled_names()
        return bundled_path(name) if is_there else None
    return None if drafter == "self" else _found(drafter)


def _kept_mover(bar: tqdm) -> Callable[[StepRecord], None]:
    """Moves a bar of blocks, and writes beside it how many drafts were kept."""
    num_kept = 0

    def move(record: StepRecord) -> None:
        nonlocal num_kept
        num_kept += sum(record.num_accepted)
        bar.update(sum(record.num_emitted))
        bar.set_postfix_str(f"{num_kept} drafts kept", refresh=False)

    return move
