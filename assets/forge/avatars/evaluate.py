"""Draws the held-out captions with the bundled avatar model and judges the pictures.

    python -m mmspec.assets.forge.avatars.evaluate --guidance 3 --out build/avatars

Uses nothing but transformers' own `generate`. With `--work-dir` it also reports the scorer's
accuracy on rendered avatars and the exactness of the codec.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, JanusForConditionalGeneration

from mmspec.assets.avatars.scoring import attribute_accuracy

from .captions import BUNDLE, SETS


@torch.inference_mode()
def draw(
    model: JanusForConditionalGeneration,
    tokenizer: AutoTokenizer,
    captions: list[str],
    guidance: float,
    batch_size: int = 50,
) -> tuple[np.ndarray, np.ndarray]:
    """Generates one picture per caption.

    Returns:
        Image codes (N, 256) and RGB pictures, uint8 (N, 16, 16, 3).
    """
    codes, images = [], []
    for start in range(0, len(captions), batch_size):
        prompts = [
            caption + tokenizer.boi_token for caption in captions[start : start + batch_size]
        ]
        inputs = tokenizer(prompts, padding=True, return_tensors="pt")
        tokens = model.generate(
            **inputs, generation_mode="image", do_sample=True, guidance_scale=guidance
        )
        pixels = model.decode_image_tokens(tokens).float()  # (B, 16, 16, 3) in [-1, 1]
        codes.append(tokens.numpy())
        images.append(((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy())
    return np.concatenate(codes), np.concatenate(images)


def contact_sheet(images: np.ndarray, columns: int = 10, scale: int = 5) -> Image.Image:
    """Lays pictures out on one sheet, enlarged without smoothing."""
    cell = 16 * scale + 4
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * cell), "white")
    for index, picture in enumerate(images):
        large = Image.fromarray(picture).resize((16 * scale, 16 * scale), Image.Resampling.NEAREST)
        sheet.paste(large, (index % columns * cell, index // columns * cell))
    return sheet


@torch.inference_mode()
def check_on_data(model: JanusForConditionalGeneration, work_dir: Path) -> dict[str, float]:
    """Reports what the scorer reads off real avatars, and how exactly the codec works."""
    with np.load(work_dir / "data.npz") as file:
        codes, palette = file["test"], file["palette"]
    with (work_dir / "attributes.jsonl").open() as lines:
        samples = [json.loads(line) for line in lines][-len(codes) :]
    real = palette[codes].reshape(-1, 16, 16, 3)
    scorer = attribute_accuracy(real, samples)
    tokens = torch.from_numpy(codes[:500].astype(np.int64))
    pixels = (model.decode_image_tokens(tokens).float() + 1) * 127.5
    target = torch.from_numpy(real[:500]).float()
    error = (pixels - target).square().mean().clamp(min=1e-12)
    inputs = (target / 127.5 - 1).permute(0, 3, 1, 2).to(model.dtype)
    found = model.model.vqmodel.encode(inputs).image_tokens.view_as(tokens)
    return {
        "scorer_mean": scorer["mean"],
        "scorer_all": scorer["all"],
        "decoder_exact_pixels": (pixels.round() == target).float().mean().item(),
        "decoder_psnr_db": (10 * torch.log10(255**2 / error)).item(),
        "encoder_exact_codes": (found == tokens).float().mean().item(),
    }


def main() -> None:
    """Evaluates and writes `evaluation_<guidance>.json` and a contact sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=BUNDLE)
    parser.add_argument("--work-dir", type=Path, help="data of make_data, to check the scorer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--guidance", type=float, default=3.0, help="above 1")
    parser.add_argument(
        "--captions",
        choices=list(SETS),
        default="heldout",
        help="heldout_fresh is for figures that are published, not for decisions",
    )
    parser.add_argument("--num-captions", type=int, default=200)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = JanusForConditionalGeneration.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype)
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with (BUNDLE / f"{args.captions}.jsonl").open() as lines:
        rows = [json.loads(line) for line in lines][: args.num_captions]
    torch.manual_seed(args.seed)
    started = time.monotonic()
    captions = [row["caption"] for row in rows]
    _, images = draw(model, tokenizer, captions, args.guidance)
    report: dict[str, object] = {
        "guidance": args.guidance,
        "captions": args.captions,
        "num_captions": len(rows),
        "time_s": round(time.monotonic() - started, 1),
        "accuracy": attribute_accuracy(images, [row["attributes"] for row in rows]),
    }
    if args.work_dir:
        report["on_data"] = check_on_data(model, args.work_dir)
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"evaluation_{args.guidance:g}"
    (args.out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    contact_sheet(images[:100]).save(args.out / f"{name}.png")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
