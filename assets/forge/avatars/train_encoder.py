"""Trains the VQ encoder to find the codes that `codebook` gave to the colours.

    python -m mmspec.assets.forge.avatars.train_encoder --work-dir build/avatars

The decoder is exact by construction; an encoder cannot be, since its group normalisation makes the
absolute colour hard to see, and so it is learned. Only image -> codes needs it; generation doesn't.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import JanusVQVAE

from .codebook import write_palette
from .model import GRID, make_config, make_tokenizer

TEMPERATURE = 0.05
NOISE = 0.1  # share of pixels with a random colour, so that neighbours are not needed to tell one


def code_logits(model: JanusVQVAE, pixels_BCHW: Tensor) -> Tensor:
    """Returns minus the distance of each pixel's latent to each code, (B, 256, K)."""
    latent = model.quant_conv(model.encoder(pixels_BCHW)).flatten(2).transpose(1, 2).float()
    return -torch.cdist(latent, model.quantize.embedding.weight).square() / TEMPERATURE


def main() -> None:
    """Trains for the given time and writes `encoder.pt`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    with np.load(args.work_dir / "data.npz") as file:
        train, test, palette = file["train"], file["test"], file["palette"]
    model = JanusVQVAE(make_config(len(make_tokenizer()), len(palette)).vq_config)
    write_palette(model, palette)
    # Start as a nearly linear map: the blocks add nothing, and what they learn is a correction.
    for name, parameter in model.encoder.named_parameters():
        if name.startswith(("mid.", "down.")) and ("conv2" in name or "proj_out" in name):
            torch.nn.init.zeros_(parameter)
    colors = torch.from_numpy(palette.astype(np.float32)) / 127.5 - 1

    def pixels(codes: Tensor) -> Tensor:
        return colors[codes].view(-1, GRID, GRID, 3).permute(0, 3, 1, 2)

    learned = [*model.encoder.parameters(), *model.quant_conv.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=2e-3, weight_decay=0.0)
    started, step = time.monotonic(), 0
    while (progress := (time.monotonic() - started) / (args.minutes * 60)) < 1:
        codes = train[rng.integers(len(train), size=16)].astype(np.int64)
        noisy = rng.random(codes.shape) < NOISE * rng.random()
        codes = torch.from_numpy(
            np.where(noisy, rng.integers(len(palette), size=codes.shape), codes)
        )
        loss = F.cross_entropy(code_logits(model, pixels(codes)).flatten(0, 1), codes.flatten())
        loss.backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 20) * (1.02 - progress)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    with torch.no_grad():
        codes = torch.from_numpy(test[:500].astype(np.int64))
        found = model.encode(pixels(codes)).image_tokens.view_as(codes)
    print(f"{step} steps, loss {loss.item():.4f}, exact {(found == codes).float().mean():.5f}")
    state = model.state_dict()
    kept = {k: v for k, v in state.items() if k.startswith(("encoder.", "quant_conv."))}
    torch.save(kept, args.work_dir / "encoder.pt")


if __name__ == "__main__":
    main()
