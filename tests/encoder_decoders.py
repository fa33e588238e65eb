"""Tiny random encoder-decoders of the real classes, and requests for them.

A request is a list of rows; a row is the text that its encoder reads (nothing where it reads pixels
only). Every row has a picture of its own.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from supported import Supported
from vlm import squares

import mmspec

IMAGE, START, BOS, EOS, PAD = 50, 51, 52, 53, 60
VOCAB = 61
SIDE = 16
#: Placeholders of a picture of 16 x 16 pixels.
NUM_PLACEHOLDERS = 17

TEXT = {
    "vocab_size": VOCAB,
    "d_model": 32,
    # DynamicCache counts the layers of a decoder by those of the encoder.
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 96,
    "scale_embedding": True,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "decoder_start_token_id": START,
    "forced_eos_token_id": None,
    "tie_word_embeddings": False,
}
#: What the encoders read besides a picture each: of three lengths, the longest last.
TEXTS = [[1, 2, 3, 1, 2], [4, 5], [6, 7, 8, 9, 6, 7, 8, 1, 2]]
NUM_NEW = 12

STDS = {
    "embed_positions.weight": 3.0,
    "encoder_attn.out_proj.weight": 0.05,
    "fc2.weight": 0.1,
    "self_attn.out_proj.weight": 0.1,
}
FLORENCE_TOWER = {
    "depths": (1, 1),
    "patch_size": (3, 3),
    "patch_stride": (2, 2),
    "patch_padding": (1, 1),
    "patch_prenorm": (False, True),
    "embed_dim": (8, 16),
    "num_heads": (2, 2),
    "num_groups": (2, 2),
    "window_size": 2,
    "projection_dim": 32,
    "max_temporal_embeddings": 4,
    "max_position_embeddings": 8,
}
DONUT_TOWER = {
    "image_size": [SIDE, SIDE],
    "patch_size": 2,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 2,
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How to build a model and its inputs.

    Attributes:
        class_name: Class in transformers.
        config: Makes its configuration.
        reads_text: The encoder reads text.
        reads_images: The encoder reads a picture.
    """

    class_name: str
    config: Callable[..., Any]
    reads_text: bool = True
    reads_images: bool = False


def bart(**changes: Any) -> Any:
    return transformers.BartConfig(**(TEXT | changes))


def mbart(**changes: Any) -> Any:
    return transformers.MBartConfig(**(TEXT | changes))


def florence2(**changes: Any) -> Any:
    return transformers.Florence2Config(
        text_config=bart(**changes).to_dict(),
        vision_config=FLORENCE_TOWER,
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def seeing(encoder: Any, **changes: Any) -> Any:
    """A vision encoder under the decoder of MBart."""
    decoder = mbart(is_encoder_decoder=False, **changes)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id = START
    config.pad_token_id, config.eos_token_id = PAD, EOS
    return config


def donut(**changes: Any) -> Any:
    """Encoder of 16 channels and a projection to the 32 of the decoder."""
    return seeing(transformers.DonutSwinConfig(**DONUT_TOWER, embed_dim=8), **changes)


def nougat(**changes: Any) -> Any:
    """Encoder and decoder of one width."""
    return seeing(transformers.DonutSwinConfig(**DONUT_TOWER, embed_dim=16), **changes)


def vit(**changes: Any) -> Any:
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2, "image_size": SIDE, "patch_size": 4}
    return seeing(transformers.ViTConfig(**tower), **changes)


FAMILIES = {
    "bart": Family(class_name="BartForConditionalGeneration", config=bart),
    "donut": Family(
        class_name="VisionEncoderDecoderModel", config=donut, reads_text=False, reads_images=True
    ),
    "florence2": Family(
        class_name="Florence2ForConditionalGeneration", config=florence2, reads_images=True
    ),
    "mbart": Family(class_name="MBartForConditionalGeneration", config=mbart),
    "nougat": Family(
        class_name="VisionEncoderDecoderModel", config=nougat, reads_text=False, reads_images=True
    ),
    "vit": Family(
        class_name="VisionEncoderDecoderModel", config=vit, reads_text=False, reads_images=True
    ),
}


def tiny_encoder_decoder(name: str, *, seed: int = 0, attention: str = "sdpa", **changes: Any):
    """A random model in float64 whose next tokens depend on what its encoder reads."""
    torch.manual_seed(seed)
    config = FAMILIES[name].config(**changes)
    model = getattr(transformers, FAMILIES[name].class_name)(config)
    if attention != "sdpa":
        model.set_attn_implementation(attention)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    for key, parameter in model.named_parameters():
        # Tokens and positions must show beside what the encoder says all the time.
        for ending, std in STDS.items():
            if key.endswith(ending):
                torch.nn.init.normal_(parameter, std=std)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    model.generation_config.decoder_start_token_id = START
    return model.double().eval()


def request(name: str, texts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What a processor would hand to `generate`: right-padded texts, and a picture for each."""
    family = FAMILIES[name]
    inputs: dict[str, Any] = {}
    if family.reads_text:
        front = [IMAGE] * NUM_PLACEHOLDERS * family.reads_images + [BOS]
        rows = [[*front, *text, EOS] for text in texts]
        longest = max(map(len, rows))
        inputs["input_ids"] = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
        inputs["attention_mask"] = torch.tensor(
            [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        )
    if family.reads_images:
        inputs["pixel_values"] = squares(len(texts), SIDE)
    return inputs


@functools.cache
def made(name):
    return tiny_encoder_decoder(name)


def decoded(model, inputs, custom_generate=None, **options):
    options = {"max_new_tokens": NUM_NEW, "do_sample": False} | options
    return model.generate(**inputs, **options, custom_generate=custom_generate)


def fixed(drafter, width=6, **options):
    return mmspec.speculate(drafter, width=width, schedule="fixed", **options)


def clone_of(model):
    return {"name": "model", "model": copy.deepcopy(model)}


VISION_ENCODER_DECODER = Supported(
    family="VisionEncoderDecoder (Donut, Nougat, ViT)",
    class_name="VisionEncoderDecoderModel",
    adapter="encoder_decoder",
    pipeline="SpeculativeVLMPipeline",
)
SUPPORTED = {
    "bart": Supported(
        family="BART",
        class_name="BartForConditionalGeneration",
        adapter="encoder_decoder",
        pipeline="speculate",
    ),
    "donut": VISION_ENCODER_DECODER,
    "florence2": Supported(
        family="Florence-2",
        class_name="Florence2ForConditionalGeneration",
        adapter="encoder_decoder",
        pipeline="SpeculativeVLMPipeline",
    ),
    "mbart": Supported(
        family="mBART",
        class_name="MBartForConditionalGeneration",
        adapter="encoder_decoder",
        pipeline="speculate",
    ),
    "nougat": VISION_ENCODER_DECODER,
    "vit": VISION_ENCODER_DECODER,
}
