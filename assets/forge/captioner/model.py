"""The captioner: the reader's family and code at the size of an avatar, with words for tokens."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmspec.assets.forge.avatars.attributes import caption_words
from mmspec.assets.forge.pages.model import SPECIAL_TOKENS, Size

#: 16x16 pixels, 64 visual tokens of 2x2.
SIZE = Size(
    vision_width=64,
    vision_layers=2,
    vision_heads=4,
    vision_mlp=128,
    width=96,
    layers=2,
    heads=4,
    mlp=256,
    side=16,
    patch=2,
)
INSTRUCTION = "describe"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Makes the tokenizer: one token per word, the blank before it included, and the comma."""
    words = [f" {word}" for word in caption_words() if word.isalpha()]
    tokens = [*SPECIAL_TOKENS, ",", "a", INSTRUCTION, *words]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[^ ,]+|,"), "isolated")
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
