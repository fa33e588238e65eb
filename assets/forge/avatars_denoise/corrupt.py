"""What the fine-tuning does to the embeddings of an image: segments of noise, the rest clean."""

import math

import torch
from torch import Tensor

from mmspec.denoiser import Denoiser

#: Share of the rows that stay clean, so that the model stays a plain autoregressive one.
CLEAN_ROWS = 0.2
#: Levels are log-uniform between these.
LEAST_SIGMA, LARGEST_SIGMA = 0.3, 80.0
#: Share of the segments that are all but pure noise throughout, as new windows are.
PURE_SEGMENTS = 0.3
LONGEST_SEGMENT, LONGEST_GAP = 128, 32
#: Weight, in places, of segments that begin with the image.
EARLY = 64


def draw_levels(num_rows: int, num_tokens: int) -> Tensor:
    """Draws the noise level of every embedding.

    Gaps and segments take turns. Inside a segment the level rises from its first embedding to its
    last, for in a window the far positions were entered last.

    Returns:
        Levels ``[num_rows, num_tokens]``; 0 where the embedding stays clean.
    """
    sigma_BN = torch.zeros(num_rows, num_tokens)
    for row in range(num_rows):
        if torch.rand(()) < CLEAN_ROWS:
            continue
        # Behind a first segment the past is noisy, which in a window it never is: so the first one
        # may begin anywhere, and often enough with the image itself.
        start = max(0, int(torch.randint(-EARLY, num_tokens, ())))
        while start < num_tokens:
            length = int(torch.randint(1, LONGEST_SEGMENT + 1, ()))
            sigma_BN[row, start : start + length] = _segment(length)[: num_tokens - start]
            start += length + int(torch.randint(1, LONGEST_GAP + 1, ()))
    return sigma_BN


def _segment(length: int) -> Tensor:
    low, high = torch.rand(2).sort().values.tolist()
    if torch.rand(()) < PURE_SEGMENTS:
        low = high = 1.0
    span = math.log(LARGEST_SIGMA / LEAST_SIGMA)
    return LEAST_SIGMA * (span * torch.linspace(low, high, length)).exp()


def corrupted(denoiser: Denoiser, embeds_BNH: Tensor, sigma_BN: Tensor) -> Tensor:
    """Puts noise of these levels on embeddings; where the level is 0 they stay as they are."""
    # A level of 0 has no logarithm; what becomes of it is not looked at.
    sigma = torch.where(sigma_BN > 0, sigma_BN, 1.0)
    noisy = denoiser(embeds_BNH, torch.randn_like(embeds_BNH), sigma)
    return torch.where(sigma_BN[..., None] > 0, noisy, embeds_BNH)
