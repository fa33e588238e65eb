"""Trains a model of the clips: velocities by flow matching, longer steps by self-consistency.

    python -m mmspec.assets.forge.clips.train target --work-dir build/clips --minutes 60
    python -m mmspec.assets.forge.clips.train drafter --work-dir build/clips --minutes 40

A second call goes on where the first was stopped.

Noised is ``(1 - t) clip + t noise``. For half of the steps the end of the interval is its
beginning, and the model learns the velocity ``noise - clip`` (flow matching, Lipman et al. 2023,
arXiv:2210.02747). For the others it learns that one step from t to r does what two steps over the
middle do (shortcut models, Frans et al. 2024, arXiv:2410.12557), where the two steps are those of
a running average of the weights. Clean blocks get a little noise that the model is not told of:
in generation they are what the model itself has made.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .model import Trainable, encode_prompts
from .simulator import split_scenes

#: Share of prompts that are left empty; noise on clean blocks at most; memory of the average.
EMPTY_SHARE, CONTEXT_NOISE, AVERAGE = 0.08, 0.15, 0.999


def load_latents(folder: Path) -> tuple[Tensor, Tensor]:
    """Latents ``[N, blocks, C, H, W]`` of the shards that exist, and the scene of each."""
    shards = [torch.load(path) for path in sorted(folder.glob("*.pt"))]
    scenes = torch.arange(len(shards[0])).repeat(len(shards))
    return torch.cat(shards), scenes


def training_loss(
    model: Trainable, average: Trainable, clean: Tensor, text: Tensor, is_map: bool
) -> Tensor:
    """The loss of one batch; ``is_map`` asks for longer steps."""
    noise = torch.randn_like(clean)
    time = torch.rand(clean.shape[:2]).clamp(min=1e-3)
    wide = time[..., None, None, None]
    noised = (1 - wide) * clean + wide * noise
    context_noise = CONTEXT_NOISE * torch.rand(len(clean), 1, 1, 1, 1) * torch.randn_like(clean)
    context = clean + context_noise
    if not is_map:
        wanted, end = noise - clean, time
    else:
        end = time * torch.rand_like(time)
        middle = (time + end) / 2
        with torch.no_grad():
            first = average(noised, context, time, middle, text).float()
            halfway = noised - (time - middle)[..., None, None, None] * first
            second = average(halfway, context, middle, end, text).float()
        wanted = (first + second) / 2
    return (model(noised, context, time, end, text).float() - wanted).square().mean()


def main() -> None:
    """Trains for the given time and writes `target.pt` or `drafter.pt`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=("target", "drafter"))
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    torch.manual_seed(5)
    model = Trainable(args.size)
    average = Trainable(args.size).requires_grad_(False)
    average.load_state_dict(model.state_dict())
    optimizers = make_optimizers(model, args.lr)
    state: dict[str, Any] = {"step": 0, "time_s": 0.0}
    path = args.work_dir / f"{args.size}.pt"
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.manual_seed(5 + state["step"])
    with (args.work_dir / f"{args.size}.jsonl").open("a") as log:
        run(args, model, average, optimizers, state, log)


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


def run(
    args: Any,
    model: Trainable,
    average: Trainable,
    optimizers: Any,
    state: dict[str, Any],
    log: Any,
) -> None:
    """The steps of training."""
    # The last one is the empty prompt.
    embeds = encode_prompts([*(scene.prompt for scene in split_scenes()[0]), ""])
    latents, scenes = load_latents(args.work_dir / "latents")
    step, before, started = state["step"], state["time_s"], time.monotonic()
    losses: dict[bool, list[float]] = {False: [], True: []}
    while (spent := before + time.monotonic() - started) < 60 * args.minutes:
        chosen = torch.randint(len(latents), (args.batch_size,))
        is_empty = torch.rand(args.batch_size) < EMPTY_SHARE
        text = embeds[torch.where(is_empty, len(embeds) - 1, scenes[chosen])]
        is_map = step >= 500 and step % 3 == 0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = training_loss(model, average, latents[chosen].float(), text, is_map)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        progress = spent / (60 * args.minutes)
        rate = args.lr * min(1.0, (step + 1) / 100) * min(1.0, (1 - progress) / 0.3 + 0.02)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        follow(average, model, step)
        losses[is_map].append(loss.item())
        if step % 100 == 0:
            row = {"step": step, "time_s": round(spent), "lr": round(rate, 6)}
            row |= {
                name: round(sum(kind) / len(kind), 5)
                for name, kind in zip(("velocity", "map"), losses.values(), strict=True)
                if kind
            }
            losses = {False: [], True: []}
            log.write(json.dumps(row) + "\n")
            log.flush()
        if step % 200 == 0:
            save(args, model, average, optimizers, step, spent)
            latents, scenes = load_latents(args.work_dir / "latents")
    save(args, model, average, optimizers, step, 60 * args.minutes)


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, step: int) -> None:
    """Moves the running average; a short memory at first."""
    memory = min(AVERAGE, (1 + step) / (10 + step))
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - memory)


def save(
    args: Any, model: Trainable, average: Trainable, optimizers: Any, step: int, time_s: float
) -> None:
    """Writes a checkpoint that a second call goes on from."""
    path = args.work_dir / f"{args.size}.pt"
    state = {"model": model.state_dict(), "average": average.state_dict()}
    state |= {"optimizers": [one.state_dict() for one in optimizers]}
    state |= {"step": step, "time_s": time_s}
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


if __name__ == "__main__":
    main()
