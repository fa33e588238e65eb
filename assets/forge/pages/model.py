"""The small document reader and its drafter: configurations, initial weights, tokenizer, processor.

All classes are transformers' own (Idefics3, the family of SmolVLM); only the sizes and the initial
scales are ours. A page of 256x256 pixels becomes 16x16 visual tokens in reading order, each one
row high and two characters wide.
"""

import math
from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from mmspec.assets.pages.rendering import CHARACTERS, SIDE

PATCH = 16
NUM_IMAGE_TOKENS = (SIDE // PATCH) ** 2
SPECIAL_TOKENS = (
    "<pad>",
    "<unk>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
)
PAD_ID, UNK_ID, IMAGE_ID, FAKE_ID, GLOBAL_ID, END_ID = range(len(SPECIAL_TOKENS))
#: What a page is asked for with. Training uses all of them, and none at all.
INSTRUCTIONS = ("Convert to Markdown.", "To Markdown.", "Read.", "")
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}<end_of_utterance>"
    "{% endfor %}"
)


@dataclass(frozen=True)
class Size:
    """How large a model is.

    Attributes:
        vision_width, vision_layers, vision_heads, vision_mlp: Of the vision tower.
        width, layers, heads, mlp: Of the decoder.
        side: Pixels on a side of the picture.
        patch: Pixels on a side of a visual token.
    """

    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    width: int
    layers: int
    heads: int
    mlp: int
    side: int = SIDE
    patch: int = PATCH

    @property
    def num_columns(self) -> int:
        """Visual tokens beside each other."""
        return self.side // self.patch

    @property
    def num_image_tokens(self) -> int:
        """Visual tokens of a picture."""
        return self.num_columns**2


SIZES = {
    "pages": Size(160, 3, 4, 480, 192, 5, 4, 448),
    "pages-drafter": Size(96, 2, 3, 192, 96, 3, 3, 192),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Makes the tokenizer: one token per character."""
    tokens = [*SPECIAL_TOKENS, "\n", *CHARACTERS[:-1]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end_of_utterance>",
        additional_special_tokens=["<image>", "<fake_token_around_image>", "<global-img>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast, size: Size) -> Idefics3Processor:
    """Wraps the tokenizer and an image processor without splitting."""
    edge = {"longest_edge": size.side}
    pictures = Idefics3ImageProcessor(
        size=edge,
        max_image_size=edge,
        do_image_splitting=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return Idefics3Processor(
        pictures, tokenizer, image_seq_len=size.num_image_tokens, chat_template=TEMPLATE
    )


def make_config(size: Size, vocab_size: int) -> Idefics3Config:
    """Returns the configuration: a SigLIP tower, a linear connector, Llama layers."""
    return Idefics3Config(
        image_token_id=IMAGE_ID,
        pad_token_id=PAD_ID,
        tie_word_embeddings=True,
        scale_factor=1,
        vision_config={
            "hidden_size": size.vision_width,
            "intermediate_size": size.vision_mlp,
            "num_hidden_layers": size.vision_layers,
            "num_attention_heads": size.vision_heads,
            "image_size": size.side,
            "patch_size": size.patch,
        },
        text_config=LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=size.width,
            intermediate_size=size.mlp,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            pad_token_id=PAD_ID,
            bos_token_id=None,
            eos_token_id=END_ID,
            tie_word_embeddings=True,
        ),
    )


def make_model(size: Size, vocab_size: int) -> Idefics3ForConditionalGeneration:
    """Makes a model with fresh weights (seed torch before)."""
    model = Idefics3ForConditionalGeneration(make_config(size, vocab_size))
    core = model.model
    # transformers' 0.02 everywhere is too small for such widths.
    nn.init.normal_(core.text_model.embed_tokens.weight, std=0.5)
    nn.init.constant_(core.text_model.norm.weight, 0.1)
    nn.init.normal_(core.vision_model.embeddings.patch_embedding.weight, std=1 / (3 * size.patch))
    nn.init.normal_(core.vision_model.embeddings.position_embedding.weight, std=0.5)
    nn.init.normal_(core.connector.modality_projection.proj.weight, std=size.vision_width**-0.5)
    for layers in (core.text_model.layers, core.vision_model.encoder.layers):
        for layer in layers:
            for name, linear in layer.named_modules():
                if isinstance(linear, nn.Linear):
                    is_last = name.endswith(("o_proj", "out_proj", "down_proj", "fc2"))
                    scale = 1 / math.sqrt(2 * len(layers)) if is_last else 1.0
                    nn.init.normal_(linear.weight, std=0.6 * scale * linear.in_features**-0.5)
    model.generation_config = GenerationConfig(
        eos_token_id=END_ID, pad_token_id=PAD_ID, do_sample=False, max_new_tokens=480
    )
    return model


def see(model: Idefics3ForConditionalGeneration, pixels_BHW: Tensor) -> Tensor:
    """What the vision tower makes of pictures: (B, visual tokens, vision width).

    Args:
        model: The model.
        pixels_BHW: Grey or RGB pictures as bytes, (B, H, W) or (B, 3, H, W).
    """
    pixels = pixels_BHW.float() / 127.5 - 1
    if pixels.ndim == 3:
        pixels = pixels[:, None].expand(-1, 3, -1, -1)
    seen: Tensor = model.model.vision_model(pixel_values=pixels).last_hidden_state
    return seen


def answer_logits(
    model: Idefics3ForConditionalGeneration,
    seen_BNW: Tensor,
    text_BT: Tensor,
    num_prompt: int,
    num_shown: int | None = None,
) -> Tensor:
    """Predicts every token of the answer from the picture and the tokens before it.

    Args:
        model: The model.
        seen_BNW: What `see` returns.
        text_BT: Token ids behind the picture: instruction, answer, padding on the right.
        num_prompt: Tokens of ``text_BT`` that belong to the prompt, at least one.
        num_shown: The decoder is given so many visual tokens only; all tokens keep their positions.

    Returns:
        Logits (B, T - num_prompt, V) of ``text_BT[:, num_prompt:]``.
    """
    core = model.model
    num_image = seen_BNW.shape[1]
    num_shown = num_image if num_shown is None else num_shown
    image = core.connector(seen_BNW)[:, :num_shown]
    embed = core.text_model.embed_tokens
    around = embed(torch.tensor([[FAKE_ID, GLOBAL_ID]])).expand(len(image), -1, -1)
    text = torch.cat([torch.full_like(text_BT[:, :1], FAKE_ID), text_BT[:, :-1]], dim=1)
    inputs = torch.cat([around.to(image.dtype), image, embed(text).to(image.dtype)], dim=1)
    first_text = around.shape[1] + num_shown
    positions = torch.arange(inputs.shape[1])
    positions[first_text:] += num_image - num_shown
    hidden = core.text_model(
        inputs_embeds=inputs,
        position_ids=positions[None].expand(len(image), -1),
        attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long),
        use_cache=False,
    ).last_hidden_state
    logits: Tensor = model.lm_head(hidden[:, first_text + num_prompt :])
    return logits
