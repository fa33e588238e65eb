"""Cheap pictures of latents: a linear map in the place of a VAE's decoder.

A router that judges a draft by such pictures needs no decoding, so a draft that is refused is never
decoded. The map takes the channels of one latent to the patch of pixels that it stands for, in all
pictures of its latent frame. A VAE of Wan makes one picture of the first latent frame that it
decodes and several of every other, so there are two maps.

Shape suffixes as in `mmspec.block_records`; K is the channels with a 1 behind them, P the outputs.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from mmspec.checks import require

#: Beside a pipeline in its folder.
PREVIEW_FILE = "preview.safetensors"
_KINDS = ("first", "later")
#: Latents, their pictures, and whether the decoder started with them.
DecodedBlock = tuple[Tensor, Tensor, bool]


class LinearPreview:
    """Pictures of latents by a linear map, clipped to [0, 1].

    Attributes:
        channels: Of the latents.
        scale: Pixels of a picture along a side of a latent.
        pictures_per_frame: Pictures of every latent frame but the first.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        """Takes the maps.

        Args:
            tensors: "first.weight" ``[3 s s, C]``, "later.weight" ``[n 3 s s, C]`` for n pictures
                of a latent frame and s x s pixels of a latent, and the "bias" of each. Outputs lie
                as `torch.nn.functional.pixel_shuffle` takes them.

        Raises:
            ValueError: If they are something else.
        """
        shapes = {name: tuple(one.shape) for name, one in tensors.items()}
        channels, scale, per_frame = _sizes(shapes)
        outputs = {"first": 3 * scale**2, "later": per_frame * 3 * scale**2}
        wanted: dict[str, tuple[int, ...]] = {}
        for kind, size in outputs.items():
            wanted[f"{kind}.weight"] = (size, channels)
            wanted[f"{kind}.bias"] = (size,)
        rule = "weights and biases for one picture of a first latent frame and for those of others"
        require(channels > 0 and shapes == wanted, "a preview", rule, shapes)
        self.channels, self.scale, self.pictures_per_frame = channels, scale, per_frame
        self._tensors = {name: one.float() for name, one in tensors.items()}

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            ValueError: If the file is missing or is something else.
        """
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read the preview {str(path)!r}: {error}") from error
        return cls(tensors)

    def save(self, path: str | Path) -> None:
        """Writes a file of safetensors."""
        save_file({name: one.cpu().contiguous() for name, one in self._tensors.items()}, path)

    @classmethod
    @torch.no_grad()
    def fit(cls, blocks: Iterable[DecodedBlock], *, ridge: float = 1e-6) -> Self:
        """Fits the maps to decoded blocks, by least squares in fp64.

        Args:
            blocks: Of each the latents ``[F, C, H, W]`` as the transformer makes them, the pictures
                ``[F', 3, s H, s W]`` in [0, 1] that the VAE made of them, and whether its decoder
                started with them. They are taken one after the other, and not kept.
            ridge: Of the penalty on the weights, as a share of the mean square of the inputs.

        Raises:
            ValueError: If pictures do not fit their latents, or a kind of latent frame is missing.
        """
        sums: dict[str, list[Tensor]] = {}
        for latents_FCHW, pictures_F3HW, is_start in blocks:
            count = int(is_start)
            parts = {
                "first": (latents_FCHW[:count], pictures_F3HW[:count]),
                "later": (latents_FCHW[count:], pictures_F3HW[count:]),
            }
            for kind, (latents, pictures) in parts.items():
                if len(latents):
                    _add(sums, kind, _inputs(latents), _outputs(latents, pictures))
        missing = [kind for kind in _KINDS if kind not in sums]
        rule = "with first latent frames and later ones"
        require(not missing, "the blocks of a preview", rule, f"none of {missing}")
        tensors = {}
        for kind, (gram_KK, cross_KP) in sums.items():
            size = gram_KK.diagonal()[:-1].mean() * ridge
            penalty_K = torch.cat([size.expand(len(gram_KK) - 1), size.new_zeros(1)])
            map_KP = torch.linalg.solve(gram_KK + penalty_K.diag(), cross_KP)
            tensors[f"{kind}.weight"] = map_KP[:-1].T
            tensors[f"{kind}.bias"] = map_KP[-1]
        return cls(tensors)

    @torch.no_grad()
    def __call__(self, latents_FCHW: Tensor, *, is_start: bool) -> Tensor:
        """Pictures of latent frames.

        Args:
            latents_FCHW: As the transformer makes them.
            is_start: Whether the decoder would start with them: the first then has one picture.

        Returns:
            float32 ``[F', 3, s H, s W]`` in [0, 1], where the latents are.
        """
        latents = latents_FCHW.float()
        count = int(is_start)
        parts = zip(_KINDS, (latents[:count], latents[count:]), strict=True)
        return torch.cat([self._pictures(kind, part) for kind, part in parts if len(part)])

    def _pictures(self, kind: str, latents_FCHW: Tensor) -> Tensor:
        device = latents_FCHW.device
        # Moved once, not for every block.
        for name in (f"{kind}.weight", f"{kind}.bias"):
            self._tensors[name] = self._tensors[name].to(device)
        weight, bias = self._tensors[f"{kind}.weight"], self._tensors[f"{kind}.bias"]
        flat = functional.conv2d(latents_FCHW, weight[..., None, None], bias)
        pictures = functional.pixel_shuffle(flat, self.scale).unflatten(1, (-1, 3)).flatten(0, 1)
        return pictures.clamp(0, 1)


def _sizes(shapes: dict[str, tuple[int, ...]]) -> tuple[int, int, int]:
    """Channels, scale and pictures per latent frame; zeros where the shapes have none."""
    first, later = (shapes.get(f"{kind}.weight", ()) for kind in _KINDS)
    if len(first) != 2 or len(later) != 2 or not first[0]:
        return 0, 0, 0
    return first[1], math.isqrt(first[0] // 3), later[0] // first[0]


def _inputs(latents_FCHW: Tensor) -> Tensor:
    """What the map sees of each latent: ``[F H W, K]``."""
    rows = latents_FCHW.double().flatten(2).transpose(1, 2).flatten(0, 1)
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def _outputs(latents_FCHW: Tensor, pictures_F3HW: Tensor) -> Tensor:
    """What it is to give for each: ``[F H W, P]``.

    Raises:
        ValueError: If the pictures are no whole number for each frame, or pixels for each latent.
    """
    num_frames, height, width = (latents_FCHW.shape[axis] for axis in (0, 2, 3))
    num_pictures, colours, high, wide = pictures_F3HW.shape
    scale = high // height
    is_good = colours == 3 and (high, wide) == (scale * height, scale * width)
    is_good = is_good and scale > 0 and num_pictures > 0 and num_pictures % num_frames == 0
    rule = f"whole pictures and pixels for latents {tuple(latents_FCHW.shape)}"
    require(is_good, "the pictures of a preview", rule, tuple(pictures_F3HW.shape))
    stacked = pictures_F3HW.double().unflatten(0, (num_frames, -1)).flatten(1, 2)
    flat = functional.pixel_unshuffle(stacked, scale)
    return flat.flatten(2).transpose(1, 2).flatten(0, 1)


def _add(sums: dict[str, list[Tensor]], kind: str, inputs: Tensor, outputs: Tensor) -> None:
    """Adds to the normal equations.

    Raises:
        ValueError: If blocks before were of another size.
    """
    products = [inputs.T @ inputs, inputs.T @ outputs]
    if kind not in sums:
        sums[kind] = products
        return
    before, now = sums[kind][1].shape, products[1].shape
    rule = f"as before: {before[0]} inputs and {before[1]} outputs"
    require(before == now, "the blocks of a preview", rule, tuple(now))
    for total, product in zip(sums[kind], products, strict=True):
        total += product
