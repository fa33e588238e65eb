"""Helios: video in chunks whose past is an input, not a cache (diffusers' `HeliosPipeline`).

The transformer is given the last committed latent frames, the older ones through larger patches,
and the very first frame. So another model can write the next block without reading anything first.
Every chunk is decoded on its own. The multistep sampler remembers earlier steps of a block, so a
block cannot change hands in the middle.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.helios.pipeline_helios import calculate_shift
from torch import Tensor

from mmspec.adapters.block_frames import Codec
from mmspec.adapters.block_video import BlockModel, Context
from mmspec.adapters.video_family import VideoLayout, sized
from mmspec.adapters.wan_codec import WanCodec
from mmspec.checks import is_integer, is_list, require

#: Latent frames of a block that the published models are made for.
BLOCK_SIZE = 9
#: Latent frames of the past through large, middle and small patches, the latest last.
HISTORY_SIZES = (16, 2, 1)
#: What `HeliosPipeline` starts its noise at.
FIRST_SIGMA = 0.999


class HeliosModel:
    """`HeliosTransformer3DModel` and its sampler.

    Attributes:
        num_prefills: 0: there is no cache.
    """

    num_prefills = 0

    def __init__(
        self, transformer: Any, scheduler: Any, layout: VideoLayout, guidance_scale: float
    ) -> None:
        """Runs nothing.

        Args:
            transformer: The model.
            scheduler: The pipeline's; a copy is used.
            layout: Of the video.
            guidance_scale: Of classifier-free guidance; at most 1 is none.
        """
        self._transformer = transformer
        # To say them, diffusers walks through all modules: too much for every step.
        self._device, self._dtype = transformer.device, transformer.dtype
        self._scheduler = type(scheduler).from_config(scheduler.config)
        self._guidance_scale = guidance_scale
        size, patch = layout.block_sizes[0], transformer.config.patch_size
        num_tokens = size * layout.height * layout.width // (patch[0] * patch[1] * patch[2])
        self._shift = calculate_shift(
            num_tokens,
            *(
                scheduler.config.get(name, value)
                for name, value in (
                    ("base_image_seq_len", 256),
                    ("max_image_seq_len", 4096),
                    ("base_shift", 0.5),
                    ("max_shift", 1.15),
                )
            ),
        )
        # Places in time: the first frame, the past from old to new, the block itself.
        places = torch.arange(1 + sum(HISTORY_SIZES) + size)[None]
        first, *history, block = places.split([1, *HISTORY_SIZES, size], dim=1)
        self._places = {
            "indices_hidden_states": block,
            "indices_latents_history_long": history[0],
            "indices_latents_history_mid": history[1],
            "indices_latents_history_short": torch.cat([first, history[2]], dim=1),
        }

    def denoise(
        self, context: Context, sample: Tensor, *, num_steps: int, first: int, last: int
    ) -> Tensor:
        """As `BlockModel.denoise`, for whole blocks only."""
        require(
            (first, last) == (0, num_steps), "the steps of a block", "taken whole", (first, last)
        )
        scheduler = self._scheduler
        sigmas = np.linspace(FIRST_SIGMA, 0.0, num_steps + 1)[:-1]
        scheduler.set_timesteps(num_steps, device=self._device, sigmas=sigmas, mu=self._shift)
        state = sample.to(self._device)
        inputs = self._places | self._history(context, state)
        for time in scheduler.timesteps:
            velocity = self._velocity(context, state, time, inputs)
            state = scheduler.step(velocity, time, state, return_dict=False)[0]
        return state

    def _velocity(
        self, context: Context, state: Tensor, time: Tensor, inputs: dict[str, Tensor]
    ) -> Tensor:
        prompt, scale = context.prompt, self._guidance_scale
        velocity = self._forward("cond", prompt.embeds, state, time, inputs)
        if scale <= 1 or prompt.negative_embeds is None:
            return velocity
        negative = self._forward("uncond", prompt.negative_embeds, state, time, inputs)
        return negative + scale * (velocity - negative)

    def _forward(
        self, name: str, embeds: Tensor, state: Tensor, time: Tensor, inputs: dict[str, Tensor]
    ) -> Tensor:
        model = self._transformer
        with model.cache_context(name):
            return model(
                hidden_states=state.to(self._dtype),
                timestep=time.expand(1),
                encoder_hidden_states=embeds.to(self._device, self._dtype),
                return_dict=False,
                **inputs,
            )[0]

    def _history(self, context: Context, state: Tensor) -> dict[str, Tensor]:
        """The committed latents as the model wants them; zeros where there are none yet."""
        num_frames = sum(HISTORY_SIZES)
        nothing = state.new_zeros(*state.shape[:2], num_frames, *state.shape[3:])
        blocks = [block.to(state) for block in context.blocks]
        past = torch.cat([nothing, *blocks], dim=2)[:, :, -num_frames:].to(self._dtype)
        old, middle, new = past.split(HISTORY_SIZES, dim=2)
        first = (blocks[0] if blocks else nothing)[:, :, :1].to(self._dtype)
        return {
            "latents_history_long": old,
            "latents_history_mid": middle,
            "latents_history_short": torch.cat([first, new], dim=2),
        }


class ChunkCodec(WanCodec):
    """Decodes every block as if it were the first."""

    remembers = False

    def decode(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        """As `Codec.decode`, without a state."""
        return super().decode(latents, None)[0], None


class HeliosFamily:
    """`diffusers.HeliosPipeline` as a family of block-wise video models."""

    can_stitch = False
    attentions: tuple[str, ...] = ()

    def __init__(self, pipe: Any) -> None:
        """Keeps the pipeline."""
        self.pipe = pipe

    def layout(
        self, num_frames: int, height: int, width: int, block_sizes: Sequence[int] | None
    ) -> VideoLayout:
        """Equal blocks, of 9 latent frames (33 pictures) unless they are given.

        The pipeline rounds the pictures of the whole up to blocks, and then down to four and one;
        here they have to fill the blocks.

        Raises:
            ValueError: If the pictures do not fill the blocks, the blocks differ, or a side does
                not fit.
        """
        sides = sized(self.pipe, num_frames, height, width)
        stride = self.pipe.vae_scale_factor_temporal
        sizes = block_sizes
        if sizes is None:
            per_block = (BLOCK_SIZE - 1) * stride + 1
            rule = f"a multiple of {per_block}"
            require(num_frames % per_block == 0, "num_frames", rule, num_frames)
            sizes = [BLOCK_SIZE] * (num_frames // per_block)
        is_good = is_list(sizes, lambda size: is_integer(size) and size >= 1)
        rule = "a list of equal numbers of latent frames >= 1"
        require(is_good and len(set(sizes)) == 1, "block_sizes", rule, sizes)
        total = len(sizes) * ((sizes[0] - 1) * stride + 1)
        rule = f"{total} for {len(sizes)} blocks of {sizes[0]} latent frames"
        require(num_frames == total, "num_frames", rule, num_frames)
        shown = (num_frames - 1) // stride * stride + 1
        return VideoLayout(num_frames=shown, block_sizes=tuple(sizes), **sides)

    def noise(
        self, layout: VideoLayout, num_rows: int, generator: Any, latents: Tensor | None
    ) -> Tensor:
        """Drawn block by block, as the pipeline does."""
        pipe, scale = self.pipe, self.pipe.vae_scale_factor_spatial
        if latents is not None:
            return latents.to(pipe._execution_device, torch.float32)
        blocks = [
            pipe.prepare_latents(
                num_rows,
                layout.channels,
                layout.height * scale,
                layout.width * scale,
                (size - 1) * pipe.vae_scale_factor_temporal + 1,
                torch.float32,
                pipe._execution_device,
                generator,
            )
            for size in layout.block_sizes
        ]
        return torch.cat(blocks, dim=2)

    def model(
        self, layout: VideoLayout, guidance_scale: float, attention: str | None = None
    ) -> BlockModel:
        """The transformer."""
        return HeliosModel(self.pipe.transformer, self.pipe.scheduler, layout, guidance_scale)

    def codec(self) -> Codec:
        """The VAE, anew for every block."""
        return ChunkCodec(self.pipe.vae)
