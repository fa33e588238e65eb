"""Prompts with images and videos of a vision-language model, content by content.

Where a call may be the turn of a conversation, two prompts share what has the same tokens and, in
the place of images, the same pixels. What they share is not read again, neither by the towers nor
by the language model.

Shape suffixes as in `mmspec.adapters.vision_language`.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmspec.adapters.causal_lm import check_fits, prompt_parts
from mmspec.adapters.image_features import PIXELS, FeatureCache, VisualItem, split
from mmspec.adapters.vision_language import (
    FAMILIES,
    check_layers,
    extras_by_item,
    extras_of,
    placeholder_tokens,
    prepare,
)
from mmspec.forward import PromptExtras, text_device
from mmspec.rows import TokenRows


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an item stands: from its first token to behind its last."""

    item: VisualItem
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class VisualPrompts:
    """Prompts of a call.

    Attributes:
        inputs: What the model's processor made of them, padded on the left.
        contents: Of each prompt, its tokens; in the place of an image's or a video's tokens, the
            hash of its content.
        places: Of each prompt, where its images and videos stand.
    """

    inputs: Mapping[str, Any]
    contents: list[list[Hashable]]
    places: list[list[_Place]]

    @classmethod
    def of(cls, model: Any, inputs: Mapping[str, Any], prompts: list[list[int]]) -> "VisualPrompts":
        """Finds the images and videos in prompts; runs nothing.

        Args:
            model: The model.
            inputs: What its processor made of the prompts.
            prompts: Their tokens, without padding.

        Raises:
            ValueError: If the images or videos do not fill their places, or the model cannot read
                them.
        """
        check_layers(model)
        modalities = [kind for kind, name in PIXELS.items() if inputs.get(name) is not None]
        tokens = placeholder_tokens(model, modalities)
        items = split(model, inputs, tokens)
        contents: list[list[Hashable]] = [list(prompt) for prompt in prompts]
        places: list[list[_Place]] = [[] for _ in prompts]
        for modality, token in tokens.items():
            queue = iter(item for item in items if item.modality == modality)
            for row, prompt in enumerate(prompts):
                at = [place for place, one in enumerate(prompt) if one == token]
                while at:
                    item = next(queue)
                    own, at = at[: item.num_tokens], at[item.num_tokens :]
                    if len(own) < item.num_tokens:
                        raise ValueError(
                            f"prompt {row} has {len(own)} tokens left for a {modality} that takes "
                            f"{item.num_tokens}"
                        )
                    places[row].append(_Place(item, own[0], own[-1] + 1))
                    for place in own:
                        contents[row][place] = item.digest
        return cls(inputs, contents, places)

    def sound(self, model: Any, num_shared: Sequence[int]) -> list[int]:
        """How much of the beginnings that prompts share with a cache is right in them.

        No beginning ends inside an image; and where a prompt sees itself whole, another prompt
        makes other keys of every token.
        """
        if FAMILIES[model.config.model_type].is_prefix:
            return [0] * len(num_shared)
        return [
            min([count, *(p.first for p in own if p.first < count < p.end)])
            for count, own in zip(num_shared, self.places, strict=True)
        ]

    def check(
        self, model: Any, rows: TokenRows, num_cached: Sequence[int], chunk_size: int | None
    ) -> None:
        """Refuses prompts that are too long or cannot be cut, before any tower runs.

        Args:
            model: The model.
            rows: The rows of the prompts.
            num_cached: Tokens of each row that need not be read.
            chunk_size: As in `mmspec.adapters.causal_lm.prompt_parts`.

        Raises:
            ValueError: As in `mmspec.adapters.causal_lm.CausalTarget`.
        """
        check_fits(model, rows)
        if chunk_size is not None:
            given = self._given(model)
            blind = {k: value for k, value in given.items() if k not in PIXELS.values()}
            is_token_BP = given["attention_mask"].bool()
            prepared = prepare(model, blind)
            extras = extras_of(model, rows, {}, prepared, is_token_BP, given, num_cached=num_cached)
            for _ in prompt_parts(rows, num_cached, chunk_size, extras.wholes):
                pass

    def extras(
        self, model: Any, rows: TokenRows, cache: FeatureCache, num_cached: Sequence[int]
    ) -> PromptExtras:
        """What the prompts have besides tokens; images that are not known go through the towers.

        Args:
            model: The model.
            rows: The rows of the prompts.
            cache: Features of earlier calls, those of a drafter's own tower included.
            num_cached: Tokens of each row that need not be read.

        Raises:
            ValueError: As in `mmspec.adapters.vision_language.extras_in_generate`.
        """
        new = [
            place.item
            for own, count in zip(self.places, num_cached, strict=True)
            for place in own
            if place.first >= count
        ]
        return extras_by_item(model, rows, self._given(model), new, cache, num_cached)

    def _given(self, model: Any) -> dict[str, Any]:
        """The inputs on the model's device."""
        device = text_device(model)
        return {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self.inputs.items()
        }
