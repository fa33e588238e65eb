"""Drafters that are shown a part of the images: the same tokens, from the parts asked for."""

import copy

import pytest
import torch
from vlm import IMAGE, TEXT, request, tiny_vlm

import mmspec
from mmspec.drafters.mixed import MixedDrafter
from mmspec.drafters.model import ModelDrafter
from mmspec.drafters.own_cache import OwnCacheDrafter

#: One family of each kind: counted positions, tiles with row breaks, images by row, images that
#: see themselves, a prefix that does, three axes, three axes with features before several layers.
KINDS = [
    "llava",
    "llava_onevision",
    "smolvlm",
    "idefics3",
    "gemma3",
    "paligemma",
    "qwen2_5_vl",
    "qwen3_vl",
]
#: One image, two of other sizes, none; the longest in the middle.
ROWS = [
    [1, 2, (2, 3), 3, 4, 1, 2],
    [5, (2, 2), 6, (3, 2), 7, 8, 5, 6, 7],
    [9, 8, 7, 9, 8],
]
SHOWN = ["uniform:0.5", "attention:0.4", "reuse", "reuse+attention:0.4", "pool:2", "reuse+pool:2"]
NUM_NEW = 18


def decoded(model, inputs, custom_generate=None, **options):
    options = {"max_new_tokens": NUM_NEW, "do_sample": False} | options
    return model.generate(**inputs, **options, custom_generate=custom_generate)


def fixed(drafter, width=6, **options):
    return mmspec.speculate(drafter, width=width, schedule="fixed", **options)


def drafters(name, model):
    clone = copy.deepcopy(model)
    shown = [o for o in SHOWN if name != "llava_onevision" or "pool" not in o]
    mixed = {"name": "mixed", "model": clone}
    return [
        *({"name": "model", "model": clone, "visual_tokens": option} for option in shown),
        {"name": "model", "visual_tokens": "self"},
        {"name": "model", "visual_tokens": "self:0.5"},
        mixed,
        mixed | {"members": ["none", "uniform:0.3", "reuse+attention:0.2"], "memory": 0.5},
    ]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_greedy_equals_generate(name, num_rows):
    model = tiny_vlm(name)
    rows = ROWS[:num_rows]
    expected = decoded(model, request(name, rows))
    for drafter in drafters(name, model):
        fast = fixed(drafter)
        assert torch.equal(decoded(model, request(name, rows), fast), expected), drafter
        assert fast.stats.num_accepted > 0, drafter
