"""Judges drawn clips, rebuilt clips, and what target and drafter make of held-out prompts.

python -m mmspec.assets.forge.clips.evaluate --work-dir build/clips --clips 64
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from mmspec.assets.clips.scoring import score_clips
from mmspec.pipelines import SpeculativeVideoPipeline

from .make_latents import load_vae
from .simulator import Simulator, split_scenes
from .train_vae import as_video


def averages(frames: Tensor, prompts: list[str]) -> dict[str, float]:
    """Means of every score, and of the difference of neighbouring pixels: how sharp clips are."""
    scores = score_clips(frames, prompts)
    found = {name: round(mean(score[name] for score in scores), 4) for name in scores[0]}
    steps = [frames.diff(dim=dim).abs().mean().item() for dim in (-2, -1)]
    return found | {"gradient": round(sum(steps), 4)}


@torch.no_grad()
def drawn(work_dir: Path, scenes: list[Any]) -> dict[str, Any]:
    """Scores of drawn clips of unseen objects, before and behind the autoencoder."""
    prompts = [scene.prompt for scene in scenes]
    clips = Simulator(split="t10k").draw(scenes, torch.Generator().manual_seed(2))
    vae = load_vae(work_dir)
    rebuilt = [
        vae.decode(vae.encode(as_video(part)).latent_dist.mode()).sample for part in clips.split(8)
    ]
    behind = (torch.cat(rebuilt).transpose(1, 2) + 1) / 2
    return {"drawn": averages(clips, prompts), "rebuilt": averages(behind, prompts)}


def generated(pipe: SpeculativeVideoPipeline, prompts: list[str], **options: Any) -> dict[str, Any]:
    """Scores of generated clips; clip k has seed k."""
    seeds = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
    out = pipe(prompts, generator=seeds, output_type="pt", **options)
    return averages(torch.as_tensor(out.frames), prompts)


def main() -> None:
    """Writes `evaluation.json` and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--assets", type=Path, default=Path(__file__).parents[2])
    parser.add_argument("--clips", type=int, default=64)
    args = parser.parse_args()
    scenes = split_scenes()[1][-args.clips :]
    prompts = [scene.prompt for scene in scenes]
    found = drawn(args.work_dir, scenes)
    pipe = SpeculativeVideoPipeline.from_pretrained(
        args.assets / "clips", drafter=args.assets / "clips-drafter"
    )
    pipe.set_progress_bar_config(disable=True)
    for size, router, choices in (
        ("target", "never", (2, 3, 4, 8, 16)),
        ("drafter behind a block of the target", "first-block", (1, 2)),
        ("drafter", "always", (1, 2)),
    ):
        for num_steps in choices:
            steps = {"drafter_steps" if "drafter" in size else "num_inference_steps": num_steps}
            found[f"{size}, {num_steps} steps"] = generated(pipe, prompts, router=router, **steps)
            print(json.dumps(found, indent=1), flush=True)
    (args.work_dir / "evaluation.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
