"""Decoder-only vision-language models as targets: images are prompt, every new token is text.

The target reads a prompt by its own forward, with its own image inputs; every later forward feeds
token ids only. What differs by family is small: whether the prompt's mask needs to know where the
images are, and how a token's place in its row becomes a position. Positions belong to a request
and are a table here; transformers keeps their end on the module, where the next request finds it.

Shape suffixes as in `mmspec.records`, and
    A  axes of a position: 1, or time, height, width     P  columns of the padded prompts
"""

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmspec.adapters.image_features import (
    PIXELS,
    FeatureCache,
    Features,
    VisualItem,
    cutter,
    encode,
    split,
)
from mmspec.adapters.visual_tokens import PromptImages
from mmspec.forward import PromptExtras
from mmspec.rows import TokenRows


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionLanguageFamily:
    """What is special about a family.

    Attributes:
        causal_type: The value of ``token_type_ids`` under which a token sees only what is before
            it; None where the family has no such input because all attention is causal.
        is_prefix: The whole prompt sees itself.
        first_position: Position of a row's first token.
        has_axes: Positions have axes (M-RoPE), and an image takes fewer of them than tokens.
        videos: Where videos come from: "own" pixels, "images" where their frames are read as
            images are, None where the family has none.
        video_token: Name in the config of the token that stands for a feature of a video.
    """

    causal_type: int | None = None
    is_prefix: bool = False
    first_position: int = 0
    has_axes: bool = False
    videos: str | None = None
    video_token: str = "video_token_id"


#: Model type in transformers -> family.
FAMILIES = {
    # The tokens of an image see each other.
    "gemma3": VisionLanguageFamily(causal_type=0),
    # Frames of a video stand as images do, with the same token.
    "glm_ocr": VisionLanguageFamily(has_axes=True, videos="own", video_token="image_token_id"),
    "got_ocr2": VisionLanguageFamily(),
    "idefics3": VisionLanguageFamily(),
    "internvl": VisionLanguageFamily(videos="images"),
    "llava": VisionLanguageFamily(),
    "llava_onevision": VisionLanguageFamily(videos="own"),
    "paddleocr_vl": VisionLanguageFamily(has_axes=True),
    "paligemma": VisionLanguageFamily(causal_type=1, is_prefix=True, first_position=1),
    "qwen2_5_vl": VisionLanguageFamily(has_axes=True, videos="own"),
    "qwen2_vl": VisionLanguageFamily(has_axes=True, videos="own"),
    "qwen3_vl": VisionLanguageFamily(has_axes=True, videos="own"),
    "smolvlm": VisionLanguageFamily(videos="images"),
}

