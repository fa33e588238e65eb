"""Writes the trained avatar Janus to `assets/avatars/` in transformers' own format.

    python -m mmspec.assets.forge.avatars.export --work-dir build/avatars

Puts together the weights of `train`, the exact palette codec of `codebook`, the tokenizer, the
processor and the generation defaults. May be run while the training goes on.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import JanusForConditionalGeneration

from .codebook import write_palette
from .make_data import BUNDLE
from .model import make_model, make_processor, make_tokenizer

PROMPT_FORMAT = "<bos> caption words (lower case) <boi>"


def build(work_dir: Path) -> tuple[JanusForConditionalGeneration, dict[str, float]]:
    """Loads the latest checkpoint into a complete model; returns it with steps and time."""
    with np.load(work_dir / "data.npz") as file:
        palette = file["palette"]
    state = torch.load(work_dir / "checkpoint.pt", weights_only=True)
    torch.manual_seed(0)
    model = make_model(len(make_tokenizer()), len(palette))
    model.load_state_dict(state["model"])
    write_palette(model.model.vqmodel, palette)
    return model.eval(), {"steps": state["step"], "training_time_s": round(state["spent_s"])}


def save_model(model: JanusForConditionalGeneration, work_dir: Path, out: Path) -> None:
    """Writes model, processor and tokenizer, in bfloat16 but for the palette."""
    model.to(torch.bfloat16)
    # A few small tensors hold the palette: in full precision, colours come back to the last bit.
    codec = model.model.vqmodel
    for part in (codec.quantize, codec.post_quant_conv, codec.decoder.conv_out):
        part.float()
    with np.load(work_dir / "data.npz") as file:
        write_palette(codec, file["palette"])  # anew, since the values had been rounded
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer = make_tokenizer()
    make_processor(tokenizer).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Writes the bundle."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=BUNDLE)
    args = parser.parse_args()
    model, facts = build(args.work_dir)
    save_model(model, args.work_dir, args.out)
    data = json.loads((args.work_dir / "data.json").read_text())
    card = {
        "name": "avatars",
        "kind": "text-to-image, autoregressive, classifier-free guidance",
        "prompt_format": PROMPT_FORMAT,
        "image_size": [16, 16],
        "pixel_range": [-1.0, 1.0],
        "num_image_tokens": 256,
        "num_codes": model.config.vq_config.num_embeddings,
        "text_vocabulary": model.config.text_config.vocab_size,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "licence": "CC0-1.0",
        "training": facts,
        "data": data,
    }
    (args.out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    if (args.work_dir / "training_log.jsonl").exists():
        shutil.copyfile(args.work_dir / "training_log.jsonl", args.out / "training_log.jsonl")


if __name__ == "__main__":
    main()
