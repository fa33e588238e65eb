"""GLM-Image as an image family: a small grid of codes, then the large one that diffusers paints.

transformers keeps the positions of the coming codes on the module, so that one model serves one
request at a time. Here they are a table of the image's layout, which belongs to one request; the
model is only read. Shape suffixes as in `mmspec.records`, and
    A  axes of a position: time, height, width
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmspec.adapters.token_image import ImageLayout
from mmspec.checks import is_integer, require
from mmspec.forward import PromptExtras, text_device
from mmspec.rows import TokenRows

#: Pixels per code and side.
PIXELS_PER_CODE = 32
DEFAULT_SIDE = 1024
#: Codes on a side of a square small grid.
SMALL_SIDE = 16

#: What `generate` is given for this model besides the inputs of a plain decoder.
GENERATE_INPUTS = frozenset({"image_grid_thw", "images_per_sample", "mm_encoder_outputs"})

Grid = tuple[int, int]


class GlmImageFamily:
    """`transformers.GlmImageForConditionalGeneration`: text to the codes of two grids.

    The head also knows special tokens, the end of the image among them. They are cut off, so
    every image is complete, and the end needs no forward.
    """

    no_guidance = (
        "GLM-Image writes its codes without guidance, so guidance_scale must be 1; the scale of "
        "GlmImagePipeline belongs to its diffusion stage"
    )
    no_pixels = (
        "GLM-Image has no pixel decoder in transformers: use output_type='tokens', or "
        "mmspec.pipelines.accelerate(pipe) for diffusers' GlmImagePipeline, which paints the codes"
    )

    def __init__(self, model: Any) -> None:
        """Takes the model apart."""
        self._model = model
        self.backbone = model.model.language_model
        self.codebook_size = model.model.vqmodel.config.num_embeddings

    def layout(self, height: int | None, width: int | None) -> ImageLayout:
        """The small grid and then the large one, of an image of any size that the codes tile.

        Raises:
            ValueError: If a side is no multiple of 32.
        """
        for name, side in (("height", height), ("width", width)):
            is_tiled = is_integer(side) and side > 0 and side % PIXELS_PER_CODE == 0
            rule = f"None or a multiple of {PIXELS_PER_CODE} pixels"
            require(side is None or is_tiled, name, rule, side)
        rows = (DEFAULT_SIDE if height is None else height) // PIXELS_PER_CODE
        columns = (DEFAULT_SIDE if width is None else width) // PIXELS_PER_CODE
        # The processor's rule: the same shape in about 16 x 16 codes.
        ratio = rows / columns
        small = int(math.sqrt(ratio) * SMALL_SIDE), int(math.sqrt(1 / ratio) * SMALL_SIDE)
        return self.layout_of([small, (rows, columns)])

    def layout_of(self, grids: Sequence[Grid]) -> ImageLayout:
        """The layout of grids (rows, columns) in the order in which they are written.

        The last is the picture.
        """
        rows, columns = grids[-1]
        num_tokens = sum(height * width for height, width in grids)
        offsets_AT = _grid_offsets(grids).to(text_device(self._model))
        return ImageLayout(
            rows=rows,
            columns=columns,
            num_tokens=num_tokens,
            stride=_strides(grids),
            code_index=torch.arange(num_tokens - rows * columns, num_tokens),
            place=functools.partial(place_codes, offsets_AT),
        )

    def layout_in(self, image_grid_thw: Tensor, images_per_sample: Tensor) -> ImageLayout:
        """The layout of a request.

        Args:
            image_grid_thw: As the processor returns it, ``[B * 2, 3]``: the large grid and then
                the small one of each image.
            images_per_sample: Grids of each image, ``[B]``.

        Raises:
            ValueError: If there are source images, or the images differ in size.
        """
        counts = images_per_sample.tolist()
        rows = [tuple(grid) for grid in image_grid_thw.tolist()]
        # The processor gives an image that is made from others one target grid only.
        require(set(counts) == {2}, "images_per_sample", "2 (text to image) throughout", counts)
        (_, *large), (_, *small) = rows[:2]
        require(rows == rows[:2] * len(counts), "image_grid_thw", "the same for all images", rows)
        return self.layout_of([(small[0], small[1]), (large[0], large[1])])

    def prompt(self, processor: Any, text: str, layout: ImageLayout) -> list[int]:
        """Token ids of a prompt, which name the grids of the image.

        Raises:
            ValueError: If the processor has no chat template, or means other grids.
        """
        inputs = processor.apply_chat_template(
            [[{"role": "user", "content": [{"type": "text", "text": text}]}]],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={
                "target_h": layout.rows * PIXELS_PER_CODE,
                "target_w": layout.columns * PIXELS_PER_CODE,
            },
        )
        meant = self.layout_in(inputs["image_grid_thw"], inputs["images_per_sample"])
        sizes, known = ((one.rows, one.columns, one.num_tokens) for one in (meant, layout))
        require(sizes == known, "rows, columns and tokens of the processor", f"{known}", sizes)
        return [int(token) for token in inputs["input_ids"][0]]

    def negative(self, processor: Any, text: str, layout: ImageLayout) -> list[int]:
        """Refused.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"negative_prompt is not supported: {self.no_guidance}")

    def embed_text(self, ids: Tensor) -> Tensor:
        """Prompt tokens to embeddings; text and codes share one table."""
        return self._model.get_input_embeddings()(ids)

    def embed_image(self, codes: Tensor) -> Tensor:
        """Image codes to embeddings."""
        return self._model.get_input_embeddings()(codes)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states to logits over the codes, special tokens left out."""
        return self._model.lm_head(hidden)[..., : self.codebook_size]

    def unconditional(self, prompt: Sequence[int]) -> list[int]:
        """Refused.

        Raises:
            ValueError: Always.
        """
        raise ValueError(self.no_guidance)

    def decode(self, codes: Tensor, layout: ImageLayout) -> Tensor:
        """Refused.

        Raises:
            ValueError: Always.
        """
        raise ValueError(self.no_pixels)


def place_codes(offsets_AT: Tensor, positions_BN: Tensor, prompt_lengths_B: Tensor) -> Tensor:
    """Text counts on all axes alike; codes lie on their grid behind it, ``[A, B, N]``.

    Args:
        offsets_AT: Position of each new token behind the prompt.
        positions_BN: Places in the row, counted from 0.
        prompt_lengths_B: Tokens of each prompt.
    """
    prompt_B1 = prompt_lengths_B[:, None]
    index = positions_BN - prompt_B1
    last = offsets_AT.shape[1] - 1
    offsets = offsets_AT.to(index.device)[:, index.clamp(0, last)]
    return torch.where(index >= 0, prompt_B1 + offsets, positions_BN)


def extras_in_generate(
    model: Any,
    rows: TokenRows,
    inputs: Mapping[str, Any],
    is_token_BP: Tensor,
    given: Mapping[str, Any],
) -> PromptExtras | None:
    """Positions of a request that came through `generate`; None where it names no grids.

    Args:
        model: The loaded model.
        rows: The rows of the request.
        inputs: What `generate` passes on.
        is_token_BP: Which columns of the prompts are tokens.
        given: What `generate` was given.

    Raises:
        ValueError: On source images, images of several sizes, or a cache of the caller's.
    """
    if inputs.get("mm_encoder_outputs"):
        raise ValueError("source images (pixel_values) are not supported for GLM-Image")
    if getattr(inputs.get("past_key_values"), "_is_user_defined", False):
        raise ValueError("past_key_values must be left out for GLM-Image; each image starts anew")
    grids, counts = inputs.get("image_grid_thw"), inputs.get("images_per_sample")
    if grids is None:
        return None
    if counts is None:
        counts = torch.tensor([len(grids)])
    place: Any = GlmImageFamily(model).layout_in(grids, counts).place
    return PromptExtras(place=lambda positions_BN: place(positions_BN, rows.prompt_lengths_B))


def _grid_offsets(grids: Sequence[Grid]) -> Tensor:
    """Position of every code behind the prompt, and of the end mark, ``[A, T]``.

    A grid begins where the longer side of the one before it ends.
    """
    blocks, start = [], 0
    for height, width in grids:
        code = torch.arange(height * width)
        still = torch.zeros_like(code)
        blocks.append(start + torch.stack([still, code // width, code % width]))
        start += max(height, width)
    return torch.cat([*blocks, torch.full((3, 1), start)], dim=1)


def _strides(grids: Sequence[Grid]) -> Tensor:
    """From the code above to every code, ``[T]``; each grid has lines of its own length."""
    codes = [(torch.arange(height * width), width) for height, width in grids]
    return torch.cat([torch.where(code < width, 0, width) for code, width in codes])
