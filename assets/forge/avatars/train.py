"""Trains the autoregressive part of the avatar Janus: image codes after a caption.

    python -m mmspec.assets.forge.avatars.train --work-dir build/avatars --minutes 40

The learning rate follows the share of the time budget that is spent, so that a busy machine makes
a shorter run and not a run without its cool-down. Stopped runs go on from `checkpoint.pt`.
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import JanusForConditionalGeneration, PreTrainedTokenizerFast

from .attributes import Attributes, make_caption
from .model import BOI_ID, PAD_ID, UNK_ID, image_logits, make_model, make_tokenizer

POOL_SIZE = 8192
CAPTION_DROPOUT = 0.1
# Parts drawn last are far from their words, and learned late; captions of one or two phrases, in
# which no other colour can be confused with theirs, break that plateau.
FEW_PHRASES = 0.4
LATE_PHRASES = ["clothing", "clothing", "clothing", "beard", "mouth", "glasses", "hair"]
UNKNOWN_WORDS = 0.03  # share of captions with one word replaced: unknown words must do no harm
WARMUP_STEPS = 60
CHECKPOINT_EVERY_S = 120.0
LOG_EVERY_STEPS = 20
UNCERTAINTY_WEIGHT = 24.0


Rows = list[list[int]]


@dataclass(frozen=True)
class TrainingData:
    """What there is to learn, and what is looked at on the way.

    Attributes:
        tokenizer: Of the captions.
        num_codes: Size of the codebook.
        train: Codes (N, 256) and what their captions are made from.
        held: The same of unseen pictures.
        encode: Writes and tokenizes one caption per sample: BOS, words, BOI.
    """

    tokenizer: PreTrainedTokenizerFast
    num_codes: int
    train: tuple[np.ndarray, Sequence[Attributes]]
    held: tuple[np.ndarray, Sequence[Attributes]]
    encode: Callable[[list[Attributes], PreTrainedTokenizerFast, random.Random], Rows]


def load_data(work_dir: Path) -> tuple[dict[str, np.ndarray], list[Attributes], list[Attributes]]:
    """Loads the codes and the attributes of the training and the test avatars."""
    with np.load(work_dir / "data.npz") as file:
        arrays = {name: file[name] for name in file.files}
    with (work_dir / "attributes.jsonl").open() as lines:
        samples = [json.loads(line) for line in lines]
    num_train = len(arrays["train"])
    return arrays, samples[:num_train], samples[num_train:]


def encode_captions(
    samples: list[Attributes], tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> Rows:
    """Writes and tokenizes one caption per avatar: BOS, words, BOI."""
    captions = []
    for sample in samples:
        few = rng.sample(LATE_PHRASES, rng.choice([1, 1, 2])) if rng.random() < FEW_PHRASES else ()
        captions.append(make_caption(sample, rng, only=tuple(dict.fromkeys(few)))[0])
    return encode_texts(captions, tokenizer, rng)


def encode_texts(
    captions: list[str], tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> Rows:
    """Tokenizes captions, a few of them with an unknown word, and puts BOI at the end."""
    rows: Rows = tokenizer(captions)["input_ids"]
    for row in rows:
        if len(row) > 1 and rng.random() < UNKNOWN_WORDS:
            row[rng.randrange(1, len(row))] = UNK_ID
        row.append(BOI_ID)
    return rows


def equal_length_batches(
    data: TrainingData,
    part: tuple[np.ndarray, Sequence[Attributes]],
    batch_size: int,
    rng: random.Random,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (prompt ids, codes) for ever, captions anew each time, without any padding.

    A row whose caption is dropped keeps its length and gets pad tokens between BOS and BOI. That
    is the unconditional row of transformers' Janus `generate`, which attends to those pads.
    """
    codes, samples = part
    while True:
        order = rng.sample(range(len(samples)), min(POOL_SIZE, len(samples)))
        by_length: dict[int, list[tuple[int, list[int]]]] = {}
        rows = data.encode([samples[index] for index in order], data.tokenizer, rng)
        for index, row in zip(order, rows, strict=True):
            if rng.random() < CAPTION_DROPOUT:
                row[1:-1] = [PAD_ID] * (len(row) - 2)
            by_length.setdefault(len(row), []).append((index, row))
        batches = [
            group[start : start + batch_size]
            for group in by_length.values()
            for start in range(0, len(group) - batch_size + 1, batch_size)
        ]
        rng.shuffle(batches)
        for batch in batches:
            chosen = codes[[index for index, _ in batch]].astype(np.int64)
            yield torch.tensor([row for _, row in batch]), torch.from_numpy(chosen)


