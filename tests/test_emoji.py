"""The bundled emoji model: it loads, decodes exactly, and its held-out names were held out."""

import json

import numpy as np
import pytest
import torch
from saved import JANUS

from mmspec.assets import bundled_path
from mmspec.pipelines.image import SpeculativeImagePipeline

FOLDER = bundled_path("emoji")


@pytest.fixture(scope="module")
def pipe():
    pipe = SpeculativeImagePipeline.from_pretrained("bundled:emoji")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def heldout_rows(file):
    return [json.loads(line) for line in (FOLDER / file).read_text().splitlines()]


@pytest.mark.supports("trained weights", JANUS)
def test_exact_draws_the_codes_of_sequential(pipe):
    caption = heldout_rows("heldout.jsonl")[0]["caption"]
    first, second = (
        pipe(
            caption,
            decoder=decoder,
            window=window,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(7),
        )
        for decoder, window in (("sequential", None), ("exact", 16))
    )
    assert first.tokens.tolist() == second.tokens.tolist()
    assert second.stats.num_target_forwards < first.stats.num_target_forwards == 256
    assert second.images[0].size == (64, 64)


@torch.no_grad()
def test_the_codec_brings_a_picture_back(pipe):
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    disc = (rows - 32) ** 2 + (columns - 32) ** 2 < 24**2
    pixels = torch.where(disc, torch.tensor([0.9, -0.4, -0.6])[:, None, None], 1.0)[None]
    codec = pipe.model.model.vqmodel
    codes = codec.encode(pixels).image_tokens.view(1, 256)
    error = (codec.decode(codes) - pixels).square().mean()
    constant = (pixels.mean((2, 3), keepdim=True) - pixels).square().mean()
    assert len(codes.unique()) > 8
    assert error < constant / 10


def test_held_out_names_are_in_no_training_caption():
    known = json.loads((FOLDER / "train_names.json").read_text())
    names = {row["name"] for row in heldout_rows("heldout.jsonl")}
    assert len(names) >= 150
    assert names.isdisjoint({*known["noto"], *known["fluent"]})
    other = {"noto": "fluent", "fluent": "noto"}
    for row in heldout_rows("heldout_styles.jsonl"):
        assert row["name"] not in known[row["style"]]
        assert row["name"] in known[other[row["style"]]]


def test_held_out_captions_have_known_words_only(pipe):
    tokenizer = pipe.processor.tokenizer
    for row in heldout_rows("heldout.jsonl"):
        assert tokenizer.unk_token_id not in tokenizer(row["caption"])["input_ids"]


def test_an_unknown_word_becomes_unk(pipe):
    tokenizer = pipe.processor.tokenizer
    ids = tokenizer("Cat qwertz, Noto")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", "cat", "<unk>", ",", "noto"]


def test_the_recipe_holds_out_new_names_of_known_words():
    icons = pytest.importorskip("mmspec.assets.forge.emoji.icons")
    words = [f"w{k}" for k in range(12)]
    names = {f"{a} {b}" for a in words for b in words} | {"lone word"}
    held = icons.heldout_names(names)
    seen = {word for name in names - held for word in name.split()}
    assert 0 < len(held) <= icons.NUM_HELDOUT_NAMES
    assert {word for name in held for word in name.split()} <= seen
    assert "lone word" not in held


def test_nearness_tells_copies_from_new_pictures():
    near = pytest.importorskip("mmspec.assets.forge.emoji.nearness")
    dice = np.random.default_rng(0)
    pictures = dice.integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    codes = dice.integers(0, 1024, (6, 256))
    copies, moved = pictures[[4, 2]], pictures[[4, 2]].copy()
    moved[0] ^= 128  # each number by just 128
    almost = codes[[4, 2]].copy()
    almost[1, :64] += 1  # a quarter of the codes
    rmse, index = near.nearest_rmse(copies, pictures)
    assert index.tolist() == [4, 2]
    assert rmse == pytest.approx(0, abs=1e-3)
    alone = near.nearest_rmse(moved, pictures[[4]])[0]
    assert alone[0] == pytest.approx(128 / 255, rel=1e-4)
    expected = np.sqrt(np.square((moved[1].astype(float) - pictures[4]) / 255).mean())
    assert alone[1] == pytest.approx(expected, rel=1e-4)
    assert near.least_hamming(almost, codes).tolist() == [0, 0.25]
    known = {"pictures": pictures, "codes": codes}
    assert near.nearness(copies, almost, known)["share_below_rmse_0.05"] == 1
    new = near.nearness(255 - pictures, codes[::-1] + 1, known)
    assert new["share_below_rmse_0.05"] == 0
    assert new["pixel_rmse_quartiles"][0] > 0.3
    assert new["code_hamming_quartiles"][0] > 0.9


@pytest.mark.parametrize(
    ("name", "category", "expected"),
    [
        ("cat face", "animals & nature", True),
        ("left facing fist", "people & body", False),
        ("person kneeling facing right", "people & body", False),
        ("red heart", "symbols", False),
    ],
)
def test_only_pictures_without_a_side_are_mirrored(name, category, expected):
    icons = pytest.importorskip("mmspec.assets.forge.emoji.icons")
    assert icons.may_flip(name, category) is expected
