"""What the pictures show is counted right, and the captions are those that nobody looked at."""

from types import SimpleNamespace

import pytest
import torch

from mmspec.assets import bundled_names
from mmspec.bench.image_setups import judge_of, load_captions
from mmspec.bench.quality import quality_sections, score, summarise_quality

FACTS = {"model": "avatars", "dtype": "float32", "temperature": 1.0, "guidance": 3.0, "batch": 2}

pytestmark = pytest.mark.skipif(
    "avatars" not in bundled_names(), reason="the captions come with the avatars"
)


def test_the_fresh_captions_are_others_of_the_same_kind():
    seen, fresh = load_captions(999), load_captions(999, is_fresh=True)
    captions = {entry["caption"] for entry in fresh}
    assert len(captions) == len(fresh) == len(seen) == 200
    assert not captions & {entry["caption"] for entry in seen}
    for entry in fresh:
        assert {"hair_color", "clothing_color", "glasses"} <= set(entry["attributes"])
    assert load_captions(3, is_fresh=True) == fresh[:3]


def test_attributes_are_counted_over_calls_of_any_size():
    # Blank pictures: nothing is there, so what a caption denies is right.
    model = SimpleNamespace(
        device="cpu", decode_image_tokens=lambda tokens: torch.ones(len(tokens), 16, 16, 3)
    )
    stated = [{"hat": "none", "glasses": "none"}, {"hat": "hat"}, {"glasses": "none"}]
    samples = []
    for part in (stated[:2], stated[2:]):
        sample = {**FACTS, "system": "exact", "guarantee": "exact", "num_images": len(part)}
        sample["tokens"] = torch.zeros(len(part), 256, dtype=torch.long)
        score(judge_of("avatars"), model, [sample], part)
        samples.append(sample)
    [row] = summarise_quality(samples)
    assert row["by_attribute"] == {"glasses": 1.0, "hat": 0.5}
    assert row["num_by_attribute"] == {"glasses": 2, "hat": 2}
    assert (row["accuracy"], row["all_right"]) == (0.75, pytest.approx(2 / 3))
    assert (row["num_images"], row["num_attributes"]) == (3, 4)
    sections = dict(quality_sections([row]))
    assert "75.0 %" in sections["Quality on fresh held-out captions"]
    [attributes] = [text for title, text in sections.items() if "attribute" in title]
    assert "glasses" in attributes
    assert "50.0 %" in attributes
    assert quality_sections([]) == []


def test_a_model_without_scoring_has_no_judge():
    assert judge_of("tiny-image") is None
    assert judge_of("bundled:avatars") is judge_of("avatars") is not None


def test_pictures_that_nothing_was_read_off_have_no_figures():
    [row] = summarise_quality([{**FACTS, "system": "x", "guarantee": "exact", "num_images": 2}])
    assert row["accuracy"] is row["all_right"] is None
    assert len(quality_sections([row])) == 1
