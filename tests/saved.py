"""Tiny random models saved to a folder, as the command line loads them."""

import torch
from supported import Supported
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from vlm import tiny_vlm
from vlm_processors import PROCESSORS

JANUS = Supported(
    family="Janus",
    class_name="JanusForConditionalGeneration",
    adapter="token_image",
    pipeline="SpeculativeImagePipeline",
)
WORDS = "a pixel avatar with red hair glasses and the blue top write this text again word for"
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


def save_tokenizer(folder, vocab_size):
    names = [*SPECIAL, *WORDS.split()]
    names += [f"w{n}" for n in range(vocab_size - len(names))]
    vocab = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    pad, bos, eos, unk = SPECIAL
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk
    ).save_pretrained(folder)


def save_llama(folder):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    save_tokenizer(folder, 61)
    return str(folder)


def save_janus(folder, *, num_codes=40, side=4):
    torch.manual_seed(0)
    model = JanusForConditionalGeneration(
        JanusConfig(
            text_config={
                "model_type": "llama",
                "vocab_size": 61,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "max_position_embeddings": 128,
                "initializer_range": 0.3,
            },
            vision_config={
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "image_size": 4 * side,
                "patch_size": 4,
                "projection_dim": 32,
                "num_image_tokens": side**2,
                "mlp_ratio": 2,
            },
            vq_config={
                "embed_dim": 8,
                "num_embeddings": num_codes,
                "latent_channels": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "projection_dim": 32,
                "num_patches": side,
                "hidden_size": 32,
                "image_token_embed_dim": 32,
            },
        )
    ).eval()
    # A fresh one: what is derived from the model's config would be derived again when loaded.
    model.generation_config = GenerationConfig(bos_token_id=1, pad_token_id=0)
    model.generation_config.generation_kwargs = {"boi_token_id": 60}
    model.save_pretrained(folder)
    save_tokenizer(folder, 61)
    return str(folder)


def save_vlm(folder, name="llava"):
    processor, model = PROCESSORS[name](), tiny_vlm(name)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