def make_optimizers(
    model: JanusForConditionalGeneration, name: str, lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the Llama layers and AdamW for the rest, or AdamW alone.

    The vision tower and the VQ model take no part in this training and are not given.
    """
    core = model.model
    parts = (core.generation_embeddings, core.generation_aligner, core.generation_head)
    outer = [p for part in parts for p in part.parameters()]
    outer += [core.language_model.embed_tokens.weight, core.language_model.norm.weight]
    layers = list(core.language_model.layers.parameters())
    outer += [p for p in layers if p.ndim < 2]
    matrices = [p for p in layers if p.ndim == 2]
    if name == "adamw":
        return [torch.optim.AdamW(outer + matrices, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]
    return [
        torch.optim.AdamW(outer, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
        torch.optim.Muon(matrices, lr=2 * lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
    ]


def learning_rate_factor(step: int, progress: float) -> float:
    """Linear warm-up in steps, flat for two thirds of the time, then a cosine to 2 %."""
    decay = 0.5 + 0.5 * math.cos(math.pi * min(1.0, max(0.0, (progress - 0.67) / 0.33)))
    return min(1.0, (step + 1) / WARMUP_STEPS) * max(0.02, decay)


@torch.no_grad()
def validation_loss(
    model: JanusForConditionalGeneration, batches: list[tuple[Tensor, Tensor]]
) -> float:
    """Mean cross-entropy in nats per image token on unseen attribute combinations."""
    losses = []
    for prompts, codes in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = image_logits(model, prompts, codes)
        losses.append(F.cross_entropy(logits.float().flatten(0, 1), codes.flatten()).item())
    return sum(losses) / len(losses)


class ThreadChooser:
    """Runs a step on all allowed threads while they are free, and else on one.

    Threads that wait for each other lose badly when another process holds one of the cores: a
    step of two threads then took five times as long as a step of one.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.single_s = math.inf
        self.started_s, self.idle_s = time.monotonic(), self._idle_s()
        torch.set_num_threads(1)

    @staticmethod
    def _idle_s() -> float:
        """Idle seconds of all cores since the machine started (Linux; elsewhere 0)."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return 0.0
        return int(stat.read_text().split("\n", 1)[0].split()[4]) / os.sysconf("SC_CLK_TCK")

    def update(self) -> None:
        """Chooses the threads of the next step; call it after every step."""
        now, idle_s = time.monotonic(), self._idle_s()
        step_s, idle = now - self.started_s, (idle_s - self.idle_s) / (now - self.started_s)
        self.started_s, self.idle_s = now, idle_s
        if torch.get_num_threads() == 1:
            self.single_s = min(self.single_s, step_s)
            if idle > 0.7 * (self.most - 1):
                torch.set_num_threads(self.most)
        elif step_s > 0.9 * self.single_s:
            torch.set_num_threads(1)


def uncertainty_weights(logits_BNV: Tensor) -> Tensor:
    """Weighs each image code by how unsure the model is of it.

    Most pixels continue a flat patch and teach nothing; a caption decides at few places, such as
    the first pixel of the clothing. The weight depends on the context and not on the code that
    follows it, so that the best prediction stays the true conditional law.
    """
    log_probs = logits_BNV.detach().float().log_softmax(-1)
    return 1.0 + UNCERTAINTY_WEIGHT * -(log_probs.exp() * log_probs).sum(-1)


def cut_log(log: Path, step: int) -> None:
    """Forgets the rows after `step`, which a resumed run is about to write again."""
    rows = log.read_text().splitlines() if log.exists() else []
    kept = [row for row in rows if json.loads(row)["step"] <= step]
    log.write_text("".join(row + "\n" for row in kept))


class Trainer:
    """The model, its optimizers, and how far the training is."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.step, self.spent_s = 0, 0.0
        self.checkpoint = args.work_dir / "checkpoint.pt"
        self.log = args.work_dir / "training_log.jsonl"
        data = self.load_data()
        torch.manual_seed(args.seed)
        self.model = self.make_model(len(data.tokenizer), data.num_codes)
        self.optimizers = self.make_optimizers()
        self.base_rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        if self.checkpoint.exists():
            self.load()
        cut_log(self.log, self.step)
        rng = random.Random(args.seed + self.step)
        self.batches = equal_length_batches(data, data.train, args.batch_size, rng)
        held = equal_length_batches(data, data.held, 32, random.Random(args.seed))
        self.held_batches = [next(held) for _ in range(4)]
        self.forward = torch.compile(image_logits, dynamic=True) if args.compile else image_logits

    def load_data(self) -> TrainingData:
        """The avatars of the work folder."""
        arrays, train, held = load_data(self.args.work_dir)
        return TrainingData(
            tokenizer=make_tokenizer(),
            num_codes=len(arrays["palette"]),
            train=(arrays["train"], train),
            held=(arrays["test"], held),
            encode=encode_captions,
        )

    def make_model(self, vocab_size: int, num_codes: int) -> JanusForConditionalGeneration:
        """The model before its first step."""
        return make_model(vocab_size, num_codes)

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers, each with one group of parameters."""
        return make_optimizers(self.model, self.args.optimizer, self.args.lr)

    def load(self) -> None:
        """Goes on where the last checkpoint was written."""
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.spent_s = state["step"], state["spent_s"]

    def save(self) -> None:
        """Writes the checkpoint; an interrupted write leaves the old one."""
        state = {"model": self.model.state_dict(), "step": self.step, "spent_s": self.spent_s}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def train_step(self, factor: float) -> tuple[float, float]:
        """Does one step at this share of the learning rates; returns loss and gradient norm."""
        loss, objective = self.losses(*next(self.batches))
        objective.backward()
        trained = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer, rate in zip(self.optimizers, self.base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item(), norm.item()

    def losses(self, prompts: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The loss to log, in nats per code, and the one to descend."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.forward(self.model, prompts, codes)
        losses = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten(), reduction="none")
        weights = uncertainty_weights(logits).flatten()
        return losses.mean(), (losses * weights).sum() / weights.sum()

    def log_row(self, loss: float, norm: float, factor: float) -> None:
        """Appends one line to the training log; every tenth has the held-out loss, too."""
        row = {"step": self.step, "loss": round(loss, 5), "lr": round(self.args.lr * factor, 7)}
        row |= {"grad_norm": round(norm, 4), "num_threads": torch.get_num_threads()}
        if self.step % (10 * LOG_EVERY_STEPS) == 0:
            row["heldout_loss"] = round(validation_loss(self.model, self.held_batches), 5)
        row["time_s"] = round(self.spent_s, 1)
        with self.log.open("a") as out:
            out.write(json.dumps(row) + "\n")

    def run(self) -> None:
        """Trains until the time budget is spent."""
        budget_s = self.args.minutes * 60
        threads = ThreadChooser(self.args.num_threads)
        last_saved, losses = time.monotonic(), []
        while self.spent_s < budget_s:
            started = time.monotonic()
            factor = learning_rate_factor(self.step, self.spent_s / budget_s)
            loss, norm = self.train_step(factor)
            losses.append(loss)
            if self.step % LOG_EVERY_STEPS == 0:
                self.log_row(sum(losses) / len(losses), norm, factor)
                losses.clear()
            threads.update()
            self.spent_s += time.monotonic() - started
            if time.monotonic() - last_saved > CHECKPOINT_EVERY_S or self.spent_s >= budget_s:
                self.save()
                last_saved = time.monotonic()


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40.0, help="training time, all runs")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default="muon")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--num-threads", type=int, default=2)
    args = parser.parse_args()
    Trainer(args).run()


if __name__ == "__main__":
    main()
