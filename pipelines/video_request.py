"""What a video call asks for: its options, checked before anything runs."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from mmspec.adapters.block_video import Prompt, Stitch
from mmspec.adapters.video_family import VideoFamily, VideoLayout
from mmspec.block_records import BlockRouter
from mmspec.checks import is_integer, is_list, require, require_generator, require_known
from mmspec.latent_preview import LinearPreview
from mmspec.pipelines.base import (
    StepEnd,
    as_list,
    check_callback,
    check_guidance,
    check_positive,
)
from mmspec.records import Guarantee
from mmspec.routers import LoadedScorers, build_router

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
#: Who may take the first steps of a stitched block.
BEGINNERS = ("drafter", "target")


class VideoOptions(TypedDict, total=False):
    """Arguments of a call besides the prompt.

    What is left out is as the folder of the target says (`read_defaults`), else as in its pipeline.

    Attributes:
        negative_prompt: What guidance steers away from: one text, or one per prompt.
        num_frames: Pictures of the video.
        height: Pixels.
        width: Pixels.
        num_inference_steps: Denoising steps of the target per block.
        drafter_steps: Those of the drafter; without it the same. Needed where the target drafts
            for itself in fewer steps.
        guidance_scale: Classifier-free guidance of the target; at most 1 is none.
        drafter_guidance_scale: That of the drafter; without it the same.
        attention: Of AnyFlow-FAR: "flex", as diffusers has it, or "dense", the same to rounding
            and several times faster for small models on a CPU. Both models, in this call alone;
            None is as they have it.
        router: A name with its argument ("first-block", "every:3"), or a router. "never", which
            needs no drafter, is the target's pipeline to the bit (with the same attention), and
            the default; all others are `lossy`.
        stitch: Shares the steps of the blocks that the target writes, the first block excepted.
            k, or "drafter:k", leaves the first k steps to the drafter; "target:k" has the target
            take the first k and the drafter the rest.
        block_sizes: Latent frames of each block (the ``chunk_partition`` of diffusers).
        generator: One for all videos, or one for each. Video k of a list is the video that a
            single call with that generator makes.
        latents: Noise ``[B, C, F, H, W]`` instead of drawing it.
        prompt_embeds: Instead of a prompt, ``[B, tokens, channels]``.
        negative_prompt_embeds: Instead of a negative prompt.
        max_sequence_length: Tokens of a prompt at most.
        output_type: "pil", "np", "pt" or "latent".
        callback_on_step_end: Called as ``f(pipeline, step_index, details)`` behind each block;
            returning True interrupts. ``details["stream"]`` is the `VideoStream`.
    """

    negative_prompt: str | Sequence[str] | None
    num_frames: int
    height: int
    width: int
    num_inference_steps: int
    drafter_steps: int
    guidance_scale: float
    drafter_guidance_scale: float
    attention: str | None
    router: str | BlockRouter
    stitch: int | str | None
    block_sizes: Sequence[int] | None
    generator: torch.Generator | Sequence[torch.Generator] | None
    latents: Tensor | None
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    max_sequence_length: int
    output_type: str
    callback_on_step_end: StepEnd | None


#: Options whose default is the target pipeline's own.
_AS_IN_DIFFUSERS = (
    "num_frames",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "max_sequence_length",
)
_DEFAULTS: VideoOptions = {
    "attention": None,
    "router": "never",
    "stitch": None,
    "block_sizes": None,
    "generator": None,
    "latents": None,
    "output_type": "pil",
    "callback_on_step_end": None,
}


#: Beside the pipeline in its folder, a JSON object of options.
DEFAULTS_FILE = "defaults.json"
#: Those that count where the folder is a drafter's; they win over the target's.
OF_DRAFTER = ("drafter_steps", "drafter_guidance_scale", "router")
#: Options that such a file cannot hold.
_NO_JSON = {
    "generator", "latents", "prompt_embeds", "negative_prompt_embeds", "callback_on_step_end",
}  # fmt: skip


def read_defaults(folder: str | Path) -> dict[str, Any]:
    """The options that a model was made for, as its folder says.

    Args:
        folder: Of a pipeline; anything that is no folder has none.

    Returns:
        Options of a call, and "fps" where the file has it. Values are checked by the call.

    Raises:
        ValueError: If the file is no JSON object, or names an unknown option.
    """
    path = Path(folder) / DEFAULTS_FILE
    if not path.is_file():
        return {}
    try:
        defaults = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    require(isinstance(defaults, dict), str(path), "a JSON object", defaults)
    known = [name for name in VideoOptions.__annotations__ if name not in _NO_JSON]
    for name in defaults:
        require_known(f"option of {path}", name, [*known, "fps"])
    return defaults


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenPrompt:
    """What a user gave for one video, checked and not encoded yet.

    Attributes:
        text: None where ``embeds`` are given.
        embeds: ``[1, tokens, channels]`` or None.
        negative_text: None where there is none.
        negative_embeds: ``[1, tokens, channels]`` or None.
    """

    text: str | None
    embeds: Tensor | None
    negative_text: str | None
    negative_embeds: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoRequest:
    """A call whose arguments but the prompt are checked; names as in `VideoOptions`.

    Attributes:
        guarantee: What router and stitching promise.
    """

    layout: VideoLayout
    router: BlockRouter
    stitch: Stitch | None
    guarantee: Guarantee
    num_inference_steps: int
    drafter_steps: int
    guidance_scale: float
    drafter_guidance_scale: float
    attention: str | None
    generator: Any
    latents: Tensor | None
    max_sequence_length: int
    output_type: str
    callback_on_step_end: StepEnd | None

    @property
    def is_guided(self) -> bool:
        """Whether a model looks at negative prompts."""
        return max(self.guidance_scale, self.drafter_guidance_scale) > 1


def video_request(
    target: VideoFamily,
    drafter: VideoFamily,
    options: Mapping[str, Any],
    loaded: LoadedScorers | None = None,
    preview: LinearPreview | None = None,
) -> VideoRequest:
    """Checks a call and fills in its defaults; runs nothing.

    Args:
        target: The model whose quality is wanted.
        drafter: The model that drafts.
        options: As in `VideoOptions`.
        loaded: Scorers of earlier calls, for the router.
        preview: Makes cheap pictures of latents, for the router.

    Raises:
        ValueError: With the rule and the value of the first argument that is out of its range.
    """
    for name in options:
        require_known("option", name, VideoOptions.__annotations__)
    given = {**_DEFAULTS, **_defaults_of(target.pipe), **options}
    for name in ("num_inference_steps", "max_sequence_length"):
        check_positive(name, given[name])
    check_callback(given["callback_on_step_end"])
    require_known("output_type", given["output_type"], OUTPUT_TYPES)
    _check_attention(target, given["attention"])
    router = build_router(given["router"], loaded)
    stitch = _stitch(given["stitch"], given["num_inference_steps"])
    is_exact = router.guarantee == Guarantee.EXACT and stitch is None
    given |= _of_drafter(given, is_alone=drafter is target, is_exact=is_exact)
    if stitch is not None:
        _check_stitch(target, drafter, given)
    names = ("num_frames", "height", "width", "block_sizes")
    given |= {
        "layout": target.layout(*(given[name] for name in names)),
        "router": router,
        "stitch": stitch,
        "guarantee": Guarantee.EXACT if is_exact else Guarantee.LOSSY,
    }
    if getattr(router, "needs_preview", False):
        _check_preview(target.pipe, router, preview)
    return VideoRequest(**{name: given[name] for name in VideoRequest.__slots__})


def check_prompts(
    pipe: Any,
    prompt: str | Sequence[str] | None,
    options: Mapping[str, Any],
    request: VideoRequest,
    num_rows: int | None = None,
) -> list[GivenPrompt]:
    """Checks prompts; encodes nothing.

    Args:
        pipe: A pipeline of diffusers.
        prompt: One or several, or None.
        options: Those of a call; of them the embeddings and what is negative.
        request: The rest of the call.
        num_rows: Videos, if there are some already; one text serves all of them.

    Returns:
        One for each video.

    Raises:
        ValueError: If not exactly one of prompt and embeddings is given, or something does not
            fit.
    """
    size, has_encoder = pipe.transformer.config.text_dim, pipe.text_encoder is not None
    embeds, negative_embeds = (
        _rows_of_embeds(name, options.get(name), size)
        for name in ("prompt_embeds", "negative_prompt_embeds")
    )
    which = {(True, True): "neither", (False, False): "both"}.get((prompt is None, embeds is None))
    require(which is None, "prompt or prompt_embeds", "given, one of them", which)
    texts: list[Any] = [None] * len(embeds or ())
    if prompt is not None:
        texts = as_list([prompt] * (num_rows or 1) if isinstance(prompt, str) else prompt)
        rule = "left out for prompt_embeds: the pipeline has no text encoder"
        require(has_encoder, "prompt", rule, prompt)
    rule = f"given, for the router {request.router.name!r} reads it"
    require(prompt is not None or not request.router.needs_prompt, "prompt", rule, prompt)
    count = len(texts)
    require(num_rows in (None, count), "the number of prompts", f"one per video, {num_rows}", count)
    negative = options.get("negative_prompt")
    rule = "left out where negative_prompt_embeds are given"
    require(negative is None or negative_embeds is None, "negative_prompt", rule, negative)
    rule = "given with guidance: the pipeline has no text encoder"
    is_good = has_encoder or negative_embeds is not None or not request.is_guided
    require(is_good, "negative_prompt_embeds", rule, None)
    if negative_embeds is not None:
        rule = f"one per video, {count}"
        require(len(negative_embeds) == count, "negative_prompt_embeds", rule, len(negative_embeds))
    nothing: list[Any] = [None] * count
    columns = (
        texts,
        embeds or nothing,
        _negative_texts(negative, count),
        negative_embeds or nothing,
    )
    return [
        GivenPrompt(text=text, embeds=one, negative_text=negative, negative_embeds=other)
        for text, one, negative, other in zip(*columns, strict=True)
    ]


def check_noise(request: VideoRequest, num_rows: int) -> None:
    """Refuses generators or noise that are not there for every video.

    Raises:
        ValueError: With the number or the shape.
    """
    layout = request.layout
    generator, latents = request.generator, request.latents
    require_generator(generator)
    is_good = not isinstance(generator, Sequence) or len(generator) == num_rows
    require(is_good, "generator", f"one, or one per video, {num_rows}", generator)
    if latents is not None:
        sizes = (layout.channels, sum(layout.block_sizes), layout.height, layout.width)
        got = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        require(got == (num_rows, *sizes), "latents", f"of the shape {(num_rows, *sizes)}", got)


@torch.no_grad()
def encode_prompts(
    pipe: Any, prompts: Sequence[GivenPrompt], request: VideoRequest
) -> list[Prompt]:
    """Each prompt by the pipeline's text encoder, alone, so that no batch rounds it otherwise."""
    encoded = []
    for prompt in prompts:
        embeds, negative_embeds = pipe.encode_prompt(
            prompt=prompt.text,
            negative_prompt=prompt.negative_text,
            do_classifier_free_guidance=request.is_guided,
            prompt_embeds=prompt.embeds,
            negative_prompt_embeds=prompt.negative_embeds,
            max_sequence_length=request.max_sequence_length,
            device=pipe._execution_device,
        )
        encoded.append(Prompt(text=prompt.text, embeds=embeds, negative_embeds=negative_embeds))
    return encoded


