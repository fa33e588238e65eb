"""A tiny random Emu3 of transformers' own classes, with a processor of transformers' own."""

import torch
from supported import Supported
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3ImageProcessor,
    Emu3Processor,
    PreTrainedTokenizerFast,
)

EMU3 = Supported(
    family="Emu3",
    class_name="Emu3ForConditionalGeneration",
    adapter="image_emu3",
    pipeline="SpeculativeImagePipeline",
)
PAD, BOS, EOS, UNK, IMAGE, BOI, WRAPPER, EOL, EOF, EOI = range(10)
SPECIAL = [
    "<|endoftext|>", "<|extra_203|>", "<|extra_204|>", "<unk>", "<image>", "<|image start|>",
    "<|image token|>", "<|extra_200|>", "<|extra_201|>", "<|image end|>",
]  # fmt: skip
WORDS = ["a", "pixel", "avatar", "with", "red", "blue", "hair", "and", "glasses", "lowres", "*"]
NUM_CODES = 24
PROMPTS = ["a pixel avatar", "a pixel avatar with red hair and glasses", "blue", "red and blue"]


def vocabulary(*, is_shuffled=False) -> dict[str, int]:
    """Special tokens, words, numbers and visual tokens, the last in any order if asked for."""
    names = [*SPECIAL, *WORDS, *map(str, range(1, 21))]
    codes = torch.randperm(NUM_CODES).tolist() if is_shuffled else range(NUM_CODES)
    names += [f"<|visual token {code:06d}|>" for code in codes]
    # Tokens behind the codes, so that the codes are neither the first nor the last ones.
    names += [f"w{n}" for n in range(3)]
    return {name: index for index, name in enumerate(names)}


def tiny_emu3(*, is_shuffled=False, context=160, dtype=torch.float64):
    torch.manual_seed(0)
    names = vocabulary(is_shuffled=is_shuffled)
    config = Emu3Config(
        text_config={
            "vocab_size": len(names), "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": context, "initializer_range": 0.3,
            "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
        },
        vq_config={
            "codebook_size": NUM_CODES, "embed_dim": 4, "latent_channels": 4, "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [],
            "hidden_size": 32, "num_attention_heads": 1, "temporal_downsample_factor": 1,
        },
        vocabulary_map=names,
    )  # fmt: skip
    model = Emu3ForConditionalGeneration(config).to(dtype).eval()
    model.generation_config.pad_token_id = PAD
    return model


def tiny_processor(*, is_shuffled=False) -> Emu3Processor:
    torch.manual_seed(0)
    names = vocabulary(is_shuffled=is_shuffled)
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        bos_token="<|extra_203|>",
        eos_token="<|extra_204|>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={
            "image_token": "<image>",
            "boi_token": "<|image start|>",
            "eoi_token": "<|image end|>",
            "image_wrapper_token": "<|image token|>",
            "eof_token": "<|extra_201|>",
            "eol_token": "<|extra_200|>",
        },
    )
    return Emu3Processor(Emu3ImageProcessor(), fast)


def allowed_tokens(model, rows, columns):
    """The constraint of transformers' own example: what may follow the ids of a row."""
    codes = model.vocabulary_mapping.image_tokens
    count = (columns + 1) * rows

    def allowed(row, ids):
        offset = len(ids) - int((ids == WRAPPER).nonzero()[0])
        if offset > count:
            return {count + 1: [EOF], count + 2: [EOI], count + 3: [EOS]}.get(offset, [PAD])
        return [EOL] if offset % (columns + 1) == 0 else codes

    return allowed
