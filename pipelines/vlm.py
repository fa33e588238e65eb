"""Images and text to text with a vision-language model of transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmspec.adapters import vision_language
from mmspec.assets import bundled_path
from mmspec.checks import require, require_known
from mmspec.drafters import DrafterSpec
from mmspec.pipelines.writing import (
    Message,
    Prompt,
    WritingOptions,
    WritingPipeline,
    WrittenOutput,
    as_requests,
)
from mmspec.speculation import build_engine

Picture = Image.Image | str | Path

#: Where a part of a message may hold its image, by the names that transformers knows.
_SOURCES = ("image", "path", "url")


class SpeculativeVLMPipeline(WritingPipeline):
    """Vision-language models, faster for the same tokens.

    Attributes:
        processor: The model's processor.
        tokenizer: The processor's tokenizer.
        drafter: Used where a call names none.
        schedule: As in `mmspec.speculation.Settings`.

    Example:
        >>> pipe = SpeculativeVLMPipeline.from_pretrained("bundled:pages")  # doctest: +SKIP
        >>> parts = [{"type": "image"}, {"type": "text", "text": "Convert to Markdown."}]
        >>> chat = [{"role": "user", "content": parts}]
        >>> pipe(chat, images="page.png").texts[0]  # doctest: +SKIP
        '# Title'
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        drafter: DrafterSpec = None,
        schedule: str | None = None,
    ) -> None:
        """Wraps loaded objects; see `from_pretrained` and `from_model`.

        Raises:
            ValueError: If the model's family, the drafter or the schedule is unknown.
        """
        super().__init__(model, processor.tokenizer, drafter=drafter, schedule=schedule)
        self.processor = processor
        known = sorted(vision_language.FAMILIES)
        require_known("model type", self.model.config.model_type, known)

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | Path,
        *,
        drafter: DrafterSpec = None,
        schedule: str | None = None,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> "SpeculativeVLMPipeline":
        """Loads a bundled model, a local folder or a hub repository of a plain transformers model.

        Args:
            id_or_path: ``"bundled:pages"``, a folder, or a hub id.
            drafter: Default of the calls; None is "ngram".
            schedule: As in `mmspec.speculation.Settings`; None picks by the rule.
            dtype: Floating-point type; None is the checkpoint's.
            device_map: As in transformers; needs accelerate.
            **kwargs: Passed to the model's ``from_pretrained``.

        Raises:
            ValueError: If the bundled name, the model's family, the drafter or the schedule is
                unknown.
        """
        name = str(id_or_path)
        path = bundled_path(name) if name.startswith("bundled:") else id_or_path
        processor = AutoProcessor.from_pretrained(path)
        model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype or "auto", device_map=device_map, **kwargs
        )
        return cls(model, processor, drafter=drafter, schedule=schedule)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        processor: Any,
        *,
        drafter: DrafterSpec = None,
        schedule: str | None = None,
    ) -> "SpeculativeVLMPipeline":
        """Uses objects that are loaded already; see `from_pretrained` for the arguments."""
        return cls(model, processor, drafter=drafter, schedule=schedule)

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves the model and its processor as transformers does."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        images: Picture | Sequence[Any] | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> WrittenOutput | tuple[list[str], list[Tensor]]:
        """Answers prompts.

        Args:
            prompt: A chat (list of messages with ``role`` and ``content``), or a text with the
                processor's own image token where an image stands; or a list of these. A part
                ``{"type": "image"}`` of a message may hold its image under ``image`` or ``path``.
            images: Those that the prompt does not hold itself, in the order of their places: an
                image, a list of them, or for a list of prompts a list with an entry for each (None,
                an image, or a list). An image is a PIL image or the path of a file.
            return_dict: False returns ``(texts, tokens)``.
            **options: ``max_new_tokens``, ``temperature``, ``drafter`` and all others of
                `SpeculativeTextPipeline.__call__` but ``cache``.

        Raises:
            ValueError: On any argument out of its range, an image that cannot be read, or as many
                images as there are no places for; before any forward.
        """
        requests = as_requests(prompt)
        plan = self._plan(WritingOptions(**options), len(requests))
        given = _images_by_request(images, len(requests))
        read = [
            self._read(request, own, index)
            for index, (request, own) in enumerate(zip(requests, given, strict=True))
        ]
        inputs = self._encode([text for text, _ in read], [pictures for _, pictures in read])
        prepared = vision_language.prepare(self.model, inputs)
        is_token_BP = inputs["attention_mask"].bool()
        pairs = zip(inputs["input_ids"], is_token_BP, strict=True)
        rows = self._rows(plan, [ids[mask].tolist() for ids, mask in pairs])
        extras = vision_language.extras_in_generate(self.model, rows, prepared, is_token_BP, inputs)
        engine = build_engine(self.model, rows, plan.law, plan.settings, extras=extras)
        output = WrittenOutput(**self._write(plan, engine, rows))
        return output if return_dict else (output.texts, output.tokens)

    def _read(
        self, request: Prompt, given: list[Picture], index: int
    ) -> tuple[str, list[Image.Image]]:
        """The text of one prompt, and its images in the order of their places."""
        name = f"prompt {index}"
        if isinstance(request, Tensor):
            raise ValueError(
                f"{name} is token ids; pass a text or a chat, which say where images go"
            )
        if isinstance(request, str):
            text, pictures = request, given
        else:
            if getattr(self.processor, "chat_template", None) is None:
                raise ValueError(
                    f"{name} is a chat, and {type(self.processor).__name__} has no chat template; "
                    "pass the text itself"
                )
            messages, pictures = _with_images(request, given, name)
            text = self.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        token = self.processor.image_token
        places = text.count(token)
        if places != len(pictures):
            raise ValueError(
                f"{name} has {places} places for images ({token!r}) and {len(pictures)} images"
            )
        return text, [opened(one, f"image {k} of {name}") for k, one in enumerate(pictures)]

    def _encode(self, texts: list[str], pictures: list[list[Image.Image]]) -> dict[str, Any]:
        """Prompts padded on the left and the model's image inputs, on its device."""
        bos = self.tokenizer.bos_token
        has_bos = [bos is not None and text.startswith(bos) for text in texts]
        if len(set(has_bos)) > 1:
            raise ValueError(f"either all prompts begin with {bos!r} or none does")
        encoded = self.processor(
            text=texts,
            images=pictures if any(pictures) else None,
            add_special_tokens=not has_bos[0],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        return dict(encoded.to(self.device, self.dtype))


def _images_by_request(images: Any, num_requests: int) -> list[list[Picture]]:
    """The images given beside each prompt.

    Raises:
        ValueError: If a list of prompts does not come with one entry of images each.
    """
    if images is None:
        return [[] for _ in range(num_requests)]
    entries = images if isinstance(images, list | tuple) else [images]
    if num_requests == 1 and not (len(entries) == 1 and isinstance(entries[0], list | tuple)):
        return [list(entries)]
    rule = f"a list with an entry for each of the {num_requests} prompts"
    require(len(entries) == num_requests, "images", rule, images)
    return [_as_pictures(entry) for entry in entries]


def _as_pictures(entry: Any) -> list[Picture]:
    if entry is None:
        return []
    return list(entry) if isinstance(entry, list | tuple) else [entry]


def _with_images(
    messages: Sequence[Message], given: list[Picture], name: str
) -> tuple[list[dict[str, Any]], list[Picture]]:
    """Messages as templates want them, and the images at their places.

    Raises:
        ValueError: If places are without image, or images without place.
    """
    rest, pictures = iter(given), []
    plain = []
    for message in messages:
        content = message.get("content") or []
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        kept = []
        for part in parts:
            if part.get("type") != "image":
                kept.append(dict(part))
                continue
            held = [part[source] for source in _SOURCES if part.get(source) is not None]
            pictures += held[:1] or [next(rest, None)]
            kept.append({"type": "image"})
        plain.append({**message, "content": kept})
    num_missing = sum(picture is None for picture in pictures)
    num_left = len(list(rest))
    if num_missing or num_left:
        raise ValueError(
            f"{name} has {len(pictures)} places for images and "
            f"{len(pictures) - num_missing + num_left} images"
        )
    return plain, pictures


def opened(picture: Any, name: str) -> Image.Image:
    """An image in memory.

    Raises:
        ValueError: If it is none, or its file cannot be read.
    """
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    require(isinstance(picture, str | Path), name, "a PIL image or the path of a file", picture)
    try:
        with Image.open(picture) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