def _defaults_of(pipe: Any) -> dict[str, Any]:
    """What a call of diffusers takes where nothing is given."""
    parameters = inspect.signature(pipe.__call__).parameters
    return {name: parameters[name].default for name in _AS_IN_DIFFUSERS}


def _of_drafter(given: Mapping[str, Any], *, is_alone: bool, is_exact: bool) -> dict[str, Any]:
    """Steps and guidance of the drafter, checked; the target's where none are given."""
    if is_alone and not is_exact and "drafter_steps" not in given:
        rule = "given where the target drafts for itself, in fewer steps than num_inference_steps"
        require(False, "drafter_steps", rule, None)
    steps = given.get("drafter_steps", given["num_inference_steps"])
    check_positive("drafter_steps", steps)
    guidance_scale = given["guidance_scale"]
    check_guidance(guidance_scale)
    check_guidance(given.get("drafter_guidance_scale", guidance_scale))
    return {
        "drafter_steps": steps,
        "drafter_guidance_scale": given.get("drafter_guidance_scale", guidance_scale),
    }


def _stitch(value: object, num_steps: int) -> Stitch | None:
    """Reads ``stitch``.

    Raises:
        ValueError: If it is neither a number of steps nor a beginner and a number.
    """
    if value is None:
        return None
    begins, steps = "drafter", value
    if isinstance(value, str):
        begins, _, text = value.partition(":")
        steps = int(text) if text.isdecimal() else None
    if begins in BEGINNERS and is_integer(steps) and 1 <= steps <= num_steps:
        return Stitch(steps, begins)
    rule = f"k, 'drafter:k' or 'target:k' with k from 1 to num_inference_steps, {num_steps}"
    raise ValueError(f"stitch must be {rule}, got {value!r}")


