"""Images and videos of prompts: found, opened, and put in the order of their places."""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import GotOcr2Processor
from transformers.utils import is_av_available, is_torchcodec_usable
from transformers.video_utils import VideoMetadata, load_video

from mmspec.checks import is_number, reason_of, require
from mmspec.pipelines.writing import Message, Prompt

Picture = Image.Image | str | Path
#: Frames, or the path of a folder of frames or of a file.
Video = Sequence[Image.Image] | str | Path

#: Where a part of a message may hold its image or video, by the names that transformers knows.
_SOURCES = {"image": ("image", "path", "url"), "video": ("video", "path", "url")}


#: The prompt that GOT-OCR2's processor writes around an image and a question.
_GOT_OCR2_CHAT = (
    "{{ '<|im_start|>%s<|im_end|>' }}"
    "{%% for message in messages %%}{{ '<|im_start|>' + message.role + '\n' }}"
    "{%% for part in message.content %%}"
    "{{ '<img>%s</img>\n' if part.type == 'image' else part.text }}"
    "{%% endfor %%}{{ '<|im_end|>' }}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\n' }}{%% endif %%}"
)


@dataclass(frozen=True, slots=True)
class Clip:
    """A video in memory.

    Attributes:
        frames: Its frames, an array or a list of images.
        metadata: When they were taken, as far as that is known.
    """

    frames: Any
    metadata: VideoMetadata


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """A prompt whose images and videos are in memory, in the order of their places.

    Attributes:
        text: What the processor reads.
        images: RGB.
        videos: Clips.
    """

    text: str
    images: list[Image.Image]
    videos: list[Clip]


def with_chat_template(processor: Any) -> Any:
    """A processor that reads chats, if it can be made to.

    GOT-OCR2's has no chat template: it writes one prompt for each image by itself.
    """
    if not isinstance(processor, GotOcr2Processor) or processor.chat_template is not None:
        return processor
    reads_chats = copy.copy(processor)
    reads_chats.chat_template = _GOT_OCR2_CHAT % (processor.system_query, processor.image_token)
    return reads_chats


def read_prompts(
    processor: Any,
    requests: Sequence[Prompt],
    images: Any,
    videos: Any,
    *,
    blind: str | None,
) -> list[ReadPrompt]:
    """Prompts as text, with their images and videos opened.

    Args:
        processor: The model's processor.
        requests: The prompts.
        images: Those that stand beside the prompts, as `SpeculativeVLMPipeline` takes them.
        videos: The same.
        blind: Name of the model if it reads no videos.

    Raises:
        ValueError: If a prompt is of another kind, or has not as many images or videos as places,
            or one cannot be read.
    """
    beside = {
        "image": images_by_request(images, len(requests)),
        "video": _by_request("videos", videos, len(requests), _as_videos),
    }
    return [
        _read(
            processor,
            request,
            {kind: given[index] for kind, given in beside.items()},
            f"prompt {index}",
            blind,
        )
        for index, request in enumerate(requests)
    ]


def images_by_request(images: Any, num_requests: int) -> list[list[Any]]:
    """The images given beside each prompt.

    Raises:
        ValueError: If a list of prompts does not come with one entry each.
    """
    return _by_request("images", images, num_requests, _as_images)


def _by_request(name: str, given: Any, num_requests: int, as_items: Any) -> list[list[Any]]:
    """What is given beside each prompt.

    Raises:
        ValueError: If a list of prompts does not come with one entry each.
    """
    if given is None:
        return [[] for _ in range(num_requests)]
    if num_requests == 1:
        items = as_items(given)
        # A single entry may stand in a list of entries, or alone.
        return [as_items(items[0]) if len(items) == 1 else items]
    is_many = isinstance(given, list | tuple) and len(given) == num_requests
    rule = f"a list with an entry for each of the {num_requests} prompts"
    require(is_many, name, rule, given)
    return [as_items(entry) for entry in given]


def _as_images(entry: Any) -> list[Any]:
    if entry is None:
        return []
    return list(entry) if isinstance(entry, list | tuple) else [entry]


def _as_videos(entry: Any) -> list[Any]:
    if _is_clip(entry):
        return [entry]
    return _as_images(entry)


def _is_clip(entry: Any) -> bool:
    """A list of frames, which is one video."""
    is_list = isinstance(entry, list | tuple) and len(entry) > 0
    return is_list and all(isinstance(frame, Image.Image) for frame in entry)


def _read(
    processor: Any,
    request: Prompt,
    given: Mapping[str, list[Any]],
    name: str,
    blind: str | None,
) -> ReadPrompt:
    """One prompt."""
    if isinstance(request, Tensor):
        raise ValueError(f"{name} is token ids; pass a text or a chat, which say where images go")
    if isinstance(request, str):
        text, found = request, {kind: [(one, None) for one in own] for kind, own in given.items()}
    else:
        if getattr(processor, "chat_template", None) is None:
            raise ValueError(
                f"{name} is a chat, and {type(processor).__name__} has no chat template; "
                "pass the text itself"
            )
        messages, found = _gathered(request, given, name)
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    for kind, own in found.items():
        token = getattr(processor, f"{kind}_token", None)
        places = text.count(token) if token is not None else 0
        if own and kind == "video" and blind is not None:
            raise ValueError(
                f"{name} has videos, and {blind} reads none; pass their frames as images"
            )
        if places != len(own):
            raise ValueError(
                f"{name} has {places} places for {kind}s ({token!r}) and {len(own)} {kind}s"
            )
    sample = _sampling(processor) if found["video"] else None
    return ReadPrompt(
        text=text,
        images=[opened(one, f"image {k} of {name}") for k, (one, _) in enumerate(found["image"])],
        videos=[
            _clip(one, fps, f"video {k} of {name}", sample)
            for k, (one, fps) in enumerate(found["video"])
        ],
    )


