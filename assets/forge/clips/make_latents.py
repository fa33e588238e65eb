"""Draws clips and encodes them: shards of latents that the training reads.

    python -m mmspec.assets.forge.clips.make_latents --work-dir build/clips --num-shards 16

A shard shows each training scene once. The first call also measures how to turn the latents.
Shards that exist are kept, so that a stopped call goes on.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from .simulator import Simulator, split_scenes
from .train_vae import FINAL_DECODER, FIRST_DECODER, as_video, make_vae


def load_vae(work_dir: Path) -> AutoencoderKLWan:
    """The trained autoencoder; its latents are turned if the turn is measured already."""
    trained, mean, size = work_dir / "decoder.pt", None, FINAL_DECODER
    if not trained.exists():
        trained, size = work_dir / "vae.pt", FIRST_DECODER
    state = torch.load(trained)["model"]
    path = work_dir / "turn.pt"
    if path.exists():
        turn, middle = torch.load(path)
        mean, state = (turn @ middle).tolist(), turned(state, turn)
    vae = make_vae(mean, size)
    vae.load_state_dict(state)
    return vae.eval()


def measured_turn(latents: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix that makes latents almost white, and their mean.

    Along some directions latents vary by a hundredth of others, and colours lie there: noise would
    drown them long before anything else. Variances become their power of a fifth, which keeps
    some order among them.

    Args:
        latents: ``[N, frames, channels, H, W]``.
    """
    points = latents.transpose(1, 2).transpose(0, 1).flatten(1)
    variances, axes = torch.linalg.eigh(torch.cov(points))
    return torch.diag(variances**-0.4) @ axes.T, points.mean(1)


def turned(state: dict[str, Tensor], turn: Tensor) -> dict[str, Tensor]:
    """Weights of an autoencoder whose latents are those of another one, turned.

    The first convolution behind the encoder and that before the decoder are linear and look at
    single places: the matrix goes into them. Encoding becomes deterministic.
    """
    size = len(turn)
    weight, bias = state["quant_conv.weight"].clone(), state["quant_conv.bias"].clone()
    weight[:size] = torch.einsum("ij,jk...->ik...", turn, weight[:size])
    bias[:size] = turn @ bias[:size]
    weight[size:], bias[size:] = 0.0, -30.0
    after = state["post_quant_conv.weight"]
    after = torch.einsum("ij...,jk->ik...", after, torch.linalg.inv(turn))
    changed = {"quant_conv.weight": weight, "quant_conv.bias": bias}
    return state | changed | {"post_quant_conv.weight": after}


@torch.no_grad()
def encode(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """Latents ``[N, frames, channels, 8, 8]`` on the autoencoder's scale."""
    parts = [vae.encode(as_video(part)).latent_dist.mode() for part in clips.split(8)]
    return torch.cat(parts).transpose(1, 2)


def main() -> None:
    """Writes `turn.pt` and `latents/N.pt`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--num-shards", type=int, default=16)
    args = parser.parse_args()
    folder = args.work_dir / "latents"
    folder.mkdir(exist_ok=True)
    simulator, (scenes, _) = Simulator(), split_scenes()
    if not (args.work_dir / "turn.pt").exists():
        clips = simulator.draw(scenes[:96], torch.Generator().manual_seed(99))
        torch.save(measured_turn(encode(load_vae(args.work_dir), clips)), args.work_dir / "turn.pt")
    vae = load_vae(args.work_dir)
    mean = torch.tensor(vae.config.latents_mean).view(1, 1, -1, 1, 1)
    for shard in range(args.num_shards):
        path = folder / f"{shard}.pt"
        if path.exists():
            continue
        clips = simulator.draw(scenes, torch.Generator().manual_seed(1000 + shard))
        torch.save((encode(vae, clips) - mean).half(), path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)


if __name__ == "__main__":
    main()
