"""Many requests from a file: what is asked, what has been answered, and answering the rest.

A run may be killed at any moment and started again with the same command: answers are appended
one by one, a half-written last line is dropped, and what has an answer is not asked again. An
output that was made with other settings is refused rather than mixed.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mmspec.pictures import contact_sheet, read_png_metadata, save_png, step_map, upscale
from mmspec.pipelines.image import DECODERS
from mmspec.records import Stats

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


def as_request(pipe: Any, prompt: Any, *, raw: bool) -> Any:
    """A text as the user's turn of a chat, where the model has a chat template.

    Args:
        pipe: A text pipeline.
        prompt: A text, or messages, which stay as they are.
        raw: Leave texts as they are too.
    """
    if raw or not isinstance(prompt, str):
        return prompt
    if getattr(pipe.tokenizer, "chat_template", None) is None:
        return prompt
    return [{"role": "user", "content": prompt}]


def run_text_file(
    load: Callable[[], Any],
    items: Sequence[Item],
    out: str | Path,
    *,
    settings: Mapping[str, Any],
    seed: int,
    max_new_tokens: int,
    batch_size: int,
    raw: bool,
    report: Report,
    **options: Any,
) -> tuple[int, int]:
    """Answers text requests, one JSON line each.

    Args:
        load: Gives a text pipeline; called only if something is missing.
        items: The requests.
        out: JSONL to append to; flushed after every batch.
        settings: Written into each row, and compared when a run is continued.
        seed: Seed of the first item; item k of the file has ``seed + k``.
        max_new_tokens: Budget of items without their own.
        batch_size: Items decoded together.
        raw: Continue texts as they are; see `as_request`.
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
            pipe = load()
            result = pipe(
                [as_request(pipe, item.prompt, raw=raw) for item in batch],
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
class ImageSettings:
    """What all images of a run share.

    Attributes:
        model: Name of the model.
        decoder: As in the image pipeline.
        window: Codes per forward, or None for the pipeline's own choice.
        guidance: Guidance scale.
        temperature: 0 is greedy.
        scale: Enlargement of the saved files.
        dtype: Name of the weights' type.
    """

    model: str
    decoder: str
    window: int | None
    guidance: float
    temperature: float
    scale: int
    dtype: str

    def check(self) -> None:
        """Refuses an unknown decoder before a model is loaded.

        Raises:
            ValueError: With the known ones.
        """
        if self.decoder not in DECODERS:
            raise ValueError(f"unknown decoder {self.decoder!r}; known: {', '.join(DECODERS)}")

    def chunks(self, prompt: str, seed: int | str) -> dict[str, str]:
        """The text chunks of an image."""
        shared = {name: str(value) for name, value in asdict(self).items()}
        shared["window"] = "auto" if self.window is None else str(self.window)
        return {"prompt": prompt, "seed": str(seed), **shared, "mmspec": version("mmspec")}

    def call_options(self) -> dict[str, Any]:
        """The arguments of the pipeline's call."""
        return {
            "decoder": self.decoder,
            "window": self.window,
            "guidance_scale": self.guidance,
            "temperature": self.temperature,
        }


@dataclass(slots=True, kw_only=True)
class ImageSummary:
    """What an image run did.

    Attributes:
        out: The sheet or the folder.
        num_skipped: Images that were there already.
        batches: Figures of each batch.
    """

    out: Path
    num_images: int = 0
    num_skipped: int = 0
    batches: list[Stats] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "out": str(self.out),
            "num_images": self.num_images,
            "num_skipped": self.num_skipped,
            "batches": [stats.to_dict() for stats in self.batches],
        }

    def line(self) -> str:
        """One line for people."""
        made = f"{self.out}: {self.num_images} made"
        if self.num_skipped:
            made += f", {self.num_skipped} were there already"
        if not self.batches:
            return made
        forwards = sum(stats.num_target_forwards for stats in self.batches)
        seconds = sum(stats.wall_time_s for stats in self.batches)
        # Rows that go through a forward together count one each: units are codes of an image.
        row_steps = sum(stats.num_units / max(stats.tau, 1e-9) for stats in self.batches)
        tau = sum(stats.num_units for stats in self.batches) / max(row_steps, 1e-9)
        return (
            f"{made}, {forwards} forwards, tau {tau:.2f}, {seconds:.2f} s "
            f"({self.batches[0].guarantee})"
        )


