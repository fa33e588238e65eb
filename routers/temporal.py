"""How a block moves: what a scorer of single pictures cannot see.

Three penalties for each step from a picture to the next, in mean absolute luma (0 black, 1 white):

    warp     what the best shift of each patch leaves over: new, torn or morphing content
    flicker  brightness along the motion that goes up and comes back down, or the reverse
    seam     how much more than its neighbours the step into the block leaves over: a jump

Shape suffixes as in `mmspec.block_records`; P is the steps, h and w count patches.
"""

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from mmspec.block_records import BlockView
from mmspec.checks import require_known
from mmspec.routers.luma import luma
from mmspec.routers.scoring import Scorer

PENALTIES = ("all", "warp", "flicker", "seam")
#: Pixels of the short side that motion is looked for at, of a patch, and of the longest shift.
SHORT_SIDE, PATCH, RADIUS = 128, 8, 4


class TemporalScorer(Scorer):
    """Minus the penalty of each step into and within the block; no weights, no prompt.

    A block without a step, one picture with none before, cannot be judged and is not kept. A block
    that stands still is perfect by this score: it sees defects of motion, not its absence.
    """

    name: ClassVar[str] = "temporal"
    sees_motion: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...]] = ("see",)

    def __init__(self, see: str = "all") -> None:
        """Chooses the penalty.

        Args:
            see: "warp", "flicker", "seam", or "all" for their sum.

        Raises:
            ValueError: If it is something else.
        """
        require_known("penalty of router 'temporal'", see, PENALTIES)
        self._see = see
        self.typed = "" if see == "all" else f",see={see}"

    def batches(self, block: BlockView) -> Iterator[Tensor]:
        """Scores all steps at once: pictures are small here, and the seam looks at its context."""
        penalties = temporal_penalties(block.frames(), block.previous_frames())
        chosen = penalties.values() if self._see == "all" else [penalties[self._see]]
        yield -torch.stack(list(chosen)).sum(0)


def temporal_penalties(frames_F3HW: Tensor, previous_3HW: Tensor | None) -> dict[str, Tensor]:
    """The penalties "warp", "flicker" and "seam" of each step of a block.

    Args:
        frames_F3HW: Its pictures, in [0, 1].
        previous_3HW: Pictures before it, one or more; None for the first block.

    Returns:
        ``[P]`` each: F steps, the first from the picture before; one less for the first block.
    """
    num_before = 0
    pictures = frames_F3HW
    if previous_3HW is not None:
        num_before = len(previous_3HW)
        pictures = torch.cat([previous_3HW.to(frames_F3HW), frames_F3HW])
    left_Phw, change_Phw = _matched(_reduced(luma(pictures)))
    warp_P = left_Phw.mean((1, 2))
    flicker_P = torch.zeros_like(warp_P)
    # Fades and light that stays are no flicker: the two changes have one sign.
    opposed_Phw = (-change_Phw[1:] * change_Phw[:-1]).clamp_min(0).sqrt()
    flicker_P[1:] = opposed_Phw.mean((1, 2))
    seam_P = torch.zeros_like(warp_P)
    first = max(num_before - 1, 0)
    if num_before:
        others_P = torch.cat([warp_P[:first], warp_P[first + 1 :]])
        usual = others_P.max() if len(others_P) else 0.0
        seam_P[first] = (warp_P[first] - usual).clamp_min(0)
    penalties = {"warp": warp_P, "flicker": flicker_P, "seam": seam_P}
    return {name: one[first:] for name, one in penalties.items()}


def _reduced(luma_FHW: Tensor) -> Tensor:
    """Short side 128 at most: a shift then reaches as far in a large picture as in a small one."""
    height, width = luma_FHW.shape[1:]
    factor = min(1.0, SHORT_SIDE / min(height, width))
    size = tuple(max(PATCH, round(side * factor)) for side in (height, width))
    return functional.interpolate(luma_FHW[:, None], size, mode="area")


def _matched(luma_F1HW: Tensor) -> tuple[Tensor, Tensor]:
    """Block matching over whole pixels.

    Returns:
        For each step and patch the mean absolute difference to the best match in the picture
        before, and the mean signed one, ``[F - 1, h, w]`` each.
    """
    old, new = luma_F1HW[:-1], luma_F1HW[1:]
    height, width = new.shape[-2:]
    padded = functional.pad(old, [RADIUS] * 4, mode="replicate")
    shifts = sorted(range(-RADIUS, RADIUS + 1), key=abs)
    best = signed = None
    for down in shifts:
        for right in shifts:
            top, left = RADIUS + down, RADIUS + right
            difference = new - padded[..., top : top + height, left : left + width]
            residual = functional.avg_pool2d(difference.abs(), PATCH)
            change = functional.avg_pool2d(difference, PATCH)
            if best is None or signed is None:
                best, signed = residual, change
                continue
            # Strictly better: of equal matches the first, which is the shortest shift, stays.
            signed = torch.where(residual < best, change, signed)
            best = torch.minimum(best, residual)
    assert best is not None
    assert signed is not None
    return best[:, 0], signed[:, 0]
