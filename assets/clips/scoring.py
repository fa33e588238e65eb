"""How good clips are, by what a prompt asked for: no router looks at any of this.

Two things are judged. *class* is the share of pictures in which a classifier, trained on drawn
clips alone, sees the object of the prompt in its colour. *trajectory* compares where the object is
in each picture with the way that the prompt asks for, walls included. *quality* is their product:
a clip must show the right thing on the right way.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmspec.assets.clips.prompts import COLOURS, OBJECTS, Scene, parse_prompt

WEIGHTS = Path(__file__).with_name("classifier.safetensors")
#: Pixels that an object can move by along each axis; residual at which a trajectory counts exp(-1).
ROOM, TOLERANCE = 16, 2.0
_NUM_PHASES = 256


class Classifier(nn.Module):
    """Object and colour of a picture ``[N, 3, 32, 32]`` in 0 .. 1."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.objects = nn.Linear(64, len(OBJECTS))
        self.colours = nn.Linear(64, len(COLOURS))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of objects ``[N, 8]`` and colours ``[N, 8]``, in the order of the tables."""
        features = self.features(pictures)
        return self.objects(features), self.colours(features)


@cache
def load_classifier() -> Classifier:
    """The trained classifier."""
    model = Classifier()
    model.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return model.eval()


def score_clips(frames: Tensor, prompts: Sequence[str]) -> list[dict[str, float]]:
    """Judges clips.

    Args:
        frames: ``[N, pictures, 3, 32, 32]`` in 0 .. 1.
        prompts: One for each clip, as `mmspec.assets.clips.prompts.Scene.prompt`.

    Returns:
        For each clip "class", "trajectory" and their product "quality", all in 0 .. 1.

    Raises:
        ValueError: If a prompt is no sentence of these clips, or the shapes do not fit.
    """
    if frames.ndim != 5 or len(frames) != len(prompts) or frames.shape[2:] != (3, 32, 32):
        got = (tuple(frames.shape), len(prompts))
        raise ValueError(f"frames must be (prompts, pictures, 3, 32, 32), got {got}")
    scenes = [parse_prompt(prompt) for prompt in prompts]
    seen, followed = classes(frames, scenes), trajectories(frames, scenes)
    return [
        {"class": one, "trajectory": other, "quality": one * other}
        for one, other in zip(seen.tolist(), followed.tolist(), strict=True)
    ]


@torch.no_grad()
def classes(frames: Tensor, scenes: Sequence[Scene], model: Classifier | None = None) -> Tensor:
    """Share of pictures that show the object of the scene in its colour, ``[N]``."""
    model = model or load_classifier()
    objects, colours = model(frames.flatten(0, 1).float())
    wanted = torch.tensor([list(OBJECTS).index(scene.object) for scene in scenes])
    wanted_colours = torch.tensor([list(COLOURS).index(scene.colour) for scene in scenes])
    shape = frames.shape[:2]
    is_right = (objects.argmax(1).view(shape) == wanted[:, None]) & (
        colours.argmax(1).view(shape) == wanted_colours[:, None]
    )
    return is_right.float().mean(1)


def trajectories(frames: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """How well the objects follow the way of their scenes, ``[N]``.

    The way is a triangle wave of known speed along each axis. Where it starts and where the middle
    of the object lies in its square are free: the best fit counts, ``exp(-(residual / 2 px)^2)``
    of the root of the mean square residual over both axes. A clip without an object counts zero.
    """
    places, is_there = centres(frames)
    velocity = torch.tensor([scene.velocity for scene in scenes])
    residual = _residuals(places, velocity).sum(1).sqrt()
    score = torch.exp(-((residual / TOLERANCE) ** 2))
    return torch.where(is_there, score, 0.0)


def centres(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Middles of brightness ``[N, pictures, 2]`` in pixels, and whether each clip has any."""
    light = frames.float().amax(2)
    # What is left of noise behind the object would pull the middle towards that of the picture.
    light = torch.where(light > 0.15, light, 0.0)
    mass = light.sum((2, 3))
    along = torch.arange(light.shape[-1], dtype=torch.float32)
    middle = (
        torch.stack([(light.sum(2) * along).sum(2), (light.sum(3) * along).sum(2)], dim=2)
        / mass.clamp(min=1e-6)[..., None]
    )
    return middle, (mass > 4).all(1)


def _residuals(places: Tensor, velocity: Tensor) -> Tensor:
    """Mean square residual of the best fit along each axis, ``[N, 2]``."""
    times = torch.arange(places.shape[1], dtype=torch.float32)
    phase = torch.arange(_NUM_PHASES) * (2 * ROOM / _NUM_PHASES)
    # Starts with the sign of the prompt: 0 .. ROOM going up, the mirror going down.
    start = phase[phase <= ROOM]
    way = start[None, None, :, None] + velocity[:, :, None, None] * times
    way = way % (2 * ROOM)
    way = torch.where(way > ROOM, 2 * ROOM - way, way)
    difference = places.transpose(1, 2)[:, :, None] - way
    return difference.var(dim=3, unbiased=False).amin(2)
