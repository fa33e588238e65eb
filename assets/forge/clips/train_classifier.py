"""Trains the classifier that judges clips: the object and the colour of a single picture.

    python -m mmspec.assets.forge.clips.train_classifier --work-dir build/clips

It sees drawn clips only, blurred and noised a little, and nothing that a model has made.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from mmspec.assets.clips.prompts import COLOURS, OBJECTS, all_scenes
from mmspec.assets.clips.scoring import Classifier, classes, trajectories

from .simulator import Simulator


def roughened(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures as an autoencoder might leave them: softer, and with a little noise."""
    softness = torch.rand(len(pictures), 1, 1, 1, generator=generator)
    soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = 0.04 * torch.rand(len(pictures), 1, 1, 1, generator=generator)
    mixed = pictures.lerp(soft, softness) + noise * torch.randn(pictures.shape, generator=generator)
    return mixed.clamp(0, 1)


def main() -> None:
    """Trains for the given time, writes `classifier.safetensors` and what it reaches."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.0)
    args = parser.parse_args()
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(3)
    simulator, scenes = Simulator(), all_scenes()
    objects = torch.tensor([list(OBJECTS).index(scene.object) for scene in scenes])
    colours = torch.tensor([list(COLOURS).index(scene.colour) for scene in scenes])
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    started = time.monotonic()
    while (spent := time.monotonic() - started) < 60 * args.minutes:
        chosen = torch.randint(len(scenes), (64,), generator=generator)
        clips = simulator.draw([scenes[number] for number in chosen], generator)
        pictures = roughened(clips[:, ::8].flatten(0, 1), generator)
        seen, painted = model(pictures)
        repeats = len(pictures) // len(chosen)
        loss = F.cross_entropy(seen, objects[chosen].repeat_interleave(repeats))
        loss = loss + F.cross_entropy(painted, colours[chosen].repeat_interleave(repeats))
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - spent / (60 * args.minutes)) + 1e-6
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    weights = {name: value.half() for name, value in model.state_dict().items()}
    save_file(weights, args.work_dir / "classifier.safetensors")
    fresh = Simulator(split="t10k").draw(scenes, torch.Generator().manual_seed(4))
    model.eval()
    reached = {
        "class": classes(fresh, scenes, model).mean().item(),
        "trajectory": trajectories(fresh, scenes).mean().item(),
    }
    (args.work_dir / "classifier.json").write_text(json.dumps(reached))
    print(reached)


if __name__ == "__main__":
    main()
