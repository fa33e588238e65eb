"""Emu3 as an image model: codes, line ends and the end of the image in one row of tokens.

An image of h x w codes is ``h * (w + 1) + 3`` tokens: behind the w codes of each line its end, and
behind the last line the ends of the frame, the image and the sequence. All but the codes are forced
by position. Here a row holds the codes ``0 ... C - 1`` and behind them the four forced tokens, so
that the head is asked for the codes only and not for the whole vocabulary (32768 of 184622).

Leaving the rest out of the softmax changes nothing: transformers mixes log-probabilities over the
whole vocabulary, ``n + s * (c - n)`` with ``c`` and ``n`` normalised, then masks. Normalising
subtracts one number from every logit of a row, so the mixture of raw logits differs from theirs by
one number per row, which no argmax, softmax, top-k or top-p sees.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmspec.adapters.constraints import TokensByPosition
from mmspec.adapters.token_image import ImageCodes, ImageLayout
from mmspec.checks import is_integer, require
from mmspec.forward import text_device
from mmspec.law_config import AllowedTokens

#: Height and width in pixels where none is asked for; the processor's own default too.
DEFAULT_SIZE = 720
#: Names of the forced tokens in the vocabulary: the end of a line, then of frame, image, sequence.
FORCED = ("<|extra_200|>", "<|extra_201|>", "<|image end|>", "<|extra_204|>")


class Emu3Family:
    """`transformers.Emu3ForConditionalGeneration`, loaded with its `Emu3Processor`."""

    def __init__(self, model: Any) -> None:
        """Takes the model apart.

        Raises:
            ValueError: If its vocabulary lacks image codes or one of the forced tokens.
        """
        self._model = model
        self.backbone = model.model.text_model
        mapping = model.vocabulary_mapping
        ids = mapping.img2bpe if mapping.vocab_map else {}
        self._num_codes = len(ids)
        missing = [name for name in FORCED if name not in (mapping.vocab_map or {})]
        if missing or sorted(ids) != list(range(max(1, self._num_codes))):
            raise ValueError(
                "the model's config.vocabulary_map must hold the visual tokens, numbered from 0, "
                f"and {', '.join(FORCED)}; got {self._num_codes} visual tokens, missing: "
                f"{', '.join(missing) or 'none'}"
            )
        self.codebook_size = self._num_codes + len(FORCED)
        code_ids = [ids[code] for code in range(self._num_codes)]
        self._tokens = ImageCodes(code_ids, [mapping.vocab_map[name] for name in FORCED])

    def layout(self, height: int | None, width: int | None) -> ImageLayout:
        """The layout of images of any size that the codes tile.

        Raises:
            ValueError: If a side is no multiple of a code's side.
        """
        side = self._model.model.vqmodel.spatial_scale_factor
        for name, value in (("height", height), ("width", width)):
            is_good = value is None or (is_integer(value) and value > 0 and value % side == 0)
            require(is_good, name, f"None or a multiple of {side} pixels", value)
        rows = (DEFAULT_SIZE if height is None else height) // side
        columns = (DEFAULT_SIZE if width is None else width) // side
        stride = columns + 1
        forced = torch.zeros(rows, stride, dtype=torch.long)
        forced[:, -1] = 1
        ends = torch.arange(2, 1 + len(FORCED))
        classes = torch.cat([forced.flatten(), ends])
        masks = torch.zeros(1 + len(FORCED), self.codebook_size, dtype=torch.bool)
        masks[0, : self._num_codes] = True
        masks[1:, self._num_codes :] = torch.eye(len(FORCED), dtype=torch.bool)
        device = text_device(self._model)
        return ImageLayout(
            rows=rows,
            columns=columns,
            num_tokens=classes.shape[0],
            stride=stride,
            code_index=(classes == 0).nonzero().flatten(),
            allowed=AllowedTokens(
                class_of_position_T=classes.to(device), masks_CV=masks.to(device), since_prompt=True
            ),
        )

    def prompt(self, processor: Any, text: str, layout: ImageLayout) -> list[int]:
        """Token ids of a prompt and the size of its image, laid out by the model's processor.

        Raises:
            ValueError: If there is a tokenizer only.
        """
        if not hasattr(processor, "image_processor"):
            raise ValueError(
                "Emu3 needs its Emu3Processor, which writes the image's size behind the prompt; "
                f"got {type(processor).__name__}"
            )
        side = processor.downsample_ratio
        ids = processor(
            text=[text],
            return_for_image_generation=True,
            # The processor makes a grid of an area and a ratio; these give back the grid exactly.
            ratio=f"{layout.columns}:{layout.rows}",
            image_area=layout.columns * layout.rows * side * side,
        )["input_ids"][0]
        return [int(token) for token in ids]

    def negative(self, processor: Any, text: str, layout: ImageLayout) -> list[int]:
        """A negative prompt is laid out as a prompt, the image's size behind it."""
        return self.prompt(processor, text, layout)

    def unconditional(self, prompt: Sequence[int]) -> list[int]:
        """Nothing but the token that begins the image, as transformers does it."""
        return []

    def embed_text(self, ids: Tensor) -> Tensor:
        """Prompt tokens to embeddings."""
        return self._model.get_input_embeddings()(ids)

    def embed_image(self, codes: Tensor) -> Tensor:
        """Codes and forced tokens to embeddings."""
        return self._model.get_input_embeddings()(self._tokens.ids(codes))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits over the codes; those of forced tokens are 0, for only the position decides."""
        logits = self._tokens.logits(self._model.lm_head, hidden)
        return torch.nn.functional.pad(logits, (0, len(FORCED)))

    def decode(self, codes: Tensor, layout: ImageLayout) -> Tensor:
        """Codes to pixels in [0, 1]."""
        grid = codes.view(-1, layout.rows, layout.columns)
        pixels = self._model.model.vqmodel.decode(grid).permute(0, 2, 3, 1)
        return (pixels.float() * 0.5 + 0.5).clamp(0, 1)

    def constraint(self, layout: ImageLayout, prompt_width: int) -> TokensByPosition:
        """The grammar of an image for `generate`, over the whole vocabulary.

        Behind the end of the image comes padding, as in transformers' own example.
        """
        table: Any = layout.allowed
        vocab_size = self._model.lm_head.weight.shape[0]
        device = table.masks_CV.device
        masks = torch.zeros(1 + len(table.masks_CV), vocab_size, dtype=torch.bool, device=device)
        masks[0, self._model.config.get_text_config().pad_token_id] = True
        ids = self._tokens.ids(torch.arange(self.codebook_size, device=device))
        masks[1:, ids] = table.masks_CV
        return TokensByPosition(
            table=AllowedTokens(
                class_of_position_T=table.class_of_position_T + 1,
                masks_CV=masks,
                since_prompt=True,
            ),
            prompt_width=prompt_width,
        )


def emu3_constraint(model: Any, *, height: int, width: int, prompt_width: int) -> TokensByPosition:
    """``prefix_allowed_tokens_fn`` for one image of Emu3 in `generate`, made by `speculate` or not.

    Args:
        model: An `Emu3ForConditionalGeneration`.
        height: Height of the image in pixels.
        width: Width in pixels.
        prompt_width: Columns of the ``input_ids``.

    Raises:
        ValueError: If a side is no multiple of a code's side.
    """
    family = Emu3Family(model)
    return family.constraint(family.layout(height, width), prompt_width)
