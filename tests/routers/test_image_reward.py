"""ImageReward: the port against the original network's arithmetic, under the original names."""

import math

import pytest
import torch
from blocks import noise_frames, scores_of, view
from image_reward import SIDE, WORDS, Original, official_state
from torch.nn import functional

from mmspec.routers import build_router
from mmspec.routers.image_reward import FILE, ImageReward, ImageRewardScorer


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder as a user would have it, with a tiny `ImageReward.pt`."""
    folder = tmp_path_factory.mktemp("image-reward")
    torch.save(official_state(), folder / FILE)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def test_the_port_is_the_original_network():
    generator = torch.Generator().manual_seed(1)
    state = official_state()
    model, original = ImageReward.from_official(state), Original(state)
    pixels = torch.randn(5, 3, SIDE, SIDE, generator=generator)
    ids = torch.tensor([[2, 5, 6, 7, 3, 0, 0, 0]])
    mask = (ids != 0).long()
    with torch.no_grad():
        batched = model(pixels, ids, mask)
        alone = torch.cat([model(one[None], ids, mask) for one in pixels])
    expected = torch.stack([original.reward(one[None], ids, mask) for one in pixels])
    assert (batched - expected).abs().max() < 1e-5
    assert (batched - alone).abs().max() < 1e-5
    # The pictures count, and so do the words behind padding's border.
    assert expected.std() > 0.01
    other = original.reward(pixels[:1], torch.tensor([[2, 5, 6, 8, 3, 0, 0, 0]]), mask)
    assert (other - expected[0]).abs() > 1e-3


def test_padding_changes_nothing():
    model = ImageReward.from_official(official_state())
    pixels, ids = torch.randn(2, 3, SIDE, SIDE), torch.tensor([[2, 5, 6, 7, 3]])
    padded = functional.pad(ids, (0, 30))
    with torch.no_grad():
        short = model(pixels, ids, torch.ones_like(ids))
        long = model(pixels, padded, (padded != 0).long())
    assert torch.allclose(short, long, atol=1e-5)


def test_the_router_scores_pictures_with_the_prompt(weights):
    scorer = ImageRewardScorer(weights, batch_size=2)
    frames = noise_frames(3, SIDE, SIDE)
    found = scores_of(scorer, view(frames, prompt="A red cat"))
    original = Original(official_state())
    ids = torch.tensor([[2, 5, 6, 7, 3] + [0] * 30])
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    expected = [
        original.reward(((frames[k] - mean) / std)[None], ids, (ids != 0).long()) for k in (0, 2, 1)
    ]
    assert (found - torch.stack(expected)).abs().max() < 1e-5
    assert not torch.allclose(found, scores_of(scorer, view(frames, prompt="the dog")))


def test_a_long_prompt_ends_at_35_tokens(weights):
    scorer = ImageRewardScorer(weights)
    text = scorer._tokenizer("cat " * 50, padding="max_length", truncation=True, max_length=35)
    assert len(text.input_ids) == 35
    assert scorer._tokenizer("[DEC] [ENC]").input_ids[1:3] == [len(WORDS), len(WORDS) + 1]
    frames = noise_frames(1, SIDE, SIDE)
    first, other = (
        scores_of(scorer, view(frames, prompt="cat " * 33 + end)) for end in ("", "dog")
    )
    assert torch.equal(first, other)


def test_by_name_with_a_threshold(weights):
    router = build_router(f"first-block+image-reward:-0.7,weights={weights}")
    assert router.needs_prompt
    judged = router.judge(view(noise_frames(4, SIDE, 30)))
    assert math.isfinite(judged.score)
    assert judged.keep == (judged.score >= -0.7)


def test_missing_or_other_weights_are_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    with pytest.raises(ValueError, match="'image-reward' has no weights; weights must be a folder"):
        ImageRewardScorer(tmp_path)
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="'image-reward' has no weights"):
        ImageRewardScorer(tmp_path)
    torch.save([1], tmp_path / FILE)
    with pytest.raises(ValueError, match="must be tensors by name, got 'list'"):
        ImageRewardScorer(tmp_path)
    with pytest.raises(ValueError, match="'image-reward' has no tokenizer"):
        build_router("image-reward:-0.7")


def test_a_tokenizer_of_other_words_is_refused(tmp_path):
    torch.save(official_state(), tmp_path / FILE)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS[:-1]))
    with pytest.raises(ValueError, match=r"must be the 14 of ImageReward\.pt, got 13"):
        ImageRewardScorer(tmp_path)


@pytest.mark.parametrize("change", ["missing", "more", "shape", "head"])
def test_a_file_of_other_weights_is_refused(change):
    state = official_state()
    if change == "missing":
        del state["blip.visual_encoder.blocks.1.norm2.bias"]
    elif change == "more":
        state["blip.visual_encoder.blocks.1.norm3.bias"] = torch.zeros(3)
    elif change == "shape":
        state["blip.visual_encoder.norm.bias"] = torch.zeros(3)
    else:
        state = {name: value for name, value in state.items() if not name.startswith("mlp")}
    with pytest.raises(ValueError, match=r"the weights are not those of ImageReward\.pt"):
        ImageReward.from_official(state)
