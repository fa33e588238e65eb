"""ImageReward on transformers' own BLIP classes, loaded from the official `ImageReward.pt`.

Source: Xu et al. 2023, "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image
Generation", https://github.com/THUDM/ImageReward. The package of that name does not import with
transformers 5, and it scores picture by picture through files; it is not used.

Shape suffixes as in `mmspec.block_records`; T is text tokens.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.utils import cached_file

from mmspec.block_records import BlockView
from mmspec.checks import require
from mmspec.routers.preprocess import crop_to_square, normalized
from mmspec.routers.scoring import Scorer, checked_batch_size, spread_batches

REPOSITORY, FILE = "THUDM/ImageReward", "ImageReward.pt"
TOKENIZER, VOCABULARY = "bert-base-uncased", "vocab.txt"
#: BLIP adds these behind the vocabulary of BERT.
ADDED_TOKENS = ["[DEC]", "[ENC]"]
#: Tokens of a prompt that the model was trained with; the rest of a prompt is not seen.
MAX_TOKENS = 35
#: Mean and deviation of the raw reward over the authors' data.
REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072
#: Channels of an attention head, of both encoders.
HEAD_SIZE = 64

_VISION = "blip.visual_encoder."
_TEXT = "blip.text_encoder."
# Pattern of an official name -> name here, in order; names of the text encoder agree.
_RENAMES = (
    (r"^blip\.text_encoder\.", "text."),
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm", r"vision.encoder.layers.\1.layer_norm"),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv", r"vision.encoder.layers.\1.self_attn.qkv"),
    (
        r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj",
        r"vision.encoder.layers.\1.self_attn.projection",
    ),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp", r"vision.encoder.layers.\1.mlp"),
)
# Of BLIP's training, and a buffer that is a plain count.
_UNUSED = re.compile(r"^blip\.(vision_proj|text_proj)\.|\.position_ids$")
_HEAD = re.compile(r"^mlp\.layers\.(\d+)\.(weight|bias)$")


class ImageReward(nn.Module):
    """The network: picture and text in, a number per picture out.

    Attributes:
        image_size: Pixels of a side.
    """

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig) -> None:
        """Builds it with random weights."""
        super().__init__()
        self.image_size = vision.image_size
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        # The published head is five layers without an activation between: one affine map.
        self.head = nn.Linear(text.hidden_size, 1)

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor]) -> "ImageReward":
        """Takes over the weights of `ImageReward.pt`; the sizes are read off their shapes.

        Raises:
            ValueError: If weights are missing, of another shape or unknown.
        """
        try:
            model = cls(_vision_config(state), _text_config(state))
            model.load_state_dict(_renamed(state))
        except (KeyError, RuntimeError) as error:
            message = f"the weights are not those of {FILE}: {str(error)[:500]}"
            raise ValueError(message) from error
        return model.float().eval()

    def forward(self, pixels_F3HW: Tensor, ids_1T: Tensor, mask_1T: Tensor) -> Tensor:
        """Scores pictures of one prompt.

        Args:
            pixels_F3HW: Normalised pictures of `image_size`.
            ids_1T: Tokens of the prompt.
            mask_1T: 0 where they are padding.

        Returns:
            Rewards ``[F]``, about standard normal over the authors' data.
        """
        num_frames = len(pixels_F3HW)
        seen = self.vision(pixels_F3HW).last_hidden_state
        # `is_decoder` is left False: with cross-attention, but looking both ways.
        read = self.text(
            input_ids=ids_1T.expand(num_frames, -1),
            attention_mask=mask_1T.expand(num_frames, -1),
            encoder_hidden_states=seen,
        ).last_hidden_state
        return (self.head(read[:, 0])[:, 0] - REWARD_MEAN) / REWARD_STD


class ImageRewardScorer(Scorer):
    """ImageReward of each picture with the prompt.

    It sees the middle square of a picture, 42% less of one of 832 x 480, the first 35 tokens of a
    prompt, and nothing of motion.
    """

    name: ClassVar[str] = "image-reward"
    needs_prompt: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...]] = ("weights", "batch_size")

    def __init__(self, weights: str | Path | None = None, batch_size: str | int = 4) -> None:
        """Loads the weights, 1.8 GB.

        Args:
            weights: A folder with `ImageReward.pt`, and with the tokenizer of bert-base-uncased
                (`vocab.txt`) or without; what is missing, and all of it by default, comes from the
                hub or its local cache.
            batch_size: Pictures that are scored at once.

        Raises:
            ValueError: If anything is missing or is something else.
        """
        self._batch_size = checked_batch_size(batch_size)
        self._tokenizer = _tokenizer(weights)
        self._model = ImageReward.from_official(_official_state(weights))
        num_known = self._model.text.config.vocab_size
        rule = f"the {num_known} of {FILE}"
        got = len(self._tokenizer)
        require(got == num_known, "words of the tokenizer of 'image-reward'", rule, got)

    def batches(self, block: BlockView) -> Iterator[Tensor]:
        """Scores a few pictures at a time, where the pictures are."""
        frames = block.frames()
        model = self._model.to(frames.device)
        text = self._tokenizer(
            block.place.prompt,
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        ).to(frames.device)
        for batch in spread_batches(frames, self._batch_size):
            pixels = normalized(crop_to_square(batch, model.image_size))
            yield model(pixels, text.input_ids, text.attention_mask)


def _official_state(weights: str | Path | None) -> Mapping[str, Tensor]:
    """Reads the file.

    Raises:
        ValueError: If it is missing or holds no tensors by name.
    """
    try:
        path = cached_file(weights or REPOSITORY, FILE)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, UnpicklingError) as error:
        rule = f"a folder with {FILE}, as image-reward:-0.7,weights=FOLDER"
        message = f"router 'image-reward' has no weights; weights must be {rule}: {error}"
        raise ValueError(message) from error
    is_good = isinstance(state, Mapping) and all(isinstance(one, Tensor) for one in state.values())
    require(is_good, f"the content of {path}", "tensors by name", type(state).__name__)
    return state


def _tokenizer(weights: str | Path | None) -> BertTokenizer:
    """The tokenizer of BERT with BLIP's two tokens.

    Raises:
        ValueError: If its vocabulary is missing.
    """
    has_own = weights is not None and (Path(weights) / VOCABULARY).exists()
    try:
        path = cached_file(weights if has_own else TOKENIZER, VOCABULARY)
        words = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        message = (
            f"router 'image-reward' has no tokenizer; the folder of weights must hold {VOCABULARY} "
            f"of {TOKENIZER}: {error}"
        )
        raise ValueError(message) from error
    # `from_pretrained` makes a tokenizer of five words where it finds no file, and says nothing.
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    tokenizer.add_tokens(ADDED_TOKENS, special_tokens=True)
    return tokenizer


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names of `ImageReward`."""
    renamed = {}
    for name, value in state.items():
        if _UNUSED.search(name) or _HEAD.match(name):
            continue
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed | _collapsed_head(state)


