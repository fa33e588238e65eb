"""The recipe of the held-out captions gives the bundled files, whose combinations are held out."""

import json

import pytest

from mmspec.assets import bundled_path

captions = pytest.importorskip("mmspec.assets.forge.avatars.captions")


def test_the_bundled_captions_are_those_of_the_recipe():
    sets = captions.draw_sets()
    assert list(sets) == ["heldout", "heldout_fresh"]
    for name, text in sets.items():
        assert (bundled_path("avatars") / f"{name}.jsonl").read_text() == text


def test_every_caption_is_of_a_held_out_combination_and_in_one_set_only():
    triples = captions.avatar.heldout_triples(captions.SEED)
    rows = [
        json.loads(line) for text in captions.draw_sets().values() for line in text.splitlines()
    ]
    assert len({row["caption"] for row in rows}) == len(rows) == 400
    for row in rows:
        assert captions.avatar.is_heldout(row["attributes"], triples)
