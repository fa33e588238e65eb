"""Writes the trained emoji Janus to `assets/emoji/` in transformers' own format.

    python -m mmspec.assets.forge.emoji.export --work-dir build/emoji

Puts together the weights of `train`, the codec of `train_codec`, the tokenizer, the processor, the
generation defaults and the lists of names. May be run while the training goes on.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import JanusForConditionalGeneration

from mmspec.assets.forge.avatars.model import make_processor

from .icons import SIZE, STYLE_WORDS, full_caption, name_hash
from .model import NUM_CODES, make_emoji_model, make_emoji_tokenizer
from .train import load_icons

BUNDLE = Path(__file__).resolve().parents[2] / "emoji"
PROMPT_FORMAT = "<bos> name, style words, category (lower case) <boi>"


def build(work_dir: Path, vocab_size: int) -> tuple[JanusForConditionalGeneration, dict[str, int]]:
    """Loads the latest checkpoint into a complete model; returns it with steps and time."""
    state = torch.load(work_dir / "checkpoint.pt", weights_only=True)
    torch.manual_seed(0)
    model = make_emoji_model(vocab_size)
    model.load_state_dict(state["model"])
    codec = model.model.vqmodel
    codec.load_state_dict(torch.load(work_dir / "codec.pt", weights_only=True))
    return model.eval(), {"steps": state["step"], "training_time_s": round(state["spent_s"])}


def write_names(icons: dict[str, list[dict[str, str]]], out: Path) -> None:
    """Writes which names each style shows in training, and the held-out captions."""
    known = {
        style: sorted({row["name"] for row in icons["train"] if row["style"] == style})
        for style in STYLE_WORDS
    }
    (out / "train_names.json").write_text(json.dumps(known, indent=0) + "\n")
    for part, file in (("names", "heldout.jsonl"), ("styles", "heldout_styles.jsonl")):
        # By hash, so that any first few are a fair mix of styles and categories.
        rows = sorted(icons[part], key=lambda row: name_hash(row["name"] + row["style"]))
        lines = [json.dumps({"caption": full_caption(**row), **row}) + "\n" for row in rows]
        (out / file).write_text("".join(lines))


def main() -> None:
    """Writes the bundle."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=BUNDLE)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    icons = load_icons(args.work_dir)
    tokenizer = make_emoji_tokenizer(icons["train"])
    model, facts = build(args.work_dir, len(tokenizer))
    model.to(torch.bfloat16)
    model.save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)
    make_processor(tokenizer, SIZE).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    write_names(icons, args.out)
    shutil.copyfile(args.work_dir / "training_log.jsonl", args.out / "training_log.jsonl")
    card = {
        "name": "emoji",
        "kind": "text-to-image, autoregressive, classifier-free guidance",
        "prompt_format": PROMPT_FORMAT,
        "image_size": [SIZE, SIZE],
        "pixel_range": [-1.0, 1.0],
        "num_image_tokens": 256,
        "num_codes": NUM_CODES,
        "text_vocabulary": len(tokenizer),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "licence": "Apache-2.0 (Noto Emoji) and MIT (Fluent Emoji): see card.md",
        "training": facts,
        "codec": json.loads((args.work_dir / "codec.json").read_text()),
        "data": json.loads((args.work_dir / "data.json").read_text()),
    }
    evaluation = args.work_dir / "evaluation.json"
    if evaluation.exists():
        card["evaluation"] = json.loads(evaluation.read_text())
    (args.out / "card.json").write_text(json.dumps(card, indent=2) + "\n")


if __name__ == "__main__":
    main()
