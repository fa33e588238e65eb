"""GLM-Image as an image family: a small grid of codes, then the large one that diffusers paints.

transformers keeps the positions of the coming codes on the module, so that one model serves one
request at a time. Here they are a table on the family object, which is bound to a size and belongs
to one request; the model is only read. Shape suffixes as in `mmspec.records`, and
    A  axes of a position: time, height, width
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmspec.checks import is_integer, require
from mmspec.forward import text_device
from mmspec.rows import TokenRows

#: Pixels per code and side.
PIXELS_PER_CODE = 32
DEFAULT_SIDE = 1024
_DEFAULT_GRIDS = ((16, 16), (32, 32))

#: What `generate` is given for this model besides the inputs of a plain decoder.
GENERATE_INPUTS = frozenset({"image_grid_thw", "images_per_sample", "mm_encoder_outputs"})

Grid = tuple[int, int]


class GlmImageFamily:
    """`transformers.GlmImageForConditionalGeneration`: text to the codes of two grids.

    The head also knows special tokens, the end of the image among them. They are cut off, so
    every image is complete, and the end needs no forward.

    Attributes:
        grids: Rows and columns of the grids, in the order in which they are written.
        map_shape: Rows and columns of the last grid, which is the image.
    """

    no_guidance = (
        "GLM-Image writes its codes without guidance, so guidance_scale must be 1; the scale of "
        "GlmImagePipeline belongs to its diffusion stage"
    )
    no_pixels = (
        "GLM-Image has no pixel decoder in transformers: use output_type='tokens', or "
        "mmspec.pipelines.accelerate(pipe) for diffusers' GlmImagePipeline, which paints the codes"
    )

    def __init__(self, model: Any, grids: Sequence[Grid] = _DEFAULT_GRIDS) -> None:
        """Takes the model apart.

        Args:
            model: The loaded model.
            grids: As the attribute; those of a 1024 x 1024 image if not given.
        """
        self._model = model
        self.backbone = model.model.language_model
        self.codebook_size = model.model.vqmodel.config.num_embeddings
        self._set_grids(grids)

    def with_grids(self, image_grid_thw: Tensor, images_per_sample: Tensor) -> "GlmImageFamily":
        """The family bound to the grids of a request.

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
        bound = copy.copy(self)
        bound._set_grids([(small[0], small[1]), (large[0], large[1])])
        return bound

    def prepare(
        self, processor: Any, prompts: Sequence[str], height: int | None, width: int | None
    ) -> tuple["GlmImageFamily", list[list[int]]]:
        """The family at a size, and the token ids of each prompt, which depend on the size.

        Args:
            processor: `transformers.GlmImageProcessor`.
            prompts: What to show.
            height: Pixels, a multiple of 32; None is 1024.
            width: The same.

        Raises:
            ValueError: If a side is no multiple of 32 or the processor has no chat template.
        """
        height = DEFAULT_SIDE if height is None else height
        width = DEFAULT_SIDE if width is None else width
        for name, side in (("height", height), ("width", width)):
            is_good = is_integer(side) and side > 0 and side % PIXELS_PER_CODE == 0
            require(is_good, name, f"a multiple of {PIXELS_PER_CODE}", side)
        family, rows = self, []
        for text in prompts:
            inputs = processor.apply_chat_template(
                [[{"role": "user", "content": [{"type": "text", "text": text}]}]],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"target_h": height, "target_w": width},
            )
            rows.append(inputs["input_ids"][0].tolist())
            family = self.with_grids(inputs["image_grid_thw"], inputs["images_per_sample"])
        return family, rows

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

    def position_ids(self, positions_BN: Tensor, prompt_lengths_B: Tensor) -> Tensor:
        """Text counts on all axes alike; codes lie on their grid behind it, ``[A, B, N]``.

        Args:
            positions_BN: Places in the row, counted from 0.
            prompt_lengths_B: Tokens of each prompt.
        """
        prompt_B1 = prompt_lengths_B[:, None]
        index = positions_BN - prompt_B1
        last = self._offsets_AT.shape[1] - 1
        offsets = self._offsets_AT.to(index.device)[:, index.clamp(0, last)]
        return torch.where(index >= 0, prompt_B1 + offsets, positions_BN)

    def decode(self, codes: Tensor) -> Tensor:
        """Refused.

        Raises:
            ValueError: Always.
        """
        raise ValueError(self.no_pixels)

    def _set_grids(self, grids: Sequence[Grid]) -> None:
        self.grids = tuple(grids)
        self.map_shape = self.grids[-1]
        self.num_image_tokens = sum(height * width for height, width in self.grids)
        self.grid_width = self.map_shape[1]
        self._offsets_AT = _grid_offsets(self.grids).to(text_device(self._model))


def place_in_generate(
    model: Any, rows: TokenRows, inputs: Mapping[str, Any]
) -> Callable[[Tensor], Tensor] | None:
    """Positions of a request that came through `generate`; None where it names no grids.

    Args:
        model: The loaded model.
        rows: The rows of the request.
        inputs: What `generate` passes on.

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
    family = GlmImageFamily(model).with_grids(grids, counts)
    return lambda positions_BN: family.position_ids(positions_BN, rows.prompt_lengths_B)


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
