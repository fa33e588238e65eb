"""Captions avatars of held-out combinations and counts the right attributes.

python -m mmspec.assets.forge.captioner.evaluate --data build/avatars --out build/captioner
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmspec.assets import bundled_path
from mmspec.assets.captioner.scoring import stated_attributes
from mmspec.assets.forge.avatars.train import load_data

from .model import INSTRUCTION, SIZE

BATCH = 100
CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": INSTRUCTION}]},
]


@torch.inference_mode()
def main() -> None:
    """Writes `evaluation_captioner.json`: accuracy by attribute, and of whole captions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="bundled:captioner")
    parser.add_argument("--num-pictures", type=int, default=2000)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    folder = bundled_path(args.model) if args.model.startswith("bundled:") else Path(args.model)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = processor.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    arrays, _, held = load_data(args.data)
    codes, held = arrays["test"][: args.num_pictures], held[: args.num_pictures]
    captions: list[str] = []
    for start in range(0, len(codes), BATCH):
        pixels = arrays["palette"][codes[start : start + BATCH]]
        images = [[Image.fromarray(one.reshape(SIZE.side, SIZE.side, 3))] for one in pixels]
        inputs = processor(text=[prompt] * len(images), images=images, return_tensors="pt")
        tokens = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        captions += processor.batch_decode(tokens, skip_special_tokens=True)
    read = [stated_attributes(caption) for caption in captions]
    result = {
        name: round(
            sum(a.get(name) == b[name] for a, b in zip(read, held, strict=True)) / len(held), 4
        )
        for name in held[0]
    }
    result["all"] = round(sum(a == b for a, b in zip(read, held, strict=True)) / len(held), 4)
    text = json.dumps({"num_pictures": len(held), "accuracy": result}, indent=2) + "\n"
    (args.out / "evaluation_captioner.json").write_text(text)
    print(text, captions[0])


if __name__ == "__main__":
    main()
