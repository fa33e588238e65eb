"""Brightness of pictures."""

from torch import Tensor


def luma(frames_F3HW: Tensor) -> Tensor:
    """Luma of ITU-R BT.709, ``[F, H, W]``, of pictures ``[F, 3, H, W]``."""
    red, green, blue = frames_F3HW.unbind(1)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
