"""Pictures as the encoders of CLIP and its kin take them, on tensors and in batches."""

from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

#: Normalisation of CLIP (Radford et al. 2021), and of BLIP.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def crop_to_square(frames_F3HW: Tensor, size: int) -> Tensor:
    """Resizes the short side and cuts out the middle: what lies outside is not seen."""
    return functional.center_crop(_resized(frames_F3HW, [size]), [size, size])


def pad_to_square(frames_F3HW: Tensor, size: int) -> Tensor:
    """Resizes the long side and adds black on both sides: the whole picture is seen."""
    height, width = frames_F3HW.shape[-2:]
    scale = size / max(height, width)
    resized = _resized(frames_F3HW, [round(height * scale), round(width * scale)])
    missing = [size - side for side in resized.shape[:-3:-1]]
    before = [one // 2 for one in missing]
    return functional.pad(
        resized, [*before, *(m - b for m, b in zip(missing, before, strict=True))]
    )


def normalized(frames_F3HW: Tensor) -> Tensor:
    """Subtracts CLIP's mean and divides by its deviation, per channel."""
    return functional.normalize(frames_F3HW, list(MEAN), list(STD))


def _resized(frames_F3HW: Tensor, size: list[int]) -> Tensor:
    """Bicubic with antialiasing, as PIL; it overshoots at edges, which PIL's integers clip."""
    bicubic = InterpolationMode.BICUBIC
    return functional.resize(frames_F3HW, size, interpolation=bicubic, antialias=True).clamp(0, 1)
