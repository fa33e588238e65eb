"""What a folder of a video model says of itself, and which drafter belongs to it."""

import json
import shutil

import pytest
import torch
from image_reward import WORDS, official_state
from video import DEFAULTS, far_pipe, save_pair, seeded

import mmspec.assets
from mmspec.pipelines import SpeculativeVideoPipeline
from mmspec.pipelines.video_request import read_defaults
from mmspec.routers.image_reward import ImageRewardScorer

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


def loaded(*arguments, **options):
    pipe = SpeculativeVideoPipeline.from_pretrained(*arguments, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_call_takes_what_the_folder_says_and_arguments_win(pair):
    target, drafter = pair
    pipe = loaded(target, drafter=drafter)
    assert pipe.defaults == DEFAULTS
    assert pipe.check_request("a cat") == (5, 16, 16)
    assert pipe.check_request("a cat", height=32) == (5, 32, 16)
    out = pipe("a cat", generator=seeded(), output_type="pt")
    assert out.frames.shape == (1, 5, 3, 16, 16)
    assert [block.source for block in out.blocks[0]] == ["target", "drafter"]
    # Two steps of the target for a block, one of the drafter.
    assert (out.stats.num_target_forwards, out.stats.num_drafter_forwards) == (2, 1)
    exact = pipe("a cat", generator=seeded(), output_type="pt", router="never")
    names = ("num_frames", "height", "width", "num_inference_steps", "guidance_scale")
    plain = pipe.target(
        "a cat", **{name: DEFAULTS[name] for name in names}, generator=seeded(),
        output_type="pt", max_sequence_length=8, chunk_partition=[1, 1],
    )  # fmt: skip
    assert torch.equal(exact.frames, plain.frames)


def test_a_drafter_says_how_it_drafts_and_no_more(pair, tmp_path):
    drafter = tmp_path / "drafter"
    shutil.copytree(pair[1], drafter)
    said = {"drafter_steps": 2, "drafter_guidance_scale": 1.0, "router": "always", "height": 64}
    (drafter / "defaults.json").write_text(json.dumps(said))
    pipe = loaded(pair[0], drafter=drafter)
    assert pipe.defaults == DEFAULTS | said | {"height": DEFAULTS["height"]}
    out = pipe("a cat", generator=seeded(), output_type="pt")
    assert (out.stats.num_target_forwards, out.stats.num_drafter_forwards) == (0, 4)
    (drafter / "defaults.json").write_text('{"steps": 2}')
    with pytest.raises(ValueError, match=r"unknown option of .*defaults\.json 'steps'"):
        loaded(pair[0], drafter=drafter)


def test_a_folder_may_name_its_attention(pair, tmp_path):
    shutil.copytree(pair[0], tmp_path / "target")
    (tmp_path / "target" / "defaults.json").write_text(
        json.dumps(DEFAULTS | {"attention": "dense", "router": "never"})
    )

    def frames(pipe, **options):
        return pipe("a cat", generator=seeded(), output_type="pt", **options).frames

    pipe = loaded(tmp_path / "target")
    dense, flex = frames(pipe), frames(pipe, attention="flex")
    assert torch.equal(dense, frames(pipe, attention="dense"))
    assert torch.equal(flex, frames(loaded(pair[0]), router="never"))
    torch.testing.assert_close(dense, flex, atol=1e-5, rtol=0)


def test_a_bundled_target_brings_its_drafter(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(mmspec.assets, "_ROOT", tmp_path)
    with pytest.raises(ValueError, match="nothing bundled is called 'tiny'; known: "):
        loaded("bundled:tiny")
    shutil.copytree(pair[0], tmp_path / "tiny")
    assert loaded("bundled:tiny").drafter.transformer.config.num_layers == 1
    alone = loaded("bundled:tiny")
    assert alone.drafter is alone.target
    far_pipe(3, num_layers=2).save_pretrained(tmp_path / "tiny-drafter")
    assert loaded("bundled:tiny").drafter.transformer.config.num_layers == 2
    assert loaded("bundled:tiny", drafter="bundled:tiny").drafter.transformer.config.num_layers == 1
    alone = loaded("bundled:tiny", drafter="self")
    assert alone.drafter is alone.target
    with pytest.raises(ValueError, match="nothing bundled is called 'tiny-draft'"):
        loaded("bundled:tiny", drafter="bundled:tiny-draft")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "defaults.json is not JSON"),
        ("[]", "must be a JSON object"),
        ('{"frames": 3}', "unknown option of .*defaults.json 'frames'; known: .*num_frames"),
        ('{"generator": null}', "unknown option"),
    ],
)
def test_bad_defaults(tmp_path, content, reason):
    (tmp_path / "defaults.json").write_text(content)
    with pytest.raises(ValueError, match=reason):
        read_defaults(tmp_path)


def test_a_folder_need_not_say_anything(tmp_path):
    assert read_defaults(tmp_path) == {}
    assert read_defaults("owner/name") == {}


def test_frames_that_do_not_fit_are_refused_before_anything_runs(pair):
    pipe = loaded(*pair[:1])
    with pytest.raises(ValueError, match="block_sizes must be latent frames per block with the"):
        pipe.check_request("a cat", num_frames=9)
    with pytest.raises(ValueError, match="prompt 0 must be a non-empty string"):
        pipe.check_request(" ")


def test_weights_of_a_router_are_loaded_once_for_a_pipeline(pair, tmp_path, monkeypatch):
    torch.save(official_state(), tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    from_settings, counted = ImageRewardScorer.from_settings.__func__, []

    def counting(kind, settings):
        counted.append(dict(settings))
        return from_settings(kind, settings)

    monkeypatch.setattr(ImageRewardScorer, "from_settings", classmethod(counting))
    pipe = loaded(pair[0])
    spec = f"first-block+image-reward:{{}},weights={tmp_path}"
    kept = pipe("a cat", router=spec.format("-inf"), generator=seeded(), output_type="pt")
    best = kept.blocks[0][1].score
    # Another threshold is another router, with the same weights.
    again = pipe("a cat", router=spec.format(best), generator=seeded(), output_type="pt")
    strict = pipe("a cat", router=spec.format(best + 1), generator=seeded(), output_type="pt")
    assert [out.blocks[0][1].source for out in (kept, again, strict)] == [
        "drafter", "drafter", "target"
    ]  # fmt: skip
    assert torch.equal(kept.frames, again.frames)
    assert counted == [{"weights": str(tmp_path)}]
    # Of other settings it is another scorer; those that were used last stay.
    for batch_size in range(1, 5):
        pipe.check_request("a cat", router=f"{spec.format(0)},batch_size={batch_size}")
    assert len(counted) == 5
    pipe.check_request("a cat", router=f"{spec.format(0)},batch_size=1")
    assert len(counted) == 5
    pipe.check_request("a cat", router=spec.format(0))
    assert len(counted) == 6
    assert json.dumps(counted[-1]) == json.dumps(counted[0])