def _collapsed_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The affine layers of the head as one; multiplied in fp64, which rounds once."""
    layers = sorted({int(match[1]) for match in map(_HEAD.match, state) if match})
    if not layers:
        raise KeyError("mlp.layers")
    weights, biases = (
        [state[f"mlp.layers.{layer}.{kind}"].double() for layer in layers]
        for kind in ("weight", "bias")
    )
    weight, bias = weights[0], biases[0]
    for by, shift in zip(weights[1:], biases[1:], strict=True):
        weight, bias = by @ weight, by @ bias + shift
    return {"head.weight": weight.float(), "head.bias": bias.float()}


def _num_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


def _vision_config(state: Mapping[str, Tensor]) -> BlipVisionConfig:
    width, _, patch, _ = state[f"{_VISION}patch_embed.proj.weight"].shape
    num_patches = state[f"{_VISION}pos_embed"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(state[f"{_VISION}blocks.0.mlp.fc1.bias"]),
        num_hidden_layers=_num_layers(state, f"{_VISION}blocks."),
        num_attention_heads=width // HEAD_SIZE,
        image_size=round(num_patches**0.5) * patch,
        patch_size=patch,
        hidden_act="gelu",
        # timm's; the default of transformers is 1e-5.
        layer_norm_eps=1e-6,
    )


def _text_config(state: Mapping[str, Tensor]) -> BlipTextConfig:
    num_tokens, width = state[f"{_TEXT}embeddings.word_embeddings.weight"].shape
    layer = f"{_TEXT}encoder.layer.0."
    return BlipTextConfig(
        vocab_size=num_tokens,
        hidden_size=width,
        encoder_hidden_size=state[f"{layer}crossattention.self.key.weight"].shape[1],
        intermediate_size=len(state[f"{layer}intermediate.dense.bias"]),
        num_hidden_layers=_num_layers(state, f"{_TEXT}encoder.layer."),
        # 12 of the published size; the default of transformers is 8, and nothing would complain.
        num_attention_heads=width // HEAD_SIZE,
        max_position_embeddings=len(state[f"{_TEXT}embeddings.position_embeddings.weight"]),
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        # Gives the layers their cross-attention.
        is_decoder=True,
    )
