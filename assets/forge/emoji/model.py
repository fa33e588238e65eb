"""The small Janus of the emoji: its codec, its words. The transformer is that of the avatars."""

import re
from collections.abc import Iterable

from torch import nn
from transformers import (
    JanusForConditionalGeneration,
    JanusVQVAE,
    JanusVQVAEConfig,
    PreTrainedTokenizerFast,
)

from mmspec.assets.forge.avatars.model import GRID, WIDTH, make_config, make_tokenizer, model_of

from .icons import SIZE, STYLE_WORDS

NUM_CODES = 1024
NUM_LAYERS = 4


def make_codec_config() -> JanusVQVAEConfig:
    """Returns the configuration of the codec: 64x64 pixels, two halvings, 16x16 codes."""
    return JanusVQVAEConfig(
        embed_dim=16,
        num_embeddings=NUM_CODES,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=[1, 2, 2],
        num_res_blocks=1,
        num_patches=GRID,
        projection_dim=WIDTH,
        image_token_embed_dim=WIDTH,
    )


def make_codec() -> JanusVQVAE:
    """Makes a codec with fresh weights (seed torch before).

    transformers' 0.02 everywhere leaves a tenth of the picture after the first convolution. The
    blocks normalise each channel, so that absolute colour has no other way than past them: red
    came out as orange and green as blue.
    """
    codec = JanusVQVAE(make_codec_config())
    for name, module in codec.named_modules():
        if isinstance(module, nn.Conv2d):
            is_branch_end = name.endswith(("conv2", "proj_out"))
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=(0.3 if is_branch_end else 1.0) * fan_in**-0.5)
    return codec


def make_emoji_tokenizer(rows: Iterable[dict[str, str]]) -> PreTrainedTokenizerFast:
    """Makes the word-level tokenizer from the names and categories of the training icons."""
    texts = {text for row in rows for text in (row["name"], row["category"])}
    texts |= set(STYLE_WORDS.values())
    words = {word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)}
    return make_tokenizer([",", *sorted(words)])


def make_emoji_model(vocab_size: int) -> JanusForConditionalGeneration:
    """Makes a model with fresh weights (seed torch before)."""
    return model_of(make_config(vocab_size, make_codec_config(), size=SIZE, num_layers=NUM_LAYERS))