#: What `generate` passes on for these models besides the inputs of a plain decoder. It runs the
#: vision tower itself and hands over what comes out.
GENERATE_INPUTS = frozenset(
    {"mm_encoder_outputs", "mm_token_type_ids", "second_per_grid_ts", "token_type_ids"}
)


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
        ValueError: On layers that cannot be given masks, on images and videos that cannot be told
            apart, or on images together with a cache that does not say where they are.
    """
    family = FAMILIES[model.config.model_type]
    encoded = inputs.get("mm_encoder_outputs") or {}
    encoded = {name: output for name, output in encoded.items() if output is not None}
    features = {modality: Features.of(output) for modality, output in encoded.items()}
    past = inputs.get("past_key_values")
    num_columns = 0 if past is None else past.get_seq_length()
    num_cached = is_token_BP[:, :num_columns].sum(1).tolist()
    if num_columns > 0:
        positions = _axes(model, rows, given) if family.has_axes else None
        has_images = _count(rows, _placeholders(model.config)) > 0
        is_unplaced = family.has_axes and has_images and positions is None
        _check_continued(type(model).__name__, family, bool(features), is_unplaced)
        inputs = {**inputs, "token_type_ids": None, "position_ids": positions}
        tokens = placeholder_tokens(model, features).values()
        if sum(sum(own.sizes) for own in features.values()) == _count(rows, tokens):
            # The images in the cache were given again.
            num_cached = [0] * rows.num_rows
        # A drafter would have to see the cached ones.
        given = {}
    return extras_of(model, rows, features, inputs, is_token_BP, given, num_cached=num_cached)


def extras_of(
    model: Any,
    rows: TokenRows,
    features: Mapping[str, Features],
    inputs: Mapping[str, Any],
    is_token_BP: Tensor,
    given: Mapping[str, Any],
    *,
    num_cached: Sequence[int],
    cache: FeatureCache | None = None,
) -> PromptExtras:
    """What the prompts of a request have besides token ids.

    Args:
        model: The loaded model.
        rows: The rows of the request.
        features: By modality, those of all placeholders that are not cached.
        inputs: Positions and token types of the whole prompts, as `generate` prepares them; None
            where positions are counted, and where all attention is causal.
        is_token_BP: Which columns of the prompts are tokens.
        given: What the model's processor made of the prompts.
        num_cached: Tokens of each row in the cache.
        cache: What other models' towers made in earlier calls; None has them run.

    Raises:
        ValueError: As in `extras_in_generate`.
    """
    family, name = FAMILIES[model.config.model_type], type(model).__name__
    placeholders = _placeholders(model.config)
    check_layers(model)
    tokens = placeholder_tokens(model, features)
    types = inputs.get("token_type_ids")
    types_BP = None
    if types is not None and family.causal_type is not None:
        types_BP = _right_padded(types, is_token_BP, family.causal_type)
    features_of = cutter(features, tokens, rows, num_cached)

    def part(starts: Sequence[int], counts: Sequence[int]) -> dict[str, Any]:
        read = features_of(starts, counts)
        # Behind a cache the mask is ours, and says what types would.
        if types_BP is not None and not any(starts):
            read["token_type_ids"] = types_BP[:, : max(counts)]
        return read

    def load(other: Any) -> Callable[[], PromptExtras]:
        if _placeholders(other.config) != placeholders or other.config.model_type not in FAMILIES:
            raise ValueError(
                f"{type(other).__name__} does not read the images of {name}'s prompts; use "
                "visual_tokens='none'"
            )
        # Nothing to read: what is refused is refused before the other tower runs.
        extras_in_generate(other, rows, {}, is_token_BP, {})
        return functools.partial(_extras_of_drafter, other, rows, is_token_BP, given, cache)

    whole: dict[str, Any] = {}
    if features:
        whole["mm_encoder_outputs"] = {kind: own.whole() for kind, own in features.items()}
    if types_BP is not None:
        whole["token_type_ids"] = types_BP
    is_whole = not any(num_cached)
    is_shown = any(given.get(pixels) is not None for pixels in PIXELS.values())
    extras = PromptExtras(
        inputs=whole if is_whole else {},
        part=part,
        wholes=_wholes(types_BP, family.causal_type, rows),
        place=_place(family, rows, inputs.get("position_ids"), is_token_BP),
        padding=family.causal_type or 0,
        placeholders=placeholders,
    )
    if not is_whole and not is_shown and _count(rows, placeholders) > 0:
        return extras
    images = PromptImages(
        model,
        rows,
        extras,
        tokens_of=functools.partial(placeholder_tokens, model),
        load=load,
        has_pictures=is_shown,
    )
    return replace(extras, seen_by=images.seen_by)


def _extras_of_drafter(
    model: Any,
    rows: TokenRows,
    is_token_BP: Tensor,
    given: Mapping[str, Any],
    cache: FeatureCache | None,
) -> PromptExtras:
    """What a model that is not the target makes of the whole prompts."""
    if cache is not None:
        modalities = [kind for kind, name in PIXELS.items() if given.get(name) is not None]
        items = split(model, given, placeholder_tokens(model, modalities))
        return extras_by_item(model, rows, given, items, cache, [0] * rows.num_rows)
    prepared = prepare(model, given, num_rows=rows.num_rows)
    return extras_in_generate(model, rows, prepared, is_token_BP, given)


def extras_by_item(
    model: Any,
    rows: TokenRows,
    given: Mapping[str, Any],
    items: Sequence[VisualItem],
    cache: FeatureCache,
    num_cached: Sequence[int],
) -> PromptExtras:
    """What prompts have besides token ids; images that are not known go through the tower alone.

    Args:
        model: The loaded model.
        rows: The rows of the request, one for each prompt.
        given: What a processor made of the prompts.
        items: The images and videos of what is not cached.
        cache: Features of earlier calls.
        num_cached: Tokens of each row that need not be read.

    Raises:
        ValueError: As in `extras_in_generate`.
    """
    blind = {name: value for name, value in given.items() if name not in PIXELS.values()}
    return extras_of(
        model,
        rows,
        encode(model, items, cache),
        prepare(model, blind),
        given["attention_mask"].bool(),
        given,
        num_cached=num_cached,
        cache=cache,
    )


def check_layers(model: Any) -> None:
    """Refuses a family whose forward takes one mask for layers of several kinds.

    Raises:
        ValueError: Naming the kinds.
    """
    kinds = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    if model.config.model_type == "paligemma" and len(kinds) > 1:
        raise ValueError(
            f"{type(model).__name__} with {', '.join(sorted(kinds))} layers takes no masks by layer"
        )


def placeholder_tokens(model: Any, modalities: Collection[str]) -> dict[str, int]:
    """The token that stands for a feature, by modality.

    Raises:
        ValueError: If images and videos are there, and one token stands for both.
    """
    names = {"image": "image_token_id", "video": FAMILIES[model.config.model_type].video_token}
    if len(modalities) > 1 and len(set(names.values())) == 1:
        raise ValueError(
            f"{type(model).__name__} has one token for images and for videos; pass only one of "
            "the two in a call"
        )
    return {modality: int(getattr(model.config, names[modality])) for modality in modalities}


def prepare(
    model: Any,
    given: Mapping[str, Any],
    *,
    num_rows: int | None = None,
    encoded: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `generate` makes of its inputs before its first forward: features, positions, a mask.

    Args:
        model: The model.
        given: Arguments of `generate`; those that are no inputs of the model are left out.
        num_rows: Rows that the prompts are repeated to; None is as many as there are.
        encoded: What its encoders make of inputs that are not given, as `generate` names it.

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

    wanted = {
        name: value
        for name, value in given.items()
        if isinstance(value, Tensor) or name == "second_per_grid_ts"
    }
    copies = 1 if num_rows is None else num_rows // len(wanted["input_ids"])
    model.generate(
        **wanted,
        **(encoded or {}),
        custom_generate=take,
        max_new_tokens=1,
        do_sample=True,
        num_beams=1,
        num_return_sequences=copies,
        use_cache=False,
    )
    return prepared


def _check_continued(
    name: str, family: VisionLanguageFamily, has_features: bool, is_unplaced: bool
) -> None:
    """Refuses turns whose positions or masks the cache does not determine."""
    remedy = "pass the whole prompt with all its images and no past_key_values"
    if is_unplaced:
        raise ValueError(
            f"past_key_values of {name} do not tell at which position an image ended; {remedy}, or "
            "mm_token_type_ids and the grids of the whole prompt as well"
        )
    if family.causal_type is not None and has_features:
        raise ValueError(
            f"new images behind past_key_values are not supported for {name}, whose images are "
            f"not read causally; {remedy}"
        )


def _axes(model: Any, rows: TokenRows, given: Mapping[str, Any]) -> Tensor | None:
    """Positions of whole prompts behind a cache, ``[A, B, P]``.

    None where the grids given are not those of all images and videos in the prompts.
    """
    ids, types = given.get("input_ids"), given.get("mm_token_type_ids")
    if ids is None or types is None or types.shape != ids.shape:
        return None
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    known = {name: given[name] for name in names if given.get(name) is not None}
    grids = [value for name, value in known.items() if name.endswith("thw")]
    merged = model.config.vision_config.spatial_merge_size**2
    if sum(int(grid.prod(-1).sum()) for grid in grids) != int((types != 0).sum()) * merged:
        return None
    positions, _ = model.base_model.get_rope_index(
        ids, mm_token_type_ids=types, attention_mask=given.get("attention_mask"), **known
    )
    whole: Tensor = positions.repeat_interleave(rows.num_rows // len(ids), dim=1)
    return whole


def _placeholders(config: Any) -> frozenset[int]:
    """Ids of the tokens in whose place a feature of an image or a video is read."""
    names = ("image_token_id", "video_token_id")
    ids = (getattr(config, name, None) for name in names)
    return frozenset(int(token) for token in ids if token is not None)


def _count(rows: TokenRows, tokens: Collection[int]) -> int:
    return sum(token in tokens for row in rows.host_tokens for token in row)


def _right_padded(values_BP: Tensor, is_token_BP: Tensor, padding: int) -> Tensor:
    """Values of padded columns as the rows of a slot cache stand: no padding before a token."""
    kept = [
        row[mask] for row, mask in zip(values_BP, is_token_BP.to(values_BP.device), strict=True)
    ]
    return pad_sequence(kept, batch_first=True, padding_value=padding)


def _wholes(
    types_BP: Tensor | None, causal_type: int | None, rows: TokenRows
) -> list[list[tuple[int, int]]]:
    """Spans of tokens that see each other whole, per row."""
    if types_BP is None:
        return [[] for _ in rows.prompt_lengths]
    pairs = zip(types_BP.tolist(), rows.prompt_lengths, strict=True)
    return [list(_spans(types[:length], causal_type)) for types, length in pairs]


def _spans(types: list[int], causal_type: int | None) -> Iterator[tuple[int, int]]:
    """Runs of tokens of another type than the causal one.

    Example:
        ``[0, 1, 1, 0, 1]`` with causal type 0: ``(1, 3)``, ``(4, 5)``.
    """
    place = 0
    for is_causal, run in itertools.groupby(types, lambda kind: kind == causal_type):
        count = len(list(run))
        if not is_causal:
            yield place, place + count
        place += count


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