def image_prompts(path: str | Path) -> list[str]:
    """The prompts of a file for images.

    Raises:
        ValueError: If an item is a chat; see also `read_items`.
    """
    items = read_items(path)
    for item in items:
        if not isinstance(item.prompt, str):
            raise ValueError(f"{path}: item {item.id!r} has messages; an image needs a 'prompt'")
    return [item.prompt for item in items]


def steps_path(path: Path) -> Path:
    """Where the step map of an image goes: ``a.png`` to ``a.steps.png``."""
    return path.with_suffix(".steps.png")


@dataclass(frozen=True, slots=True)
class _Picture:
    path: Path
    prompt: str
    seed: int


def run_image_files(
    load: Callable[[], Any],
    prompts: Sequence[str],
    out: Path,
    *,
    num: int,
    seed: int,
    settings: ImageSettings,
    batch_size: int,
    steps_map: bool,
    report: Report,
) -> ImageSummary:
    """Makes single PNG files; those that exist with the same metadata are left as they are.

    Files are called ``PROMPT-IMAGE.png``, both counted from 0.

    Args:
        load: Gives an image pipeline; called only if something is missing.
        prompts: What to draw.
        out: The folder.
        num: Images of each prompt.
        seed: Seed of image 0 of each prompt; image k has ``seed + k``.
        settings: What the images share.
        batch_size: Images decoded together.
        steps_map: Also write each step map, as ``NAME.steps.png``.
        report: Told the progress, a line at a time.

    Returns:
        What was done.
    """
    pictures = [
        _Picture(out / f"{row:04d}-{k:02d}.png", prompt, seed + k)
        for row, prompt in enumerate(prompts)
        for k in range(num)
    ]
    missing = [p for p in pictures if not _is_there(p, settings, steps_map)]
    summary = ImageSummary(out=out, num_skipped=len(pictures) - len(missing))
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        result = _draw(load(), batch, settings)
        for row, picture in enumerate(batch):
            chunks = settings.chunks(picture.prompt, picture.seed)
            if steps_map:  # before the image, whose presence says that both are done
                drawn = upscale(step_map(result.step_maps[row]), settings.scale)
                save_png(drawn, steps_path(picture.path), chunks)
            save_png(upscale(result.images[row], settings.scale), picture.path, chunks)
        summary.batches.append(result.stats)
        summary.num_images += len(batch)
        report(f"{summary.num_images}/{len(missing)} {batch[-1].path.name}")
    return summary


def save_sheet(
    load: Callable[[], Any],
    prompts: Sequence[str],
    out: Path,
    *,
    num: int,
    seed: int,
    settings: ImageSettings,
    batch_size: int,
    steps_map: bool,
    report: Report,
) -> ImageSummary:
    """Makes the images of one prompt and saves them on one sheet; arguments as above."""
    pictures = [_Picture(out, prompts[0], seed + k) for k in range(num)]
    summary = ImageSummary(out=out, num_images=num)
    images, maps = [], []
    for start in range(0, num, batch_size):
        result = _draw(load(), pictures[start : start + batch_size], settings)
        images += [upscale(image, settings.scale) for image in result.images]
        maps += [upscale(step_map(drawn), settings.scale) for drawn in result.step_maps]
        summary.batches.append(result.stats)
        if num > batch_size:
            report(f"{len(images)}/{num}")
    chunks = settings.chunks(prompts[0], seed if num == 1 else f"{seed}..{seed + num - 1}")
    if steps_map:
        save_png(contact_sheet(maps), steps_path(out), chunks)
    save_png(contact_sheet(images), out, chunks)
    return summary


def _draw(pipe: Any, pictures: Sequence[_Picture], settings: ImageSettings) -> Any:
    return pipe(
        [picture.prompt for picture in pictures],
        generator=generators([picture.seed for picture in pictures]),
        **settings.call_options(),
    )


def _is_there(picture: _Picture, settings: ImageSettings, steps_map: bool) -> bool:
    paths = [picture.path, steps_path(picture.path)] if steps_map else [picture.path]
    wanted = settings.chunks(picture.prompt, picture.seed)
    return all(read_png_metadata(path) == wanted for path in paths)
