"""Trains the target of the clips: velocities by flow matching, longer steps by self-consistency.

    python -m mmspec.assets.forge.clips.train_target --work-dir build/clips --minutes 67
    python -m mmspec.assets.forge.clips.train_target --work-dir build/clips --own-past --minutes 35

A second call goes on where the first was stopped.

Noised is ``(1 - t) clip + t noise``. For two thirds of the steps the end of the interval is its
beginning, and the model learns the velocity ``noise - clip`` (flow matching, Lipman et al. 2023,
arXiv:2210.02747). For the others it learns that one step from t to r does what two steps over the
middle do (shortcut models, Frans et al. 2024, arXiv:2410.12557), where the two steps are those of
a running average of the weights. Clean blocks get a little noise that the model is not told of:
in generation they are what the model itself has made. With ``--own-past`` they are that in the
training too (`training.own_past`), from where the first training ended, and go to `target-own.pt`.
"""

import argparse
import functools

import torch
from torch import Tensor

from .model import Trainable
from .training import own_past, parse_arguments, train

#: Noise on clean blocks at most; rounds of own past are fewer than this; its share of the blocks.
CONTEXT_NOISE, ROUNDS, OWN_SHARE = 0.15, 5, 0.9


def training_loss(
    model: Trainable,
    average: Trainable,
    clean: Tensor,
    text: Tensor,
    step: int,
    *,
    rounds: int,
) -> tuple[str, Tensor]:
    """The loss of one batch: "velocity", or from step 500 on each third "map", for longer steps."""
    is_map = step >= 500 and step % 3 == 0
    noise = torch.randn_like(clean)
    time = torch.rand(clean.shape[:2]).clamp(min=1e-3)
    wide = time[..., None, None, None]
    noised = (1 - wide) * clean + wide * noise
    context = own_past(average, clean, text, rounds=rounds, share=OWN_SHARE, noise=CONTEXT_NOISE)
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
    error = model(noised, context, time, end, text).float() - wanted
    return "map" if is_map else "velocity", error.square().mean()


def main() -> None:
    """Trains for the given time and writes `target.pt` or `target-own.pt`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--own-past", action="store_true")
    args = parse_arguments(parser, 67.0, 2e-3)
    loss = functools.partial(training_loss, rounds=ROUNDS if args.own_past else 1)
    if not args.own_past:
        train("target", args, loss, seed=5, cooldown=0.3)
        return
    trained = torch.load(args.work_dir / "target.pt")["average"]

    def start(model: Trainable) -> None:
        model.load_state_dict(trained)

    train("target", args, loss, seed=7, cooldown=0.5, start=start, name="target-own")


if __name__ == "__main__":
    main()
