"""Fine-tunes the bundled avatar Janus to predict the next clean code from noisy embeddings, too.

    python -m mmspec.assets.forge.avatars_denoise.train --work-dir build/avatars_denoise \
        --minutes 40

The work folder wants `data.npz` and `attributes.jsonl` of `avatars.make_data`. Stopped runs go on
from `checkpoint.pt`. The embeddings of the codes are not trained, for their statistics are part of
the noise.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import JanusForConditionalGeneration

from mmspec.assets.forge.avatars.make_data import BUNDLE
from mmspec.assets.forge.avatars.train import Trainer, make_optimizers, uncertainty_weights
from mmspec.denoiser import Denoiser

from .corrupt import corrupted, draw_levels


class DenoiseTrainer(Trainer):
    """The trainer of the avatars, with noise on a part of what the model reads."""

    def make_model(self, vocab_size: int, num_codes: int) -> JanusForConditionalGeneration:
        """The bundled model, with a denoiser as a part of it while it is trained."""
        model = JanusForConditionalGeneration.from_pretrained(BUNDLE, dtype=torch.float32)
        model.denoiser = Denoiser(model.config.text_config.hidden_size)
        core = model.model
        for part in (core.generation_embeddings, core.generation_aligner):
            part.requires_grad_(False)
        with torch.no_grad():
            codes = torch.arange(num_codes)
            model.denoiser.measure(model.prepare_embeddings_for_image_generation(codes))
        return model.train()

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """Those of the avatars, and one more for the level encoding."""
        encoder = self.model.denoiser.encoder.parameters()
        return [
            *make_optimizers(self.model, self.args.optimizer, self.args.lr),
            torch.optim.AdamW(encoder, lr=self.args.lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def losses(self, prompts: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The loss behind clean codes, to log, and the objective.

        The two halves of the objective are averaged apart: behind noise the model is unsure nearly
        everywhere, and weights by uncertainty would leave nothing to the clean half.
        """
        sigma_BN = draw_levels(codes.shape[0], codes.shape[1] - 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            corrupt = partial(corrupted, self.model.denoiser, sigma_BN=sigma_BN)
            logits = self.forward(self.model, prompts, codes, corrupt)
        losses = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten(), reduction="none")
        # A code is behind noise if any of the codes before it was noisy.
        is_noisy = F.pad(sigma_BN.cumsum(1) > 0, (1, 0)).flatten()
        weights = uncertainty_weights(logits).flatten() * ~is_noisy
        clean = (losses * weights).sum() / weights.sum()
        noisy = (losses * is_noisy).sum() / is_noisy.sum().clamp(min=1)
        return losses[~is_noisy].mean(), clean + noisy


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40.0, help="training time, all runs")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default="muon")
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("--num-threads", type=int, default=1)
    DenoiseTrainer(parser.parse_args(namespace=argparse.Namespace(compile=False))).run()


if __name__ == "__main__":
    main()
