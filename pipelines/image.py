"""Text to image with autoregressive image models, by speculative Jacobi decoding."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from mmspec.adapters.token_image import TokenImageTarget, image_family
from mmspec.assets import bundled_path
from mmspec.checks import require, require_known
from mmspec.drafters import build_drafter
from mmspec.drafters.jacobi import default_window
from mmspec.engine import Engine
from mmspec.law_config import LawConfig
from mmspec.noise import row_keys
from mmspec.pipelines.base import (
    SpeculativePipeline,
    StepEnd,
    as_list,
    check_callback,
    check_guidance,
    check_positive,
    check_window,
)
from mmspec.records import Generation, Stats
from mmspec.rows import TokenRows
from mmspec.sampling import Law, build_law
from mmspec.schedule import FixedSchedule
from mmspec.tree import BUCKETS
from mmspec.verify import build_rule
from mmspec.window_schedule import window_schedule

#: Decoder -> rule. "sequential" is plain decoding through the same code, the yardstick.
DECODERS = {"sequential": "exact", "exact": "exact", "coupled": "coupled", "sjd": "sjd"}
OUTPUT_TYPES = ("pil", "pt", "np", "tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOutput:
    """What an image pipeline returns.

    Attributes:
        images: By ``output_type``: PIL images, a float tensor ``[B, 3, H, W]`` or array
            ``[B, H, W, 3]`` in [0, 1], or None for "tokens".
        tokens: Image codes ``[B, num_image_tokens]``; -1 where an interrupted call had none yet.
        step_maps: For each code the step in which it was committed, ``[B, rows, columns]``, -1
            where none: the picture of how much was accepted at once.
        stats: Figures over the batch.
        row_stats: Figures per image.
        interrupted: True if the call was stopped early; ``images`` is None then.
    """

    images: Any
    tokens: Tensor
    step_maps: Tensor
    stats: Stats
    row_stats: tuple[Stats, ...]
    interrupted: bool = False


class SpeculativeImagePipeline(SpeculativePipeline):
    """Autoregressive text-to-image models, several times faster for the same images.

    Example:
        >>> pipe = SpeculativeImagePipeline.from_pretrained("bundled:avatars")  # doctest: +SKIP
        >>> out = pipe("a pixel avatar with red hair", guidance_scale=3.0)  # doctest: +SKIP
        >>> out.images[0].save("avatar.png")  # doctest: +SKIP
    """

    def __init__(self, model: Any, processor: Any) -> None:
        """Wraps loaded objects; see `from_pretrained` and `from_model`."""
        super().__init__(model)
        self.processor = processor
        self._family = image_family(model)

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> "SpeculativeImagePipeline":
        """Loads a bundled model, a local folder or a hub repository of a plain transformers model.

        Args:
            id_or_path: ``"bundled:avatars"``, a folder, or a hub id.
            dtype: Floating-point type; float32 if None.
            device_map: As in transformers; needs accelerate.
            **kwargs: Passed to the model's ``from_pretrained``.

        Raises:
            ValueError: If the bundled name is unknown or the model is of no known family.
        """
        name = str(id_or_path)
        path = bundled_path(name) if name.startswith("bundled:") else id_or_path
        model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype or torch.float32, device_map=device_map, **kwargs
        )
        return cls(model, _load_processor(path))

    @classmethod
    def from_model(cls, model: Any, processor: Any) -> "SpeculativeImagePipeline":
        """Uses objects that are loaded already: a model and its processor or tokenizer."""
        return cls(model, processor)

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves the model and its processor as transformers does."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        guidance_scale: float = 3.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        decoder: str = "exact",
        window: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepEnd | None = None,
        compile: bool = False,
    ) -> ImageOutput:
        """Makes images.

        Args:
            prompt: One prompt or several.
            guidance_scale: Classifier-free guidance; 1 switches it off.
            num_images_per_prompt: Images of each prompt, next to each other in the output.
            generator: One for all images, or one per image. Image k of a list is the image that a
                single call with that generator gives.
            decoder: "exact" (same tokens as "sequential" with the same seed), "coupled" or "sjd"
                (same law, other tokens), "sequential" (plain decoding).
            window: Tokens per image and forward. None chooses it while running, by what widths
                bring and cost ("exact" only, for it moves no token); by the grid and the batch
                for the other decoders and with ``compile``.
            temperature: 0 is greedy.
            top_k: Keep the k most likely codes. transformers' own Janus keeps 50 unless told
                otherwise; here nothing is cut unless asked.
            top_p: Keep the smallest set with this mass.
            output_type: "pil", "pt", "np" or "tokens".
            callback_on_step_end: Called as ``f(pipeline, step_index, details)`` after each step;
                returning True interrupts.
            compile: Compile the model's forward (pays on long runs).

        Raises:
            ValueError: On any argument out of its range, before any forward.
        """
        prompts = [p for p in as_list(prompt) for _ in range(_count(num_images_per_prompt))]
        rule = _rule_of(decoder)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
        check_callback(callback_on_step_end)
        check_window(window)
        check_guidance(guidance_scale)
        require(isinstance(compile, bool), "compile", "True or False", compile)
        law = build_law(LawConfig(temperature=temperature, top_k=top_k, top_p=top_p))
        if decoder == "sequential":
            window = 1
        elif window is None and (decoder != "exact" or compile):
            window = default_window(self._family.num_image_tokens, len(prompts))
        engine, rows = self._engine(
            prompts, rule, law, window, guidance_scale, generator, compile, decoder
        )
        total = len(prompts) * self._family.num_image_tokens
        bar, after_step = self._watch(total, callback_on_step_end)
        with bar:
            result = engine.run(after_step)
        return self._output(result, rows, output_type)

    def _engine(
        self,
        prompts: list[str],
        rule: str,
        law: Law,
        window: int | None,
        guidance_scale: float,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        compile: bool,
        decoder: str,
    ) -> tuple[Engine, TokenRows]:
        family = self._family
        rows = TokenRows(
            [self._prompt_ids(text) for text in prompts],
            max_new_tokens=[family.num_image_tokens] * len(prompts),
            keys_B=row_keys(generator, len(prompts)),
            device=self.device,
        )
        schedule: Any
        if window is None:
            kind = (guidance_scale, law.is_greedy, self.dtype, str(self.device))
            schedule = window_schedule(self.model, kind, rows)
        else:
            schedule = FixedSchedule(window, lambda: rows.max_remaining)
        target = TokenImageTarget(family, rows, guidance_scale=guidance_scale, compile=compile)
        drafter = build_drafter(
            "none" if decoder == "sequential" else {"name": "jacobi", "stride": family.grid_width},
            target=target,
            rows=rows,
            law=law,
            max_width=BUCKETS[-1] if window is None else window,
            shared_noise=rule == "exact",
        )
        return Engine(target, drafter, build_rule(rule, law, rows), schedule), rows

    def _prompt_ids(self, text: str) -> list[int]:
        """Token ids of a prompt, the begin-of-image token last."""
        boi = self._family.boi_token_id  # type: ignore[attr-defined]
        if hasattr(self.processor, "image_processor"):
            if getattr(self.processor, "chat_template", None):
                content = [{"type": "text", "text": text}]
                text = self.processor.apply_chat_template(
                    [{"role": "user", "content": content}], add_generation_prompt=True
                )
            ids = self.processor(text=[text], generation_mode="image")["input_ids"][0]
        else:
            ids = self.processor(text)["input_ids"]
        ids = [int(token) for token in ids]
        return ids if ids[-1] == boi else [*ids, boi]

    def _output(self, result: Generation, rows: TokenRows, output_type: str) -> ImageOutput:
        family = self._family
        count = family.num_image_tokens
        tokens = torch.full((rows.num_rows, count), -1)
        maps = torch.full((rows.num_rows, count), -1)
        for row, codes in enumerate(result.units):
            tokens[row, : len(codes)] = torch.tensor(codes, dtype=torch.long)
            steps = [s.index for s in result.steps for _ in range(s.num_emitted[row])]
            maps[row, : len(steps)] = torch.tensor(steps, dtype=torch.long)
        images = None
        if output_type != "tokens" and not result.interrupted:
            pixels = family.decode(tokens.to(self.device)).cpu()
            images = _as_type(pixels, output_type)
        return ImageOutput(
            images=images,
            tokens=tokens,
            step_maps=maps.view(rows.num_rows, -1, family.grid_width),
            stats=result.stats,
            row_stats=result.row_stats,
            interrupted=result.interrupted,
        )


def _count(num_images_per_prompt: int) -> int:
    check_positive("num_images_per_prompt", num_images_per_prompt)
    return num_images_per_prompt


def _rule_of(decoder: str) -> str:
    require_known("decoder", decoder, DECODERS)
    return DECODERS[decoder]


def _load_processor(path: str | Path) -> Any:
    """The processor if the repository has one, else its tokenizer."""
    try:
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError):
        processor = None
    return processor if processor is not None else AutoTokenizer.from_pretrained(path)


def _as_type(pixels_BHWC: Tensor, output_type: str) -> Any:
    if output_type == "pt":
        return pixels_BHWC.permute(0, 3, 1, 2)
    array = pixels_BHWC.numpy()
    if output_type == "np":
        return array
    return [Image.fromarray(np.round(image * 255).astype(np.uint8)) for image in array]
