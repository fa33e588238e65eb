"""Chameleon as an image model: text and image codes in one vocabulary, one square grid.

The class of transformers sets the logits of all image codes to the least number there is, so its
own `generate` cannot write images: held to image codes, it draws them uniformly. Here the decoder
and the head are called, not the class around them. Nor does transformers have the second half of
the image tokenizer, so a pixel decoder has to be supplied.

Prompt and guidance are those of Chameleon's own code (facebookresearch/chameleon, dbbe47f,
`chameleon/inference/chameleon.py`): a turn of the user, and the same without it.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmspec.adapters.token_image import ImageCodes, ImageLayout, square_layout

#: Name of the token that begins an image.
BEGIN = "<racm3:break>"


class ChameleonFamily:
    """`transformers.ChameleonForConditionalGeneration`, loaded with its `ChameleonProcessor`.

    Fine-tunes that draw (Anole) have the same class.
    """

    no_pixels = (
        "Chameleon has no pixel decoder in transformers: use output_type='tokens', or supply one, "
        "SpeculativeImagePipeline.from_model(model, processor, image_decoder=...)"
    )

    def __init__(self, model: Any) -> None:
        """Takes the model apart.

        Raises:
            ValueError: If its vocabulary lacks image codes or the token that begins an image.
        """
        self._model = model
        self.backbone = model.model
        mapping = model.model.vocabulary_mapping
        ids = mapping.img2bpe
        self._begin: Any = mapping.vocab_map.get(BEGIN)
        if self._begin is None or sorted(ids) != list(range(max(1, len(ids)))):
            raise ValueError(
                "the model's config.vocabulary_map must hold the image codes, numbered from 0, "
                f"and {BEGIN}; got {len(ids)} image codes"
                + (f" and no {BEGIN}" if self._begin is None else "")
            )
        self.codebook_size = len(ids)
        self._codes = ImageCodes([ids[code] for code in range(len(ids))])
        config = model.config.vq_config
        self._side = config.resolution // 2 ** (len(config.channel_multiplier) - 1)

    def layout(self, height: int | None, width: int | None) -> ImageLayout:
        """The one grid there is.

        Raises:
            ValueError: If a size is asked for.
        """
        return square_layout("Chameleon", self._side, height, width)

    def prompt(self, processor: Any, text: str, layout: ImageLayout) -> list[int]:
        """A turn of the user, and the token that begins the image.

        Raises:
            ValueError: If there is a tokenizer only.
        """
        if not hasattr(processor, "image_processor"):
            raise ValueError(
                "Chameleon needs its ChameleonProcessor, which ends the user's turn behind the "
                f"prompt; got {type(processor).__name__}"
            )
        return [*map(int, processor(text=[text])["input_ids"][0]), self._begin]

    def negative(self, processor: Any, text: str, layout: ImageLayout) -> list[int]:
        """A negative prompt is laid out as a prompt."""
        return self.prompt(processor, text, layout)

    def unconditional(self, prompt: Sequence[int]) -> list[int]:
        """The beginning of the sequence and nothing else: the prompt is left out."""
        begin = self._model.config.bos_token_id
        return [] if begin is None else [begin]

    def embed_text(self, ids: Tensor) -> Tensor:
        """Prompt tokens to embeddings; text and codes share one table."""
        return self._model.get_input_embeddings()(ids)

    def embed_image(self, codes: Tensor) -> Tensor:
        """Image codes to embeddings."""
        return self._model.get_input_embeddings()(self._codes.ids(codes))

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states to logits over the codes."""
        return self._codes.logits(self._model.lm_head, hidden)

    def decode(self, codes: Tensor, layout: ImageLayout) -> Tensor:
        """Refused.

        Raises:
            ValueError: Always.
        """
        raise ValueError(self.no_pixels)
