"""Routers in the video pipeline: tiny random models, pictures decoded for real."""

import pytest
import torch
from image_reward import WORDS, official_state
from video import NUM_FRAMES, SIDE, embeds, far_pipe, seeded, with_text

from mmspec.pipelines import SpeculativeVideoPipeline
from mmspec.routers import build_router
from mmspec.routers.calibration import calibrate, recorded_scores

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(scope="module")
def pipe():
    pipe = SpeculativeVideoPipeline.from_model(with_text(far_pipe(1)), drafter=far_pipe(2))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, router, *prompt, seeds=(0,), **more):
    if not prompt:
        more |= {"prompt_embeds": embeds().repeat(len(seeds), 1, 1)}
    return pipe(
        *prompt, router=router, generator=[seeded(seed) for seed in seeds], num_frames=NUM_FRAMES,
        height=SIDE, width=SIDE, num_inference_steps=2, output_type="latent", **more,
    )  # fmt: skip


def made_by(out, row=0):
    return [(record.source, record.score) for record in out.blocks[row]]


def test_recorded_scores_become_a_threshold_that_keeps_the_wanted_share(pipe):
    recorded = call(pipe, "first-block+temporal:-inf", seeds=(0, 1))
    scores = recorded_scores(recorded.blocks)
    assert len(scores) == 4
    assert all(score <= 0 for score in scores)
    found = calibrate("temporal", scores, accept_rate=0.5)
    out = call(pipe, f"first-block+temporal:{found.threshold!r}", seeds=(0, 1))
    # The second block's draft is the recorded one: what stands before it is the same.
    for row in range(2):
        assert out.blocks[row][1].score == recorded.blocks[row][1].score
        is_kept = out.blocks[row][1].source == "drafter"
        assert is_kept == (recorded.blocks[row][1].score >= found.threshold)


@pytest.mark.parametrize("router", ["random:0.5", "every:2+temporal:accept=0.5,mean=-0.05,std=0.1"])
def test_a_row_of_a_batch_is_its_single_run_and_a_run_its_repeat(pipe, router):
    seeds = (0, 1, 2)
    batch = call(pipe, build_router(router), seeds=seeds)
    for row, seed in enumerate(seeds):
        alone = call(pipe, router, seeds=(seed,))
        assert made_by(alone) == made_by(batch, row)
        assert torch.equal(alone.frames[0], batch.frames[row])


def test_image_reward_wants_the_prompt_and_decides(pipe, tmp_path):
    torch.save(official_state(), tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    router = build_router(f"image-reward:-inf,weights={tmp_path}")
    with pytest.raises(ValueError, match="prompt must be given, for the router 'image-reward:-inf"):
        call(pipe, router)
    out = call(pipe, router, "a red cat", max_sequence_length=8)
    assert [source for source, _ in made_by(out)] == ["drafter"] * 3
    best = max(score for _, score in made_by(out))
    strict = build_router(f"image-reward:{best + 1},weights={tmp_path}")
    assert made_by(call(pipe, strict, "a red cat", max_sequence_length=8))[0][0] == "target"
