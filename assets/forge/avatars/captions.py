"""Draws the held-out captions: one set to develop with, and one that is only for figures.

    python -m mmspec.assets.forge.avatars.captions

Writes `heldout.jsonl` and `heldout_fresh.jsonl` to `assets/avatars/`; `make_data` does so as well.
It needs no pictures: which combinations are held out follows from the seed alone.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from . import attributes as avatar

BUNDLE = Path(__file__).resolve().parents[2] / "avatars"
NUM_CAPTIONS = 200
SEED = 20
# File -> what is added to the seed. A file has no caption of the files before it.
SETS = {"heldout": 1, "heldout_fresh": 2}


def heldout_captions(triples: set[tuple[str, ...]], rng: random.Random) -> Iterator[dict]:
    """Yields captions of held-out combinations; each states the whole held-out triple."""
    while True:
        sample = avatar.draw_attributes(rng)
        if avatar.is_heldout(sample, triples):
            caption, stated = avatar.make_caption(sample, rng, ("hair", "clothing", "glasses"))
            yield {"caption": caption, "attributes": stated}


def draw_sets(seed: int = SEED) -> dict[str, str]:
    """Draws every set of captions.

    Args:
        seed: The data's; it chooses the held-out combinations too.

    Returns:
        File name without ending -> JSON lines with "caption" and "attributes" (what it states).
    """
    triples = avatar.heldout_triples(seed)
    taken: set[str] = set()
    texts = {}
    for name, offset in SETS.items():
        lines: list[str] = []
        captions = heldout_captions(triples, random.Random(seed + offset))
        while len(lines) < NUM_CAPTIONS:
            row = next(captions)
            if row["caption"] not in taken:
                lines.append(json.dumps(row) + "\n")
                taken.add(row["caption"])
        texts[name] = "".join(lines)
    return texts


def write_sets(seed: int = SEED) -> dict[str, str]:
    """Writes every set to the bundle; returns the texts as `draw_sets` does."""
    texts = draw_sets(seed)
    for name, text in texts.items():
        (BUNDLE / f"{name}.jsonl").write_text(text)
    return texts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=SEED)
    write_sets(parser.parse_args().seed)
