"""Writes the fine-tuned avatar Janus to `assets/avatars-denoise/`: a plain model and its denoiser.

    python -m mmspec.assets.forge.avatars_denoise.export --work-dir build/avatars_denoise

May be run while the training goes on.
"""

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from transformers import JanusForConditionalGeneration

from mmspec.assets.forge.avatars.export import save_model
from mmspec.assets.forge.avatars.make_data import BUNDLE
from mmspec.assets.forge.avatars.model import make_model, make_tokenizer
from mmspec.denoiser import FILE_NAME, Denoiser, NoiseSchedule

OUT = BUNDLE.parent / "avatars-denoise"
#: Measured beside others in the card.
SCHEDULE = NoiseSchedule(num_steps=1, num_clean=16)


def build(work_dir: Path) -> tuple[JanusForConditionalGeneration, Denoiser, dict[str, float]]:
    """Loads the latest checkpoint; returns model and denoiser apart, and steps and time."""
    state = torch.load(work_dir / "checkpoint.pt", weights_only=True)
    with np.load(work_dir / "data.npz") as file:
        model = make_model(len(make_tokenizer()), len(file["palette"]))
    denoiser = Denoiser(model.config.text_config.hidden_size, SCHEDULE)
    model.denoiser = denoiser
    model.load_state_dict(state["model"])
    del model.denoiser
    facts = {"steps": state["step"], "training_time_s": round(state["spent_s"])}
    return model.eval(), denoiser, facts


def main() -> None:
    """Writes the bundle."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    model, denoiser, facts = build(args.work_dir)
    save_model(model, args.work_dir, args.out)
    denoiser.save(args.out)
    (args.out / FILE_NAME).chmod(0o644)
    card = json.loads((BUNDLE / "card.json").read_text())
    card |= {
        "name": "avatars-denoise",
        "base": "avatars",
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_denoiser_parameters": sum(p.numel() for p in denoiser.parameters()),
        "schedule": asdict(denoiser.schedule),
        "training": facts,
    }
    (args.out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    if (args.work_dir / "training_log.jsonl").exists():
        shutil.copyfile(args.work_dir / "training_log.jsonl", args.out / "training_log.jsonl")


if __name__ == "__main__":
    main()
