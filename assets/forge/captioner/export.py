"""Writes the trained captioner to `assets/captioner/`, with some held-out avatars.

python -m mmspec.assets.forge.captioner.export --data build/avatars --work-dir build/captioner
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from PIL import Image

from mmspec.assets.forge.avatars.train import load_data
from mmspec.assets.forge.pages.export import ASSETS, save_model
from mmspec.assets.forge.pages.model import make_model

from .captions import full_caption
from .model import SIZE, make_tokenizer

BUNDLE = ASSETS / "captioner"
NUM_SAMPLES = 24


def main() -> None:
    """Writes the bundle."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=BUNDLE)
    args = parser.parse_args()
    tokenizer = make_tokenizer()
    model = make_model(SIZE, len(tokenizer))
    model.load_state_dict(torch.load(args.work_dir / "captioner.pt", weights_only=True)["model"])
    model.generation_config.max_new_tokens = 40
    save_model(model, tokenizer, SIZE, args.out)
    arrays, _, held = load_data(args.data)
    folder = args.out / "samples"
    folder.mkdir(exist_ok=True)
    rows = []
    for index in range(NUM_SAMPLES):
        picture = arrays["palette"][arrays["test"][index]].reshape(SIZE.side, SIZE.side, 3)
        file = f"{index:02}.png"
        Image.fromarray(picture).save(folder / file, optimize=True)
        row = {"file": file, "caption": full_caption(held[index]), "attributes": held[index]}
        rows.append(json.dumps(row) + "\n")
    (folder / "samples.jsonl").write_text("".join(rows))
    shutil.copyfile(args.work_dir / "captioner.jsonl", args.out / "training_log.jsonl")


if __name__ == "__main__":
    main()
