"""What to show: requests of images and of videos, of a command's arguments or of a file."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmspec.checks import is_integer, require, require_known
from mmspec.jobs import lines_of


@dataclass(frozen=True, slots=True, kw_only=True)
class VisualRequest:
    """One request, which may have several images or videos.

    Attributes:
        prompt: What to show.
        negative_prompt: What guidance steers away from, or None.
        height: Pixels, or None for the model's own.
        width: Pixels, likewise.
        seed: Seed of image or video 0; number k has ``seed + k``.
        where: File and line, for messages; empty where there is none.
    """

    prompt: str
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    seed: int = 0
    where: str = ""

    @property
    def size(self) -> tuple[int | None, int | None]:
        """Height and width."""
        return self.height, self.width

    def fields(self) -> dict[str, Any]:
        """What it says, without its place in a file."""
        own = asdict(self)
        del own["where"]
        return {name: value for name, value in own.items() if value is not None}

    def options(self) -> dict[str, Any]:
        """The options of a pipeline's call that it sets."""
        names = ("negative_prompt", "height", "width")
        return {name: value for name, value in self.fields().items() if name in names}

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Puts its place in a file in front of a `ValueError`."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}" if self.where else error) from error


#: Field of a line -> the rule in words, and whether a value keeps it.
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "prompt": ("a non-empty string", lambda v: isinstance(v, str) and v.strip() != ""),
    "negative_prompt": ("null or a string", lambda v: v is None or isinstance(v, str)),
    "height": ("null or an integer >= 1", lambda v: v is None or (is_integer(v) and v >= 1)),
    "width": ("null or an integer >= 1", lambda v: v is None or (is_integer(v) and v >= 1)),
    "seed": ("an integer", is_integer),
}


def read_requests(path: str | Path, shared: Mapping[str, Any]) -> list[VisualRequest]:
    """The requests of a file.

    Args:
        path: A ``.jsonl`` file of objects with ``prompt`` and optionally other fields of
            `VisualRequest`; any other file has one prompt per line.
        shared: Fields for lines that do not have them.

    Raises:
        ValueError: If a line cannot be used; the message names the file and the line.
    """
    requests = []
    for _, where, given in lines_of(path):
        for name, value in given.items():
            require_known(f"{where}: field", name, _RULES)
            rule, is_good = _RULES[name]
            require(is_good(value), f"{where}: {name!r}", rule, value)
        require("prompt" in given, where, "an object with a 'prompt'", given)
        requests.append(VisualRequest(**{**shared, **given, "where": where}))
    return requests
