"""Trains the small video autoencoder of the clips, diffusers' `AutoencoderKLWan`.

    python -m mmspec.assets.forge.clips.train_vae --work-dir build/clips

Four pictures and 4 x 4 pixels become one place of 8 latent channels. A second call goes on where
the first was stopped.

The first training cuts three latent frames out of a clip. Decoded one after the other, later frames
see more of the past than that, and colours drift. Also, decoding is more than half of what a
drafted video costs. So ``--decoder-only`` trains a smaller decoder for the same latents, in the end
on whole clips, and writes `decoder.pt`. It may run while models learn to write these latents.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from .simulator import Simulator, split_scenes

LATENT_CHANNELS = 8
#: Channels of the pictures inside of the decoder that the encoder is trained with, and inside of
#: the one that is bundled.
FIRST_DECODER, FINAL_DECODER = 12, 8


def make_vae(mean: list[float] | None = None, decoder_dim: int = FINAL_DECODER) -> AutoencoderKLWan:
    """The autoencoder with random weights, and the mean of its latents if it is known."""
    return AutoencoderKLWan(
        base_dim=12,
        decoder_base_dim=decoder_dim,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=mean or [0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_spatial=4,
    )


def as_video(clips: Tensor) -> Tensor:
    """From ``[N, F, 3, H, W]`` in 0 .. 1 to what the autoencoder reads."""
    return (clips * 2 - 1).transpose(1, 2)


def cut(video: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Nine pictures of each clip, three latent frames; of them a square.

    Four small squares for each clip cost what a whole one costs, and show more: training begins
    with them.
    """
    num_cuts = (video.shape[3] // side) ** 2
    room, cuts = video.shape[3] - side, []
    for _ in range(num_cuts):
        first = int(torch.randint(video.shape[2] - 8, (1,), generator=generator))
        top, left = (int(room * torch.rand((), generator=generator)) for _ in range(2))
        cuts.append(video[:, :, first : first + 9, top : top + side, left : left + side])
    return torch.cat(cuts)


def training_loss(vae: AutoencoderKLWan, video: Tensor) -> tuple[Tensor, float]:
    """The loss of one batch, and the mean absolute error of its pictures in grey levels."""
    law = vae.encode(video).latent_dist
    rebuilt = _decode(vae, vae.post_quant_conv(law.sample()))
    error = rebuilt.float() - video
    # Colours are learnt long after brightness unless they count for more.
    hue = error - error.mean(1, keepdim=True)
    loss = error.abs().mean() + 2 * error.square().mean() + 3 * hue.abs().mean()
    loss = loss + 3e-4 * law.kl().mean() / law.mean[0].numel()
    return loss, error.abs().mean().item() * 127.5


def _decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """As `AutoencoderKLWan.decode`, but without its clamp, which has no gradient outside."""
    memory = [None] * vae._cached_conv_counts["decoder"]
    pictures = []
    for index, frame in enumerate(latents.split(1, dim=2)):
        first = {"first_chunk": True} if index == 0 else {}
        pictures.append(vae.decoder(frame, feat_cache=memory, feat_idx=[0], **first))
    return torch.cat(pictures, dim=2)


class ConvolutionMuon:
    """Muon for the kernels of convolutions, each as a matrix of its output channels; else AdamW."""

    def __init__(self, model: torch.nn.Module, lr: float) -> None:
        """Takes the weights of the model."""
        weights = list(model.parameters())
        self._kernels = [weight for weight in weights if weight.ndim >= 4 and weight[0].numel() > 1]
        chosen = {id(kernel) for kernel in self._kernels}
        # Views of the kernels, so that a step on the matrix is a step on the kernel.
        self._matrices = [torch.nn.Parameter(kernel.data.flatten(1)) for kernel in self._kernels]
        rest = [weight for weight in weights if id(weight) not in chosen]
        self.parts = [
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
            torch.optim.Muon(
                self._matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
            ),
        ]

    def step(self, rate: float) -> None:
        """One step of both, and gradients back to zero."""
        for kernel, matrix in zip(self._kernels, self._matrices, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
            kernel.grad = None
        for part in self.parts:
            part.param_groups[0]["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)


def main() -> None:
    """Trains for the given time and writes `vae.pt`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=18.5)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--decoder-only", action="store_true")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    args.path = args.work_dir / ("decoder.pt" if args.decoder_only else "vae.pt")
    torch.manual_seed(1)
    vae = make_vae(decoder_dim=FINAL_DECODER if args.decoder_only else FIRST_DECODER)
    optimizer = ConvolutionMuon(vae, args.lr)
    state: dict[str, Any] = {"step": 0, "time_s": 0.0}
    if args.decoder_only:
        take_encoder(vae, torch.load(args.work_dir / "vae.pt")["model"])
    if args.path.exists():
        state = torch.load(args.path)
        vae.load_state_dict(state["model"])
        for part, saved in zip(optimizer.parts, state["optimizer"], strict=True):
            part.load_state_dict(saved)
    with (args.work_dir / "vae.jsonl").open("a") as log:
        run(args, vae, optimizer, state, log)


def take_encoder(vae: AutoencoderKLWan, trained: dict[str, Tensor]) -> None:
    """All of a trained autoencoder but its decoder; what makes the latents is trained no more."""
    rest = {name: weight for name, weight in trained.items() if not name.startswith("decoder.")}
    missing, unexpected = vae.load_state_dict(rest, strict=False)
    assert not unexpected
    assert all(name.startswith("decoder.") for name in missing)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)


def run(
    args: argparse.Namespace,
    vae: AutoencoderKLWan,
    optimizer: ConvolutionMuon,
    state: dict[str, Any],
    log: TextIO,
) -> None:
    """The steps of training."""
    simulator, (scenes, _) = Simulator(), split_scenes()
    path, step, before = args.path, state["step"], state["time_s"]
    generator = torch.Generator().manual_seed(1 + step)
    started = time.monotonic()
    while (spent := before + time.monotonic() - started) < 60 * args.minutes:
        chosen = torch.randint(len(scenes), (args.batch_size,), generator=generator)
        clips = simulator.draw([scenes[number] for number in chosen], generator)
        progress = spent / (60 * args.minutes)
        side = 16 if progress < (0.4 if args.decoder_only else 0.7) else 32
        video = as_video(clips)
        if side == 16 or not args.decoder_only:
            video = cut(video, side, generator)
        rate = args.lr * min(1.0, (step + 1) / 50) * min(1.0, (1 - progress) / 0.4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, error = training_loss(vae, video)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step(rate)
        step += 1
        if step % 50 == 0:
            row = {"step": step, "time_s": round(spent), "side": side}
            row |= {"loss": round(loss.item(), 5), "grey_levels": round(error, 3)}
            log.write(json.dumps(row) + "\n")
            log.flush()
        if step % 300 == 0:
            save(path, vae, optimizer.parts, step, spent)
    save(path, vae, optimizer.parts, step, 60 * args.minutes)


def save(
    path: Path,
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    step: int,
    time_s: float,
) -> None:
    """Writes a checkpoint that a second call goes on from."""
    states = [optimizer.state_dict() for optimizer in optimizers]
    state = {"model": model.state_dict(), "optimizer": states}
    partial = path.with_suffix(".partial")
    torch.save(state | {"step": step, "time_s": time_s}, partial)
    partial.replace(path)


if __name__ == "__main__":
    main()
