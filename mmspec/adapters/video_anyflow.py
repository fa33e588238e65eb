"""AnyFlow-FAR: causal video in blocks with a key/value cache (diffusers' `AnyFlowFARPipeline`).

A flow map takes any interval of the noise in one step (Gu et al. 2026, arXiv:2605.13724), so the
same weights draft in fewer steps. Committed blocks are read in one forward, which writes the cache
anew; the last ones in full, older ones through larger patches (FAR, arXiv:2503.19325). That
forward depends on nothing but the committed latents and the prompt: it may come late.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mmspec.adapters.block_frames import Codec
from mmspec.adapters.block_video import BlockModel, Context
from mmspec.adapters.dense_attention import DenseAttention
from mmspec.adapters.video_family import VideoLayout, sized
from mmspec.adapters.wan_codec import WanCodec
from mmspec.checks import is_integer, is_list, require


class FarModel:
    """`AnyFlowFARTransformer3DModel` and its flow-map scheduler.

    Every tensor may have several rows, always as many: videos that stand at the same block.

    Attributes:
        num_prefills: How often it has read the committed latents.
    """

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        layout: VideoLayout,
        guidance_scale: float,
        attention: str | None = None,
    ) -> None:
        """Runs nothing, and holds no memory before the first block.

        Args:
            transformer: The model.
            scheduler: The pipeline's; a copy is used.
            layout: Of the video.
            guidance_scale: Of classifier-free guidance; at most 1 is none.
            attention: "dense" while this model runs, or else as the transformer has it.
        """
        self._transformer = transformer
        # To say them, diffusers walks through all modules: too much for every step.
        self._device, self._dtype = transformer.device, transformer.dtype
        self._attention: AbstractContextManager[Any] = nullcontext()
        if attention == "dense":
            self._attention = DenseAttention(transformer)
        self._scheduler = type(scheduler).from_config(scheduler.config)
        self._layout = layout
        self._guidance_scale = guidance_scale
        self._num_copies = 2 if guidance_scale > 1 else 1
        self._cache: dict[int, dict[str, Tensor]] | None = None
        self._cached: Context | None = None
        self.num_prefills = 0

    def denoise(
        self, context: Context, sample: Tensor, *, num_steps: int, first: int, last: int
    ) -> Tensor:
        """As `BlockModel.denoise`; the context is read when it is another than last time."""
        self._scheduler.set_timesteps(num_steps, device=self._device)
        state_BFCHW = self._frames_first(sample)
        for step in range(first, last):
            state_BFCHW = self._step(context, state_BFCHW, step)
        return state_BFCHW.permute(0, 2, 1, 3, 4)

    def _step(self, context: Context, state_BFCHW: Tensor, step: int) -> Tensor:
        """One Euler step with the mean velocity between two times."""
        scheduler = self._scheduler
        time = scheduler.timesteps[step]
        end = scheduler.sigmas[step + 1] * scheduler.config.num_train_timesteps
        velocity = self.velocity(context, state_BFCHW, time, end)
        return scheduler.step(velocity, time, state_BFCHW, return_dict=False)[0]

    def velocity(self, context: Context, state_BFCHW: Tensor, time: Tensor, end: Tensor) -> Tensor:
        """The mean velocity between two times, guided, ``[B, F, C, H, W]``.

        Args:
            context: What the block is made from.
            state_BFCHW: At ``time``, ``[B, F, C, H, W]``.
            time: In the units of the scheduler's timesteps, a scalar.
            end: At most ``time``; equal to it asks for the velocity at that time.
        """
        index, num_frames = len(context.blocks), state_BFCHW.shape[1]
        copies_BFCHW = self._copied(state_BFCHW)
        with self._attention:
            self._prepare(context, len(state_BFCHW))
            velocity, _ = self._transformer(
                hidden_states=copies_BFCHW,
                timestep=time.expand(len(copies_BFCHW), num_frames),
                r_timestep=end.expand(len(copies_BFCHW), num_frames),
                encoder_hidden_states=self._embeds(context),
                chunk_partition=list(self._layout.block_sizes[: index + 1]),
                kv_cache=self._cache,
                kv_cache_flag={"num_cached_chunks": index, "is_cache_step": False},
                return_dict=False,
            )
        if self._num_copies == 2:
            negative, velocity = velocity.chunk(2)
            velocity = negative + self._guidance_scale * (velocity - negative)
        return velocity

    def _prepare(self, context: Context, num_rows: int) -> None:
        """Makes room, and reads the context if the cache is of another one."""
        if self._cache is None:
            self._cache = self._empty_cache(num_rows * self._num_copies)
        if context.blocks and self._cached is not context:
            self._read(context)

    def _read(self, context: Context) -> None:
        """Writes the keys and values of every committed block."""
        latents_BFCHW = self._copied(self._frames_first(torch.cat(context.blocks, dim=2)))
        index = len(context.blocks)
        sizes = list(self._layout.block_sizes[:index])
        height, width = latents_BFCHW.shape[-2:]
        mask = self._transformer.build_attention_mask(
            chunk_partition=sizes,
            height=height,
            width=width,
            device=latents_BFCHW.device,
            mode="cache",
        )
        clean = torch.zeros(latents_BFCHW.shape[:2], dtype=torch.int64, device=latents_BFCHW.device)
        self._transformer(
            hidden_states=latents_BFCHW,
            chunk_partition=sizes,
            timestep=clean,
            r_timestep=clean,
            encoder_hidden_states=self._embeds(context),
            attention_mask=mask,
            kv_cache=self._cache,
            kv_cache_flag={"num_cached_chunks": index - 1, "is_cache_step": True},
            return_dict=False,
        )
        self._cached = context
        self.num_prefills += 1

    def _empty_cache(self, num_rows: int) -> dict[int, dict[str, Tensor]]:
        """Room for the full blocks and for the ones that are compressed."""
        config, layout = self._transformer.config, self._layout
        largest, num_blocks = max(layout.block_sizes), len(layout.block_sizes)
        num_full = config.full_chunk_limit * largest
        num_compressed = max(num_blocks - config.full_chunk_limit + 1, 0) * largest

        def room(num_frames: int, patch: Sequence[int]) -> Tensor:
            num_tokens = num_frames * (layout.height // patch[1]) * (layout.width // patch[2])
            heads, size = config.num_attention_heads, config.attention_head_dim
            return torch.zeros(
                (2, num_rows, heads, num_tokens, size),
                device=self._device,
                dtype=self._dtype,
            )

        return {
            layer: {
                "full_cache": room(num_full, config.patch_size),
                "compressed_cache": room(num_compressed, config.compressed_patch_size),
            }
            for layer in range(config.num_layers)
        }

    def _frames_first(self, latents_BCFHW: Tensor) -> Tensor:
        return latents_BCFHW.to(self._device, self._dtype).permute(0, 2, 1, 3, 4)

    def _copied(self, tensor: Tensor) -> Tensor:
        """Twice, for the negative prompt and the prompt, where there is guidance."""
        return torch.cat([tensor] * 2) if self._num_copies == 2 else tensor

    def _embeds(self, context: Context) -> Tensor:
        prompt = context.prompt
        embeds, negative_embeds = prompt.embeds, prompt.negative_embeds
        if self._num_copies == 2 and negative_embeds is not None:
            embeds = torch.cat([negative_embeds, embeds])
        return embeds.to(self._device, self._dtype)


class FarFamily:
    """`diffusers.AnyFlowFARPipeline` as a family of block-wise video models."""

    can_stitch = True
    attentions: tuple[str, ...] = ("flex", "dense")

    def __init__(self, pipe: Any) -> None:
        """Keeps the pipeline."""
        self.pipe = pipe

    def layout(
        self, num_frames: int, height: int, width: int, block_sizes: Sequence[int] | None
    ) -> VideoLayout:
        """Blocks as the model was trained with them, or as they are given.

        Raises:
            ValueError: If the frames do not fill the blocks, or a side does not fit.
        """
        sides = sized(self.pipe, num_frames, height, width)
        stride = self.pipe.vae_scale_factor_temporal
        is_good = num_frames % stride == 1
        require(is_good, "num_frames", f"a multiple of {stride} and one more", num_frames)
        sizes = self.pipe.transformer.config.chunk_partition if block_sizes is None else block_sizes
        is_good = is_list(sizes, lambda size: is_integer(size) and size >= 1) and len(sizes) > 0
        require(is_good, "block_sizes", "a list of latent frames per block, each >= 1", sizes)
        num_latents = (num_frames - 1) // stride + 1
        rule = (
            f"latent frames per block with the sum {num_latents}, for num_frames={num_frames} "
            f"makes {num_latents} latent frames"
        )
        require(sum(sizes) == num_latents, "block_sizes", rule, list(sizes))
        return VideoLayout(num_frames=num_frames, block_sizes=tuple(sizes), **sides)

    def noise(
        self, layout: VideoLayout, num_rows: int, generator: Any, latents: Tensor | None
    ) -> Tensor:
        """Drawn once for whole videos, as the pipeline does."""
        scale = self.pipe.vae_scale_factor_spatial
        return self.pipe.prepare_latents(
            num_rows,
            layout.channels,
            layout.height * scale,
            layout.width * scale,
            layout.num_frames,
            torch.float32,
            self.pipe._execution_device,
            generator,
            latents,
        )

    def model(
        self, layout: VideoLayout, guidance_scale: float, attention: str | None = None
    ) -> BlockModel:
        """The transformer on a cache of its own."""
        transformer, scheduler = self.pipe.transformer, self.pipe.scheduler
        return FarModel(transformer, scheduler, layout, guidance_scale, attention)

    def codec(self) -> Codec:
        """The VAE, whose causal convolutions remember the blocks before."""
        return WanCodec(self.pipe.vae)
