"""Tiny random GLM-Image models of the real classes, with a processor, and the whole pipeline."""

import torch
from supported import Supported
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageImageProcessor,
    GlmImageProcessor,
    PreTrainedTokenizerFast,
)

GLM_IMAGE = Supported(
    family="GLM-Image",
    class_name="GlmImageForConditionalGeneration",
    adapter="image_glm",
    pipeline="accelerate",
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
    pictures = GlmImageImageProcessor(
        patch_size=8, merge_size=1, temporal_patch_size=1,
        size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64},
    )  # fmt: skip
    return GlmImageProcessor(pictures, fast, chat_template=TEMPLATE)


def glm_pipe(model=None, *, num_train_timesteps=10):
    """diffusers' whole pipeline around a tiny model; a picture of 64 pixels has 4 codes."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        GlmImagePipeline,
        GlmImageTransformer2DModel,
    )
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    torch.manual_seed(1)
    text_config = T5Config(
        vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    transformer = GlmImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, text_embed_dim=16, time_embed_dim=16, condition_dim=8,
        prior_vq_quantizer_codebook_size=CODES,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 8, 8, 8), in_channels=3, out_channels=3, layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4, norm_num_groups=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipe = GlmImagePipeline(
        tokenizer=ByT5Tokenizer(),
        processor=glm_processor(),
        text_encoder=T5EncoderModel(text_config).eval(),
        vision_language_encoder=glm_model() if model is None else model,
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=num_train_timesteps),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
