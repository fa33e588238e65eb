"""The VAE of Wan, decoded block by block.

Its convolutions are causal in time and remember the last latent frames of what they saw.
`AutoencoderKLWan.decode` starts them anew, decodes one latent frame after the other and forgets.
Here the memory outlives the call and belongs to the caller: every layer replaces its entry of the
list and changes no tensor in place, so a copy of the list is a snapshot, and a draft that is
dropped leaves nothing behind. The pictures are those of the whole decode, to the bit.
"""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from mmspec.checks import require


class WanCodec:
    """`AutoencoderKLWan` with a memory for each video."""

    remembers = True

    def __init__(self, vae: Any) -> None:
        """Keeps the VAE.

        Raises:
            ValueError: If it decodes in tiles, which forgets the memory between them.
        """
        require(not vae.use_tiling, "vae.use_tiling", "off: blocks are decoded whole", True)
        self._vae = vae
        # To say them, diffusers walks through all modules: too much for every block.
        self._device, self._dtype = vae.device, vae.dtype

    @torch.no_grad()
    def decode(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        """As `Codec.decode`; the state is the list of what every layer remembers."""
        vae = self._vae
        is_first = state is None
        memory = [None] * vae._cached_conv_counts["decoder"] if is_first else list(state)
        frames = vae.post_quant_conv(self._normalised(latents))
        pictures: list[Tensor] = []
        for frame in frames.split(1, dim=2):
            first = {"first_chunk": True} if is_first and not pictures else {}
            pictures.append(vae.decoder(frame, feat_cache=memory, feat_idx=[0], **first))
        pixels = torch.cat(pictures, dim=2)
        if vae.config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=vae.config.patch_size)
        return pixels.clamp(-1.0, 1.0), memory

    def _normalised(self, latents: Tensor) -> Tensor:
        """From the transformer's scale of latents to the VAE's."""
        latents = latents.to(self._device, self._dtype)

        def per_channel(values: list[float]) -> Tensor:
            return torch.tensor(values).view(1, -1, 1, 1, 1).to(latents)

        config = self._vae.config
        return latents / (1.0 / per_channel(config.latents_std)) + per_channel(config.latents_mean)