_Found = dict[str, list[tuple[Any, Any]]]


def _gathered(
    messages: Sequence[Message], given: Mapping[str, list[Any]], name: str
) -> tuple[list[dict[str, Any]], _Found]:
    """Messages as templates want them; images and videos at their places, with frame rates.

    Raises:
        ValueError: If places are without image or video, or the other way round.
    """
    rest = {kind: iter(own) for kind, own in given.items()}
    found: _Found = {kind: [] for kind in given}
    plain = []
    for message in messages:
        content = message.get("content") or []
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        kept = []
        for part in parts:
            kind = part.get("type")
            if kind not in found:
                kept.append(dict(part))
                continue
            held = [part[source] for source in _SOURCES[kind] if part.get(source) is not None]
            found[kind].append(((held or [next(rest[kind], None)])[0], part.get("fps")))
            kept.append({"type": kind})
        plain.append({**message, "content": kept})
    for kind, own in found.items():
        num_missing = sum(one is None for one, _ in own)
        num_left = len(list(rest[kind]))
        if num_missing or num_left:
            raise ValueError(
                f"{name} has {len(own)} places for {kind}s and "
                f"{len(own) - num_missing + num_left} {kind}s"
            )
    return plain, found


def opened(picture: Any, name: str) -> Image.Image:
    """An image in memory.

    Raises:
        ValueError: If it is none, cannot be read, or has no pixels; names its file.
    """
    is_file = isinstance(picture, str | Path)
    is_good = is_file or isinstance(picture, Image.Image)
    require(is_good, name, "a PIL image or the path of a file", picture)
    if is_file:
        name = f"{name} ({picture})"
    try:
        if is_file:
            with Image.open(picture) as image:
                read = image.convert("RGB")
        else:
            read = picture.convert("RGB")
    except Exception as error:  # decoders of broken data raise errors of many kinds
        raise ValueError(f"{name} cannot be read: {reason_of(error)}") from error
    require(min(read.size) > 0, f"size of {name}", "at least 1 x 1", read.size)
    return read


_Sampling = Callable[..., Any]


def _sampling(processor: Any) -> _Sampling | None:
    """How the processor picks frames of a file; None where it takes all."""
    own = processor.video_processor
    if not own.do_sample_frames:
        return None
    names = inspect.signature(own.sample_frames).parameters
    options = {name: getattr(own, name) for name in names if hasattr(own, name)}
    return functools.partial(own.sample_frames, **options)


def _clip(video: Any, fps: Any, name: str, sample: _Sampling | None) -> Clip:
    """A video in memory.

    Args:
        video: Frames or a path.
        fps: Frames a second; None where that is not known.
        name: What to call it.
        sample: As `_sampling` returns it.

    Raises:
        ValueError: If it is none, cannot be read, or its frame rate is no positive number.
    """
    rule = "None or a number > 0"
    require(fps is None or (is_number(fps) and fps > 0), f"fps of {name}", rule, fps)
    if isinstance(video, str | Path) and not Path(video).is_dir():
        return _decoded(Path(video), fps, name, sample)
    if isinstance(video, str | Path):
        # Names of frames count: 0001.png, 0002.png, ...
        paths = sorted(path for path in Path(video).iterdir() if path.is_file())
        frames = [opened(path, f"frame {path.name} of {name}") for path in paths]
    else:
        rule = "a list of PIL images, or the path of a folder of frames or of a file"
        require(_is_clip(video), name, rule, video)
        frames = [opened(frame, f"frame {k} of {name}") for k, frame in enumerate(video)]
    sizes = {frame.size for frame in frames}
    if len(sizes) != 1:
        raise ValueError(f"{name} must have frames of one size, got {len(sizes)} sizes")
    width, height = frames[0].size
    metadata = VideoMetadata(
        total_num_frames=len(frames),
        fps=fps,
        width=width,
        height=height,
        duration=None if fps is None else len(frames) / fps,
        frames_indices=list(range(len(frames))),
    )
    return Clip(frames, metadata)


def _decoded(path: Path, fps: Any, name: str, sample: _Sampling | None) -> Clip:
    """A video from a file."""
    if fps is not None:
        raise ValueError(f"fps of {name} is in its file; got {fps!r} as well")
    if not path.is_file():
        raise ValueError(f"{name} cannot be read: no file or folder {str(path)!r}")
    decoders = {"torchcodec": is_torchcodec_usable(decode="video"), "pyav": is_av_available()}
    backend = next((decoder for decoder, is_there in decoders.items() if is_there), None)
    if backend is None:
        raise ValueError(
            f"{name} is a file, and neither torchcodec nor av is installed to decode it; pass a "
            "list of frames or the path of a folder of frames"
        )
    try:
        frames, metadata = load_video(str(path), backend=backend, sample_indices_fn=sample)
    except Exception as error:
        raise ValueError(f"{name} ({path}) cannot be read: {reason_of(error)}") from error
    return Clip(frames, metadata)
