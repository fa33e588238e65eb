"""Writes the palette into the VQ model: one code per colour, decoded without any loss.

A picture of the data set has one of about a hundred colours per pixel, so nothing has to be
learned: the codebook holds the colours and the decoder's weights spell them out. The one obstacle
is the decoder's group normalisation, which would make a pixel depend on the whole picture. It
cannot when every feature is +1 or -1 and shares its group with its negative: then each group has
mean 0 and variance 1 whatever the picture. Hence a code is the 24 bits of its colour as signs.

    pixel = sum_k 2^k / 255 * bit_k      (bit_k = +-1; the range [-1, 1] for the values 0..255)
    silu(x) - silu(-x) = x               (undoes the decoder's last activation on a pair)

Beside the bits, a code holds its colour itself, so that near colours are near in the codebook.
"""

import numpy as np
import torch
from torch import Tensor, nn
from transformers import JanusVQVAE

NUM_BITS = 24
# Squared lengths of the two parts of a code, which has length 1 (`decode` normalises codes).
BITS_SHARE = 0.25
COLOR_SHARE = 1.0 - BITS_SHARE


def color_bits(palette_K3: np.ndarray) -> Tensor:
    """Returns the 24 bits of every colour as +-1: channel by channel, high bit first."""
    bits = np.unpackbits(palette_K3.astype(np.uint8), axis=1)  # (K, 24)
    return torch.from_numpy(bits.astype(np.float32)) * 2 - 1


def make_codebook(palette_K3: np.ndarray, embed_dim: int) -> Tensor:
    """Returns unit codes (K, embed_dim): bits, centred colour, and a filler for the length."""
    bits = color_bits(palette_K3) * (BITS_SHARE / NUM_BITS) ** 0.5
    color = torch.from_numpy(palette_K3.astype(np.float32)) / 127.5 - 1  # in [-1, 1]
    color = color * (COLOR_SHARE / 3) ** 0.5
    filler = (COLOR_SHARE - color.square().sum(1, keepdim=True)).clamp(min=0).sqrt()
    codes = torch.cat([bits, color, filler], dim=1)
    return nn.functional.pad(codes, (0, embed_dim - codes.shape[1]))


@torch.no_grad()
def write_palette(vq_model: JanusVQVAE, palette_K3: np.ndarray) -> None:
    """Sets the codebook and the decoder so that `decode` returns the exact palette colours.

    Args:
        vq_model: A Janus VQ model of one resolution (`channel_multiplier=[1]`) whose base width
            is 64 (groups of two channels) and which has at least 24 latent channels.
        palette_K3: The colours, uint8, one per code.
    """
    decoder = vq_model.decoder
    vq_model.quantize.embedding.weight.copy_(
        make_codebook(palette_K3, vq_model.quantize.embedding_dim)
    )
    for conv in (vq_model.post_quant_conv, decoder.conv_in, decoder.conv_out):
        conv.weight.zero_()
        conv.bias.zero_()
    # 1. Code -> 24 latents of size 1.
    bits = torch.arange(NUM_BITS)
    vq_model.post_quant_conv.weight[bits, bits, 0, 0] = (NUM_BITS / BITS_SHARE) ** 0.5
    # 2. Latent k -> channels 2k and 2k+1 with opposite signs. The groups left over stay zero.
    decoder.conv_in.weight[2 * bits, bits, 1, 1] = 1.0
    decoder.conv_in.weight[2 * bits + 1, bits, 1, 1] = -1.0
    # 3. The blocks in between add nothing.
    for name, parameter in decoder.named_parameters():
        if name.startswith(("mid.", "up.")) and ("conv2" in name or "proj_out" in name):
            parameter.zero_()
    # 4. Bits -> colour.
    weights = (2.0 ** torch.arange(7, -1, -1.0)) / 255
    for channel in range(3):
        of_channel = bits[8 * channel : 8 * channel + 8]
        decoder.conv_out.weight[channel, 2 * of_channel, 1, 1] = weights
        decoder.conv_out.weight[channel, 2 * of_channel + 1, 1, 1] = -weights
