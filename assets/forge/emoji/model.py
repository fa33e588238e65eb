"""The small Janus of the emoji: its codec, its words. The transformer is that of the avatars."""

import re
from collections.abc import Iterable

from transformers import JanusForConditionalGeneration, JanusVQVAEConfig, PreTrainedTokenizerFast

from mmspec.assets.forge.avatars.model import GRID, WIDTH, make_config, make_tokenizer, model_of

from .icons import SIZE, STYLE_WORDS

NUM_CODES = 512
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


def make_emoji_tokenizer(rows: Iterable[dict[str, str]]) -> PreTrainedTokenizerFast:
    """Makes the word-level tokenizer from the names and categories of the training icons."""
    texts = {text for row in rows for text in (row["name"], row["category"])}
    texts |= set(STYLE_WORDS.values())
    words = {word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)}
    return make_tokenizer([",", *sorted(words)])


def make_emoji_model(vocab_size: int) -> JanusForConditionalGeneration:
    """Makes a model with fresh weights (seed torch before)."""
    return model_of(make_config(vocab_size, make_codec_config(), size=SIZE, num_layers=NUM_LAYERS))
