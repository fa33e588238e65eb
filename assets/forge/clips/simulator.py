"""Clips of one object of Fashion-MNIST that crosses a black square and bounces off its walls.

Fashion-MNIST (Xiao et al. 2017, MIT licence) comes as Debian's package ``dataset-fashion-mnist``.
"""

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmspec.assets.clips.prompts import COLOURS, OBJECTS, Scene, all_scenes

FASHION = Path("/usr/share/datasets/fashion-mnist")
#: Pixels of a picture's side and of an object's; pictures of a clip.
SIDE, OBJECT_SIDE, NUM_FRAMES = 32, 16, 33
NUM_HELD_OUT = 320


class Simulator:
    """Draws clips of scenes.

    Attributes:
        sprites: Class number -> ``[N, 16, 16]`` in 0 .. 1.
    """

    def __init__(self, *, split: str = "train", folder: Path = FASHION) -> None:
        """Reads the objects.

        Args:
            split: "train" or "t10k".
            folder: Of the four files of Fashion-MNIST.
        """
        images = _read(folder / f"{split}-images-idx3-ubyte.gz", 16)
        classes = _read(folder / f"{split}-labels-idx1-ubyte.gz", 8)
        small = F.interpolate(
            images.reshape(-1, 1, 28, 28).float() / 255, size=OBJECT_SIDE, mode="area"
        )
        self.sprites = {number: small[classes == number, 0] for number in OBJECTS.values()}

    def draw(self, scenes: Sequence[Scene], generator: torch.Generator) -> Tensor:
        """Draws one clip for each scene, ``[N, 33, 3, 32, 32]`` in 0 .. 1."""
        sprites, starts = [], torch.rand(len(scenes), 2, generator=generator)
        for scene in scenes:
            pool = self.sprites[OBJECTS[scene.object]]
            chosen = torch.randint(len(pool), (1,), generator=generator)
            colour = torch.tensor(COLOURS[scene.colour])
            sprites.append(pool[chosen] * colour.view(3, 1, 1))
        room = SIDE - OBJECT_SIDE
        velocity = torch.tensor([scene.velocity for scene in scenes])
        places = bounce(starts * room, velocity, room)
        return paste(torch.stack(sprites), places)


def _read(path: Path, header: int) -> Tensor:
    """The bytes of a file behind its header."""
    with gzip.open(path) as file:
        return torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=header).copy())


def bounce(start: Tensor, velocity: Tensor, room: float, num_frames: int = NUM_FRAMES) -> Tensor:
    """Places ``[N, frames, 2]`` of something that moves in ``0 .. room`` along each axis."""
    times = torch.arange(num_frames).view(1, -1, 1)
    way = (start[:, None] + times * velocity[:, None]) % (2 * room)
    return torch.where(way > room, 2 * room - way, way)


def paste(sprites: Tensor, places: Tensor) -> Tensor:
    """Puts ``[N, 3, 16, 16]`` into black pictures, between pixels bilinearly."""
    num_clips, num_frames = places.shape[:2]
    large = F.pad(sprites, (0, SIDE - OBJECT_SIDE, 0, SIDE - OBJECT_SIDE))
    large = large[:, None].expand(-1, num_frames, -1, -1, -1).flatten(0, 1)
    theta = torch.zeros(num_clips * num_frames, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1.0
    theta[:, :, 2] = -places.flatten(0, 1) * 2 / SIDE
    grid = F.affine_grid(theta, list(large.shape), align_corners=False)
    frames = F.grid_sample(large, grid, align_corners=False)
    return frames.unflatten(0, (num_clips, num_frames))


def split_scenes() -> tuple[list[Scene], list[Scene]]:
    """Scenes to train on, and the held-out ones, which no clip of the training shows."""
    scenes = all_scenes()
    order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(11)).tolist()
    shuffled = [scenes[number] for number in order]
    return shuffled[NUM_HELD_OUT:], shuffled[:NUM_HELD_OUT]
