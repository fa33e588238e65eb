"""Writes the trained models as folders of diffusers: `assets/clips` and `assets/clips-drafter`.

python -m mmspec.assets.forge.clips.export --work-dir build/clips --out mmspec/assets
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AnyFlowFARPipeline, FlowMapEulerDiscreteScheduler

from .make_latents import load_vae
from .model import TEXT_TOKENS, Trainable, make_text_encoder, make_tokenizer, make_transformer
from .simulator import NUM_FRAMES, SIDE, split_scenes

#: Held-out scenes for calibration; the rest is for tests.
NUM_CALIBRATION = 64
#: What a call takes where nothing is given, and pictures per second. Without the drafter the
#: target drafts for itself.
DEFAULTS = {
    "num_frames": NUM_FRAMES,
    "height": SIDE,
    "width": SIDE,
    "num_inference_steps": 8,
    "drafter_steps": 3,
    "guidance_scale": 2.0,
    "max_sequence_length": TEXT_TOKENS,
    # diffusers' own takes three times as long for models as small as these.
    "attention": "dense",
    "fps": 12,
}
DRAFTER_DEFAULTS = {"drafter_steps": 1, "drafter_guidance_scale": 1.0, "router": "first-block"}


def make_pipeline(size: str, work_dir: Path) -> AnyFlowFARPipeline:
    """The averaged weights of a training as a pipeline; only the target has a text encoder."""
    trained = Trainable(size)
    trained.load_state_dict(torch.load(work_dir / f"{size}.pt")["average"])
    transformer = make_transformer(size)
    transformer.load_state_dict(trained.transformer.state_dict())
    has_text = size == "target"
    return AnyFlowFARPipeline(
        tokenizer=make_tokenizer() if has_text else None,
        text_encoder=make_text_encoder() if has_text else None,
        transformer=transformer.half(),
        vae=load_vae(work_dir).half(),
        scheduler=FlowMapEulerDiscreteScheduler(),
    )


def main() -> None:
    """Writes both folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for size, name in (("target", "clips"), ("drafter", "clips-drafter")):
        make_pipeline(size, args.work_dir).save_pretrained(args.out / name)
        shutil.copyfile(args.work_dir / f"{size}.jsonl", args.out / name / "training_log.jsonl")
    folder = args.out / "clips"
    shutil.copyfile(args.work_dir / "classifier.safetensors", folder / "classifier.safetensors")
    for name, defaults in (("clips", DEFAULTS), ("clips-drafter", DRAFTER_DEFAULTS)):
        path = args.out / name / "defaults.json"
        path.write_text(json.dumps(defaults, indent=2) + "\n")
    _, held_out = split_scenes()
    with (folder / "held_out.jsonl").open("w") as file:
        for number, scene in enumerate(held_out):
            split = "calibration" if number < NUM_CALIBRATION else "test"
            file.write(json.dumps({"prompt": scene.prompt, "split": split}) + "\n")


if __name__ == "__main__":
    main()
