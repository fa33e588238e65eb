"""What a run that goes on after a stop drafts from: the texts that it wrote before."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmspec.jobs.journal import Journal

#: Characters of earlier texts that are recalled: as many tokens as the store holds, or fewer.
MAX_RECALLED = 1_000_000


@dataclass(frozen=True, slots=True)
class Recalling:
    """Loads a pipeline that knows texts which were written before.

    Attributes:
        load: Loads the pipeline.
        texts: The texts, the oldest first.
    """

    load: Callable[[], Any]
    texts: tuple[str, ...]

    def __call__(self) -> Any:
        """The pipeline."""
        pipe = self.load()
        pipe.remember(self.texts)
        return pipe


def recalling(load: Callable[[], Any], journal: Journal) -> Callable[[], Any]:
    """Loads a pipeline that knows the latest texts of a journal; ``load`` if there are none."""
    texts: list[str] = []
    room = MAX_RECALLED
    for key in reversed(journal.entries):
        text = (journal.get(key) or {}).get("text")
        if text is not None and len(text) > room:
            break
        if text:
            texts.append(text)
            room -= len(text)
    return Recalling(load, tuple(reversed(texts))) if texts else load
