"""Encoder-decoders as targets: the encoder runs once, the decoder is what is decoded with.

`decoder_of` shows a decoder as the decoder-only model that the rest of the library knows. What the
encoder said stands in the request's cache (`mmspec.adapters.cross_cache`). The decoders of the BART
line count positions themselves, the same for all rows; rows that advance unevenly need their own.
The view therefore adds each token's position to its embedding and calls a shell of the decoder, a
copy of the module object with the same weights whose position table adds zero. Floating-point sums
stay those of the decoder, and the model itself is not touched.

Shape suffixes as in `mmspec.records`, and
    E  states of an encoder     P  columns of the padded decoder prompts
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from mmspec.adapters.causal_lm import check_fits
from mmspec.adapters.cross_cache import EncoderSlotCache
from mmspec.adapters.image_features import FeatureCache, encode, split
from mmspec.adapters.vision_language import prepare
from mmspec.forward import PromptExtras
from mmspec.rows import TokenRows


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderDecoderFamily:
    """Where a family keeps its parts.

    Attributes:
        decoder: Name of the decoder.
        head: Name of the module that turns its states into logits.
        bias: Name of what is added to the logits, if anything is.
        reads_text: The encoder reads text; otherwise all text is the decoder's.
        reads_images: The encoder reads an image.
    """

    decoder: str
    head: str = "lm_head"
    bias: str | None = None
    reads_text: bool = True
    reads_images: bool = False


#: Model type in transformers -> family.
FAMILIES = {
    "bart": EncoderDecoderFamily(decoder="model.decoder", bias="final_logits_bias"),
    "florence2": EncoderDecoderFamily(decoder="model.language_model.decoder", reads_images=True),
    "mbart": EncoderDecoderFamily(decoder="model.decoder", bias="final_logits_bias"),
    "vision-encoder-decoder": EncoderDecoderFamily(
        decoder="decoder.model.decoder",
        head="decoder.lm_head",
        reads_text=False,
        reads_images=True,
    ),
}

#: Those whose encoder reads an image.
SEEING = tuple(name for name, family in FAMILIES.items() if family.reads_images)

#: Model types of decoders whose positions the view can take over.
DECODERS = ("bart", "mbart")

#: What `generate` passes on for these models besides the inputs of a plain decoder.
GENERATE_INPUTS = frozenset({"decoder_attention_mask", "encoder_outputs"})

_VIEWS: WeakKeyDictionary[Any, "DecoderView"] = WeakKeyDictionary()


# --------------------------------------------------------------------------- the decoder alone


class NoPositions(nn.Module):
    """Stands where a decoder keeps its table of positions, and adds zero."""

    def forward(
        self, input_ids: Tensor | None, past_key_values_length: int, position_ids: Tensor
    ) -> Tensor:
        """Zero, whatever the position."""
        return position_ids.new_zeros(())


class DecoderView(nn.Module):
    """A decoder and its head as a decoder-only model over an `EncoderSlotCache`.

    It shares every weight with the model and holds nothing of a request.
    """

    def __init__(self, decoder: Any, head: nn.Module, bias: Tensor | None) -> None:
        """Copies the decoder's module object, but no weight."""
        super().__init__()
        self.config = copy.deepcopy(decoder.config)
        self.config.is_encoder_decoder = False
        self.config.num_hidden_layers = len(decoder.layers)
        shell = copy.copy(decoder)
        shell.__dict__ = dict(decoder.__dict__)
        shell._modules = {**decoder._modules, "embed_positions": NoPositions()}
        shell.config = self.config
        self.decoder = shell
        self.positions = decoder.embed_positions
        self.head = head
        self.register_buffer("bias", bias, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The weights' floating-point type."""
        return self.get_input_embeddings().weight.dtype

    def get_input_embeddings(self) -> Any:
        """The token embeddings."""
        return self.decoder.embed_tokens

    def get_output_embeddings(self) -> Any:
        """The head."""
        return self.head

    def shows(self, decoder: Any, head: nn.Module, bias: Tensor | None) -> bool:
        """Whether this is still a view of these parts."""
        kept = {**self.decoder._modules, "embed_positions": self.positions}
        return (
            self.head is head
            and self.bias is bias
            and self.decoder.training == decoder.training
            and self.config._attn_implementation == decoder.config._attn_implementation
            and kept == decoder._modules
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = True,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutputWithPast:
        """Logits behind the tokens, as a decoder-only model gives them."""
        cross = past_key_values.cross
        embedded = self.decoder.embed_tokens(input_ids)
        # The table adds an axis in front of the positions that it is given.
        embedded = embedded + self.positions(input_ids, position_ids=position_ids)[0]
        if attention_mask is None:
            # Left without one the decoder makes one of ones, and reads it.
            attention_mask = _causal_mask(embedded, past_key_values.cursor)
        states = self.decoder(
            inputs_embeds=embedded,
            attention_mask=attention_mask,
            encoder_hidden_states=cross.states,
            encoder_attention_mask=cross.mask,
            past_key_values=past_key_values.joint(),
            use_cache=use_cache,
        ).last_hidden_state
        logits = self.head(slice_logits_to_keep(states, logits_to_keep))
        if self.bias is not None:
            logits = logits + self.bias
        return CausalLMOutputWithPast(logits=logits)


def _causal_mask(embedded: Tensor, cursor: Any) -> Tensor:
    """What to add to the scores where all rows have the same number of tokens."""
    slot = torch.arange(cursor.extent, device=embedded.device)
    node = torch.arange(embedded.shape[1], device=embedded.device) + cursor.past
    least = torch.finfo(embedded.dtype).min
    is_hidden = (slot > node[:, None])[None, None]
    return torch.zeros_like(is_hidden, dtype=embedded.dtype).masked_fill(is_hidden, least)


def decoder_of(model: Any) -> DecoderView:
    """The decoder of a model; the same view every time, so that it is compiled once.

    Raises:
        ValueError: Naming the model and what stands in the way.
    """
    name, family = type(model).__name__, FAMILIES.get(model.config.model_type)
    if family is None:
        raise ValueError(
            f"{name} is an encoder-decoder of a kind that is not supported "
            f"(model type {model.config.model_type!r}; known: {', '.join(sorted(FAMILIES))})"
        )
    kind = model.config.get_text_config(decoder=True).model_type
    if kind not in DECODERS:
        raise ValueError(
            f"{name} has a decoder of type {kind!r}; positions of its own for each row are "
            f"possible for {' and '.join(DECODERS)}"
        )
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise ValueError(f"{name} is spread over devices; load encoder-decoders on one")
    bias = None if family.bias is None else model.get_buffer(family.bias)
    parts = (model.get_submodule(family.decoder), model.get_submodule(family.head), bias)
    view = _VIEWS.get(model)
    if view is None or not view.shows(*parts):
        view = _VIEWS[model] = DecoderView(*parts)
    return view


# --------------------------------------------------------------------------- requests


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompts(PromptExtras):
    """What the encoder said to the rows of a request.

    Attributes:
        states: The encoder's states, ``[B, E, hidden]``, as the decoder takes them.
        mask: Which of them are tokens or pixels and no padding, bool ``[B, E]``; None is all.
        texts: Token ids of the texts that the encoder has read, placeholders left out.
        encode: What the encoder of another model says to the same rows.
    """

    states: Tensor
    mask: Tensor | None = None
    texts: Sequence[Sequence[int]] = ()
    encode: Callable[[Any], "EncodedPrompts"] = field(repr=False)

    def new_cache(self, rows: TokenRows) -> EncoderSlotCache:
        """An empty cache for these rows."""
        mask = self.mask
        if mask is not None:
            least = torch.finfo(self.states.dtype).min
            mask = torch.zeros_like(mask, dtype=self.states.dtype).masked_fill(~mask, least)
            mask = mask[:, None, None]
        return EncoderSlotCache(rows.num_rows, rows.capacity, self.states, mask)

    def drafter_options(
        self, name: str, options: Mapping[str, Any], rows: TokenRows
    ) -> dict[str, Any]:
        """Options of a drafter; an encoder-decoder gets its own encoder's word on the same rows.

        Raises:
            ValueError: If it is told to do without, or cannot read what the target's encoder reads.
        """
        changed = dict(options)
        model = changed.get("model")
        has_encoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        if str(changed.get("visual_tokens", "")).startswith("self"):
            raise ValueError("visual_tokens='self' is not possible for encoder-decoders")
        if name != "model" or not has_encoder:
            return changed
        shown = changed.pop("visual_tokens", "all")
        if shown != "all":
            raise ValueError(
                f"visual_tokens={shown!r} is not possible for {type(model).__name__}: an "
                "encoder-decoder drafts with what its encoder says of the whole input"
            )
        decoder, theirs = decoder_of(model), self.encode(model)
        return changed | {
            "model": decoder,
            "cache": theirs.new_cache(rows),
            "view": lambda: PromptExtras(place=theirs.place),
        }


def decoder_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What `generate` passes on about the decoder's prompts, by the names of a plain decoder.

    Raises:
        ValueError: On a cache of an earlier call.
    """
    past = inputs.get("past_key_values")
    if getattr(past, "_is_user_defined", False):
        raise ValueError(
            "past_key_values of an earlier call are not supported for encoder-decoders; pass the "
            "whole decoder_input_ids and no past_key_values"
        )
    return {
        "attention_mask": inputs.get("decoder_attention_mask"),
        "past_key_values": past,
    }


def extras_in_generate(
    model: Any,
    rows: TokenRows,
    inputs: Mapping[str, Any],
    is_token_BP: Tensor | None,
    given: Mapping[str, Any],
    cache: FeatureCache | None = None,
) -> EncodedPrompts:
    """What the encoder said to the rows of a request.

    Args:
        model: The loaded model.
        rows: The rows of the request; their prompts are the decoder's.
        inputs: What `generate` passes on.
        is_token_BP: Which columns of the decoder's prompts are tokens; None where `generate` has
            not seen them. transformers counts all columns as positions, and so do rows with
            padding here.
        given: What `generate` was given.
        cache: What other models' encoders made of images in earlier calls; None has them run.

    Raises:
        ValueError: If a row does not fit the decoder's context.
    """
    family = FAMILIES[model.config.model_type]
    place = None
    if is_token_BP is not None and not bool(is_token_BP.all()):
        is_token_BP = is_token_BP.to(rows.lengths_B.device)
        check_fits(model, rows, (~is_token_BP).sum(1).tolist())
        place = _by_column(model, rows, is_token_BP)
    else:
        check_fits(model, rows)
    states = inputs["encoder_outputs"][0]
    projection = getattr(model, "enc_to_dec_proj", None)
    if projection is not None:
        states = projection(states)
    mask = inputs.get("attention_mask") if family.reads_text else None
    if mask is not None:
        mask = mask.to(states.device).bool()
        mask = None if bool(mask.all()) else mask
    read = _read_by_encoder(family, given)
    copies = rows.num_rows // len(states)

    def encode(other: Any) -> EncodedPrompts:
        _check_reads_the_same(other, model, read)
        theirs = prepare(other, read) if cache is None else prepare_by_item(other, read, cache)
        return extras_in_generate(other, rows, theirs, is_token_BP, given)

    def seen_by(
        other: Any, sights: Sequence[Any], forward: Any
    ) -> Callable[[], list[PromptExtras]]:
        raise ValueError(
            f"{type(other).__name__} does not read what {type(model).__name__}'s encoder reads; "
            "use visual_tokens='none'"
        )

    return EncodedPrompts(
        place=place,
        seen_by=seen_by,
        states=states.repeat_interleave(copies, 0),
        mask=None if mask is None else mask.repeat_interleave(copies, 0),
        texts=_texts(model, read),
        encode=encode,
    )


def prepare_by_item(model: Any, given: Mapping[str, Any], cache: FeatureCache) -> dict[str, Any]:
    """What `generate` makes of an encoder's inputs; images that are not known are read alone.

    Where an encoder reads text as well, the features of its vision tower are kept, otherwise all
    that it says.

    Args:
        model: The loaded model.
        given: What its encoder reads.
        cache: Features of earlier calls.

    Raises:
        ValueError: If the images do not fill the placeholders of the texts.
    """
    if "pixel_values" not in given:
        return prepare(model, given)
    reads_text = FAMILIES[model.config.model_type].reads_text
    tokens = {"image": int(model.config.image_token_id)} if reads_text else {}
    features = encode(model, split(model, given, tokens), cache)["image"].whole()
    rest = {name: value for name, value in given.items() if name != "pixel_values"}
    if reads_text:
        return prepare(model, rest, encoded={"mm_encoder_outputs": {"image": features}})
    states = BaseModelOutput(last_hidden_state=features.pooler_output)
    return prepare(model, rest, encoded={"encoder_outputs": states})


def decoder_prompts(
    model: Any, prepared: Mapping[str, Any], texts: Sequence[Sequence[int]]
) -> list[list[int]]:
    """What each row's decoder begins with, by the rule of `generate`.

    Args:
        model: The model.
        prepared: What `prepare` says of its encoder's input.
        texts: Token ids that the decoder is given, row by row.

    Returns:
        The start token and the text; only the text if that begins with the start token, or where
        the encoder is Donut's, whose checkpoints begin with a token of their task.
    """
    encoder = getattr(model.config, "encoder", None)
    has_own_start = "donut" in getattr(encoder, "model_type", "")
    prompts = []
    for start, text in zip(prepared["input_ids"].tolist(), texts, strict=True):
        is_whole = len(text) > 0 and (has_own_start or text[:1] == start)
        prompts.append(list(text) if is_whole else [*start, *text])
    return prompts


def _by_column(model: Any, rows: TokenRows, is_token_BP: Tensor) -> Callable[[Tensor], Tensor]:
    """Positions as transformers counts them in padded decoder prompts: padding included."""
    last = model.config.get_text_config(decoder=True).max_position_embeddings - 1
    columns_BP = torch.argsort((~is_token_BP).long(), dim=1, stable=True)
    width = columns_BP.shape[1]
    lengths_B1 = rows.prompt_lengths_B[:, None]

    def place(positions_BN: Tensor) -> Tensor:
        read = columns_BP.gather(1, positions_BN.clamp(max=width - 1))
        behind = positions_BN + width - lengths_B1
        return torch.where(positions_BN < lengths_B1, read, behind).clamp(max=last)

    return place


def _read_by_encoder(family: EncoderDecoderFamily, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """What of the arguments of `generate` its encoder reads."""
    names = ("input_ids", "attention_mask") * family.reads_text
    names += ("pixel_values",) * family.reads_images
    return {name: given[name] for name in names if isinstance(given.get(name), Tensor)}


def _texts(model: Any, read: Mapping[str, Tensor]) -> list[list[int]]:
    """The text that an encoder has read, row by row."""
    ids = read.get("input_ids")
    if ids is None:
        return []
    is_text = ids != getattr(model.config, "image_token_id", -1)
    if "attention_mask" in read:
        is_text &= read["attention_mask"].to(ids.device).bool()
    return [row[mask].tolist() for row, mask in zip(ids, is_text, strict=True)]


def _check_reads_the_same(other: Any, model: Any, read: Mapping[str, Tensor]) -> None:
    """Refuses a drafter whose encoder cannot be given the target's input."""
    name = type(other).__name__
    if other.config.model_type != model.config.model_type:
        raise ValueError(f"{name} does not read what {type(model).__name__}'s encoder reads")
    if model.main_input_name not in read:
        raise ValueError(
            f"a drafter with an encoder of its own needs {model.main_input_name}, and `generate` "
            "was given encoder_outputs only"
        )
    tokens = [getattr(one.config, "image_token_id", None) for one in (other, model)]
    if tokens[0] != tokens[1]:
        raise ValueError(
            f"the drafter's image_token_id is {tokens[0]}, that of the target {tokens[1]}"
        )
