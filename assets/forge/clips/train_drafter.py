"""Trains the drafter of the clips to go on with a clip in one or two steps.

    python -m mmspec.assets.forge.clips.train_drafter --work-dir build/clips --minutes 30

A second call goes on where the first was stopped. It begins with the first and the last layer of
the trained target, and everything around them.

Behind its first block a clip is nearly determined by what came before and by the prompt. So the
drafter learns to go from noise straight to the next block: its velocity is compared with
``noise - clip`` where it starts at pure noise, or halfway on its own line. What it reads of the
past is what it has made itself, some blocks back, and what it should come to is the drawn clip:
errors do not add up (`training.own_past`; scheduled sampling, Bengio et al. 2015,
arXiv:1506.03099; for video, self forcing, Huang et al. 2025, arXiv:2506.08009, there with a loss
on laws instead of on a clip).
"""

import argparse

import torch
from torch import Tensor

from .model import Trainable
from .training import own_past, parse_arguments, train

#: Layers of the target that the drafter starts from.
LAYERS = (0, 3)
#: Rounds of own past are fewer than this; noise on the past at most.
ROUNDS, CONTEXT_NOISE = 5, 0.2
#: Share of losses behind half a step; share of own blocks in the past.
HALF_SHARE, OWN_SHARE = 0.35, 0.9
#: Weight of the first block, which nothing determines: only so that it is not forgotten.
FIRST_WEIGHT = 0.05


def start_from_target(model: Trainable, state: dict[str, Tensor]) -> None:
    """Copies the target's weights, of its layers those of `LAYERS`."""
    kept = {}
    for name, value in state.items():
        head, middle, tail = name.partition(".blocks.")
        if not middle:
            kept[name] = value
            continue
        number, _, rest = tail.partition(".")
        if int(number) in LAYERS:
            kept[f"{head}.blocks.{LAYERS.index(int(number))}.{rest}"] = value
    model.load_state_dict(kept)


def drafted(model: Trainable, noise: Tensor, past: Tensor, text: Tensor, has_half: bool) -> Tensor:
    """Where the model goes from noise, ``[N, blocks, C, H, W]``; over the middle if asked."""
    ones = torch.ones(noise.shape[:2])
    if not has_half:
        return noise - model(noise, past, ones, 0 * ones, text).float()
    with torch.no_grad():
        halfway = noise - 0.5 * model(noise, past, ones, ones / 2, text).float()
    return halfway - 0.5 * model(halfway, past, ones / 2, 0 * ones, text).float()


def training_loss(
    model: Trainable, average: Trainable, clean: Tensor, text: Tensor, step: int
) -> tuple[str, Tensor]:
    """Mean square error of blocks made from noise and from a past that is partly the model's."""
    past = own_past(model, clean, text, rounds=ROUNDS, share=OWN_SHARE, noise=CONTEXT_NOISE)
    noise = torch.randn_like(clean)
    has_half = bool(torch.rand(()) < HALF_SHARE)
    made = drafted(model, noise, past, text, has_half)
    error = (made - clean).square().mean((2, 3, 4))
    loss = error[:, 1:].mean() + FIRST_WEIGHT * error[:, 0].mean()
    return "two steps" if has_half else "one step", loss


def main() -> None:
    """Trains for the given time and writes `drafter.pt`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args = parse_arguments(parser, 30.0, 1.5e-3)
    target = torch.load(args.work_dir / "target.pt")["average"]

    def start(model: Trainable) -> None:
        start_from_target(model, target)

    train("drafter", args, training_loss, seed=6, cooldown=0.4, start=start)


if __name__ == "__main__":
    main()
