"""Judges the bundled emoji model: likelihood, the codec, and whether it copies its training icons.

    python -m mmspec.assets.forge.emoji.evaluate --work-dir build/emoji

Writes `evaluation.json` and two contact sheets to the work folder. Pictures are compared after the
codec, training icons included, so that what the codec loses does not count as being new.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import JanusForConditionalGeneration

from mmspec.assets.forge.avatars.model import PAD_ID, image_logits
from mmspec.pipelines.image import SpeculativeImagePipeline

from .export import BUNDLE
from .icons import full_caption, name_hash
from .nearness import nearest_rmse, nearness
from .train import load_icons
from .train_codec import psnr

GUIDANCE = 3.0
WINDOW = 32
Row = dict[str, str]


def to_bytes(pixels: torch.Tensor) -> np.ndarray:
    """Turns [0, 1] into uint8."""
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def pixels_of(model: JanusForConditionalGeneration, codes: torch.Tensor) -> torch.Tensor:
    """Returns the pictures of codes in [0, 1], float32 (N, 64, 64, 3)."""
    return model.decode_image_tokens(codes).float() * 0.5 + 0.5


@torch.inference_mode()
def nll(pipe: SpeculativeImagePipeline, rows: list[Row], codes: np.ndarray, worded: bool) -> float:
    """Mean negative log-likelihood in nats per code, with the full caption or with none."""
    tokenizer, total = pipe.processor.tokenizer, 0.0
    for row, picture in zip(rows, codes, strict=True):
        ids = tokenizer(full_caption(**row) + tokenizer.boi_token)["input_ids"]
        if not worded:
            ids[1:-1] = [PAD_ID] * (len(ids) - 2)
        wanted = torch.from_numpy(picture.astype(np.int64))[None]
        logits = image_logits(pipe.model, torch.tensor([ids]), wanted)
        total += F.cross_entropy(logits[0], wanted[0]).item()
    return round(total / len(rows), 4)


@torch.inference_mode()
def decode(model: JanusForConditionalGeneration, codes: np.ndarray) -> np.ndarray:
    """Returns the pictures of codes, uint8 (N, 64, 64, 3)."""
    parts = [
        to_bytes(pixels_of(model, torch.from_numpy(part.astype(np.int64))))
        for part in np.array_split(codes, max(1, len(codes) // 32))
    ]
    return np.concatenate(parts)


def draw(pipe: SpeculativeImagePipeline, rows: list[Row]) -> np.ndarray:
    """Draws one picture per icon's full caption; returns the codes."""
    codes = []
    for start in range(0, len(rows), 16):
        captions = [full_caption(**row) for row in rows[start : start + 16]]
        seeds = [torch.Generator().manual_seed(start + index) for index in range(len(captions))]
        out = pipe(
            captions,
            guidance_scale=GUIDANCE,
            generator=seeds,
            window=WINDOW,
            output_type="tokens",
        )
        codes.append(out.tokens.numpy())
    return np.concatenate(codes)


def save_sheet(sides: tuple[np.ndarray, ...], path: Path, columns: int = 20) -> None:
    """Saves pictures in bands of one line per side: what was drawn above what it is compared to."""
    columns = min(columns, len(sides[0]))
    starts = range(0, len(sides[0]) - columns + 1, columns)
    lines = [np.concatenate(list(side[k : k + columns]), axis=1) for k in starts for side in sides]
    Image.fromarray(np.concatenate(lines)).save(path)


def judge(model: Path, work_dir: Path, num_pictures: int, num_scored: int) -> dict[str, Any]:
    """Computes everything, the pictures in bfloat16 and the rest in float32; see the module."""
    scorer, pipe = (
        SpeculativeImagePipeline.from_pretrained(model, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    pipe.set_progress_bar_config(disable=True)
    icons = load_icons(work_dir)
    with np.load(work_dir / "codes.npz") as file:
        codes = {name: file[name] for name in file.files}
    with np.load(work_dir / "pictures.npz") as file:
        originals = {part: file[part] for part in file.files}
    order = {
        part: sorted(range(len(rows)), key=lambda i: name_hash(rows[i]["name"] + rows[i]["style"]))
        for part, rows in icons.items()
    }
    report: dict[str, Any] = {"guidance": GUIDANCE, "num_pictures": num_pictures}
    known = {"pictures": decode(pipe.model, codes["train"]), "codes": codes["copies"]}
    for part in ("train", "names", "styles"):
        chosen = order[part][:num_scored]
        rows = [icons[part][i] for i in chosen]
        report[part] = {
            "nll_nats_per_code": nll(scorer, rows, codes[part][chosen], True),
            "nll_without_caption": nll(scorer, rows, codes[part][chosen], False),
            "psnr_db": round(psnr(scorer.model.model.vqmodel, originals[part][chosen]), 3),
        }
    real = order["names"][:num_pictures]
    report["nearest_training_icon"] = {
        "real held-out icons": nearness(
            decode(pipe.model, codes["names"][real]), codes["names"][real], known
        )
    }
    for part in ("names", "train"):
        chosen = order[part][:num_pictures]
        made = draw(pipe, [icons[part][i] for i in chosen])
        pictures = decode(pipe.model, made)
        report["nearest_training_icon"][f"drawn for {part}"] = nearness(pictures, made, known)
        target = decode(pipe.model, codes[part][chosen])
        nearest = known["pictures"][nearest_rmse(pictures, known["pictures"])[1]]
        save_sheet((pictures[:60], target[:60], nearest[:60]), work_dir / f"sheet_{part}.png")
    return report


def main() -> None:
    """Evaluates the bundle and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=BUNDLE)
    parser.add_argument("--num-pictures", type=int, default=100)
    parser.add_argument("--num-scored", type=int, default=100)
    args = parser.parse_args()
    report = judge(args.model, args.work_dir, args.num_pictures, args.num_scored)
    (args.work_dir / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
