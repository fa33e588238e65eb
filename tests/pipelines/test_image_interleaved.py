"""A request that begins and ends in the middle of another, on the same pipeline or model."""

import pytest
import torch
from emu3 import BOI, BOS, WRAPPER, tiny_emu3, tiny_processor
from glm import START, glm_model, glm_processor
from saved import save_janus
from transformers.generation.streamers import BaseStreamer

import mmspec
from mmspec.pipelines import SpeculativeImagePipeline

#: The first request of a family and the second, of another batch and, where there are any, size.
REQUESTS = {
    "janus": ({"prompt": ["a red hair", "a pixel avatar"]}, {"prompt": "glasses"}),
    "emu3": (
        {"prompt": ["a red hair", "blue"], "height": 24, "width": 32, "negative_prompt": "lowres"},
        {"prompt": "a pixel avatar with glasses", "height": 16, "width": 40},
    ),
    "glm": (
        {"prompt": ["a cat", "a red dog hat"], "height": 64, "width": 96},
        {"prompt": "a blue dog", "height": 32, "width": 64},
    ),
}


def loaded(family, folder):
    if family == "janus":
        return SpeculativeImagePipeline.from_pretrained(save_janus(folder), dtype=torch.float64)
    make, processor = {
        "emu3": (tiny_emu3, tiny_processor), "glm": (glm_model, glm_processor)
    }[family]  # fmt: skip
    return SpeculativeImagePipeline.from_model(make(), processor())


@pytest.mark.parametrize(
    ("family", "window"), [("janus", 8), ("janus", None), ("emu3", 8), ("glm", 16)]
)
def test_a_call_in_the_callback_of_another_changes_neither(family, window, tmp_path):
    pipe = loaded(family, tmp_path)
    pipe.set_progress_bar_config(disable=True)
    first, second = REQUESTS[family]

    def tokens(request, *seeds, **options):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shared = {"generator": generators, "window": window, "output_type": "tokens"}
        return pipe(**request, **shared, **options).tokens

    def another(pipeline, step, details):
        if step == 3:
            inner.append(tokens(second, 7))

    inner = []
    alone = tokens(first, 1, 2), tokens(second, 7)
    assert torch.equal(tokens(first, 1, 2, callback_on_step_end=another), alone[0])
    assert torch.equal(inner[0], alone[1])


class Interrupted(BaseStreamer):
    """Runs something else when the third piece of a text comes."""

    def __init__(self, run) -> None:
        self.num_pieces, self.run = 0, run

    def put(self, value) -> None:
        self.num_pieces += 1
        if self.num_pieces == 3:
            self.run()

    def end(self) -> None:
        pass


def requests_of_generate(family):
    """A model, and the inputs of its `generate` for one image and for two of another size."""
    if family == "emu3":
        model, grids = tiny_emu3(), None
        prompts = [[[BOS, 12, BOI, WRAPPER]], [[BOS, 14, BOI, WRAPPER], [BOS, 11, BOI, WRAPPER]]]
    else:
        model, grids = glm_model(), [[[1, 4, 3], [1, 3, 2]], [[1, 2, 5], [1, 2, 3]]]
        prompts = [[[49, 50, START]], [[49, 52, START], [40, 33, START]]]
    requests = []
    for index, ids in enumerate(map(torch.tensor, prompts)):
        request = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 17}
        if grids is not None:
            request["image_grid_thw"] = torch.tensor(grids[index] * len(ids))
            request["images_per_sample"] = torch.tensor([2] * len(ids))
        requests.append(request)
    return model, *requests


@pytest.mark.parametrize("family", ["emu3", "glm"])
def test_generate_inside_generate_changes_neither(family):
    model, first, second = requests_of_generate(family)

    def tokens(request, drafter, **options):
        seeds = [torch.Generator().manual_seed(row) for row in range(len(request["input_ids"]))]
        fast = mmspec.speculate(drafter, width=7, schedule="fixed", generator=seeds)
        return model.generate(**request, do_sample=True, custom_generate=fast, **options)

    inner = []
    streamer = Interrupted(lambda: inner.append(tokens(second, "jacobi")))
    outer = tokens(first, "jacobi", streamer=streamer)
    assert torch.equal(outer, tokens(first, "none"))
    assert torch.equal(inner[0], tokens(second, "none"))
