"""Many requests from a file: what is asked, what has been answered, and answering the rest.

A run may be killed at any moment and started again with the same command: answers are appended
one by one, a half-written last line is dropped, and what has an answer is not asked again. An
output that was made with other settings is refused rather than mixed.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmspec.pictures import read_png_metadata, save_png, step_map, upscale

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One request of a file.

    Attributes:
        id: Unique in its file.
        index: Place in the file from 0; the seed of the item counts from it, so that the answer
            does not depend on what was skipped.
        prompt: A text, or chat messages.
        max_new_tokens: Budget of this item, or None for the run's own.
    """

    id: str
    index: int
    prompt: Any
    max_new_tokens: int | None = None


def read_items(path: str | Path) -> list[Item]:
    """Reads requests.

    Args:
        path: A ``.jsonl`` file with objects of ``prompt`` (text) or ``messages`` (chat), and
            optionally ``id`` and ``max_new_tokens``; any other file has one prompt per line.

    Returns:
        The requests. Without an ``id``, the number of the line from 1 serves; empty lines do not
        count as requests.

    Raises:
        ValueError: If a line cannot be used, an id comes twice, or there is no request; the
            message names the file and the line.
    """
    path = Path(path)
    is_jsonl = path.suffix == ".jsonl"
    items: list[Item] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        fields = _fields(line, where) if is_jsonl else {"prompt": line.strip()}
        items.append(_item(fields, len(items), number, where))
    if not items:
        raise ValueError(f"{path} has no prompts")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise ValueError(f"{path}: the id {item.id!r} comes twice")
        seen.add(item.id)
    return items


def _fields(line: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: must be a JSON object with 'prompt' or 'messages'")
    return fields


def _item(fields: Mapping[str, Any], index: int, number: int, where: str) -> Item:
    prompt = fields.get("messages", fields.get("prompt"))
    if not isinstance(prompt, (str, list)) or not prompt:
        raise ValueError(f"{where}: needs a non-empty 'prompt' or 'messages'")
    return Item(
        id=str(fields.get("id", number)),
        index=index,
        prompt=prompt,
        max_new_tokens=fields.get("max_new_tokens"),
    )


def answered_ids(path: str | Path, settings: Mapping[str, Any]) -> set[str]:
    """Which ids an output file has, cutting off a last line that a kill left half-written.

    Args:
        path: The JSONL output; may be missing.
        settings: What the rows of this run are made with.

    Raises:
        ValueError: If a row was made with other settings or is no answer at all.
    """
    path = Path(path)
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    ids = set()
    for number, line in enumerate(whole.decode("utf-8").splitlines(), 1):
        row = _fields(line, f"{path}, line {number}")
        if "id" not in row or row.get("settings") != dict(settings):
            raise ValueError(
                f"{path}, line {number} was made with other settings; "
                "use the same ones to continue it, or another --out"
            )
        ids.add(row["id"])
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return ids


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator per row, so that a row does not depend on its batch."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def run_text_file(
    pipe: Any,
    items: Sequence[Item],
    out: str | Path,
    *,
    settings: Mapping[str, Any],
    seed: int,
    max_new_tokens: int,
    batch_size: int,
    report: Report,
    **options: Any,
) -> tuple[int, int]:
    """Answers text requests, one JSON line each.

    Args:
        pipe: A text pipeline.
        items: The requests.
        out: JSONL to append to; flushed after every batch.
        settings: Written into each row, and compared when a run is continued.
        seed: Seed of the first item; item k of the file has ``seed + k``.
        max_new_tokens: Budget of items without their own.
        batch_size: Items decoded together.
        report: Told the progress, a line at a time.
        **options: Passed to the pipeline's call.

    Returns:
        How many were answered now, and how many had been before.
    """
    out = Path(out)
    done = answered_ids(out, settings)
    missing = [item for item in items if item.id not in done]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        for batch in _batches(missing, max_new_tokens, batch_size):
            result = pipe(
                [item.prompt for item in batch],
                max_new_tokens=batch[0].max_new_tokens or max_new_tokens,
                generator=generators([seed + item.index for item in batch]),
                **options,
            )
            for row, item in enumerate(batch):
                answer = {
                    "id": item.id,
                    "text": result.texts[row],
                    "num_tokens": len(result.tokens[row]),
                    "seed": seed + item.index,
                    "tau": round(result.row_stats[row].tau, 3),
                    "num_target_forwards": result.row_stats[row].num_target_forwards,
                    "settings": dict(settings),
                }
                file.write(json.dumps(answer, ensure_ascii=False) + "\n")
            file.flush()
            report(f"{batch[-1].index + 1}/{len(items)} {batch[-1].id}")
    return len(missing), len(items) - len(missing)


def _batches(items: Sequence[Item], budget: int, batch_size: int) -> Iterator[list[Item]]:
    """Neighbours with the same budget, at most ``batch_size`` of them."""
    batch: list[Item] = []
    for item in items:
        same = batch and (item.max_new_tokens or budget) == (batch[0].max_new_tokens or budget)
        if batch and (not same or len(batch) == batch_size):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One image to make as a file of its own.

    Attributes:
        path: The file.
        prompt: What it shows.
        seed: Seed of its generator.
    """

    path: Path
    prompt: str
    seed: int


def run_image_files(
    pipe: Callable[[], Any],
    pictures: Sequence[Picture],
    *,
    settings: Mapping[str, str],
    scale: int,
    batch_size: int,
    report: Report,
    steps_map: bool = False,
    **options: Any,
) -> tuple[list[Any], int]:
    """Makes single PNG files; those that exist with the same metadata are left as they are.

    Args:
        pipe: Called when the first image is needed; returns an image pipeline.
        pictures: What to make.
        settings: Text chunks that all files share; prompt and seed are added.
        scale: Enlargement.
        batch_size: Images decoded together.
        report: Told the progress, a line at a time.
        steps_map: Also write each step map, as ``NAME.steps.png``.
        **options: Passed to the pipeline's call.

    Returns:
        The statistics of each batch, and how many images were there already.
    """
    missing = [p for p in pictures if not _is_there(p, settings, steps_map)]
    stats = []
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        result = pipe()(
            [picture.prompt for picture in batch],
            generator=generators([picture.seed for picture in batch]),
            **options,
        )
        stats.append(result.stats)
        for row, picture in enumerate(batch):
            chunks = _chunks(picture, settings)
            if steps_map:  # before the image, whose presence says that both are done
                drawn = upscale(step_map(result.step_maps[row]), scale)
                save_png(drawn, steps_path(picture.path), chunks)
            save_png(upscale(result.images[row], scale), picture.path, chunks)
        report(f"{start + len(batch)}/{len(missing)} {batch[-1].path.name}")
    return stats, len(pictures) - len(missing)


def steps_path(path: Path) -> Path:
    """Where the step map of an image goes: ``a.png`` to ``a.steps.png``."""
    return path.with_suffix(".steps.png")


def _is_there(picture: Picture, settings: Mapping[str, str], steps_map: bool) -> bool:
    paths = [picture.path, steps_path(picture.path)] if steps_map else [picture.path]
    return all(read_png_metadata(path) == _chunks(picture, settings) for path in paths)


def _chunks(picture: Picture, settings: Mapping[str, str]) -> dict[str, str]:
    return {"prompt": picture.prompt, "seed": str(picture.seed), **settings}
