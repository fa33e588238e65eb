"""Agreement of picture and prompt by CLIP and two models tuned from it, through transformers.

Shape suffixes as in `mmspec.block_records`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, CLIPModel

from mmspec.block_records import BlockView
from mmspec.routers.preprocess import crop_to_square, normalized, pad_to_square
from mmspec.routers.scoring import Scorer, checked_batch_size, spread_batches

_TOKENIZER_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class ClipScorer(Scorer):
    """CLIPScore, 2.5 max(cosine, 0), of each picture with the prompt.

    Source: Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image
    Captioning". It sees the middle square of a picture and 77 tokens of a prompt.
    """

    name: ClassVar[str] = "clip-score"
    needs_prompt: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...]] = ("weights", "batch_size")
    #: Repositories of the hub; a folder of weights brings its own tokenizer.
    default_weights: ClassVar[str] = "openai/clip-vit-base-patch32"
    default_tokenizer: ClassVar[str] = "openai/clip-vit-base-patch32"

    def __init__(self, weights: str | Path | None = None, batch_size: str | int = 4) -> None:
        """Loads the weights.

        Args:
            weights: A folder or a hub repository with a `CLIPModel` and its tokenizer; without it,
                the published one.
            batch_size: Pictures that are scored at once.

        Raises:
            ValueError: If they are missing or are something else.
        """
        self._batch_size = checked_batch_size(batch_size)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(weights or self.default_tokenizer)
            self._model = CLIPModel.from_pretrained(weights or self.default_weights).eval()
        except (OSError, ValueError) as error:
            message = (
                f"router {self.name!r} has no weights: {error}; give a folder or a repository with "
                f"a CLIPModel and its tokenizer, as {self.name}:0.5,weights=FOLDER"
            )
            raise ValueError(message) from error

    def batches(self, block: BlockView) -> Iterator[Tensor]:
        """Scores a few pictures at a time, where the pictures are; the prompt is read once."""
        frames = block.frames()
        model = self._model.to(frames.device)
        config = model.config
        tokens = self._tokenizer(
            block.place.prompt,
            truncation=True,
            max_length=config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(frames.device)
        text = _direction(model.get_text_features(**tokens).pooler_output)
        for batch in spread_batches(frames, self._batch_size):
            pixels = normalized(self.squared(batch, config.vision_config.image_size))
            features = model.get_image_features(pixel_values=pixels.to(model.dtype)).pooler_output
            cosine_F = (_direction(features) @ text[0]).float()
            yield self.scaled(cosine_F, model.logit_scale.float())

    @staticmethod
    def squared(frames_F3HW: Tensor, size: int) -> Tensor:
        """Makes pictures square."""
        return crop_to_square(frames_F3HW, size)

    @staticmethod
    def scaled(cosine_F: Tensor, log_scale: Tensor) -> Tensor:
        """The published number of a cosine."""
        return 2.5 * cosine_F.clamp_min(0)


class PickScorer(ClipScorer):
    """PickScore, the scaled cosine of a CLIP that was tuned on choices of people.

    Source: Kirstain et al. 2023, "Pick-a-Pic: An Open Dataset of User Preferences for
    Text-to-Image Generation".
    """

    name: ClassVar[str] = "pick-score"
    default_weights: ClassVar[str] = "yuvalkirstain/PickScore_v1"
    default_tokenizer: ClassVar[str] = _TOKENIZER_H

    @staticmethod
    def scaled(cosine_F: Tensor, log_scale: Tensor) -> Tensor:
        """Times the learned temperature: about 20."""
        return log_scale.exp() * cosine_F


class HpsScorer(ClipScorer):
    """Human Preference Score v2, the cosine; the whole picture is seen, padded to a square.

    Source: Wu et al. 2023, "Human Preference Score v2: A Solid Benchmark for Evaluating Human
    Preferences of Text-to-Image Synthesis". The weights are published for open_clip; the default
    is a conversion for transformers.
    """

    name: ClassVar[str] = "hps"
    default_weights: ClassVar[str] = "adams-story/HPSv2-hf"
    default_tokenizer: ClassVar[str] = _TOKENIZER_H

    @staticmethod
    def squared(frames_F3HW: Tensor, size: int) -> Tensor:
        """Pads pictures with black."""
        return pad_to_square(frames_F3HW, size)

    @staticmethod
    def scaled(cosine_F: Tensor, log_scale: Tensor) -> Tensor:
        """The cosine itself: about 0.27."""
        return cosine_F


def _direction(features: Tensor) -> Tensor:
    return functional.normalize(features, dim=-1)
