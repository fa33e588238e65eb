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

from mmspec.adapters.token_image import (
    ImageFamily,
    ImageLayout,
    TokenImageTarget,
    image_family,
)
from mmspec.assets import bundled_path
from mmspec.checks import is_number, require, require_known
from mmspec.drafters import build_drafter
from mmspec.drafters.jacobi import default_window
from mmspec.engine import Engine
from mmspec.law_config import LawConfig
from mmspec.lossy import GroupedAcceptance, OverlappingRows
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
from mmspec.window_schedule import WindowSchedule, window_schedule

#: Decoder -> rule. "sequential" is plain decoding through the same code, the yardstick.
DECODERS = {
    "sequential": "exact",
    "exact": "exact",
    "coupled": "coupled",
    "sjd": "sjd",
    "lossy-grouped": "lossy-grouped",
    "lossy-rows": "lossy-rows",
}
#: Rules that change the law, with a ``lenience``; see `mmspec.lossy`.
LOSSY = ("lossy-grouped", "lossy-rows")
OUTPUT_TYPES = ("pil", "pt", "np", "tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOutput:
    """What an image pipeline returns.

    Attributes:
        images: By ``output_type``: PIL images, a float tensor ``[B, 3, H, W]`` or array
            ``[B, H, W, 3]`` in [0, 1], or None for "tokens".
        tokens: Image codes ``[B, rows * columns]``; -1 where an interrupted call had none yet.
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
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        decoder: str = "exact",
        window: int | None = None,
        lenience: float | None = None,
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
            negative_prompt: What guidance steers away from: one text for all prompts or one for
                each; it may be empty. For Emu3; unused where guidance is off. None leaves it to
                the family: for Emu3 the token that begins the image and nothing before it.
            height: Height of the images in pixels, for families that make several sizes; None is
                the family's own.
            width: Width in pixels, likewise.
            guidance_scale: Classifier-free guidance; 1 switches it off. None is 3, or 1 for models
                that have none.
            num_images_per_prompt: Images of each prompt, next to each other in the output.
            generator: One for all images, or one per image. Image k of a list is the image that a
                single call with that generator gives.
            decoder: "exact" (same tokens as "sequential" with the same seed), "coupled" or "sjd"
                (same law, other tokens), "sequential" (plain decoding); "lossy-grouped" and
                "lossy-rows" change the law for fewer forwards (docs/image_decoders.md).
            window: Tokens per image and forward. None chooses it while running, by what widths
                bring and cost ("exact" only, for it moves no token); by the grid and the batch
                for the other decoders and with ``compile``.
            lenience: How far a lossy decoder may depart, from 0 (as "coupled" or "exact") to 1.
                For "lossy-grouped" the radius of a cluster of codes that stand for each other, in
                root mean square distances between two codes; for "lossy-rows" the share of the
                row above that need not be settled. None is the rule's own (`mmspec.lossy`).
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
        texts = as_list(prompt)
        negatives = _negatives(negative_prompt, len(texts))
        count = _count(num_images_per_prompt)
        pairs = [p for p in zip(texts, negatives, strict=True) for _ in range(count)]
        rule = _rule_of(decoder)
        check_lenience(lenience, rule)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
        no_pixels = getattr(self._family, "no_pixels", None)
        if no_pixels is not None and output_type != "tokens":
            raise ValueError(no_pixels)
        check_callback(callback_on_step_end)
        check_window(window)
        if guidance_scale is None:
            guidance_scale = 1.0 if hasattr(self._family, "no_guidance") else 3.0
        check_guidance(guidance_scale)
        require(isinstance(compile, bool), "compile", "True or False", compile)
        layout = self._family.layout(height, width)
        config = LawConfig(
            temperature=temperature, top_k=top_k, top_p=top_p, allowed=layout.allowed
        )
        # Looked at before guidance: a family without negative prompts says so in any case.
        negative_ids = [
            self._family.negative(self.processor, text, layout)
            for _, text in pairs
            if text is not None
        ]
        engine, _ = image_engine(
            self._family,
            layout,
            [self._family.prompt(self.processor, text, layout) for text, _ in pairs],
            rule=rule,
            law=build_law(config),
            window=1 if decoder == "sequential" else window,
            lenience=lenience,
            guidance_scale=guidance_scale,
            negatives=negative_ids or None,
            keys_B=row_keys(generator, len(pairs)),
            device=self.device,
            compile=compile,
        )
        bar, after_step = self._watch(len(pairs) * layout.num_tokens, callback_on_step_end)
        with bar:
            result = engine.run(after_step)
        return self._output(result, layout, output_type)

    def _prompt_ids(self, text: str) -> list[int]:
        """Token ids of a prompt for an image of the family's own size."""
        return self._family.prompt(self.processor, text, self._family.layout(None, None))

    def _output(self, result: Generation, layout: ImageLayout, output_type: str) -> ImageOutput:
        num_rows = len(result.units)
        units = torch.full((num_rows, layout.num_tokens), -1)
        steps = torch.full((num_rows, layout.num_tokens), -1)
        for row, of_row in enumerate(result.units):
            units[row, : len(of_row)] = torch.tensor(of_row, dtype=torch.long)
            taken = [s.index for s in result.steps for _ in range(s.num_emitted[row])]
            steps[row, : len(taken)] = torch.tensor(taken, dtype=torch.long)
        tokens = units[:, layout.code_index]
        images = None
        if output_type != "tokens" and not result.interrupted:
            pixels = self._family.decode(tokens.to(self.device), layout).cpu()
            images = _as_type(pixels, output_type)
        return ImageOutput(
            images=images,
            tokens=tokens,
            step_maps=steps[:, layout.code_index].view(num_rows, layout.rows, layout.columns),
            stats=result.stats,
            row_stats=result.row_stats,
            interrupted=result.interrupted,
        )


def image_engine(
    family: ImageFamily,
    layout: ImageLayout,
    prompts: Sequence[Sequence[int]],
    *,
    rule: str,
    law: Law,
    window: int | None,
    guidance_scale: float,
    keys_B: Tensor,
    device: torch.device,
    negatives: Sequence[Sequence[int]] | None = None,
    lenience: float | None = None,
    compile: bool = False,
) -> tuple[Engine, TokenRows]:
    """Wires the engine that writes one image per prompt; runs nothing.

    Args:
        family: The model.
        layout: How an image lies in the new tokens of a row.
        prompts: Token ids of each prompt.
        rule: A name of `mmspec.verify.RULES` or `LOSSY`.
        law: The law that tokens are drawn from.
        window: Tokens per image and forward; 1 is plain decoding, None chooses: while running
            for the exact rule, by the grid and the batch for others and for compiled forwards.
        guidance_scale: As in `TokenImageTarget`.
        keys_B: Noise keys, one per image.
        device: Where the model takes its input.
        negatives: As in `TokenImageTarget`.
        lenience: Of a lossy rule; None is its own.
        compile: Compile the model's forward.

    Raises:
        ValueError: If a row does not fit the model's context.
    """
    rows = TokenRows(
        prompts,
        max_new_tokens=[layout.num_tokens] * len(prompts),
        keys_B=keys_B,
        device=device,
    )
    # Other rules would follow the clock with their tokens, and a compiled forward compile anew.
    if window is None and (rule != "exact" or compile):
        window = default_window(layout.num_tokens, len(prompts))
    schedule: WindowSchedule | FixedSchedule
    if window is None:
        kind = (guidance_scale, law.is_greedy, family.backbone.dtype, str(device))
        schedule = window_schedule(family.backbone, kind, rows)
    else:
        schedule = FixedSchedule(window, lambda: rows.max_remaining)
    target = TokenImageTarget(
        family,
        rows,
        guidance_scale=guidance_scale,
        negatives=negatives,
        place=layout.place,
        compile=compile,
    )
    drafter = build_drafter(
        "none" if window == 1 else {"name": "jacobi", "stride": layout.stride},
        target=target,
        rows=rows,
        law=law,
        max_width=BUCKETS[-1] if window is None else window,
        shared_noise=rule in ("exact", "lossy-rows"),
    )
    made = _build_rule(rule, law, rows, family, layout, lenience)
    return Engine(target, drafter, made, schedule), rows


def _build_rule(
    name: str,
    law: Law,
    rows: TokenRows,
    family: ImageFamily,
    layout: ImageLayout,
    lenience: float | None,
) -> Any:
    """A rule by name; lossy ones are told what codes look like, or where they stand."""
    options: dict[str, Any] = {} if lenience is None else {"lenience": float(lenience)}
    if name == "lossy-grouped":
        codes = torch.arange(family.codebook_size, device=rows.lengths_B.device)
        codes_VH = family.embed_image(codes).detach().float()
        return GroupedAcceptance(law, rows, codes_VH=codes_VH, **options)
    if name == "lossy-rows":
        first = int(layout.code_index[0])
        return OverlappingRows(law=law, rows=rows, stride=layout.stride, first=first, **options)
    return build_rule(name, law, rows)


def _count(num_images_per_prompt: int) -> int:
    check_positive("num_images_per_prompt", num_images_per_prompt)
    return num_images_per_prompt


def _negatives(negative_prompt: Any, num_prompts: int) -> list[str | None]:
    """The negative prompt of each prompt; None where there is none.

    Raises:
        ValueError: If it is neither None, nor a string, nor one string per prompt.
    """
    if negative_prompt is None or isinstance(negative_prompt, str):
        return [negative_prompt] * num_prompts
    is_good = isinstance(negative_prompt, list | tuple) and len(negative_prompt) == num_prompts
    is_good = is_good and all(isinstance(text, str) for text in negative_prompt)
    rule = f"None, a string, or a list of {num_prompts} strings, one per prompt"
    require(is_good, "negative_prompt", rule, negative_prompt)
    return list(negative_prompt)


def check_lenience(lenience: Any, rule: str) -> None:
    """Refuses a lenience out of its range, or for a rule that has none.

    Raises:
        ValueError: With the value.
    """
    if lenience is None:
        return
    if rule not in LOSSY:
        raise ValueError(f"lenience is for {' and '.join(LOSSY)} only, got {lenience!r}")
    is_good = is_number(lenience) and 0 <= lenience <= 1
    require(is_good, "lenience", "None or a number between 0 and 1", lenience)


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
