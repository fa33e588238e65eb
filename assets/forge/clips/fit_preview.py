"""Fits `preview.safetensors` of `bundled:clips`: a linear map from latents to pictures.

    python -m mmspec.assets.forge.clips.fit_preview --out mmspec/assets

It learns from training scenes, and prints its error on clips of held-out scenes and objects.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from mmspec.adapters.block_frames import pictures
from mmspec.adapters.wan_codec import WanCodec
from mmspec.latent_preview import PREVIEW_FILE, DecodedBlock, LinearPreview

from .make_latents import encode
from .simulator import Simulator, split_scenes

NUM_CLIPS, NUM_JUDGED = 128, 24


def decoded(vae: AutoencoderKLWan, count: int, *, is_training: bool) -> Iterator[DecodedBlock]:
    """Drawn clips as the autoencoder has them."""
    training, held_out = split_scenes()
    scenes, split = (training, "train") if is_training else (held_out, "t10k")
    # Neighbours in the list are alike.
    chosen = scenes[:: len(scenes) // count][:count]
    clips = Simulator(split=split).draw(chosen, torch.Generator().manual_seed(7))
    mean = torch.tensor(vae.config.latents_mean).view(1, 1, -1, 1, 1)
    codec = WanCodec(vae)
    for latents in (encode(vae, clips) - mean).split(1):
        pixels, _ = codec.decode(latents.transpose(1, 2), None)
        yield latents[0], pictures(pixels), True


def main() -> None:
    """Writes `clips/preview.safetensors`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    folder = args.out / "clips"
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae").eval()
    preview = LinearPreview.fit(decoded(vae, NUM_CLIPS, is_training=True))
    preview.save(folder / PREVIEW_FILE)
    errors = [
        preview(latents, is_start=is_start) - shown
        for latents, shown, is_start in decoded(vae, NUM_JUDGED, is_training=False)
    ]
    error = torch.cat(errors)
    mean, root = error.abs().mean().item(), error.square().mean().sqrt().item()
    print(
        f"{len(error)} held-out pictures: mean error {255 * mean:.1f} of 255, RMS {root:.4f} of 1"
    )


if __name__ == "__main__":
    main()
