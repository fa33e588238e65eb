"""No-reference statistics of single pictures that need no weights: blur and noise.

Shape suffixes as in `mmspec.block_records`.
"""

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from mmspec.block_records import BlockView
from mmspec.routers.luma import luma
from mmspec.routers.scoring import Scorer


class SharpnessScorer(Scorer):
    """Standard deviation of the luma's Laplacian, per picture: blur lowers it, noise raises it.

    Source: Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy", which takes
    its square.
    """

    name: ClassVar[str] = "sharpness"

    def batches(self, block: BlockView) -> Iterator[Tensor]:
        """Scores all pictures at once; a constant picture has 0."""
        laplacian = _filtered(block.frames(), [[0, 1, 0], [1, -4, 1], [0, 1, 0]])
        yield laplacian.std((1, 2), correction=0)


class NoiseScorer(Scorer):
    """Minus the standard deviation of white noise in the luma, per picture.

    Source: Immerkær 1996, "Fast noise variance estimation". Fine texture counts as noise too.
    """

    name: ClassVar[str] = "noise"

    def batches(self, block: BlockView) -> Iterator[Tensor]:
        """Scores all pictures at once."""
        response = _filtered(block.frames(), [[1, -2, 1], [-2, 4, -2], [1, -2, 1]])
        # The filter has the norm 6, and a normal law the mean absolute value sqrt(2 / pi).
        yield -response.abs().mean((1, 2)) * (math.sqrt(math.pi / 2) / 6)


def _filtered(frames_F3HW: Tensor, kernel: list[list[int]]) -> Tensor:
    weight = torch.tensor(kernel, dtype=frames_F3HW.dtype, device=frames_F3HW.device)
    return functional.conv2d(luma(frames_F3HW)[:, None], weight[None, None])[:, 0]
