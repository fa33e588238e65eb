"""Draws clips and encodes them: shards of latents that the training reads.

    python -m mmspec.assets.forge.clips.make_latents --work-dir build/clips --num-shards 16

A shard shows each training scene once. The first call also measures the scale of the latents.
Shards that exist are kept, so that a stopped call goes on.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from .simulator import Simulator, split_scenes
from .train_vae import as_video, make_vae


def load_vae(work_dir: Path) -> AutoencoderKLWan:
    """The trained autoencoder with the scale of its latents, if that is measured already."""
    path = work_dir / "scale.json"
    scale = json.loads(path.read_text()) if path.exists() else {}
    vae = make_vae(scale.get("mean"), scale.get("std"))
    vae.load_state_dict(torch.load(work_dir / "vae.pt")["model"])
    return vae.eval()


@torch.no_grad()
def encode(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """Latents ``[N, frames, channels, 8, 8]`` on the autoencoder's scale."""
    parts = [vae.encode(as_video(part)).latent_dist.mode() for part in clips.split(8)]
    return torch.cat(parts).transpose(1, 2)


def main() -> None:
    """Writes `scale.json` and `latents/N.pt`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--num-shards", type=int, default=16)
    args = parser.parse_args()
    folder = args.work_dir / "latents"
    folder.mkdir(exist_ok=True)
    simulator, (scenes, _) = Simulator(), split_scenes()
    if not (args.work_dir / "scale.json").exists():
        clips = simulator.draw(scenes[:96], torch.Generator().manual_seed(99))
        latents = encode(load_vae(args.work_dir), clips)
        scale = {
            "mean": latents.mean((0, 1, 3, 4)).tolist(),
            "std": latents.std((0, 1, 3, 4)).tolist(),
        }
        (args.work_dir / "scale.json").write_text(json.dumps(scale))
    vae = load_vae(args.work_dir)
    mean, std = (
        torch.tensor(values).view(1, 1, -1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    for shard in range(args.num_shards):
        path = folder / f"{shard}.pt"
        if path.exists():
            continue
        clips = simulator.draw(scenes, torch.Generator().manual_seed(1000 + shard))
        torch.save(((encode(vae, clips) - mean) / std).half(), path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)


if __name__ == "__main__":
    main()
