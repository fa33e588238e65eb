"""Whether the pictures of every decoder show what their captions state.

The captions are `heldout_fresh.jsonl`, which no decision about the model has looked at. A bundled
model whose pictures can be judged brings a module ``scoring`` that does it; for the avatars it is
exact lookup (`mmspec.assets.avatars.scoring`).
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mmspec.bench.measure import Sample, ratio
from mmspec.bench.report import Section, percent, table

#: What tells the configurations of image samples apart.
FIELDS = ("model", "dtype", "temperature", "guidance", "batch")
Attributes = Mapping[str, str]
Judge = Callable[[Any, Sequence[Attributes]], Mapping[str, float]]


def grouped(samples: Sequence[Sample]) -> dict[tuple[Any, ...], dict[str, list[Sample]]]:
    """Configuration -> system -> samples, in the order they were asked for."""
    groups: dict[tuple[Any, ...], dict[str, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        groups[tuple(sample[name] for name in FIELDS)][sample["system"]].append(sample)
    return groups


def title_of(row: Sample) -> str:
    """The configuration of a row in words."""
    where = f"guidance {row['guidance']:g}, batch {row['batch']}"
    return f"{row['model']}, {row['dtype']}, temperature {row['temperature']:g}, {where}"


def score(
    judge: Judge, model: Any, samples: Iterable[Sample], attributes: Sequence[Attributes]
) -> None:
    """Adds to samples how many stated attributes their pictures show.

    Args:
        judge: Given pictures in [0, 1] and what they should show, the share that they do, by
            attribute and for ``all`` of a picture's.
        model: Turns the samples' ``tokens`` into pictures.
        samples: Of the same captions.
        attributes: What each caption states.
    """
    counts = Counter(name for stated in attributes for name in stated)
    for sample in samples:
        with torch.no_grad():
            pixels = model.decode_image_tokens(sample["tokens"].to(model.device))
        images = (pixels.float().cpu().numpy() + 1) / 2
        found = judge(np.clip(images, 0, 1), attributes)
        sample["num_by_attribute"] = dict(counts)
        sample["num_right_by_attribute"] = {
            name: round(found[name] * count) for name, count in counts.items()
        }
        sample["num_all_right"] = round(found["all"] * len(attributes))


def summarise_quality(samples: Sequence[Sample]) -> list[Sample]:
    """One row per configuration and decoder: the share of right attributes."""
    rows = []
    for key, systems in sorted(grouped(samples).items()):
        for name, found in systems.items():
            rows.append(
                {"type": "quality", **dict(zip(FIELDS, key, strict=True)), "system": name}
                | _figures(found)
            )
    return rows


def _figures(samples: Sequence[Sample]) -> Sample:
    judged = [sample for sample in samples if "num_all_right" in sample]
    stated: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for sample in judged:
        stated.update(sample["num_by_attribute"])
        right.update(sample["num_right_by_attribute"])
    return {
        "guarantee": samples[0]["guarantee"],
        "num_images": sum(s["num_images"] for s in samples),
        "num_attributes": stated.total(),
        "accuracy": ratio(right.total(), stated.total()),
        "all_right": ratio(
            sum(s["num_all_right"] for s in judged), sum(s["num_images"] for s in judged)
        ),
        "by_attribute": {name: right[name] / stated[name] for name in sorted(stated)},
        "num_by_attribute": {name: stated[name] for name in sorted(stated)},
    }


def quality_sections(rows: Sequence[Sample]) -> list[Section]:
    """All decoders in one table, and per configuration a table of the attributes."""
    if not rows:
        return []
    headers = ["configuration", "system", "guarantee", "images", "attributes right", "all right"]
    lines = [
        [
            title_of(row),
            *(row[name] for name in ("system", "guarantee", "num_images")),
            *(percent(row[name]) for name in ("accuracy", "all_right")),
        ]
        for row in rows
    ]
    sections = [("Quality on fresh held-out captions", table(headers, lines))]
    groups: dict[str, list[Sample]] = defaultdict(list)
    for row in rows:
        if row["by_attribute"]:
            groups[title_of(row)].append(row)
    for title, found in groups.items():
        sections.append((f"Right by attribute: {title}", _attribute_table(found)))
    return sections


def _attribute_table(rows: Sequence[Sample]) -> str:
    counts = rows[0]["num_by_attribute"]
    lines = [
        [name, count, *(percent(row["by_attribute"].get(name)) for row in rows)]
        for name, count in counts.items()
    ]
    return table(["attribute", "stated", *(row["system"] for row in rows)], lines)
