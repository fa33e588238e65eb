"""Calls about pictures that were seen before, and how often a tower runs for them."""

import copy
from typing import Any

import torch

from mmspec.pipelines import SpeculativeVLMPipeline
from mmspec.pipelines.writing import WrittenOutput

#: Pictures of each call: one and three, new ones, known ones, and both; one of them twice.
CALLS = [[0], [0], [1, 0, 1], [2, 1, 0]]
#: Of these, those that no earlier call had.
NUM_NEW = [1, 0, 1, 1]
#: Where each class keeps what sees.
TOWERS = ("vision_tower", "vision_model", "visual", "encoder")


class TowerRuns:
    """Counts how often a model's tower runs."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        base = model.base_model
        name = next(name for name in TOWERS if hasattr(base, name))
        getattr(base, name).register_forward_pre_hook(self._run)

    def _run(self, module: Any, args: Any) -> None:
        self.count += 1


def another(model: Any) -> Any:
    """A drafter of the same family with a tower of its own; some of its drafts are right."""
    drafter = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in drafter.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.03 * noise)
    return drafter


def make_fresh(pipe: SpeculativeVLMPipeline) -> SpeculativeVLMPipeline:
    """The same models, and nothing kept."""
    fresh = SpeculativeVLMPipeline.from_model(
        pipe.model, pipe.processor, schedule="fixed", image_cache=0
    )
    fresh.set_progress_bar_config(disable=True)
    return fresh


def figures_of(out: WrittenOutput) -> list[tuple[int, int, int]]:
    """What a draft that differs in one token would change, by row."""
    return [(row.num_drafted, row.num_accepted, row.num_target_forwards) for row in out.row_stats]
