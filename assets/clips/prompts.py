"""The prompts of the bundled clips: which object, in which colour, moving where and how fast."""

import re
from dataclasses import dataclass
from itertools import product

#: Classes of Fashion-MNIST that can be told apart at 16 x 16 pixels, by their number there.
OBJECTS = {
    "t-shirt": 0,
    "trouser": 1,
    "pullover": 2,
    "dress": 3,
    "sandal": 5,
    "sneaker": 7,
    "bag": 8,
    "boot": 9,
}
#: Red, green and blue of full brightness.
COLOURS = {
    "red": (1.0, 0.2, 0.2),
    "green": (0.2, 1.0, 0.2),
    "blue": (0.3, 0.4, 1.0),
    "yellow": (1.0, 1.0, 0.2),
    "orange": (1.0, 0.6, 0.1),
    "pink": (1.0, 0.4, 0.8),
    "cyan": (0.2, 1.0, 1.0),
    "white": (1.0, 1.0, 1.0),
}
#: Signs of the first step to the right and down.
DIRECTIONS = {
    "right": (1, 0),
    "left": (-1, 0),
    "down": (0, 1),
    "up": (0, -1),
    "down right": (1, 1),
    "down left": (-1, 1),
    "up right": (1, -1),
    "up left": (-1, -1),
}
#: Pixels per picture along each axis that moves.
SPEEDS = {"slowly": 0.75, "quickly": 1.5}

_PATTERN = re.compile(
    rf"an? ({'|'.join(COLOURS)}) ({'|'.join(OBJECTS)}) moving "
    rf"({'|'.join(sorted(DIRECTIONS, key=len, reverse=True))}) ({'|'.join(SPEEDS)})"
)


@dataclass(frozen=True, slots=True)
class Scene:
    """What a prompt asks for: keys of the tables above."""

    object: str
    colour: str
    direction: str
    speed: str

    @property
    def prompt(self) -> str:
        """The sentence."""
        article = "an" if self.colour == "orange" else "a"
        return f"{article} {self.colour} {self.object} moving {self.direction} {self.speed}"

    @property
    def velocity(self) -> tuple[float, float]:
        """Pixels per picture to the right and down, before the first wall."""
        right, down = DIRECTIONS[self.direction]
        return right * SPEEDS[self.speed], down * SPEEDS[self.speed]


def parse_prompt(prompt: str) -> Scene:
    """Reads a sentence of `Scene.prompt`.

    Raises:
        ValueError: If it is no such sentence.
    """
    found = _PATTERN.fullmatch(prompt)
    if found is None:
        rule = "as 'a red sneaker moving up left slowly', with the words of its tables"
        raise ValueError(f"prompt must be {rule}, got {prompt!r}")
    colour, name, direction, speed = found.groups()
    return Scene(name, colour, direction, speed)


def all_scenes() -> list[Scene]:
    """All 1024 of them, in a fixed order."""
    return [Scene(*words) for words in product(OBJECTS, COLOURS, DIRECTIONS, SPEEDS)]
