"""Trains the reader, or its drafter, on pages drawn on the fly.

    python -m mmspec.assets.forge.pages.train --work-dir build/pages --size pages --minutes 90

First the vision tower alone learns letters: a linear layer, which is thrown away later, names the
two characters of each visual token from its output. Then the whole model learns to read. Its pages
begin with two lines and grow whenever the loss is low: with few lines it is easy to find out that
the text is on the picture, and where. The learning rate follows the share of the time budget
that is spent. Stopped runs go on from the checkpoint.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmspec.assets.forge.avatars.train import ThreadChooser
from mmspec.assets.pages.rendering import CHARACTERS, NUM_COLUMNS, NUM_ROWS, cell_codes, draw_page
from mmspec.assets.pages.scoring import error_rate

from .compose import compose, load_blocks
from .measure import read_pages
from .model import (
    END_ID,
    INSTRUCTIONS,
    PAD_ID,
    SIZES,
    answer_logits,
    make_model,
    make_tokenizer,
    see,
)

POOL_BATCHES = 8  # pages of so many batches are sorted by length, which saves padding
FIRST_ROWS = 2
FOUND_BELOW = 1.0  # nats per character, which no language model reaches
WARMUP_STEPS = 100
CHECKPOINT_EVERY_S = 120.0
DEV_EVERY_S = 900.0
LOG_EVERY_STEPS = 20
NUM_DEV_PAGES = 8

NAMING_WEIGHT = 1.0
SHORT_PAGE = 8  # rows
PER_TOKEN = 2  # characters

Batch = tuple[Tensor, Tensor, int, Tensor]
Page = tuple[np.ndarray, list[int], np.ndarray]


class Pages:
    """Batches of pages for ever.

    Attributes:
        max_rows: Lines of a page at most; may be changed at any time.
    """

    def __init__(self, work_dir: Path, batch_size: int, seed: int) -> None:
        self.blocks = load_blocks(work_dir, "train")
        self.batch_size, self.max_rows = batch_size, NUM_ROWS
        self.rng, self.noise = Random(seed), np.random.default_rng(seed)
        tokenizer = make_tokenizer()
        self.ids = {text: index for text, index in tokenizer.get_vocab().items() if len(text) == 1}

    def page(self) -> Page:
        """A picture, the tokens to read from it, and the character of each cell."""
        rows = self.max_rows
        if self.rng.random() < 0.4:
            rows = self.rng.randint(1, rows)
        markdown, _ = compose(self.blocks, self.rng, rows)
        blur = self.rng.uniform(0.2, 0.8) if self.rng.random() < 0.2 else 0.0
        noise = self.rng.uniform(1, 20) if self.rng.random() < 0.2 else 0.0
        picture = draw_page(markdown, self.noise, blur=blur, noise=noise)
        return picture, [self.ids[c] for c in markdown] + [END_ID], cell_codes(markdown)

    def __iter__(self) -> Iterator[Batch]:
        """Yields pictures, text behind them, how much of it is prompt, and the cells."""
        while True:
            pool = [self.page() for _ in range(POOL_BATCHES * self.batch_size)]
            pool.sort(key=lambda page: len(page[1]))
            starts = list(range(0, len(pool), self.batch_size))
            self.rng.shuffle(starts)
            for start in starts:
                yield self._batch(pool[start : start + self.batch_size])

    def _batch(self, pages: list[Page]) -> Batch:
        prompt = [self.ids[c] for c in self.rng.choice(INSTRUCTIONS)] + [END_ID]
        longest = max(len(answer) for _, answer, _ in pages)
        rows = [prompt + answer + [PAD_ID] * (longest - len(answer)) for _, answer, _ in pages]
        pictures = torch.from_numpy(np.stack([picture for picture, _, _ in pages]))
        cells = torch.from_numpy(np.stack([cells for _, _, cells in pages]))
        return pictures, torch.tensor(rows), len(prompt), cells


def naming_loss(naming: torch.nn.Linear, seen: Tensor, cells: Tensor) -> Tensor:
    """Cross-entropy of the characters that visual tokens stand for, in nats per character."""
    targets = F.pad(cells, (0, NUM_COLUMNS % PER_TOKEN)).unflatten(-1, (-1, PER_TOKEN))
    named = naming(seen[:, : targets.shape[1] * targets.shape[2]])
    return F.cross_entropy(named.float().view(-1, len(CHARACTERS)), targets.flatten())


def make_optimizers(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest."""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if ".layers." in name and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in named.values() if id(p) not in chosen]
    return [
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
    ]


