"""Prompts of encoder-decoders: what the encoder reads, and what the decoder begins with."""

from collections.abc import Sequence
from typing import Any

from mmspec.adapters import encoder_decoder
from mmspec.adapters.image_features import FeatureCache
from mmspec.checks import require
from mmspec.forward import text_device
from mmspec.pipelines.vlm_inputs import images_by_request, opened
from mmspec.pipelines.writing import Prompt


def read_encoded(
    model: Any, processor: Any, requests: Sequence[Prompt], images: Any, cache: FeatureCache
) -> tuple[list[list[int]], dict[str, Any], dict[str, Any]]:
    """Runs the encoder over texts with an image each.

    Args:
        model: The encoder-decoder.
        processor: Its processor.
        requests: The prompts; the text is the encoder's where that reads any, else the decoder's.
        images: As `SpeculativeVLMPipeline` takes them.
        cache: What was made of images in earlier calls.

    Returns:
        The decoder's prompts, what `generate` would pass on, and the processor's inputs.

    Raises:
        ValueError: If a prompt is no text, has not exactly one image, or that cannot be read.
    """
    name = type(model).__name__
    given = images_by_request(images, len(requests))
    for index, (request, pictures) in enumerate(zip(requests, given, strict=True)):
        require(isinstance(request, str), f"prompt {index} of {name}", "a text", request)
        if len(pictures) != 1:
            raise ValueError(f"prompt {index} of {name} needs one image, got {len(pictures)}")
    shown = [opened(one, f"image 0 of prompt {k}") for k, [one] in enumerate(given)]
    ids: list[list[int]] = [[] for _ in requests]
    if encoder_decoder.FAMILIES[model.config.model_type].reads_text:
        # Encoders count positions from the left.
        encoded = processor(
            text=list(requests),
            images=shown,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
    else:
        ids = processor.tokenizer(list(requests), add_special_tokens=False)["input_ids"]
        encoded = processor.image_processor(shown, return_tensors="pt")
    inputs = dict(encoded.to(text_device(model), model.dtype))
    prepared = encoder_decoder.prepare_by_item(model, inputs, cache)
    return encoder_decoder.decoder_prompts(model, prepared, ids), prepared, inputs
