"""Tiny random GLM-Image models of the real classes, with a processor, and the whole pipeline."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageImageProcessor,
    GlmImageProcessor,
    PreTrainedTokenizerFast,
)

CODES, SPECIALS = 24, 4
START, END, PAD = 24, 25, 60
NAMED = {"<|start|>": START, "<|end|>": END, "<sop>": 28, "<eop>": 29, "<|image|>": 59,
         "<pad>": PAD, "<unk>": 58}  # fmt: skip
WORDS = [*map(str, range(1, 20)), "a", "cat", "dog", "red", "blue", "hat"]
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def glm_model(*, dtype=torch.float64, seed=0) -> GlmImageForConditionalGeneration:
    """A random model whose next codes are far from uniform."""
    torch.manual_seed(seed)
    config = GlmImageConfig(
        text_config={
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
            "vision_vocab_size": CODES + SPECIALS, "pad_token_id": PAD, "eos_token_id": END,
            "initializer_range": 0.3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                "mrope_section": [1, 2, 1]},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24,
            "image_size": 64, "patch_size": 8,
        },
        vq_config={"embed_dim": 8, "num_embeddings": CODES, "latent_channels": 16},
        image_token_id=59, image_start_token_id=START, image_end_token_id=END,
    )  # fmt: skip
    model = GlmImageForConditionalGeneration(config).to(dtype).eval()
    model.generation_config.eos_token_id = END
    model.generation_config.pad_token_id = PAD
    return model


def glm_processor() -> GlmImageProcessor:
    """Words to ids, the sizes of the grids and the start of the image behind them."""
    vocabulary = NAMED | {word: 30 + index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>", pad_token="<pad>",
        unk_token="<unk>", padding_side="left",
        extra_special_tokens={"image_token": "<|image|>", "grid_bos_token": "<sop>",
                              "grid_eos_token": "<eop>"},
    )  # fmt: skip
    return GlmImageProcessor(GlmImageImageProcessor(), fast, chat_template=TEMPLATE)
