"""Trains the picture codec: 64x64 pixels to 16x16 codes and back, `JanusVQVAE` itself.

    python -m mmspec.assets.forge.emoji.train_codec --work-dir build/emoji --minutes 16

Then writes the codes of all pictures, mirrored and shifted ones included, to `codes.npz`.

The codes lie on the unit sphere, because `JanusVQVAE.decode` normalises them; the nearest code by
distance, which `encode` takes, is then the nearest by angle, too. The codebook follows the encoder
by running means (van den Oord et al. 2017, https://arxiv.org/abs/1711.00937, appendix A.1), codes
that go unused are put where the encoder is, and the first steps train without quantisation.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import JanusVQVAE

from mmspec.assets.forge.avatars.model import GRID
from mmspec.assets.forge.avatars.train import cut_log

from .icons import may_flip
from .model import make_codec

BATCH_SIZE = 8
LEARNING_RATE = 2e-3
FREE_STEPS = 100  # without quantisation
MEAN_DECAY = 0.98
RESTART_EVERY = 25
DEAD_BELOW = 0.05  # uses per step
MAX_SHIFT = 3
NUM_SHIFTS = 1  # shifted copies of every picture among the training codes
COMMITMENT = 0.25


def to_pixels(pictures: np.ndarray) -> Tensor:
    """Turns uint8 (B, 64, 64, 3) into (B, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def shift(pictures: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Moves pictures (B, 64, 64, 3) over white paper, by whole pixels."""
    m = MAX_SHIFT
    wide = np.pad(pictures, ((0, 0), (m, m), (m, m), (0, 0)), constant_values=255)
    size = pictures.shape[1]
    return wide[:, m + rows : m + rows + size, m + columns : m + columns + size]


class Codebook:
    """Running means of what the encoder makes of each code."""

    def __init__(self, weight_KC: Tensor) -> None:
        self.weight_KC = weight_KC
        self.uses_K = torch.ones(len(weight_KC))
        self.sums_KC = weight_KC.clone()

    @torch.no_grad()
    def start(self, units_NC: Tensor, rounds: int = 8) -> None:
        """Spherical k-means over what the encoder makes now."""
        picked = torch.randperm(len(units_NC))[: len(self.weight_KC)]
        self.weight_KC.copy_(units_NC[picked])
        for _ in range(rounds):
            self._count(units_NC, decay=0.0)
            self._restart(units_NC, below=0.5)
        for running in (self.uses_K, self.sums_KC):  # from now on, per step
            running.mul_(BATCH_SIZE * GRID**2 / len(units_NC))

    @torch.no_grad()
    def _count(self, units_NC: Tensor, decay: float) -> None:
        codes_N = (units_NC @ self.weight_KC.T).argmax(1)
        uses_K = torch.bincount(codes_N, minlength=len(self.weight_KC)).float()
        sums_KC = torch.zeros_like(self.weight_KC).index_add_(0, codes_N, units_NC)
        self.uses_K.mul_(decay).add_(uses_K, alpha=1 - decay)
        self.sums_KC.mul_(decay).add_(sums_KC, alpha=1 - decay)
        used = self.uses_K > 1e-3
        self.weight_KC[used] = F.normalize(self.sums_KC[used], dim=1)

    def _restart(self, units_NC: Tensor, below: float) -> None:
        dead = torch.nonzero(self.uses_K < below).flatten()
        # Where the codebook fits worst: most patches are white paper and need no more codes.
        misfit_N = 1 - (units_NC @ self.weight_KC.T).amax(1)
        picked = torch.multinomial(misfit_N.clamp(min=0) + 1e-6, max(1, len(dead)))[: len(dead)]
        self.weight_KC[dead] = units_NC[picked]
        self.sums_KC[dead] = units_NC[picked]
        self.uses_K[dead] = 1.0

    def update(self, units_NC: Tensor, step: int) -> None:
        """Follows one batch of the encoder's unit vectors."""
        self._count(units_NC, MEAN_DECAY)
        if step % RESTART_EVERY == 0:
            with torch.no_grad():
                self._restart(units_NC, DEAD_BELOW)


def reconstruction_loss(made: Tensor, pixels: Tensor) -> Tensor:
    """Squared and absolute error; absolute error of neighbours' differences and of patch means."""
    patches = F.avg_pool2d(made - pixels, 4).abs().mean()
    edges = sum((made.diff(dim=axis) - pixels.diff(dim=axis)).abs().mean() for axis in (2, 3))
    return F.mse_loss(made, pixels) + 0.5 * F.l1_loss(made, pixels) + 0.5 * edges + patches


@torch.no_grad()
def psnr(codec: JanusVQVAE, pictures: np.ndarray) -> float:
    """Mean peak signal-to-noise ratio of the pictures after `encode` and `decode`, in dB."""
    values = []
    for start in range(0, len(pictures), 32):
        pixels = to_pixels(pictures[start : start + 32])
        codes = codec.encode(pixels).image_tokens.view(len(pixels), -1)
        made = codec.decode(codes).clamp(-1, 1)
        error = (made - pixels).square().mean((1, 2, 3)) / 4
        values += (-10 * error.clamp(min=1e-10).log10()).tolist()
    return sum(values) / len(values)


def encode_units(codec: JanusVQVAE, pixels: Tensor) -> Tensor:
    """Returns the encoder's vectors (B, C, 16, 16) at length 1, in float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = codec.quant_conv(codec.encoder(pixels))
    return F.normalize(hidden.float(), dim=1)


class CodecTrainer:
    """The codec, its optimizer, and how far the training is."""

    def __init__(self, work_dir: Path, minutes: float, seed: int) -> None:
        self.work_dir, self.budget_s = work_dir, 60 * minutes
        with np.load(work_dir / "pictures.npz") as file:
            self.pictures, self.held = file["train"], file["names"]
        torch.manual_seed(seed)
        self.codec = make_codec()
        self.step, self.spent_s = 0, 0.0
        self.optimizer = torch.optim.AdamW(
            (p for name, p in self.codec.named_parameters() if "embedding" not in name),
            lr=LEARNING_RATE,
            betas=(0.9, 0.98),
            weight_decay=1e-4,
        )
        self.codebook = Codebook(self.codec.quantize.embedding.weight.data)
        self.checkpoint = work_dir / "codec_checkpoint.pt"
        if self.checkpoint.exists():
            self.load()
        self.rng = np.random.default_rng(seed + self.step)

    def load(self) -> None:
        """Goes on where the last checkpoint was written."""
        state = torch.load(self.checkpoint, weights_only=True)
        self.codec.load_state_dict(state["codec"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.codebook.uses_K, self.codebook.sums_KC = state["uses"], state["sums"]
        self.step, self.spent_s = state["step"], state["spent_s"]

    def save(self) -> None:
        """Writes the checkpoint; an interrupted write leaves the old one."""
        state = {"codec": self.codec.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"uses": self.codebook.uses_K, "sums": self.codebook.sums_KC}
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state | {"step": self.step, "spent_s": self.spent_s}, partial)
        partial.replace(self.checkpoint)

    def batch(self) -> Tensor:
        """Draws a batch of pictures, each mirrored or not and shifted by up to three pixels."""
        chosen = self.pictures[self.rng.choice(len(self.pictures), BATCH_SIZE)]
        rows, columns = self.rng.integers(0, 2 * MAX_SHIFT + 1, 2)
        chosen = shift(chosen, int(rows) - MAX_SHIFT, int(columns) - MAX_SHIFT)
        if self.rng.random() < 0.5:
            chosen = chosen[:, :, ::-1]
        return to_pixels(np.ascontiguousarray(chosen))

    def train_step(self) -> tuple[float, float]:
        """Does one step; returns the reconstruction loss and the loss of commitment."""
        pixels = self.batch()
        units = encode_units(self.codec, pixels)
        taken, commitment = units, torch.zeros(())
        if self.step >= FREE_STEPS:
            flat_NC = units.detach().permute(0, 2, 3, 1).flatten(0, 2)
            codes_N = (flat_NC @ self.codebook.weight_KC.T).argmax(1)
            nearest = self.codebook.weight_KC[codes_N].view(len(units), GRID, GRID, -1)
            nearest = nearest.permute(0, 3, 1, 2).contiguous()
            commitment = (units - nearest).square().sum(1).mean()
            taken = units + (nearest - units).detach()
            self.codebook.update(flat_NC, self.step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made = self.codec.decoder(self.codec.post_quant_conv(taken))
        loss = reconstruction_loss(made.float(), pixels)
        (loss + COMMITMENT * commitment).backward()
        torch.nn.utils.clip_grad_norm_(self.codec.parameters(), 1.0)
        progress = self.spent_s / self.budget_s
        factor = min(1.0, (self.step + 1) / 50)
        factor *= max(0.02, 0.5 + 0.5 * math.cos(math.pi * min(1.0, progress)))
        self.optimizer.param_groups[0]["lr"] = LEARNING_RATE * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item(), commitment.item()

    def start_codebook(self) -> None:
        """Fills the codebook from 16 batches of the encoder as it is."""
        with torch.no_grad():
            units = [encode_units(self.codec, self.batch()) for _ in range(16)]
        self.codebook.start(torch.cat([u.permute(0, 2, 3, 1).flatten(0, 2) for u in units]))

    def run(self) -> None:
        """Trains until the time budget is spent, and saves the codec."""
        losses: list[tuple[float, float]] = []
        cut_log(self.work_dir / "codec_log.jsonl", self.step)
        with (self.work_dir / "codec_log.jsonl").open("a") as log:
            while self.spent_s < self.budget_s:
                started = time.monotonic()
                if self.step == FREE_STEPS:
                    self.start_codebook()
                losses.append(self.train_step())
                self.spent_s += time.monotonic() - started
                if self.step % 50 == 0:
                    mean = np.mean(losses, axis=0).round(5).tolist()
                    losses.clear()
                    row = {"step": self.step, "loss": mean[0], "commitment": mean[1]}
                    row["live_codes"] = int((self.codebook.uses_K > DEAD_BELOW).sum())
                    if self.step % 200 == 0:
                        row["heldout_psnr"] = round(psnr(self.codec, self.held[:64]), 3)
                        self.save()
                    row["time_s"] = round(self.spent_s, 1)
                    log.write(json.dumps(row) + "\n")
                    log.flush()
        self.save()
        torch.save(self.codec.state_dict(), self.work_dir / "codec.pt")


@torch.no_grad()
def encode_all(codec: JanusVQVAE, pictures: np.ndarray) -> np.ndarray:
    """Returns the codes of pictures, int16 (N, 256); the encoder runs in bfloat16."""
    rows = []
    for start in range(0, len(pictures), 32):
        units = encode_units(codec, to_pixels(np.ascontiguousarray(pictures[start : start + 32])))
        flat_NC = units.permute(0, 2, 3, 1).flatten(0, 2)
        codes_N = (flat_NC @ codec.quantize.embedding.weight.T).argmax(1)
        rows.append(codes_N.view(len(units), -1))
    return torch.cat(rows).numpy().astype(np.int16)


def write_codes(codec: JanusVQVAE, work_dir: Path, seed: int) -> dict[str, float]:
    """Encodes all parts; the training part also shifted and mirrored. Returns the PSNRs.

    `codes.npz` has the codes of "train", "names" and "styles" as drawn, and for training "copies"
    (M, 256) with "copy_of" (M,), the index of the icon.
    """
    with np.load(work_dir / "pictures.npz") as file:
        pictures = {part: file[part] for part in file.files}
    with (work_dir / "icons.jsonl").open() as lines:
        icons = [json.loads(line) for line in lines]
    train = [icon for icon in icons if icon["split"] == "train"]
    arrays = {part: encode_all(codec, pictures[part]) for part in pictures}
    flips = np.flatnonzero([may_flip(icon["name"], icon["category"]) for icon in train])
    rng = np.random.default_rng(seed)
    copies = [arrays["train"], encode_all(codec, pictures["train"][flips, :, ::-1])]
    copy_of = [np.arange(len(train)), flips]
    for _ in range(NUM_SHIFTS):
        moves = rng.integers(-MAX_SHIFT, MAX_SHIFT + 1, (len(train), 2)).tolist()
        pairs = zip(pictures["train"], moves, strict=True)
        moved = np.concatenate([shift(picture[None], *move) for picture, move in pairs])
        copies += [encode_all(codec, moved), encode_all(codec, moved[flips, :, ::-1])]
        copy_of += [np.arange(len(train)), flips]
    arrays["copies"], arrays["copy_of"] = np.concatenate(copies), np.concatenate(copy_of)
    np.savez_compressed(work_dir / "codes.npz", **arrays)
    return {part: round(psnr(codec, pictures[part][:128]), 3) for part in pictures}


def main() -> None:
    """Trains the codec and writes the codes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=16.0)
    parser.add_argument("--seed", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    trainer = CodecTrainer(args.work_dir, args.minutes, args.seed)
    trainer.run()
    quality = write_codes(trainer.codec.eval(), args.work_dir, args.seed)
    facts = {"steps": trainer.step, "training_time_s": round(trainer.spent_s), "psnr_db": quality}
    (args.work_dir / "codec.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
