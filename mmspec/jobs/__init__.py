"""Many requests, one kind of result each.

Requests of a file: `mmspec.jobs.text`, `mmspec.jobs.image`, `mmspec.jobs.video`. Pages of files and
folders: `mmspec.jobs.documents`, `mmspec.jobs.captions`. The threshold of a router from a sample of
requests: `mmspec.jobs.calibration`.

A run may be killed at any moment and started again with the same command: it goes on with what is
missing. What was made with other settings is refused rather than mixed.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmspec.checks import is_integer, require

Report = Callable[[str], None]

_CHUNK_BYTES = 1 << 16


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
    items: list[Item] = []
    for number, where, fields in lines_of(path):
        items.append(_item(fields, len(items), number, where))
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise ValueError(f"{path}: the id {item.id!r} comes twice")
        seen.add(item.id)
    return items


def lines_of(path: str | Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """The lines of a file of requests: number from 1, name for messages, fields.

    Args:
        path: A ``.jsonl`` file with an object on each line; any other file has a ``prompt`` each.

    Raises:
        ValueError: If a line is no JSON object, or all are empty.
    """
    path = Path(path)
    is_jsonl = path.suffix == ".jsonl"
    is_empty = True
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            is_empty = False
            where = f"{path}, line {number}"
            yield number, where, fields_of(line, where) if is_jsonl else {"prompt": line.strip()}
    if is_empty:
        raise ValueError(f"{path} has no prompts")


def fields_of(line: str, where: str) -> dict[str, Any]:
    """A line of JSON as an object.

    Raises:
        ValueError: If it is none; names the line.
    """
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
    budget = fields.get("max_new_tokens")
    is_good = budget is None or (is_integer(budget) and budget >= 1)
    require(is_good, f"{where}: 'max_new_tokens'", "null or an integer >= 1", budget)
    return Item(id=str(fields.get("id", number)), index=index, prompt=prompt, max_new_tokens=budget)


def stored_rows(
    path: Path, settings: Mapping[str, Any], name: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole lines of a JSONL output, of which a kill may have left a half one at the end.

    Args:
        path: The output; may be missing.
        settings: What the rows of this run are made with.
        name: Field by which rows are known.

    Yields:
        Where in the file each begins, in bytes, and its fields.

    Raises:
        ValueError: If a row was made with other settings or is no row at all.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        start = 0
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.endswith(b"\n"):
                # The half line is going to be cut off, which is no way to treat a file of others.
                require(line.startswith(b"{"), where, "JSON", line[:20])
                return
            row = fields_of(line.decode("utf-8"), where)
            if name not in row or row.get("settings") != dict(settings):
                raise ValueError(
                    f"{where} was made with other settings{_difference(row, settings)}; "
                    "use the same ones to continue it, or another --out"
                )
            yield start, row
            start += len(line)


def _difference(row: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The settings that differ, for messages; empty where the row says none."""
    found = row.get("settings")
    if not isinstance(found, dict):
        return ""
    names = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
    shown = [f"{n} {found.get(n)!r} (asked for: {settings.get(n)!r})" for n in names]
    return f": {', '.join(shown)}" if shown else ""


def cut_half_line(path: Path) -> None:
    """Drops what stands behind the last line end of a file, if there is one."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end = size
        while end:
            start = max(0, end - _CHUNK_BYTES)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator per row, so that a row does not depend on its batch."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def check_writable(folder: Path) -> None:
    """Makes a folder and a file in it that vanishes, before work that would be lost.

    Raises:
        OSError: With the folder and the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror}") from error
