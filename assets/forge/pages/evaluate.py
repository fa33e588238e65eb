"""Reads the held-out pages with a bundled reader and reports its character error rate.

    python -m mmspec.assets.forge.pages.evaluate --model bundled:pages --out build/pages

Everything goes the way a user's pages go: a PIL picture, the processor, `generate`, greedy.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmspec.assets import bundled_path
from mmspec.assets.pages.rendering import render_page
from mmspec.assets.pages.scoring import edit_distance

from .export import NOISY
from .model import INSTRUCTIONS

BATCH = 50
CHAT = [
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": INSTRUCTIONS[0]}],
    }
]


@torch.inference_mode()
def read(model: Any, processor: Any, pages: list[str], **how: float) -> list[tuple[str, int]]:
    """Draws and reads pages, page ``i`` with seed ``i``; returns texts and numbers of tokens."""
    prompt = processor.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    found = []
    for start in range(0, len(pages), BATCH):
        batch = pages[start : start + BATCH]
        images = [[render_page(page, seed=start + i, **how)] for i, page in enumerate(batch)]
        inputs = processor(text=[prompt] * len(batch), images=images, return_tensors="pt")
        tokens = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        counts = (tokens != processor.tokenizer.pad_token_id).sum(1).tolist()
        texts = processor.batch_decode(tokens, skip_special_tokens=True)
        found += zip(texts, counts, strict=True)
    return found


def report(rows: list[dict[str, Any]], found: list[tuple[str, int]]) -> dict[str, Any]:
    """Error rates over all pages and by kind; how many pages are without an error."""
    errors = [
        edit_distance(text, row["markdown"]) for row, (text, _) in zip(rows, found, strict=True)
    ]
    lengths = [len(row["markdown"]) for row in rows]
    result: dict[str, Any] = {
        "num_pages": len(rows),
        "cer": round(sum(errors) / sum(lengths), 5),
        "pages_without_error": round(sum(e == 0 for e in errors) / len(rows), 3),
        "median_cer": round(
            sorted(e / n for e, n in zip(errors, lengths, strict=True))[len(rows) // 2], 5
        ),
        "tokens_per_page": round(sum(count for _, count in found) / len(found), 1),
    }
    for kind in sorted({row["kind"] for row in rows}):
        of_kind = [i for i, row in enumerate(rows) if row["kind"] == kind]
        total = sum(lengths[i] for i in of_kind)
        result[f"cer_{kind}"] = round(sum(errors[i] for i in of_kind) / total, 5)
    return result


def main() -> None:
    """Evaluates clean and noisy pages and writes `evaluation_NAME.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled:pages")
    parser.add_argument("--num-pages", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    folder = bundled_path(args.model) if args.model.startswith("bundled:") else Path(args.model)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    lines = (bundled_path("pages") / "held_out.jsonl").read_text().splitlines()[: args.num_pages]
    rows = [json.loads(line) for line in lines]
    pages = [row["markdown"] for row in rows]
    result = {
        "clean": report(rows, read(model, processor, pages)),
        "noisy": NOISY | report(rows, read(model, processor, pages, **NOISY)),
    }
    text = json.dumps(result, indent=2) + "\n"
    (args.out / f"evaluation_{folder.name}.json").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
