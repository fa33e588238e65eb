"""Trains the captioner on the avatars that `mmspec.assets.forge.avatars.make_data` drew.

    python -m mmspec.assets.forge.captioner.train --data build/avatars --work-dir build/captioner

Combinations that were held out from the avatars' training are held out here, too.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmspec.assets.forge.avatars.train import load_data
from mmspec.assets.forge.pages.model import END_ID, answer_logits, make_model, see
from mmspec.assets.forge.pages.train import learning_rate_factor, make_optimizers

from .captions import full_caption
from .model import INSTRUCTION, SIZE, make_tokenizer


def load_pairs(data: Path) -> tuple[Tensor, Tensor]:
    """The training avatars: pictures as bytes (N, 3, 16, 16), and tokens of their captions.

    Captions have one length less where an avatar has no hat; those are padded with END.
    """
    arrays, train, _ = load_data(data)
    pictures = arrays["palette"][arrays["train"]].reshape(-1, SIZE.side, SIZE.side, 3)
    tokenizer = make_tokenizer()
    rows = tokenizer([full_caption(one) for one in train])["input_ids"]
    longest = max(map(len, rows))
    text = torch.tensor([row + [END_ID] * (longest + 1 - len(row)) for row in rows])
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))), text


def main() -> None:
    """Trains for the given time and writes `captioner.pt`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=20)
    args = parser.parse_args()
    pictures, text = load_pairs(args.data)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    prompt = torch.tensor([[*tokenizer(INSTRUCTION)["input_ids"], END_ID]])
    prompt = prompt.expand(args.batch_size, -1)
    model = make_model(SIZE, len(tokenizer))
    optimizers = make_optimizers(model, args.lr)
    started, step = time.monotonic(), 0
    with (args.work_dir / "captioner.jsonl").open("w") as log:
        while (spent := time.monotonic() - started) < 60 * args.minutes:
            factor = learning_rate_factor(step, spent / (60 * args.minutes))
            chosen = torch.randint(len(text), (args.batch_size,))
            rows = torch.cat([prompt, text[chosen]], dim=1)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = answer_logits(model, see(model, pictures[chosen]), rows, prompt.shape[1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), text[chosen].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = args.lr * factor
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % 50 == 0:
                row = {"step": step, "time_s": round(spent), "loss": round(loss.item(), 5)}
                log.write(json.dumps(row) + "\n")
                log.flush()
    torch.save({"model": model.state_dict(), "step": step}, args.work_dir / "captioner.pt")


if __name__ == "__main__":
    main()
