"""Trains the target of the clips: velocities by flow matching, longer steps by self-consistency.

    python -m mmspec.assets.forge.clips.train_target --work-dir build/clips --minutes 67

A second call goes on where the first was stopped.

Noised is ``(1 - t) clip + t noise``. For two thirds of the steps the end of the interval is its
beginning, and the model learns the velocity ``noise - clip`` (flow matching, Lipman et al. 2023,
arXiv:2210.02747). For the others it learns that one step from t to r does what two steps over the
middle do (shortcut models, Frans et al. 2024, arXiv:2410.12557), where the two steps are those of
a running average of the weights. Clean blocks get a little noise that the model is not told of:
in generation they are what the model itself has made.
"""

import torch
from torch import Tensor

from .model import Trainable
from .training import parse_arguments, train

#: Noise on clean blocks at most.
CONTEXT_NOISE = 0.15


def training_loss(
    model: Trainable, average: Trainable, clean: Tensor, text: Tensor, step: int
) -> tuple[str, Tensor]:
    """The loss of one batch: "velocity", or from step 500 on each third "map", for longer steps."""
    is_map = step >= 500 and step % 3 == 0
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
    error = model(noised, context, time, end, text).float() - wanted
    return "map" if is_map else "velocity", error.square().mean()


if __name__ == "__main__":
    arguments = parse_arguments(__doc__.splitlines()[0], 67.0, 2e-3)
    train("target", arguments, training_loss, seed=5, cooldown=0.3)