def _check_attention(family: VideoFamily, attention: object) -> None:
    """Refuses an attention that a family does not have.

    Raises:
        ValueError: With those that it has.
    """
    rule = " or ".join(map(repr, [None, *family.attentions]))
    is_good = attention is None or attention in family.attentions
    require(is_good, "attention", f"{rule} for {type(family.pipe).__name__}", attention)


def _check_preview(pipe: Any, router: BlockRouter, preview: LinearPreview | None) -> None:
    """Refuses a router that looks at previews where there are none of these latents.

    Raises:
        ValueError: With the router, or with what does not fit.
    """
    rule = f"set (fit_preview makes one), for the router {router.name!r} looks at previews"
    require(preview is not None, "preview of the pipeline", rule, None)
    assert preview is not None
    wanted = (pipe.transformer.config.in_channels, pipe.vae_scale_factor_temporal)
    rule = "that of latents of {} channels with {} pictures a frame".format(*wanted)
    got = (preview.channels, preview.pictures_per_frame)
    require(got == wanted, "preview of the pipeline", rule, got)


def _check_stitch(target: VideoFamily, drafter: VideoFamily, given: Mapping[str, Any]) -> None:
    """Refuses to hand a block over where the two do not meet at the same noise.

    Raises:
        ValueError: With what differs.
    """
    kind = type(target.pipe).__name__
    rule = f"None for {kind}, whose sampler remembers earlier steps of a block"
    require(target.can_stitch, "stitch", rule, given["stitch"])
    steps = given["num_inference_steps"]
    rule = f"num_inference_steps, {steps}, with stitch"
    require(given["drafter_steps"] == steps, "drafter_steps", rule, given["drafter_steps"])
    ours, theirs = (dict(family.pipe.scheduler.config) for family in (target, drafter))
    require(ours == theirs, "the drafter's scheduler", f"the target's with stitch, {ours}", theirs)


def _rows_of_embeds(name: str, value: Any, size: int) -> list[Tensor] | None:
    """Embeddings by video, ``[1, tokens, channels]`` each."""
    if value is None:
        return None
    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    is_good = isinstance(value, Tensor) and value.ndim == 3 and value.shape[2] == size
    require(is_good and len(value) > 0, name, f"of the shape (videos, tokens, {size})", got)
    return list(value.split(1))


def _negative_texts(negative: Any, num_rows: int) -> list[str | None]:
    if negative is None or isinstance(negative, str):
        return [negative] * num_rows
    is_good = is_list(negative, lambda text: isinstance(text, str)) and len(negative) == num_rows
    rule = f"None, a string, or a list of {num_rows} strings, one per video"
    require(is_good, "negative_prompt", rule, negative)
    return list(negative)
