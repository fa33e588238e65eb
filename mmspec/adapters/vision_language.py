"""Decoder-only vision-language models as targets: images are prompt, every new token is text.

The target reads a prompt by its own forward, with its own image inputs; every later forward feeds
token ids only. What differs by family is small: whether the prompt's mask needs to know where the
images are, and how a token's place in its row becomes a position. Positions belong to a request
and are a table here; transformers keeps their end on the module, where the next request finds it.

Shape suffixes as in `mmspec.records`, and
    A  axes of a position: 1, or time, height, width     P  columns of the padded prompts
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmspec.adapters.visual_tokens import PromptImages
from mmspec.forward import PromptExtras
from mmspec.rows import TokenRows


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionLanguageFamily:
    """What is special about a family.

    Attributes:
        causal_type: The value of ``token_type_ids`` under which a token sees only what is before
            it; None where the family has no such input because all attention is causal.
        first_position: Position of a row's first token.
        has_axes: Positions have axes (M-RoPE), and an image takes fewer of them than tokens.
    """

    causal_type: int | None = None
    first_position: int = 0
    has_axes: bool = False


#: Model type in transformers -> family.
FAMILIES = {
    # The tokens of an image see each other.
    "gemma3": VisionLanguageFamily(causal_type=0),
    "glm_ocr": VisionLanguageFamily(has_axes=True),
    "got_ocr2": VisionLanguageFamily(),
    "idefics3": VisionLanguageFamily(),
    "internvl": VisionLanguageFamily(),
    "llava": VisionLanguageFamily(),
    "llava_onevision": VisionLanguageFamily(),
    "paddleocr_vl": VisionLanguageFamily(has_axes=True),
    # The whole prompt sees itself.
    "paligemma": VisionLanguageFamily(causal_type=1, first_position=1),
    "qwen2_5_vl": VisionLanguageFamily(has_axes=True),
    "qwen2_vl": VisionLanguageFamily(has_axes=True),
    "qwen3_vl": VisionLanguageFamily(has_axes=True),
    "smolvlm": VisionLanguageFamily(),
}

#: What `generate` passes on for these models besides the inputs of a plain decoder. It runs the
#: vision tower itself and hands over what comes out.
GENERATE_INPUTS = frozenset({"mm_encoder_outputs", "mm_token_type_ids", "token_type_ids"})


def extras_in_generate(
    model: Any,
    rows: TokenRows,
    inputs: Mapping[str, Any],
    is_token_BP: Tensor,
    given: Mapping[str, Any],
) -> PromptExtras:
    """What the prompts of a request that came through `generate` have besides token ids.

    Args:
        model: The loaded model.
        rows: The rows of the request.
        inputs: What `generate` passes on.
        is_token_BP: Which columns of the prompts are tokens.
        given: What `generate` was given.

    Raises:
        ValueError: On videos, on layers that cannot be given masks, or on images together with a
            cache that does not say where they are.
    """
    family = FAMILIES[model.config.model_type]
    name = type(model).__name__
    encoded = inputs.get("mm_encoder_outputs") or {}
    features = {key: value for key, value in encoded.items() if value is not None}
    if "video" in features:
        raise ValueError(f"videos are not supported for {name}; pass their frames as images")
    kinds = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    if model.config.model_type == "paligemma" and len(kinds) > 1:
        raise ValueError(f"{name} with {', '.join(sorted(kinds))} layers takes no masks by layer")
    placeholders = _placeholders(model.config)
    past = inputs.get("past_key_values")
    is_continued = past is not None and past.get_seq_length() > 0
    if is_continued:
        _check_continued(name, family, bool(features), _has_any(rows, placeholders))
    types = inputs.get("token_type_ids")
    more: dict[str, Any] = {}
    if features:
        more["mm_encoder_outputs"] = features
    if types is not None and family.causal_type is not None and not is_continued:
        more["token_type_ids"] = _right_padded(types, is_token_BP, family.causal_type)
    positions = None if is_continued else inputs.get("position_ids")

    def load(other: Any) -> Callable[[], PromptExtras]:
        if _placeholders(other.config) != placeholders or other.config.model_type not in FAMILIES:
            raise ValueError(
                f"{type(other).__name__} does not read the images of {name}'s prompts; use "
                "visual_tokens='none'"
            )
        # Nothing to read: what is refused is refused before the other tower runs.
        extras_in_generate(other, rows, {}, is_token_BP, {})

        def read() -> PromptExtras:
            theirs = prepare(other, given, num_rows=rows.num_rows)
            return extras_in_generate(other, rows, theirs, is_token_BP, given)

        return read

    extras = PromptExtras(
        inputs=more,
        place=_place(family, rows, positions, is_token_BP),
        padding=family.causal_type or 0,
        placeholders=placeholders,
    )
    if is_continued and _has_any(rows, placeholders):
        return extras
    images = PromptImages(
        model,
        rows,
        extras,
        load=load,
        has_pictures="pixel_values" in given,
    )
    return replace(extras, seen_by=images.seen_by)


def prepare(model: Any, given: Mapping[str, Any], *, num_rows: int | None = None) -> dict[str, Any]:
    """What `generate` makes of its inputs before its first forward: features, positions, a mask.

    Args:
        model: The model.
        given: Arguments of `generate`; those that are no tensors are left out.
        num_rows: Rows that the prompts are repeated to; None is as many as there are.

    Returns:
        What `generate` would pass on, with ``input_ids``.
    """
    prepared: dict[str, Any] = {}

    def take(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        prepared.update(model_kwargs, input_ids=input_ids)
        return input_ids

    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    copies = 1 if num_rows is None else num_rows // len(tensors["input_ids"])
    model.generate(
        **tensors,
        custom_generate=take,
        max_new_tokens=1,
        do_sample=True,
        num_beams=1,
        num_return_sequences=copies,
        use_cache=False,
    )
    return prepared


def _check_continued(
    name: str, family: VisionLanguageFamily, has_features: bool, has_images: bool
) -> None:
    """Refuses turns whose positions or masks the cache does not determine."""
    remedy = "pass the whole prompt with all its images and no past_key_values"
    if family.has_axes and has_images:
        raise ValueError(
            f"past_key_values of {name} do not tell at which position an image ended; {remedy}"
        )
    if family.causal_type is not None and has_features:
        raise ValueError(
            f"new images behind past_key_values are not supported for {name}, whose images are "
            f"not read causally; {remedy}"
        )


def _placeholders(config: Any) -> frozenset[int]:
    """Ids of the tokens in whose place a feature of an image or a video is read."""
    names = ("image_token_id", "video_token_id")
    ids = (getattr(config, name, None) for name in names)
    return frozenset(int(token) for token in ids if token is not None)


def _has_any(rows: TokenRows, tokens: frozenset[int]) -> bool:
    return any(not tokens.isdisjoint(row) for row in rows.host_tokens)


def _right_padded(values_BP: Tensor, is_token_BP: Tensor, padding: int) -> Tensor:
    """Values of padded columns as the rows of a slot cache stand: no padding before a token."""
    kept = [
        row[mask] for row, mask in zip(values_BP, is_token_BP.to(values_BP.device), strict=True)
    ]
    return pad_sequence(kept, batch_first=True, padding_value=padding)


def _place(
    family: VisionLanguageFamily,
    rows: TokenRows,
    positions: Tensor | None,
    is_token_BP: Tensor,
) -> Callable[[Tensor], Tensor] | None:
    """How places in a row become positions; None where they are the same.

    Args:
        family: The family.
        rows: The rows.
        positions: Of the prompts, as `generate` prepared them: ``[4, B, P]`` with a first axis that
            counts tokens, or ``[B, P]``.
        is_token_BP: Which columns of the prompts are tokens.
    """
    if not family.has_axes or positions is None or positions.ndim == 2:
        first = family.first_position
        return None if first == 0 else lambda positions_BN: positions_BN + first
    device = rows.lengths_B.device
    axes = (_right_padded(axis_BP, is_token_BP, 0) for axis_BP in positions[-3:])
    table_ABP = torch.stack(list(axes)).to(device)
    last_B1 = rows.prompt_lengths_B[:, None] - 1
    end_AB1 = table_ABP.gather(2, last_B1.expand(len(table_ABP), -1, -1))

    def place(positions_BN: Tensor) -> Tensor:
        index = positions_BN.clamp(max=table_ABP.shape[2] - 1)
        read = table_ABP.gather(2, index.expand(len(table_ABP), -1, -1))
        # Behind the prompt every axis counts on from where it ended.
        return torch.where(positions_BN <= last_B1, read, end_AB1 + positions_BN - last_B1)

    return place
