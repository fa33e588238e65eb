"""A tiny random Chameleon of transformers' own classes, and its processor."""

import torch
from supported import Supported
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonImageProcessor,
    ChameleonProcessor,
    PreTrainedTokenizerFast,
)

CHAMELEON = Supported(
    family="Chameleon",
    class_name="ChameleonForConditionalGeneration",
    adapter="image_chameleon",
    pipeline="SpeculativeImagePipeline",
    note="pixels need a supplied image_decoder",
)
BOS, PAD, EOS, BOI, EOI, SEP, UNK, IMAGE = range(8)
SPECIAL = [
    "<s>", "<pad>", "</s>", "<racm3:break>", "<eoss>", "<reserved08706>", "<unk>", "<image>",
]  # fmt: skip
WORDS = ["a", "pixel", "avatar", "with", "red", "blue", "hair", "and", "glasses", "lowres"]
NUM_CODES, SIDE = 24, 4
PROMPTS = ["a pixel avatar", "a pixel avatar with red hair and glasses", "blue", "red and blue"]


def vocabulary(*, is_shuffled=False) -> dict[str, int]:
    """Special tokens, words, and image codes by their digits as letters; then more words."""
    codes = torch.randperm(NUM_CODES).tolist() if is_shuffled else range(NUM_CODES)
    letters = ["".join(chr(ord("A") + int(digit)) for digit in str(code)) for code in codes]
    names = [*SPECIAL, *WORDS, *(f"IMGIMG{name}Z" for name in letters), "w0", "w1"]
    return {name: index for index, name in enumerate(names)}


def tiny_chameleon(*, is_shuffled=False, swin_norm=False) -> ChameleonForConditionalGeneration:
    torch.manual_seed(0)
    names = vocabulary(is_shuffled=is_shuffled)
    config = ChameleonConfig(
        vocab_size=len(names), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.3, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        vocabulary_map=names, swin_norm=swin_norm,
        vq_config={
            "embed_dim": 8, "num_embeddings": NUM_CODES, "latent_channels": 8, "resolution": 8,
            "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1,
        },
    )  # fmt: skip
    return ChameleonForConditionalGeneration(config).double().eval()


def tiny_processor(*, is_shuffled=False) -> ChameleonProcessor:
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.WordLevel(vocabulary(is_shuffled=is_shuffled), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", sep_token="<reserved08706>",
        extra_special_tokens={"image_token": "<image>", "boi_token": "<racm3:break>",
                              "eoi_token": "<eoss>"},
    )  # fmt: skip
    return ChameleonProcessor(ChameleonImageProcessor(), fast, image_seq_length=SIDE * SIDE)


def image_decoder(codes_BHW: torch.Tensor) -> torch.Tensor:
    """Two pixels by two of each code, grey by its number: a codebook one can read back."""
    grey = codes_BHW.double() / (NUM_CODES - 1) * 2 - 1
    return grey[:, None].repeat_interleave(2, -1).repeat_interleave(2, -2).repeat(1, 3, 1, 1)
