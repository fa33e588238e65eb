"""Text to image with autoregressive image models, by speculative Jacobi decoding."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from mmspec.adapters.causal_lm import check_fits
from mmspec.adapters.token_image import ImageLayout, image_family
from mmspec.assets import bundled_path
from mmspec.checks import require, require_known
from mmspec.denoiser import FILE_NAME, Denoiser
from mmspec.law_config import LawConfig
from mmspec.ledger import Ledger
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
from mmspec.pipelines.image_decoders import (
    DECODERS,
    DENOISE,
    DrafterMaker,
    check_batch_size,
    check_drafter,
    check_lenience,
    image_engine,
)
from mmspec.records import Generation, Outcome, Stats, StepRecord
from mmspec.rows import TokenRows
from mmspec.sampling import build_law

ImageDecoder = Callable[[Tensor], Tensor]
ImageEnd = Callable[[Any, int, "ImageOutput"], None]
OUTPUT_TYPES = ("pil", "pt", "np", "tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOutput:
    """What an image pipeline returns.

    Attributes:
        images: By ``output_type``: PIL images, a float tensor ``[B, 3, H, W]`` or array
            ``[B, H, W, 3]`` in [0, 1], or None for "tokens" and for a call that handed each image
            to ``callback_on_image_end``.
        tokens: Image codes ``[B, rows * columns]``; -1 where an interrupted call had none yet.
        step_maps: For each code the step of its image in which it was committed, ``[B, rows,
            columns]``, -1 where none: the picture of how much was accepted at once.
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

    Attributes:
        denoiser: What a model that was trained on noisy embeddings has beside its weights, for
            ``decoder="jacobi-denoise"``; None for other models.

    Example:
        >>> pipe = SpeculativeImagePipeline.from_pretrained("bundled:avatars")  # doctest: +SKIP
        >>> out = pipe("a pixel avatar with red hair", guidance_scale=3.0)  # doctest: +SKIP
        >>> out.images[0].save("avatar.png")  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        image_decoder: ImageDecoder | None = None,
        denoiser: Denoiser | None = None,
    ) -> None:
        """Wraps loaded objects; see `from_pretrained` and `from_model`."""
        super().__init__(model)
        self.processor = processor
        self.denoiser = denoiser
        self._family = image_family(model)
        self._no_pixels = getattr(self._family, "no_pixels", None)
        if image_decoder is not None:
            require(callable(image_decoder), "image_decoder", "None or callable", image_decoder)
            rule = f"None for {type(model).__name__}, which has a pixel decoder of its own"
            require(self._no_pixels is not None, "image_decoder", rule, image_decoder)
            self._no_pixels = None
        self.image_decoder = image_decoder

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        image_decoder: ImageDecoder | None = None,
        **kwargs: Any,
    ) -> "SpeculativeImagePipeline":
        """Loads a bundled model, a local folder or a hub repository of a plain transformers model.

        Args:
            id_or_path: ``"bundled:avatars"``, a folder, or a hub id.
            dtype: Floating-point type; float32 if None.
            device_map: As in transformers; needs accelerate.
            image_decoder: As in `from_model`.
            **kwargs: Passed to the model's ``from_pretrained``.

        Raises:
            ValueError: If the bundled name is unknown or the model is of no known family.
        """
        name = str(id_or_path)
        path = bundled_path(name) if name.startswith("bundled:") else id_or_path
        model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype or torch.float32, device_map=device_map, **kwargs
        )
        return cls(model, _load_processor(path), image_decoder, Denoiser.load(path))

    @classmethod
    def from_model(
        cls,
        model: Any,
        processor: Any,
        *,
        image_decoder: ImageDecoder | None = None,
        denoiser: Denoiser | None = None,
    ) -> "SpeculativeImagePipeline":
        """Uses objects that are loaded already.

        Args:
            model: The model.
            processor: Its processor or tokenizer.
            image_decoder: Makes pixels ``[B, 3, height, width]`` in [-1, 1] of codes ``[B, rows,
                columns]``, as the decoder of a VQ model does; for families that have none in
                transformers.
            denoiser: For ``decoder="jacobi-denoise"``, of a model that was trained on noisy
                embeddings.

        Raises:
            ValueError: If the model is of no known family, or has a pixel decoder of its own.
        """
        return cls(model, processor, image_decoder, denoiser)

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves the model and its processor as transformers does, and the denoiser beside them."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        if self.denoiser is not None:
            self.denoiser.save(folder)

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
        batch_size: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        decoder: str = "exact",
        drafter: DrafterMaker | None = None,
        window: int | None = None,
        lenience: float | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepEnd | None = None,
        callback_on_image_end: ImageEnd | None = None,
        compile: bool = False,
    ) -> ImageOutput:
        """Makes images.

        Args:
            prompt: One prompt or several.
            negative_prompt: What guidance steers away from: one text for all prompts or one for
                each; it may be empty. For Emu3 and Chameleon; unused where guidance is off. None
                leaves it to the family: for Emu3 the token that begins the image and nothing
                before it, for Chameleon the beginning of the sequence before that.
            height: Height of the images in pixels, for families that make several sizes; None is
                the family's own.
            width: Width in pixels, likewise.
            guidance_scale: Classifier-free guidance; 1 switches it off. None is 3, or 1 for models
                that have none.
            num_images_per_prompt: Images of each prompt, next to each other in the output.
            batch_size: Images that are under way together, at most; where one is complete, the
                next begins in its place, so that forwards stay full to the end. None is all
                images. Fewer than all for the exact decoders only. No image depends on it.
            generator: One for all images, or one per image. Image k of a list is the image that a
                single call with that generator gives.
            decoder: "exact" (same tokens as "sequential" with the same seed), "jacobi-denoise"
                (likewise, with noise in the window; for models fine-tuned for it), "coupled" or
                "sjd" (same law, other tokens), "sequential" (plain decoding); "lossy-grouped" and
                "lossy-rows" change the law for fewer forwards (docs/image_decoders.md).
            drafter: Makes another drafter than the Jacobi window, for "exact" (docs/drafters.md,
                "Writing one"). None is the window.
            window: Tokens per image and forward. None chooses it while running, by what widths
                bring and cost (exact decoders only, for it moves no token); by the grid and the
                batch for the other decoders, with ``drafter`` and with ``compile``.
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
                returning True interrupts. ``details["preview"]()`` draws the images so far, grey
                where nothing is yet: a list of PIL images, at the price of a pixel decoding.
            callback_on_image_end: Called as ``f(pipeline, image_index, output)`` when an image is
                complete, before the callback of the step; ``output`` holds this image alone. The
                call then returns no images, so that those of a long run need not be kept.
            compile: Compile the model's forward (pays on long runs).

        Raises:
            ValueError: On any argument out of its range, before any forward.
        """
        texts = as_list(prompt)
        negatives = _negatives(negative_prompt, len(texts))
        count = _count(num_images_per_prompt)
        pairs = [p for p in zip(texts, negatives, strict=True) for _ in range(count)]
        rule = _rule_of(decoder)
        denoiser = self._denoiser_of(decoder)
        check_lenience(lenience, rule)
        check_drafter(drafter, decoder)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
        if self._no_pixels is not None and output_type != "tokens":
            raise ValueError(self._no_pixels)
        check_batch_size(batch_size, decoder, len(pairs))
        check_callback(callback_on_step_end)
        check_callback(
            callback_on_image_end, "callback_on_image_end", "pipeline, image_index, output"
        )
        check_window(window)
        if guidance_scale is None:
            guidance_scale = 1.0 if hasattr(self._family, "no_guidance") else 3.0
        check_guidance(guidance_scale)
        require(isinstance(compile, bool), "compile", "True or False", compile)
        layout = self._family.layout(height, width)
        config = LawConfig(
            temperature=temperature, top_k=top_k, top_p=top_p, allowed=layout.allowed
        )
        given = [text for texts_of_row in pairs for text in texts_of_row if text is not None]
        self._warn_of_unknown_words(self.processor, given)
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
            denoiser=denoiser,
            compile=compile,
            num_rows=batch_size,
            make_drafter=drafter,
        )
        preview = functools.partial(self._preview, engine.ledger, layout, {})
        watch = self._watch(
            len(pairs) * layout.num_tokens, callback_on_step_end, more={"preview": preview}
        )
        with watch as after_step:

            def after(record: StepRecord, outcome: Outcome) -> bool:
                if callback_on_image_end is not None:
                    for index in outcome.ended:
                        image = engine.ledger.generation(requests=[index])
                        callback_on_image_end(self, index, self._output(image, layout, output_type))
                return after_step(record, outcome)

            result = engine.run(after)
        if callback_on_image_end is not None:
            output_type = "tokens"
        return self._output(result, layout, output_type)

    def _denoiser_of(self, decoder: str) -> Denoiser | None:
        """The denoiser that a decoder needs; None for decoders that need none.

        Raises:
            ValueError: If the model has none.
        """
        if decoder != DENOISE:
            return None
        if self.denoiser is None:
            raise ValueError(
                f"decoder={decoder!r} needs a model that was fine-tuned on noisy embeddings, with "
                f"{FILE_NAME} in its folder; this one has none"
            )
        return self.denoiser.to(self.device)

    def _prompt_ids(self, text: str) -> list[int]:
        """Token ids of a prompt for an image of the family's own size."""
        return self._family.prompt(self.processor, text, self._family.layout(None, None))

    def check_request(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        """Refuses what a call would refuse about one image, and runs nothing.

        Args:
            prompt: As in the call, and so are the others.
            negative_prompt: One text or None.
            height: Pixels.
            width: Pixels.

        Raises:
            ValueError: If the prompt is empty or too long, or the family does not make such images.
        """
        as_list(prompt)
        layout = self._family.layout(height, width)
        prompts = [self._family.prompt(self.processor, prompt, layout)]
        if negative_prompt is not None:
            prompts.append(self._family.negative(self.processor, negative_prompt, layout))
        budgets = [layout.num_tokens] * len(prompts)
        keys_B = torch.zeros(len(prompts), dtype=torch.long)
        rows = TokenRows(prompts, max_new_tokens=budgets, keys_B=keys_B)
        check_fits(self._family.backbone, rows)

    def _preview(
        self, ledger: Ledger, layout: ImageLayout, drawn: dict[int, Image.Image]
    ) -> list[Image.Image]:
        """All images so far; those that are complete are kept in ``drawn``."""
        if self._no_pixels is not None:
            raise ValueError(self._no_pixels)
        units = ledger.units
        begun = [index for index, codes in enumerate(units) if codes and index not in drawn]
        sketches = self._sketches([units[index] for index in begun], layout) if begun else []
        found = dict(zip(begun, sketches, strict=True))
        complete = [index for index in begun if len(units[index]) == layout.num_tokens]
        drawn |= {index: found[index] for index in complete}
        shown = drawn | found
        grey = Image.new("RGB", next(iter(shown.values())).size, (128, 128, 128))
        return [shown.get(index, grey) for index in range(len(units))]

    def _sketches(self, units: Sequence[Sequence[int]], layout: ImageLayout) -> list[Image.Image]:
        """Images of the new tokens of rows, grey where there are none yet."""
        tokens = _codes(units, layout)
        is_there = tokens >= 0
        # A decoder looks around: the last code in the place of those to come keeps edges quiet.
        last = tokens.gather(1, (is_there.sum(1, keepdim=True) - 1).clamp(min=0)).clamp(min=0)
        pixels = self._decode(torch.where(is_there, tokens, last), layout)
        mask = is_there.view(-1, 1, layout.rows, layout.columns).float()
        mask = torch.nn.functional.interpolate(mask, size=pixels.shape[1:3])
        drawn: list[Image.Image] = _as_type(
            torch.where(mask.permute(0, 2, 3, 1) > 0, pixels, 0.5), "pil"
        )
        return drawn

    def _decode(self, tokens: Tensor, layout: ImageLayout) -> Tensor:
        """Codes ``[B, rows * columns]`` to pixels ``[B, height, width, 3]`` in [0, 1], on the CPU.

        Raises:
            ValueError: If a supplied decoder returns something else.
        """
        tokens = tokens.to(self.device)
        if self.image_decoder is None:
            return self._family.decode(tokens, layout).cpu()
        pixels = self.image_decoder(tokens.view(-1, layout.rows, layout.columns))
        shape = list(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        is_good = isinstance(shape, list) and len(shape) == 4 and shape[:2] == [len(tokens), 3]
        rule = f"of the shape [{len(tokens)}, 3, height, width]"
        require(is_good, "the pixels that image_decoder returns", rule, shape)
        return (pixels.permute(0, 2, 3, 1).float().cpu() * 0.5 + 0.5).clamp(0, 1)

    def _output(self, result: Generation, layout: ImageLayout, output_type: str) -> ImageOutput:
        steps = [
            [step for step, count in enumerate(counts) for _ in range(count)]
            for counts in result.emitted
        ]
        tokens = _codes(result.units, layout)
        images = None
        if output_type != "tokens" and not result.interrupted:
            images = _as_type(self._decode(tokens, layout), output_type)
        return ImageOutput(
            images=images,
            tokens=tokens,
            step_maps=_codes(steps, layout).view(-1, layout.rows, layout.columns),
            stats=result.stats,
            row_stats=result.row_stats,
            interrupted=result.interrupted,
        )


def _codes(units: Sequence[Sequence[int]], layout: ImageLayout) -> Tensor:
    """What belongs to codes of what belongs to the new tokens of rows, -1 where nothing is yet."""
    laid = torch.full((len(units), layout.num_tokens), -1)
    for row, of_row in enumerate(units):
        laid[row, : len(of_row)] = torch.tensor(of_row, dtype=torch.long)
    return laid[:, layout.code_index]


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
