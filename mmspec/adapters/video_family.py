"""Families of block-wise video models: what differs between diffusers' pipelines."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mmspec.adapters.block_frames import Codec
from mmspec.adapters.block_video import BlockModel
from mmspec.checks import is_integer, require

#: Class of diffusers -> (module, class).
FAMILIES = {
    "AnyFlowFARPipeline": ("mmspec.adapters.video_anyflow", "FarFamily"),
    "HeliosPipeline": ("mmspec.adapters.video_helios", "HeliosFamily"),
}

#: What drafter and target must have in common to share latents: settings of the VAE.
SHARED_SETTINGS = (
    "z_dim",
    "latents_mean",
    "latents_std",
    "scale_factor_spatial",
    "scale_factor_temporal",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoLayout:
    """How a video of one size lies in latent blocks.

    Attributes:
        num_frames: Pictures of the video.
        block_sizes: Latent frames of each block.
        channels: Of the latents.
        height: Of the latents.
        width: Of the latents.
    """

    num_frames: int
    block_sizes: tuple[int, ...]
    channels: int
    height: int
    width: int


class VideoFamily(Protocol):
    """A kind of pipeline of diffusers that writes videos block by block.

    Attributes:
        pipe: The pipeline.
        can_stitch: Whether another model may take over in the middle of a block.
        attentions: Ways to compute attention, by name; empty where there is but one.
    """

    pipe: Any
    can_stitch: bool
    attentions: tuple[str, ...]

    def layout(
        self, num_frames: int, height: int, width: int, block_sizes: Sequence[int] | None
    ) -> VideoLayout:
        """The layout of a video of that size in pixels.

        Raises:
            ValueError: If the frames do not fill the blocks, or a side does not fit.
        """

    def noise(
        self, layout: VideoLayout, num_rows: int, generator: Any, latents: Tensor | None
    ) -> Tensor:
        """Noise of whole videos ``[B, C, F, H, W]``, the numbers that the pipeline draws."""

    def model(
        self, layout: VideoLayout, guidance_scale: float, attention: str | None = None
    ) -> BlockModel:
        """The transformer, ready for videos of one layout.

        Args:
            layout: Of the videos.
            guidance_scale: Of classifier-free guidance; at most 1 is none.
            attention: One of `attentions`, while this model runs; None is as the transformer has
                it.
        """

    def codec(self) -> Codec:
        """What decodes the blocks."""


def video_family(pipe: Any) -> VideoFamily:
    """The family of a pipeline.

    Raises:
        ValueError: If it is of no known family; lists the known ones.
    """
    kind = type(pipe).__name__
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"{kind} is not a known pipeline of block-wise video; known: {known}")
    module, name = FAMILIES[kind]
    return getattr(importlib.import_module(module), name)(pipe)


def check_pair(target: Any, drafter: Any) -> None:
    """Refuses a drafter whose latents the target cannot read.

    Args:
        target: A pipeline of diffusers.
        drafter: Another.

    Raises:
        ValueError: With what differs, and both values.
    """
    pairs = [("pipeline", type(target).__name__, type(drafter).__name__)]
    for name in ("in_channels", "text_dim"):
        configs = (target.transformer.config, drafter.transformer.config)
        pairs.append((f"transformer.{name}", *(config[name] for config in configs)))
    if drafter.vae is not None:
        configs = (target.vae.config, drafter.vae.config)
        pairs += [
            (f"vae.{key}", *(config.get(key) for config in configs)) for key in SHARED_SETTINGS
        ]
    for name, ours, theirs in pairs:
        require(ours == theirs, f"the drafter's {name}", f"the target's, {ours!r}", theirs)


def sized(pipe: Any, num_frames: int, height: int, width: int) -> dict[str, int]:
    """Channels, height and width of the latents of a video.

    Raises:
        ValueError: If a size is no count, or the VAE and the patches do not divide a side.
    """
    sizes = {"num_frames": num_frames, "height": height, "width": width}
    for name, value in sizes.items():
        require(is_integer(value) and value >= 1, name, "an integer >= 1", value)
    config, scale = pipe.transformer.config, pipe.vae_scale_factor_spatial
    for name, patch in (("height", config.patch_size[1]), ("width", config.patch_size[2])):
        step = scale * patch
        require(sizes[name] % step == 0, name, f"a multiple of {step}", sizes[name])
    return {"channels": config.in_channels, "height": height // scale, "width": width // scale}
