"""Images and videos item by item: what the towers make of the batch, at the same places."""

import pytest
import torch
import transformers
from vlm import FAMILIES, IMAGE, TOWER, llama, request, tiny_vlm

from mmspec.adapters.image_features import FeatureCache, Features, encode, split
from mmspec.adapters.vision_language import placeholder_tokens, prepare
from mmspec.adapters.visual_prompts import VisualPrompts

ROWS = [[1, (2, 3), 3], [5, (2, 2), 6, (3, 2), 7], [9, 8]]
FILMS = [[1, (2, 2, 1), 3], [5, (2, 1, 2), 7], [9, 8]]
CASES = [(name, "image", ROWS) for name in FAMILIES] + [
    (name, "video", FILMS) for name, family in FAMILIES.items() if family.films is not None
]


def prompts_of(inputs):
    pairs = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


@pytest.mark.parametrize(("name", "modality", "rows"), CASES)
def test_items_make_up_the_batch(name, modality, rows):
    model, inputs = tiny_vlm(name), request(name, rows)
    with torch.no_grad():
        output = prepare(model, inputs)["mm_encoder_outputs"][modality]
        items = split(model, inputs, placeholder_tokens(model, [modality]))
        own = encode(model, items, FeatureCache(0))[modality]
    whole = Features.of(output)
    assert (own.kind, own.is_stacked) == (whole.kind, whole.is_stacked)
    torch.testing.assert_close(own.rows_RD, whole.rows_RD, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(own.deepstack or (), whole.deepstack or (), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert len({item.digest for item in items}) == len(items) == 3 - (modality == "video")


def test_items_of_other_sizes_in_one_batch():
    """A Pixtral tower pads images to the largest and is told their sizes."""
    config = transformers.LlavaConfig(
        text_config=llama(),
        vision_config=transformers.PixtralVisionConfig(**(TOWER | {"head_dim": 8})),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = transformers.LlavaForConditionalGeneration(config).double().eval()
    ids = torch.tensor([[1, *[IMAGE] * 4, 2, *[IMAGE] * 2, 3]])
    pixels = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "image_sizes": torch.tensor([[8, 8], [4, 8]]),
    }
    with torch.no_grad():
        whole = Features.of(prepare(model, inputs)["mm_encoder_outputs"]["image"])
        items = split(model, inputs, {"image": IMAGE})
        own = encode(model, items, FeatureCache(0))["image"]
    assert [item.num_tokens for item in items] == [4, 2]
    torch.testing.assert_close(own.rows_RD, whole.rows_RD, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "smolvlm"])
def test_an_image_is_known_in_other_company(name):
    model = tiny_vlm(name)
    alone = split(model, request(name, ROWS[:1]), {"image": IMAGE})
    beside = split(model, request(name, ROWS), {"image": IMAGE})
    assert alone[0].digest == beside[0].digest
    assert alone[0].digest != beside[1].digest


def test_images_stand_where_their_tokens_are():
    model, inputs = tiny_vlm("qwen2_vl"), request("qwen2_vl", ROWS)
    prompts = prompts_of(inputs)
    seen = VisualPrompts.of(model, inputs, prompts)
    spans = [[(place.first, place.end) for place in row] for row in seen.places]
    assert spans == [[(2, 8)], [(2, 6), (9, 15)], []]
    for row, prompt in enumerate(prompts):
        for place, token in enumerate(prompt):
            assert (seen.contents[row][place] == token) == (token != IMAGE)
    # No beginning ends within an image.
    assert seen.sound(model, [7, 9, 1]) == [2, 9, 1]
    assert seen.sound(model, [8, 12, 0]) == [8, 9, 0]


def test_images_that_do_not_fill_their_places_are_refused():
    model, inputs = tiny_vlm("qwen2_vl"), request("qwen2_vl", ROWS)
    inputs["input_ids"][inputs["input_ids"] == 7] = IMAGE
    with pytest.raises(ValueError, match="17 image tokens, and the images given fill 16"):
        VisualPrompts.of(model, inputs, prompts_of(inputs))


def cast_and_back(model):
    model.float().double()


def replaced(model):
    state = {name: value * 1.01 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def changed_in_place(model):
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)


@pytest.mark.parametrize("change", [cast_and_back, replaced, changed_in_place])
def test_features_of_other_weights_are_not_found(change):
    model, cache = tiny_vlm("llava"), FeatureCache()
    items = split(model, request("llava", [[1, (2, 2), 3]]), {"image": IMAGE})
    with torch.no_grad():
        for num_changes in range(3):
            for _ in range(2):
                own = cache.features(model, items)[0].rows_RD
                fresh = FeatureCache(0).features(model, items)[0].rows_RD
                assert torch.equal(own, fresh)
            assert (cache.num_misses, cache.num_hits) == (num_changes + 1, num_changes + 1)
            change(model)
