"""Trains the drafter of the clips to go on with a clip in one or two steps.

    python -m mmspec.assets.forge.clips.train_drafter --work-dir build/clips --minutes 30

A second call goes on where the first was stopped. It begins with the first and the last layer of
the trained target, and everything around them.

Behind its first block a clip is nearly determined by what came before and by the prompt. So the
drafter learns to go from noise straight to the next block: its velocity is compared with
``noise - clip`` where it starts at pure noise, or halfway on its own line. What it reads of the
past is what it has made itself, some blocks back, and what it should come to is the drawn clip:
errors do not add up (`own_past`; scheduled sampling, Bengio et al. 2015,
arXiv:1506.03099; for video, self forcing, Huang et al. 2025, arXiv:2506.08009, there with a loss
on laws instead of on a clip).
"""

import torch
from torch import Tensor

from .model import Trainable
from .training import parse_arguments, train

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


@torch.no_grad()
def own_past(model: Trainable, clean: Tensor, text: Tensor) -> Tensor:
    """What the model may find behind itself: clips, of which some blocks are its own.

    All blocks are made at once, in one step each, and again from those. What is its own after k
    rounds has k blocks of its own behind it, as far as there are so many. The first block, and a
    tenth of the others, stay as they are drawn: they stand for blocks of the target.

    Args:
        model: The drafter.
        clean: Drawn clips, ``[N, blocks, C, H, W]``.
        text: Prompts, ``[N, tokens, channels]``.
    """
    past = clean + CONTEXT_NOISE * torch.rand(len(clean), 1, 1, 1, 1) * torch.randn_like(clean)
    is_own = torch.rand(clean.shape[:2]) < OWN_SHARE
    is_own[:, 0] = False
    start, ones = torch.randn_like(clean), torch.ones(clean.shape[:2])
    for _ in range(int(torch.randint(ROUNDS, ()))):
        made = start - model(start, past, ones, 0 * ones, text).float()
        past = torch.where(is_own[..., None, None, None], made, past)
    return past


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
    past = own_past(model, clean, text)
    noise = torch.randn_like(clean)
    has_half = bool(torch.rand(()) < HALF_SHARE)
    made = drafted(model, noise, past, text, has_half)
    error = (made - clean).square().mean((2, 3, 4))
    loss = error[:, 1:].mean() + FIRST_WEIGHT * error[:, 0].mean()
    return "two steps" if has_half else "one step", loss


def main() -> None:
    """Trains for the given time and writes `drafter.pt`."""
    args = parse_arguments(__doc__.splitlines()[0], 30.0, 1.5e-3)
    target = torch.load(args.work_dir / "target.pt")["average"]

    def start(model: Trainable) -> None:
        start_from_target(model, target)

    train("drafter", args, training_loss, seed=6, cooldown=0.4, start=start)


if __name__ == "__main__":
    main()
