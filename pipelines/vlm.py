"""Images and text to text with a vision-language model of transformers."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmspec.adapters import encoder_decoder, vision_language
from mmspec.adapters.image_features import DEFAULT_CACHE_BYTES, PIXELS, FeatureCache
from mmspec.adapters.visual_prompts import VisualPrompts
from mmspec.assets import bundled_path
from mmspec.checks import require, require_known
from mmspec.drafters import DrafterSpec
from mmspec.drafters.trie import NgramTrie
from mmspec.pipelines.encoded import read_encoded
from mmspec.pipelines.turns import TurnCache, TurnOutput, check_cache, claimed, num_shared
from mmspec.pipelines.vlm_inputs import (
    Picture,
    ReadPrompt,
    Video,
    read_prompts,
    with_chat_template,
)
from mmspec.pipelines.writing import Plan, Prompt, WritingOptions, WritingPipeline, as_requests
from mmspec.speculation import build_engine
from mmspec.tree import BUCKETS


class SpeculativeVLMPipeline(WritingPipeline):
    """Vision-language models, faster for the same tokens.

    Attributes:
        processor: The model's processor.
        tokenizer: The processor's tokenizer.
        drafter: Used where a call names none.
        schedule: As in `mmspec.speculation.Settings`.
        image_cache: What vision towers, a drafter's included, made of images and videos in
            earlier calls.
        store: Texts that calls with ``drafter={"name": "ngram", "memory": pipe.store}`` draft from
            and add to.

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
        image_cache: FeatureCache | int = DEFAULT_CACHE_BYTES,
    ) -> None:
        """Wraps loaded objects; see `from_pretrained` and `from_model`.

        Raises:
            ValueError: If the model's family, the drafter or the schedule is unknown, or
                ``image_cache`` is no size.
        """
        super().__init__(model, processor.tokenizer, drafter=drafter, schedule=schedule)
        self.processor = with_chat_template(processor)
        if not isinstance(image_cache, FeatureCache):
            image_cache = FeatureCache(image_cache)
        self.image_cache: FeatureCache = image_cache
        self.clear_store()
        known = sorted([*vision_language.FAMILIES, *encoder_decoder.SEEING])
        require_known("model type", self.model.config.model_type, known)

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | Path,
        *,
        drafter: DrafterSpec = None,
        schedule: str | None = None,
        image_cache: FeatureCache | int = DEFAULT_CACHE_BYTES,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> "SpeculativeVLMPipeline":
        """Loads a bundled model, a local folder or a hub repository of a plain transformers model.

        Args:
            id_or_path: ``"bundled:captioner"``, a folder, or a hub id.
            drafter: Default of the calls; None is "ngram". ``"bundled:pages-drafter"``, as such or
                as ``model`` of a mapping, is loaded; as such it sees the images.
            schedule: As in `mmspec.speculation.Settings`; None picks by the rule.
            image_cache: Most bytes of features of images and videos to keep for later calls; 0
                keeps none. Or a cache, which pipelines may share.
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
        drafter = bundled_spec(drafter)
        model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype or "auto", device_map=device_map, **kwargs
        )
        drafter = with_loaded(drafter, dtype=dtype or "auto", device_map=device_map)
        return cls(model, processor, drafter=drafter, schedule=schedule, image_cache=image_cache)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        processor: Any,
        *,
        drafter: DrafterSpec = None,
        schedule: str | None = None,
        image_cache: FeatureCache | int = DEFAULT_CACHE_BYTES,
    ) -> "SpeculativeVLMPipeline":
        """Uses objects that are loaded already; see `from_pretrained` for the arguments."""
        return cls(model, processor, drafter=drafter, schedule=schedule, image_cache=image_cache)

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves the model and its processor as transformers does."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def clear_store(self) -> None:
        """Forgets the texts to draft from."""
        self.store = NgramTrie(max_draft=BUCKETS[-1])

    def remember(self, texts: Iterable[str]) -> None:
        """Adds texts that an earlier process wrote to the store, the oldest first."""
        for text in texts:
            self.store.observe(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        images: Picture | Sequence[Any] | None = None,
        videos: Video | Sequence[Any] | None = None,
        cache: TurnCache | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> TurnOutput | tuple[list[str], list[Tensor]]:
        """Answers prompts.

        Args:
            prompt: A chat (list of messages with ``role`` and ``content``), or a text with the
                processor's own image and video tokens where these stand; or a list of these. A part
                ``{"type": "image"}`` of a message may hold its image under ``image`` or ``path``, a
                part ``{"type": "video"}`` its video under ``video`` or ``path``, and under ``fps``
                its frames a second. Of an encoder-decoder, a text with exactly one image.
            images: Those that the prompt does not hold itself, in the order of their places: an
                image, a list of them, or for a list of prompts a list with an entry for each (None,
                an image, or a list). An image is a PIL image or the path of a file.
            videos: The same for videos. A video is a list of PIL images, or the path of a folder of
                frames (in the order of their names) or of a file, which torchcodec or av decodes.
            cache: An earlier output's ``cache``; what the prompt shares with it, tokens and images,
                is not read again.
            return_dict: False returns ``(texts, tokens)``.
            **options: ``max_new_tokens``, ``temperature``, ``drafter`` and all others of
                `SpeculativeTextPipeline.__call__`.

        Raises:
            ValueError: On any argument out of its range, an image or video that cannot be read, or
                as many of them as there are no places for; before any forward.
        """
        requests = as_requests(prompt)
        plan = self._plan(WritingOptions(**options), len(requests))
        if self.model.config.model_type in encoder_decoder.FAMILIES:
            output = self._write_encoded(plan, requests, images, videos, cache)
        else:
            output = self._write_shown(plan, requests, images, videos, cache)
        return output if return_dict else (output.texts, output.tokens)

    def _write_shown(
        self, plan: Plan, requests: list[Prompt], images: Any, videos: Any, cache: TurnCache | None
    ) -> TurnOutput:
        """Answers prompts that hold their images."""
        check_cache(cache, self.model, len(requests))
        has_videos = vision_language.FAMILIES[self.model.config.model_type].videos is not None
        blind = None if has_videos else type(self.model).__name__
        read = read_prompts(self.processor, requests, images, videos, blind=blind)
        self._warn_of_unknown_words(self.tokenizer, [one.text for one in read])
        inputs = self._encode(read)
        is_token_BP = inputs["attention_mask"].bool()
        pairs = zip(inputs["input_ids"], is_token_BP, strict=True)
        prompts = [ids[mask].tolist() for ids, mask in pairs]
        rows = self._rows(plan, prompts)
        seen = VisualPrompts.of(self.model, inputs, prompts)
        num_cached = seen.sound(self.model, num_shared(cache, seen.contents))
        seen.check(self.model, rows, num_cached, plan.options.prefill_chunk_size)
        engine = build_engine(
            self.model,
            rows,
            plan.law,
            plan.settings,
            cache=None if cache is None else cache.slots,
            num_cached=num_cached,
            extras=seen.extras(self.model, rows, self.image_cache, num_cached),
            prefill_chunk_size=plan.options.prefill_chunk_size,
        )
        cache = claimed(cache, self.model, engine, seen.contents, num_cached)
        written = self._write(plan, engine, rows)
        # The last token of a row, its root, has no keys yet.
        cache.tokens = [
            [*contents, *rows.new_tokens(row)][:-1] for row, contents in enumerate(seen.contents)
        ]
        return TurnOutput(**written, cache=cache)

    def _write_encoded(
        self, plan: Plan, requests: list[Prompt], images: Any, videos: Any, cache: TurnCache | None
    ) -> TurnOutput:
        """Answers prompts whose images an encoder reads."""
        name = type(self.model).__name__
        refused = {
            "cache": cache,
            "videos": videos,
            "prefill_chunk_size": plan.options.prefill_chunk_size,
        }
        for option, value in refused.items():
            require(value is None, f"{option} of {name}", "None for an encoder-decoder", value)
        prompts, prepared, inputs = read_encoded(
            self.model, self.processor, requests, images, self.image_cache
        )
        rows = self._rows(plan, prompts)
        extras = encoder_decoder.extras_in_generate(
            self.model, rows, prepared, None, inputs, self.image_cache
        )
        engine = build_engine(self.model, rows, plan.law, plan.settings, extras=extras)
        return TurnOutput(**self._write(plan, engine, rows), cache=None)

    def _encode(self, prompts: Sequence[ReadPrompt]) -> dict[str, Any]:
        """Prompts padded on the left and the model's visual inputs, on the processor's device."""
        bos = self.tokenizer.bos_token
        has_bos = [bos is not None and prompt.text.startswith(bos) for prompt in prompts]
        if len(set(has_bos)) > 1:
            raise ValueError(f"either all prompts begin with {bos!r} or none does")
        images: list[Any] = [prompt.images for prompt in prompts]
        clips = [clip for prompt in prompts for clip in prompt.videos]
        videos: dict[str, Any] = {}
        if clips and any(images) and self.model.config.model_type == "smolvlm":
            raise ValueError(
                "the processor of SmolVLM reads images or videos in a call, not both; pass the "
                "frames as images"
            )
        if clips:
            videos = {
                "videos": [clip.frames for clip in clips],
                "video_metadata": [clip.metadata for clip in clips],
                "do_sample_frames": False,
            }
        if self.model.config.model_type == "got_ocr2":
            # Its processor takes lists of images for the pages of a single placeholder.
            images = [image for own in images for image in own]
        encoded = self.processor(
            text=[prompt.text for prompt in prompts],
            images=images if any(images) else None,
            add_special_tokens=not has_bos[0],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **videos,
        )
        # Times between frames keep their precision.
        pixels = {name: encoded[name].to(self.dtype) for name in PIXELS.values() if name in encoded}
        return {**encoded, **pixels}


def bundled_spec(drafter: DrafterSpec) -> DrafterSpec:
    """A bundled drafter's name as a mapping; anything else as it is. Loads nothing.

    Raises:
        ValueError: If nothing bundled has the name.
    """
    if isinstance(drafter, str) and drafter.startswith("bundled:"):
        drafter = {"name": "model", "model": drafter, "visual_tokens": "all"}
    name = _bundled_model(drafter)
    if name is not None:
        bundled_path(name)
    return drafter


def with_loaded(drafter: DrafterSpec, **options: Any) -> DrafterSpec:
    """A drafter whose bundled model, if it names one, is loaded.

    Args:
        drafter: As `bundled_spec` returns it.
        **options: Of the model's ``from_pretrained``.
    """
    name = _bundled_model(drafter)
    if name is None:
        return drafter
    model = AutoModelForImageTextToText.from_pretrained(bundled_path(name), **options)
    assert isinstance(drafter, Mapping)
    return {**drafter, "model": model.eval()}


def _bundled_model(drafter: DrafterSpec) -> str | None:
    name = drafter.get("model") if isinstance(drafter, Mapping) else None
    return name if isinstance(name, str) and name.startswith("bundled:") else None