def learning_rate_factor(step: int, progress: float) -> float:
    """Linear warm-up in steps, flat for half of the time, then a straight line to 1 %."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * max(0.01, min(1.0, 2 * (1 - progress)))


class Trainer:
    """The model, its optimizers, and how far the training is."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.step, self.spent_s, self.average = 0, 0.0, 9.0
        self.first_reading: int | None = None
        self.has_found = False
        self.checkpoint = args.work_dir / f"{args.size}.pt"
        self.log = args.work_dir / f"{args.size}.jsonl"
        torch.manual_seed(args.seed)
        self.model = make_model(SIZES[args.size], len(make_tokenizer()))
        width = SIZES[args.size].vision_width
        self.model.naming = torch.nn.Linear(width, PER_TOKEN * len(CHARACTERS))
        self.optimizers = make_optimizers(self.model, args.lr)
        self.pages = Pages(args.work_dir, args.batch_size, args.seed)
        if self.checkpoint.exists():
            self.load()
        rng = Random(1)
        dev = load_blocks(args.work_dir, "dev")
        self.dev = [compose(dev, rng)[0] for _ in range(NUM_DEV_PAGES)]

    def load(self) -> None:
        """Goes on where the last checkpoint was written, with new pages."""
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.spent_s, self.average = state["step"], state["spent_s"], state["average"]
        self.pages = Pages(self.args.work_dir, self.args.batch_size, self.args.seed + self.step)
        self.pages.max_rows, self.first_reading = state["max_rows"], state["first_reading"]
        self.has_found = state["has_found"]

    def save(self) -> None:
        """Writes the checkpoint; an interrupted write leaves the old one."""
        state = {"model": self.model.state_dict(), "step": self.step, "spent_s": self.spent_s}
        state |= {"average": self.average, "max_rows": self.pages.max_rows}
        state |= {"first_reading": self.first_reading, "has_found": self.has_found}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def train_step(self, batch: Batch, factor: float, *, reads: bool) -> tuple[float, float]:
        """Does one step at this share of the learning rate.

        Args:
            batch: See `Pages`.
            factor: Share of the learning rate.
            reads: Train everything; False trains the vision tower alone.

        Returns:
            Nats per token of the answer and per cell of the page.
        """
        pictures, text, num_prompt, cells = batch
        loss = torch.zeros(())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            # Blank rows cost time for nothing; and until the text is found, letters are not what
            # is to be learned.
            is_short = reads and self.pages.max_rows <= SHORT_PAGE
            with torch.set_grad_enabled(not reads or self.has_found or not is_short):
                seen = see(self.model, pictures)
                naming = naming_loss(self.model.naming, seen, cells)
            if reads:
                num_rows = 2 + int(cells.any(dim=2).any(dim=0).nonzero().max())
                num_shown = num_rows * SIZES[self.args.size].num_columns if is_short else None
                logits = answer_logits(self.model, seen, text, num_prompt, num_shown)
                targets = text[:, num_prompt:].flatten()
                loss = F.cross_entropy(logits.float().flatten(0, 1), targets, ignore_index=PAD_ID)
        (loss + NAMING_WEIGHT * naming).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = self.args.lr * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item(), naming.item()

    def grow(self, loss: float) -> None:
        """Makes pages longer once the reader copes with those it has."""
        self.average += 0.05 * (loss - self.average)
        self.has_found |= self.average < FOUND_BELOW
        if self.average < self.args.grow_below and self.pages.max_rows < NUM_ROWS:
            self.pages.max_rows = min(NUM_ROWS, 1 + self.pages.max_rows * 3 // 2)
            self.average = 4 * self.args.grow_below

    def write(self, **row: float) -> None:
        """Appends a line to the log."""
        row = {"step": self.step, "time_s": round(self.spent_s), "rows": self.pages.max_rows} | row
        with self.log.open("a") as out:
            out.write(json.dumps(row) + "\n")

    def dev_error(self) -> float:
        """Character error rate on a few clean pages of the dev part."""
        tokenizer = make_tokenizer()
        return error_rate(read_pages(self.model.eval(), tokenizer, self.dev), self.dev)

    def run(self) -> None:
        """Trains until the time budget is spent."""
        budget_s = self.args.minutes * 60
        saved_s = seen_s = time.monotonic()
        losses = []
        batches, threads = iter(self.pages), ThreadChooser(self.args.num_threads)
        self.model.train()
        while self.spent_s < budget_s:
            started = time.monotonic()
            reads = self.spent_s >= self.args.naming_minutes * 60
            if reads and self.first_reading is None:
                self.first_reading, self.pages.max_rows = self.step, FIRST_ROWS
                batches = iter(self.pages)
            factor = learning_rate_factor(
                self.step - (self.first_reading or 0), self.spent_s / budget_s
            )
            losses.append(self.train_step(next(batches), factor, reads=reads))
            threads.update()
            if reads:
                self.grow(losses[-1][0])
            now = time.monotonic()
            self.spent_s += now - started
            if self.step % LOG_EVERY_STEPS == 0:
                loss, naming = np.mean(losses, axis=0).round(4).tolist()
                self.write(loss=loss, naming=naming, factor=round(factor, 3))
                losses.clear()
            if now - saved_s > CHECKPOINT_EVERY_S or self.spent_s >= budget_s:
                self.save()
                saved_s = now
            if now - seen_s > DEV_EVERY_S and self.average < 1:
                self.write(dev_cer=round(self.dev_error(), 4))
                self.model.train()
                seen_s = time.monotonic()


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--size", choices=sorted(SIZES), default="pages")
    parser.add_argument("--minutes", type=float, default=90.0, help="training time, all runs")
    parser.add_argument("--naming-minutes", type=float, default=6.0, help="of these, tower alone")
    parser.add_argument("--grow-below", type=float, default=0.4, help="nats per character")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--num-threads", type=int, default=2)
    Trainer(parser.parse_args()).run()


if __name__ == "__main__":
    main()
