"""Answering text requests, and the rest of them after a kill.

Answers are appended one by one, a half-written last line is dropped, and what has an answer is not
asked again. An output that was made with other settings is refused rather than mixed.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmspec.jobs import Item, Report, cut_half_line, generators, stored_rows


def answered_ids(path: str | Path, settings: Mapping[str, Any]) -> set[str]:
    """Which ids an output file has, cutting off a last line that a kill left half-written.

    Args:
        path: The JSONL output; may be missing.
        settings: What the rows of this run are made with.

    Raises:
        ValueError: If a row was made with other settings or is no answer at all.
    """
    path = Path(path)
    ids = {row["id"] for _, row in stored_rows(path, settings, "id")}
    cut_half_line(path)
    return ids


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
