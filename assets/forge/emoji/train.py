"""Trains the autoregressive part of the emoji Janus: image codes after a caption.

    python -m mmspec.assets.forge.emoji.train --work-dir build/emoji --minutes 50

The trainer is that of the avatars: time drives the learning rate, and stopped runs go on.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import JanusForConditionalGeneration, PreTrainedTokenizerFast

from mmspec.assets.forge.avatars.train import Rows, Trainer, TrainingData, encode_texts

from .icons import make_caption
from .model import NUM_CODES, make_emoji_model, make_emoji_tokenizer


def load_icons(work_dir: Path) -> dict[str, list[dict[str, str]]]:
    """Loads name, style and category of every icon, by part of the split."""
    parts: dict[str, list[dict[str, str]]] = {}
    with (work_dir / "icons.jsonl").open() as lines:
        for line in lines:
            row = json.loads(line)
            parts.setdefault(row.pop("split"), []).append(row)
    return parts


def encode_captions(
    rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> Rows:
    """Writes and tokenizes one caption per icon: BOS, words, BOI."""
    return encode_texts([make_caption(rng=rng, **row) for row in rows], tokenizer, rng)


class EmojiTrainer(Trainer):
    """The trainer of the avatars with the icons' data, and every code weighed the same.

    The avatars' weights by uncertainty are left out: here the model is unsure of most codes.
    """

    def load_data(self) -> TrainingData:
        """The codes of the work folder, shifted and mirrored copies included."""
        with np.load(self.args.work_dir / "codes.npz") as file:
            codes, copy_of, names = file["copies"], file["copy_of"], file["names"]
        icons = load_icons(self.args.work_dir)
        return TrainingData(
            tokenizer=make_emoji_tokenizer(icons["train"]),
            num_codes=NUM_CODES,
            train=(codes, [icons["train"][index] for index in copy_of]),
            held=(names, icons["names"]),
            encode=encode_captions,
        )

    def make_model(self, vocab_size: int, num_codes: int) -> JanusForConditionalGeneration:
        """The model before its first step; `num_codes` is fixed by the codec."""
        return make_emoji_model(vocab_size)

    def losses(self, prompts: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The loss in nats per code, to log and to descend."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.forward(self.model, prompts, codes)
        loss = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())
        return loss.detach(), loss


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=50.0, help="training time, all runs")
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=20)
    fixed = argparse.Namespace(compile=False, optimizer="muon", num_threads=1)
    EmojiTrainer(parser.parse_args(namespace=fixed)).run()


if __name__ == "__main__":
    main()
