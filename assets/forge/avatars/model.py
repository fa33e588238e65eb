"""The small Janus of the avatars: configuration, initial weights, tokenizer, processor.

All classes are transformers' own; only the sizes and the initial scale of a few layers are ours.
"""

import math
from collections.abc import Callable, Sequence

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from .attributes import caption_words

GRID = 16
NUM_IMAGE_TOKENS = GRID * GRID
WIDTH = 256
SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "image_token": "<image>",
}
PAD_ID, BOS_ID, EOS_ID, UNK_ID, BOI_ID, EOI_ID, IMAGE_ID = range(len(SPECIAL_TOKENS))


def make_tokenizer(words: Sequence[str] | None = None) -> PreTrainedTokenizerFast:
    """Makes the word-level tokenizer: lower case, words and marks, BOS in front.

    Args:
        words: What captions are made of, punctuation marks included; those of avatars by default.
    """
    tokens = [*SPECIAL_TOKENS.values(), *(caption_words() if words is None else words)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    bos = SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, BOS_ID)]
    )
    named = {name: SPECIAL_TOKENS[name] for name in ("boi_token", "eoi_token", "image_token")}
    standard = {name: text for name, text in SPECIAL_TOKENS.items() if name not in named}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens=named,
        **standard,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast, size: int = GRID) -> JanusProcessor:
    """Wraps the tokenizer and an image processor of `size` pixels in transformers' processor."""
    images = JanusImageProcessor(
        size={"height": size, "width": size},
        min_size=size,
        do_resize=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return JanusProcessor(images, tokenizer, num_image_tokens=NUM_IMAGE_TOKENS)


def make_codec_config(num_codes: int) -> JanusVQVAEConfig:
    """Returns the configuration of the avatars' codec: one code per pixel."""
    return JanusVQVAEConfig(
        embed_dim=32,
        num_embeddings=num_codes,
        latent_channels=32,
        base_channels=64,
        channel_multiplier=[1],
        num_res_blocks=1,
        projection_dim=WIDTH,
        image_token_embed_dim=WIDTH,
    )


def make_config(
    vocab_size: int, codec: JanusVQVAEConfig, size: int = GRID, num_layers: int = 6
) -> JanusConfig:
    """Returns the configuration around a codec: Llama layers of width 256.

    Args:
        vocab_size: Words and special tokens.
        codec: Turns `size` pixels into 16x16 codes; its `projection_dim` is `WIDTH`.
        size: Pixels on a side.
        num_layers: Llama layers.
    """
    return JanusConfig(
        text_config=LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=WIDTH,
            intermediate_size=640,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            pad_token_id=PAD_ID,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
            tie_word_embeddings=True,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=size,
            patch_size=size // GRID,
            projection_dim=WIDTH,
            num_image_tokens=NUM_IMAGE_TOKENS,
            mlp_ratio=2.0,
        ),
        vq_config=codec,
        image_token_id=IMAGE_ID,
        tie_word_embeddings=True,
    )


def make_generation_config() -> GenerationConfig:
    """Returns the defaults of `model.generate(..., generation_mode="image")`."""
    config = GenerationConfig(
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        do_sample=True,
        temperature=1.0,
        top_k=0,  # transformers' own default of 50 would cut the codebook
        guidance_scale=3.0,
        max_length=NUM_IMAGE_TOKENS + 64,
    )
    # Janus' generate looks the start-of-image id up here, by this name.
    config.generation_kwargs = {"boi_token_id": BOI_ID}
    return config


def make_model(vocab_size: int, num_codes: int) -> JanusForConditionalGeneration:
    """Makes an avatar model with fresh weights (seed torch before)."""
    return model_of(make_config(vocab_size, make_codec_config(num_codes)))


def model_of(config: JanusConfig) -> JanusForConditionalGeneration:
    """Makes a model with fresh weights (seed torch before)."""
    model = JanusForConditionalGeneration(config)
    # transformers' 0.02 everywhere shrinks an image code through three layers to 1e-4, below the
    # epsilon of the first RMSNorm; and residual branches are scaled down with depth as in GPT-2.
    core = model.model
    nn.init.normal_(core.generation_embeddings.weight, std=1.0)
    for linear in (core.generation_aligner.fc1, *core.generation_aligner.hidden_layers):
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    nn.init.normal_(core.language_model.embed_tokens.weight, std=0.5)
    nn.init.normal_(core.generation_head.proj_out.weight, std=WIDTH**-0.5)
    layers = core.language_model.layers
    for layer in layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * len(layers)))
        attention, mlp = layer.self_attn, layer.mlp
        inner = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
        for linear in inner:
            nn.init.normal_(linear.weight, std=0.5 * linear.in_features**-0.5)
    model.generation_config = make_generation_config()
    return model


def image_logits(
    model: JanusForConditionalGeneration,
    prompt_ids_BP: Tensor,
    codes_BN: Tensor,
    corrupt: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Predicts every image code from the prompt and the codes before it.

    Args:
        model: The Janus model.
        prompt_ids_BP: Token ids of equally long prompts, BOS first and BOI last.
        codes_BN: The image's codes in raster order.
        corrupt: What to do to the embeddings of the codes before the model reads them.

    Returns:
        Logits (B, N, codebook size), the same numbers `generate` would sample from.
    """
    text = model.get_input_embeddings()(prompt_ids_BP)
    image = model.prepare_embeddings_for_image_generation(codes_BN[:, :-1])
    if corrupt is not None:
        image = corrupt(image)
    hidden = model.model.language_model(
        inputs_embeds=torch.cat([text, image], dim=1), use_cache=False
    ).last_hidden_state
    return model.model.generation_head(hidden[:, prompt_ids_BP.shape[1] - 1 :])
