"""Routers in the video pipeline: tiny random models, pictures decoded for real."""

import pytest
import torch
from image_reward import WORDS, official_state
from video import (
    NUM_FRAMES,
    SIDE,
    Scripted,
    embeds,
    far_pipe,
    plain,
    save_pair,
    seeded,
    with_text,
)

from mmspec.latent_preview import LinearPreview
from mmspec.pipelines import SpeculativeVideoPipeline
from mmspec.routers import build_router
from mmspec.routers.calibration import calibrate, recorded_scores

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(scope="module")
def pipe():
    pipe = SpeculativeVideoPipeline.from_model(with_text(far_pipe(1)), drafter=far_pipe(2))
    pipe.set_progress_bar_config(disable=True)
    pipe.preview = random_preview()
    return pipe


def random_preview(channels=16, per_frame=4):
    torch.manual_seed(9)
    sizes = {"first": 3 * 64, "later": per_frame * 3 * 64}
    tensors = {f"{kind}.weight": torch.randn(size, channels) for kind, size in sizes.items()}
    biases = {f"{kind}.bias": torch.randn(size) for kind, size in sizes.items()}
    return LinearPreview(tensors | biases)


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


PREVIEW = "first-block+temporal:accept=0.5,mean=-0.4,std=0.1,on=preview"


@pytest.mark.parametrize(
    "router", ["random:0.5", "every:2+temporal:accept=0.5,mean=-0.093,std=0.1", PREVIEW]
)
def test_a_row_of_a_batch_is_its_single_run_and_a_run_its_repeat(pipe, router):
    seeds = (0, 1, 2)
    batch = call(pipe, build_router(router), seeds=seeds)
    for row, seed in enumerate(seeds):
        alone = call(pipe, router, seeds=(seed,))
        assert made_by(alone) == made_by(batch, row)
        assert torch.equal(alone.frames[0], batch.frames[row])
    sources = {record.source for of_row in batch.blocks for record in of_row[1:]}
    assert sources == {"target", "drafter"}


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


# --------------------------------------------------------------------------- previews


def test_a_draft_that_previews_refuse_is_never_decoded(pipe, monkeypatch):
    out = call(pipe, "temporal:inf,on=preview")
    assert [source for source, _ in made_by(out)] == ["target"] * 3
    assert torch.equal(out.frames, plain(pipe.target, num_steps=2))
    assert out.stats.decode_time_s == 0
    for threshold in ("inf", "-inf"):
        monkeypatch.setattr(pipe.target.vae.decoder, "forward", counting(pipe, decoded := []))
        shown = pipe(
            prompt_embeds=embeds(), router=f"sharpness:{threshold},on=preview,pictures=2",
            generator=seeded(), num_frames=NUM_FRAMES, height=SIDE, width=SIDE,
            num_inference_steps=2, output_type="pt",
        )  # fmt: skip
        monkeypatch.undo()
        assert shown.stats.num_kept == (0 if threshold == "inf" else 3)
        # The four latent frames of the video, once each.
        assert len(decoded) == 4


def counting(pipe, calls):
    forward = pipe.target.vae.decoder.forward

    def counted(*arguments, **more):
        calls.append(1)
        return forward(*arguments, **more)

    return counted


def test_previews_keep_what_they_are_told_to_and_stream_alike(pipe):
    dense = {"attention": "dense"}
    recorded = recorded_scores(call(pipe, "temporal:-inf,on=preview", **dense).blocks)
    decoded = recorded_scores(call(pipe, "temporal:-inf", **dense).blocks)
    # The first block has one picture and none before it: no step to judge.
    assert all(one != other for one, other in zip(recorded[1:], decoded[1:], strict=True))
    bar = max(recorded[1:])
    out = call(pipe, f"temporal:{bar!r},on=preview", **dense)
    sources = [source for source, _ in made_by(out)]
    assert sources[0] == "target"
    blocks = list(
        pipe.stream(
            prompt_embeds=embeds(), router=f"temporal:{bar!r},on=preview", generator=seeded(),
            num_frames=NUM_FRAMES, height=SIDE, width=SIDE, num_inference_steps=2,
            output_type="latent", **dense,
        )
    )  # fmt: skip
    assert torch.equal(torch.cat([block.latents for block in blocks], dim=2), out.frames)
    assert [block.records[0].score for block in blocks][1:] == [s for _, s in made_by(out)][1:]


def test_previews_of_a_block_stand_beside_those_before_it(pipe):
    seen = []

    class Looking(Scripted):
        needs_preview = True

        def judge(self, block):
            seen.append((block.preview.frames(), block.preview.previous_frames()))
            return super().judge(block)

    latents = call(pipe, Looking([True, False, True]), attention="dense").frames[0].transpose(0, 1)
    whole = pipe.preview(latents, is_start=True)
    drafts, before = zip(*seen, strict=True)
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(drafts[0], whole[:1], **close)
    assert not torch.equal(drafts[1], whole[1:9])
    torch.testing.assert_close(drafts[2], whole[9:], **close)
    assert before[0] is None
    torch.testing.assert_close(before[1], whole[:1], **close)
    torch.testing.assert_close(before[2], whole[5:9], **close)


def test_previews_that_are_no_numbers_never_keep(pipe, monkeypatch):
    broken = random_preview()
    broken._tensors["first.bias"][:] = torch.nan
    broken._tensors["later.bias"][:] = torch.nan
    monkeypatch.setattr(pipe, "preview", broken)
    out = call(pipe, "sharpness:-inf,on=preview")
    assert [source for source, _ in made_by(out)] == ["target"] * 3


def test_a_preview_is_fitted_to_the_pipeline_and_found_in_its_folder(tmp_path):
    save_pair(tmp_path)
    pipe = SpeculativeVideoPipeline.from_pretrained(tmp_path / "target")
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"preview .* must be set \(fit_preview makes one\)"):
        pipe("a cat", router="temporal:0,on=preview")
    calls = [
        {"prompt": "a cat", "generator": seeded(k), "router": "always", "attention": "dense"}
        for k in range(3)
    ]
    pipe.fit_preview(calls).save(tmp_path / "target" / "preview.safetensors")
    latents, pictures = (
        pipe(**calls[0] | {"generator": seeded(0), "output_type": kind}).frames[0]
        for kind in ("latent", "pt")
    )
    latents = latents.transpose(0, 1)
    # 12 latents of a kind, 17 inputs: the map passes through what it saw.
    error = (pipe.preview(latents, is_start=True) - pictures).square().mean().sqrt()
    assert error < 0.1 * pictures.std()
    loaded = SpeculativeVideoPipeline.from_pretrained(tmp_path / "target")
    assert torch.equal(loaded.preview(latents, is_start=True), pipe.preview(latents, is_start=True))


@pytest.mark.parametrize("wrong", [{"channels": 8}, {"per_frame": 2}])
def test_a_preview_of_other_latents_is_refused(pipe, wrong, monkeypatch):
    monkeypatch.setattr(pipe, "preview", random_preview(**wrong))
    with pytest.raises(ValueError, match="must be that of latents of 16 channels with 4 pictures"):
        call(pipe, "first-block+temporal:0,on=preview")
    call(pipe, "first-block")
