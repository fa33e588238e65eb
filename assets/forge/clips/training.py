"""What the trainings of the two models share: data, optimizers, the loop, checkpoints."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .model import Trainable, encode_prompts
from .simulator import split_scenes

#: Share of prompts that are left empty; memory of the running average of the weights.
EMPTY_SHARE, AVERAGE = 0.08, 0.999

#: From model, average, clips ``[N, blocks, C, H, W]``, prompts ``[N, tokens, channels]`` and the
#: number of the step to the kind of loss and its value.
Loss = Callable[[Trainable, Trainable, Tensor, Tensor, int], tuple[str, Tensor]]


def parse_arguments(description: str, minutes: float, lr: float) -> argparse.Namespace:
    """The options of a training."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=lr)
    return parser.parse_args()


def train(
    size: str,
    args: argparse.Namespace,
    loss_of: Loss,
    *,
    seed: int,
    cooldown: float,
    start: Any = None,
) -> None:
    """Trains for the given time, or goes on where it was stopped, and writes ``SIZE.pt``.

    Args:
        size: "target" or "drafter".
        args: As `parse_arguments` gives them.
        loss_of: The loss of a batch.
        seed: Of weights, batches and noise.
        cooldown: Share of the time in which the rate of learning falls.
        start: Called with the model before the first step.
    """
    torch.manual_seed(seed)
    model, average = Trainable(size), Trainable(size).requires_grad_(False)
    optimizers = make_optimizers(model, args.lr)
    state: dict[str, Any] = {"step": 0, "time_s": 0.0}
    path = args.work_dir / f"{size}.pt"
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.manual_seed(seed + state["step"])
    elif start is not None:
        start(model)
    average.load_state_dict(state.get("average", model.state_dict()))
    with path.with_suffix(".jsonl").open("a") as log:
        run(path, args, loss_of, cooldown, (model, average, optimizers), state, log)


def make_optimizers(model: Trainable, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's layers, AdamW for the rest."""
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    matrices = {name for name, value in named.items() if ".blocks." in name and value.ndim == 2}
    rest = [value for name, value in named.items() if name not in matrices]
    return [
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
        torch.optim.Muon(
            [named[name] for name in sorted(matrices)],
            lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw",
        ),
    ]  # fmt: skip


def load_latents(folder: Path) -> tuple[Tensor, Tensor]:
    """Latents ``[N, blocks, C, H, W]`` of the shards that exist, and the scene of each."""
    shards = [torch.load(path) for path in sorted(folder.glob("*.pt"))]
    scenes = torch.arange(len(shards[0])).repeat(len(shards))
    return torch.cat(shards), scenes


def run(
    path: Path,
    args: Any,
    loss_of: Loss,
    cooldown: float,
    parts: Any,
    state: dict[str, Any],
    log: Any,
) -> None:
    """The steps of training."""
    model, average, optimizers = parts
    # The last one is the empty prompt.
    embeds = encode_prompts([*(scene.prompt for scene in split_scenes()[0]), ""])
    latents, scenes = load_latents(path.parent / "latents")
    step, before, started = state["step"], state["time_s"], time.monotonic()
    losses: dict[str, list[float]] = {}
    while (spent := before + time.monotonic() - started) < 60 * args.minutes:
        chosen = torch.randint(len(latents), (args.batch_size,))
        is_empty = torch.rand(args.batch_size) < EMPTY_SHARE
        text = embeds[torch.where(is_empty, len(embeds) - 1, scenes[chosen])]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            kind, loss = loss_of(model, average, latents[chosen].float(), text, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        progress = spent / (60 * args.minutes)
        rate = args.lr * min(1.0, (step + 1) / 100) * min(1.0, (1 - progress) / cooldown + 0.01)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        follow(average, model, step)
        losses.setdefault(kind, []).append(loss.item())
        if step % 100 == 0:
            row = {"step": step, "time_s": round(spent), "lr": round(rate, 6)}
            row |= {name: round(sum(some) / len(some), 5) for name, some in losses.items()}
            losses = {}
            log.write(json.dumps(row) + "\n")
            log.flush()
        if step % 200 == 0:
            save(path, parts, step, spent)
            latents, scenes = load_latents(path.parent / "latents")
    save(path, parts, step, 60 * args.minutes)


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, step: int) -> None:
    """Moves the running average; a short memory at first."""
    memory = min(AVERAGE, (1 + step) / (10 + step))
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - memory)


def save(path: Path, parts: Any, step: int, time_s: float) -> None:
    """Writes a checkpoint that a second call goes on from."""
    model, average, optimizers = parts
    state = {"model": model.state_dict(), "average": average.state_dict()}
    state |= {"optimizers": [one.state_dict() for one in optimizers]}
    state |= {"step": step, "time_s": time_s}
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)
