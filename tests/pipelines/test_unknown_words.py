"""Words that a model's tokenizer has no token for are named, not read as one in silence."""

import json

import pytest
import torch
from PIL import Image
from saved import save_janus
from transformers import AutoTokenizer, MgpstrTokenizer
from video import save_pair

from mmspec.assets import bundled_path
from mmspec.pipelines import (
    SpeculativeImagePipeline,
    SpeculativeVideoPipeline,
    SpeculativeVLMPipeline,
)
from mmspec.pipelines.base import unknown_words


@pytest.mark.parametrize(
    ("folder", "text", "words"),
    [
        ("clips/tokenizer", "a purple boot, moving up slowly", ["purple", "boot,"]),
        ("clips/tokenizer", "a red boot moving <unk> slowly", []),
        ("avatars", "a pixel avatar with a zeppelin, a Zeppelin", ["zeppelin", "Zeppelin"]),
        ("emoji", "a red apple", []),
        ("captioner", "describe it, <image>", ["it"]),
        ("pages", "Übermut", ["Ü"]),
    ],
)
def test_words_are_those_of_the_tokenizer(folder, text, words):
    name, _, inner = folder.partition("/")
    tokenizer = AutoTokenizer.from_pretrained(bundled_path(name) / inner)
    assert unknown_words(tokenizer, text) == words


def test_a_tokenizer_without_places_gives_the_text(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"[GO]": 0, "[s]": 1, "a": 2, "b": 3}))
    tokenizer = MgpstrTokenizer(tmp_path / "vocab.json")
    assert not tokenizer.is_fast
    assert unknown_words(tokenizer, "abba") == []
    assert unknown_words(tokenizer, "abc") == ["abc"]
    tokenizer.unk_token = None
    assert unknown_words(tokenizer, "abc") == []


def named(caplog):
    return [record.args[0] for record in caplog.records if record.name == "mmspec"]


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_video_pipeline_names_each_word_once(tmp_path, caplog):
    pipe = quiet(SpeculativeVideoPipeline.from_pretrained(save_pair(tmp_path)[0]))
    options = {"output_type": "latent", "negative_prompt": "blurred"}
    pipe.stream(["a cat", "a cat on Mars"], **options)
    assert "the model does not know 'Mars', and reads each as <unk>" in caplog.text
    assert str(tmp_path / "target" / "tokenizer") in caplog.text
    # Guidance is off: nobody reads what it steers away from.
    assert "blurred" not in caplog.text
    stream = pipe.stream("a cat on Mars", **options, guidance_scale=2.0)
    stream.set_prompt("a dog on Venus")
    assert named(caplog) == ["'Mars'", "'blurred'", "'Venus'"]


def test_an_image_pipeline_names_them(tmp_path, caplog):
    pipe = quiet(SpeculativeImagePipeline.from_pretrained(save_janus(tmp_path)))
    pipe(["a red hair", "a plum hair"], output_type="tokens", generator=torch.Generator())
    assert named(caplog) == ["'plum'"]


def test_a_vision_language_pipeline_names_them(caplog):
    pipe = quiet(SpeculativeVLMPipeline.from_pretrained("bundled:captioner"))
    parts = [{"type": "image"}, {"type": "text", "text": "describe it"}]
    pipe([{"role": "user", "content": parts}], images=Image.new("RGB", (16, 16)), max_new_tokens=1)
    assert named(caplog) == ["'it'"]
